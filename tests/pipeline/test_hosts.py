"""Several hosts: each reads the images of its own devices' rows, and all stop alike where one cannot read its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini_run import ROOT, environment, free_port, write_data, write_recipe

from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import load_shared
from m3po_jax.hosts.rows import Shares, own_rows, shard_hosts


def mesh_of(data: int, fsdp: int, tensor: int, processes: list[int]) -> Any:
    devices = np.array([SimpleNamespace(process_index=process) for process in processes], object)
    return SimpleNamespace(
        devices=devices.reshape(data, fsdp, tensor), shape={"data": data, "fsdp": fsdp, "tensor": tensor}
    )


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 30),
    st.data(),
)
def test_own_rows(sizes: tuple[int, int, int], count: int, data: st.DataObject) -> None:
    """A process needs a row exactly if one of its devices has it; none is left out."""
    devices = int(np.prod(sizes))
    processes = data.draw(st.lists(st.integers(0, 3), min_size=devices, max_size=devices), "processes")
    mesh = mesh_of(*sizes, processes)
    shards = sizes[0] * sizes[1]
    masks = {}
    for process in range(4):
        with mock.patch.object(jax, "process_index", return_value=process):
            masks[process] = own_rows(count, mesh)
    for row in range(count):
        split = count % shards == 0
        shard = row * shards // count
        held = processes[shard * sizes[2] : (shard + 1) * sizes[2]] if split else processes
        for process in set(processes):
            assert masks[process][row] == (process in held or not split)
    assert np.any([masks[process] for process in set(processes)], axis=0).all()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 20), max_size=60))
def test_prompts_are_dealt_to_whom_has_the_fewest(processes: list[int], answered: list[int]) -> None:
    """In proportion to the shards, whoever answers faster."""
    mesh = mesh_of(len(processes), 1, 1, processes)
    shares, given = Shares(mesh), []
    for answer in answered:
        given.append(shares.deal())
        if answer < len(given):
            shares.answered(given.pop(answer))
        open_now = [given.count(hosts) / shard_hosts(mesh).count(hosts) for hosts in set(shard_hosts(mesh))]
        fewest = shares.deal()
        assert given.count(fewest) / shard_hosts(mesh).count(fewest) == min(open_now)
        shares.answered(fewest)


def test_alone_nothing_is_agreed_on() -> None:
    def load(place: int) -> int:
        if place == 2:
            raise UserError("damaged", where="row 2")
        return place

    assert load_shared(load, lambda _: -1, [True, True, False, True]) == [0, 1, -1, 3]
    with pytest.raises(UserError, match="row 2: damaged"):
        load_shared(load, lambda _: -1, [True] * 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """What two processes write down, and where."""
    folder = tmp_path_factory.mktemp("hosts")
    data = write_data(folder / "data", count=24)
    (data.parent / "broken.png").write_bytes(b"no image")
    write_recipe(folder, data)
    variables = environment(devices=2)
    variables["PYTHONPATH"] += f":{ROOT / 'tests/pipeline'}:{ROOT / 'tests/training'}:{ROOT / 'tests'}"
    variables |= {"M3PO_COORDINATOR": f"127.0.0.1:{free_port()}", "M3PO_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "hosts_worker.py", folder],
            env=variables | {"M3PO_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=1200)[1]
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
    yield folder, [json.loads((folder / f"results-{index}.json").read_text()) for index in range(2)]


@pytest.mark.slow
def test_each_host_reads_its_share(found: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = found
    for name, most in (("pixels", 14), ("cached", 16)):
        shares = [result[name]["reads"] for result in results]
        assert all(len(share) <= most for share in shares), shares
        assert sorted(shares[0] + shares[1]) == sorted(f"s{i}" for i in range(24))
    made = [result[name]["made"] for name in ("pixels", "cached") for result in results]
    assert len(made[0]) == 48 and all(rows == made[0] for rows in made)


@pytest.mark.slow
def test_all_stop_at_an_image_that_one_cannot_read(found: tuple[Path, list[dict[str, Any]]]) -> None:
    _, results = found
    readers = []
    for bad in (12, 13):
        one, other = (result[f"bad_{bad}"] for result in results)
        assert one["error"] == other["error"] and f"s{bad}" in one["error"] and "decode" in one["error"]
        readers += [i for i, result in enumerate((one, other)) if f"s{bad}" in result["reads"]]
        # Everything before it is answered, and written where its shard is whole.
        whole = [row for row in results[0]["pixels"]["made"] if int(row[0][1:]) < 12]
        assert [row for row in one["made"] if int(row[0][1:]) < 12] == whole
        assert f"s{bad}" not in {row[0] for row in one["made"]}
    assert sorted(readers) == [0, 1]
    for bad, reader in ((3, 0), (12, 1)):
        one, other = (result[f"uncached_{bad}"] for result in results)
        assert one["error"] == other["error"] and f"s{bad}" in one["error"]
        assert [f"s{bad}" in result["reads"] for result in (one, other)] == [reader == 0, reader == 1]


@pytest.mark.slow
def test_training_stops_at_an_image_that_one_cannot_read(found: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = found
    assert [result["train"]["error"] for result in results] == ["row-5: a damaged image"] * 2
    reads = [result["train"]["reads"] for result in results]
    assert min(map(len, reads)) >= 0.4 * sum(map(len, reads))
    # The step that met it changed nothing: what is saved is the state after the last good one.
    log = folder / "train/metrics.jsonl"
    steps = len(log.read_text().splitlines()) if log.exists() else 0
    assert [path.name for path in (folder / "train/checkpoints").iterdir() if path.name.isdigit()] == [str(steps)]
