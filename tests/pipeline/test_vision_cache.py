"""The caches in whole runs: the same candidates, log-probs and training; what one run computed, the next reads."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from mini_run import write_data, write_recipe

from m3po_jax.data import tables
from m3po_jax.inference.scorer import Scorer
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.caches import image_features, vision_features, vision_folder
from m3po_jax.pipeline.rounds import reference_log_probs
from m3po_jax.pipeline.run import Run
from m3po_jax.pipeline.score import blank_log_probs, pools
from m3po_jax.recipes import load_recipe


def candidates_of(path: Path, name: str, *overrides: str) -> list[dict]:
    run = Run(load_recipe(path, [f"name={name}", *overrides]))
    with run.directory.lock():
        run.open()
        run.generate_stage(run.directory.cell(1))
    return list(tables.read_rows(run.directory.cell(1).candidates.folder))


def test_generation_reads_cached_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data", count=6), arms={})
    plain = candidates_of(recipe, "plain")
    capsys.readouterr()
    image_features.clear_cache()  # of other tests on the same tiny model
    first = candidates_of(recipe, "first", "cache.vision_features=auto")
    assert "6 images computed" in " ".join(capsys.readouterr())
    assert image_features._cache_size() == 1
    again = candidates_of(recipe, "again", "cache.vision_features=auto")
    assert "0 images computed" in " ".join(capsys.readouterr())
    assert image_features._cache_size() == 1, "a model loaded anew is the same program"
    for rows in (first, again):
        assert [row["token_ids"] for row in rows] == [row["token_ids"] for row in plain]
        for row, other in zip(rows, plain, strict=True):
            np.testing.assert_allclose(row["token_logprobs"], other["token_logprobs"], atol=1e-4)


def trained_run(path: Path, name: str, *overrides: str) -> Run:
    run = Run(load_recipe(path, [f"name={name}", "train.reference=computed", *overrides]))
    with run.directory.lock():
        run.open()
        for stage in (run.generate_stage, run.score_stage, run.select_stage, run.train_stage):
            stage(run.directory.cell(1))
    return run


def test_a_second_run_computes_nothing_but_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, write_data(tmp_path / "data", count=6), arms={}, train={"max_steps": 2})
    plain = trained_run(recipe, "plain")
    assert "log-probs" not in " ".join(capsys.readouterr())
    caches = ("cache.vision_features=auto", "cache.reference=auto")
    image_features.clear_cache()
    first = trained_run(recipe, "first", *caches)
    assert image_features._cache_size() == 1, "generation and training share one program"
    pairs = first.directory.cell(1).selection.pairs()
    said = " ".join(" ".join(capsys.readouterr()).split())
    assert "6 images computed" in said and f"reference log-probs: {len(pairs)} of {len(pairs)} rows computed" in said

    files = sorted((tmp_path / "runs/cache/vision").glob("*/??/*.npy"))
    assert len(files) == 6
    whole = [file.read_bytes() for file in files]
    middle = len(whole[0]) // 2
    files[0].write_bytes(whole[0][:middle] + bytes([whole[0][middle] ^ 1]) + whole[0][middle + 1 :])
    files[1].write_bytes(whole[1][:-200])
    second = trained_run(recipe, "second", *caches)
    said = " ".join(" ".join(capsys.readouterr()).split())
    # The shorter file is missed at once; the one with a flipped bit when it is read.
    assert "vision features: 1 images computed" in said and "vision features: 0 images computed" in said
    assert f"reference log-probs: 0 of {len(pairs)} rows computed" in said
    for file, content in zip(files, whole, strict=True):
        made, before = np.load(file), np.load(io.BytesIO(content))
        np.testing.assert_allclose(made, before, atol=1e-5)

    lines = [run.directory.cell(1).training.metrics() for run in (plain, first, second)]
    for other in lines[1:]:
        for line, expected in zip(other, lines[0], strict=True):
            np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-4)
            np.testing.assert_allclose(line["logps/chosen"], expected["logps/chosen"], rtol=1e-4)

    # Log-probs under blank images and of a later round's reference: the same numbers, and no image is read.
    scorer = Scorer(second.start_model, second.mesh, batch_size=8)
    groups = [group for _, group in pools(tables.read_rows(second.directory.cell(1).candidates.folder))]
    own = [second.prompts[group[0]["id"]] for group in groups]
    expected = reference_log_probs(scorer, second.policy.processor, pairs)
    features = vision_features(
        vision_folder(second.recipe.cache, second.recipe.train, second.recipe.output_dir),
        second.policy,
        second.policy.processor,
        second.mesh,
    )
    assert features is not None

    def read(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Processor, "images", read)
    features.images = read
    blank = blank_log_probs(scorer, own, groups, second.policy.processor)
    for row, other in zip(
        reference_log_probs(scorer, second.policy.processor, pairs, features), expected, strict=True
    ):
        for side in ("chosen", "rejected"):
            name = f"reference_{side}_logprobs"
            np.testing.assert_allclose(row[name], other[name], atol=1e-5)
    scored = {
        (row["id"], row["candidate"]): row["confidence_prior"]
        for row in tables.read_rows(plain.directory.cell(1).scores.folder)
    }
    for group, found in zip(groups, blank, strict=True):
        for row, log_probs in zip(group, found, strict=True):
            assert log_probs.mean() == pytest.approx(scored[row["id"], row["candidate"]], abs=1e-4)
