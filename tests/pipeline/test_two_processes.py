"""Two processes, as two hosts run them, share one run directory and make what one process makes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mini_run import ROOT, free_port, m3po, rows, same_run, write_data, write_recipe

pytestmark = pytest.mark.slow


# Imported by Python as it starts: writes down the rows whose images the process decodes. None is kept in memory, as
# one process alone would find all of them there, and each of two processes half.
READ_LOG = """
import os
from m3po_jax.data import images, kept_images
kept_images.KeptImages.__init__.__defaults__ = (0,)
decode = images.decode
def logged(*given, where, **more):
    with open(f"{os.environ['READ_LOG']}-{os.environ.get('M3PO_PROCESS_ID', 'alone')}", "a") as log:
        print(where, file=log)
    return decode(*given, where=where, **more)
images.decode = logged
"""


def read_log(folder: Path) -> dict[str, str]:
    """The environment of processes that write ``folder/reads-*``."""
    (folder / "sitecustomize.py").write_text(READ_LOG)
    return {"PYTHONPATH": f"{folder}:{ROOT}", "READ_LOG": str(folder / "reads")}


def reads(folder: Path, process: str) -> int:
    return len((folder / f"reads-{process}").read_text().splitlines())


def hosts(*arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
    """The same command in two processes that know of each other; each has one device."""
    variables |= {"M3PO_COORDINATOR": f"127.0.0.1:{free_port()}", "M3PO_NUM_PROCESSES": "2"}
    return [m3po(*arguments, **variables | {"M3PO_PROCESS_ID": str(index)}) for index in range(2)]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and messages of every process; none outlives the test."""
    try:
        found = [process.communicate(timeout=1200)[1] for process in processes]
        return [(process.returncode, errors[-4000:]) for process, errors in zip(processes, found, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder, write_data(folder / "data"))
    [(status, errors)] = ends([m3po("run", "--config", str(recipe), **read_log(folder))])
    assert status == 0, errors
    return folder / "runs" / "mini"


def test_two_processes_make_the_same_run(alone: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, alone.parents[1] / "data" / "prompts.jsonl")
    for status, errors in ends(hosts("run", "--config", str(recipe), **read_log(tmp_path))):
        assert status == 0, errors
    run = tmp_path / "runs" / "mini"
    same_run(alone, run, tolerance=2e-3)
    # About half each: threads that load ahead may or may not have read a batch that training did not come to.
    whole, shares = reads(alone.parents[1], "alone"), [reads(tmp_path, str(process)) for process in range(2)]
    assert all(0.35 * whole < share < 0.65 * whole for share in shares), (whole, shares)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert not list(run.rglob("*.tmp")) and (run / "report.html").exists()


@pytest.mark.parametrize(
    ("verb", "moment"), [("generate", "round-1/candidates/00000-*.parquet"), ("run", "round-1/checkpoints/2")]
)
def test_both_stop_when_one_is_told_and_continue_together(
    alone: Path, tmp_path: Path, verb: str, moment: str
) -> None:
    recipe = write_recipe(tmp_path, alone.parents[1] / "data" / "prompts.jsonl")
    run = tmp_path / "runs" / "mini"
    pair = hosts(verb, "--config", str(recipe))
    deadline = time.monotonic() + 300
    while not list(run.glob(moment)) and pair[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    pair[1].send_signal(signal.SIGTERM)
    for status, errors in ends(pair):
        assert status == 75 and "the same command continues" in errors, errors
    for status, errors in ends(hosts(verb, "--config", str(recipe))):
        assert status == 0, errors
    if verb == "run":
        same_run(alone, run, tolerance=2e-3)
        return
    for one, two in zip(rows(alone / "round-1/candidates"), rows(run / "round-1/candidates"), strict=True):
        assert (one["id"], one["candidate"], one["token_ids"]) == (two["id"], two["candidate"], two["token_ids"])


@pytest.mark.parametrize(
    ("verb", "moment", "killed"),
    [("generate", "round-1/candidates/00000-*.parquet", 1), ("run", "round-1/checkpoints/2", 0)],
)
def test_when_one_is_killed_the_other_ends_as_one_that_is_started_again(
    alone: Path, tmp_path: Path, verb: str, moment: str, killed: int
) -> None:
    """Within a minute, by one line and the status that launchers wait for, whichever of the two is lost."""
    recipe = write_recipe(tmp_path, alone.parents[1] / "data" / "prompts.jsonl")
    run = tmp_path / "runs" / "mini"
    pair = hosts(verb, "--config", str(recipe))
    deadline = time.monotonic() + 300
    while not list(run.glob(moment)) and pair[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    pair[killed].kill()
    since = time.monotonic()
    status, errors = ends(pair)[1 - killed]
    assert time.monotonic() - since < 60
    assert status == 75, errors
    told = [line for line in errors.splitlines() if line.startswith("m3po: ")]
    assert len(told) == 1 and "another host is gone" in told[0] and "the same command continues" in told[0], errors
    assert not re.search(r"Traceback|Check failure|coordination|\.cc", errors), errors
    for status, errors in ends(hosts(verb, "--config", str(recipe))):
        assert status == 0, errors
    if verb == "run":
        same_run(alone, run, tolerance=2e-3)
