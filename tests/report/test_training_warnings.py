"""What training warned of stands in the report."""

from __future__ import annotations

import json
from pathlib import Path

from m3po_jax.report.overview import warnings
from m3po_jax.workspace.contents import read_run


def test_training_warnings_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "round-1"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 9, "loss": 0.5}) + "\n")
    (folder / "warnings.jsonl").write_text(json.dumps({"step": 7, "kind": "collapse", "message": "it falls"}) + "\n")
    assert "Round 1: step 7: it falls." in warnings(read_run(tmp_path)[0])
    (folder / "warnings.jsonl").unlink()
    assert not any("it falls" in line for line in warnings(read_run(tmp_path)[0]))
