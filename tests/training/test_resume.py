"""A stage that is stopped and killed at random steps, also in the middle of a save, ends as one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS = 9


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs, shared by all processes of this file: compiling them is most of a process's time."""
    return tmp_path_factory.mktemp("programs")


def start(folder: Path, programs: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("resume_worker.py")), str(folder), *map(str, arguments)],
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": f"{root}:{root / 'tests'}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, errors[-3000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    status, errors = finish(start(folder, programs))
    assert status == 0, errors
    return folder


def committed(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def test_random_stops_and_kills(whole: Path, programs: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    # One of each kind, in any order, at increasing steps; checkpoints are at even steps and at the last.
    kinds, steps = draw.sample(["term", "kill", "kill-in-save"], 3), sorted(draw.sample(range(1, STEPS - 1), 3))
    stops = list(zip(kinds, steps, strict=True))
    log = [f"seed {seed}"]
    order: dict[int, list[int]] = {}

    def took(before: int) -> None:
        """Reads which rows this process took, counted from the checkpoint that it found."""
        file = tmp_path / "order.jsonl"
        for step, line in enumerate(file.read_text().splitlines(), before + 1):
            order[step] = json.loads(line)
        file.unlink()

    for how, drawn in stops:
        before = max(committed(tmp_path), default=0) if (tmp_path / "checkpoints").exists() else 0
        step = drawn + drawn % 2 if how == "kill-in-save" else drawn  # even steps are saved
        if step <= before:
            log.append(f"{how} at step {step}: already past it")
            continue
        status, errors = finish(start(tmp_path, programs, how, step))
        assert status == (75 if how == "term" else -signal.SIGKILL), (log, how, step, status, errors)
        kept = committed(tmp_path)
        partial = [path.name for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]
        if how == "kill-in-save":
            assert partial and step not in kept, (log, kept, partial)
        if how == "term":
            # Numbers are read, and the signal sent, when the next step is under way: it is seen after that one.
            # Those of the first step of a process are read at once.
            last = step if step == before + 1 else min(step + 1, STEPS)
            assert max(kept) == last, (log, kept)
        took(before)
        log.append(f"{how} at step {step}: exit {status}, checkpoints {kept}, unfinished {partial}")
    before = max(committed(tmp_path), default=0)
    status, errors = finish(start(tmp_path, programs))
    assert status == 0, (log, errors)
    took(before)
    log.append(f"continued from {before} to the end: checkpoints {committed(tmp_path)}")
    print("\n".join(log))

    with np.load(whole / "final.npz") as expected, np.load(tmp_path / "final.npz") as found:
        assert set(expected.files) == set(found.files)
        for name in expected.files:
            assert expected[name].tobytes() == found[name].tobytes(), (log, name)
        assert any("ema" in name for name in expected.files) and any("mu" in name for name in expected.files)
        print(f"{len(expected.files)} arrays equal in every bit")
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes(), log
    lines = (whole / "order.jsonl").read_text().splitlines()
    assert order == {step: json.loads(line) for step, line in enumerate(lines, 1)}, log
    assert committed(tmp_path) == committed(whole), log
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if "tmp" in path.name]


def test_two_processes_continue_as_one(whole: Path, programs: Path, tmp_path: Path) -> None:
    """Stopped as two processes after step 4, continued by one: the same data order, and numbers within rounding."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {"M3PO_COORDINATOR": address, "M3PO_NUM_PROCESSES": "2"}
    pair = [start(tmp_path, programs, "term", 4, **shared, M3PO_PROCESS_ID=str(index)) for index in range(2)]
    for status, errors in [finish(process) for process in pair]:
        assert status == 75, errors
    assert max(committed(tmp_path)) == 5
    status, errors = finish(start(tmp_path, programs))
    assert status == 0, errors
    assert (tmp_path / "order.jsonl").read_text() == (whole / "order.jsonl").read_text()
    expected = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == STEPS
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if line["step"] > 1 or name != "rewards/accuracies":  # a tie of two equal rewards, decided by rounding
                np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-4, err_msg=name)
    with np.load(whole / "final.npz") as one, np.load(tmp_path / "final.npz") as two:
        for name in one.files:
            if "trainable" in name or "ema" in name:
                np.testing.assert_allclose(two[name], one[name], rtol=0, atol=2e-5, err_msg=name)
