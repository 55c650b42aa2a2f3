"""Generation from cached vision features: the same candidates, and an image that was encoded once is not again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mini_run import write_data, write_recipe

from m3po_jax.config import load_recipe
from m3po_jax.data import tables
from m3po_jax.pipeline.run import Run


def candidates_of(path: Path, name: str, *overrides: str) -> list[dict]:
    run = Run(load_recipe(path, [f"name={name}", *overrides]))
    with run.directory.lock():
        run.open()
        run.generate_stage(1)
    return list(tables.read_rows(run.directory.round(1) / "candidates"))


def test_generation_reads_cached_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data", count=6), arms={})
    plain = candidates_of(recipe, "plain")
    capsys.readouterr()
    first = candidates_of(recipe, "first", "cache.vision_features=auto")
    assert "6 images computed" in " ".join(capsys.readouterr())
    again = candidates_of(recipe, "again", "cache.vision_features=auto")
    assert "0 images computed" in " ".join(capsys.readouterr())
    for rows in (first, again):
        assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in plain]
        for row, other in zip(rows, plain, strict=True):
            np.testing.assert_allclose(row["token_logprobs"], other["token_logprobs"], atol=1e-4)
