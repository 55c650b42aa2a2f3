"""A model's identity: another for every change of what is read, the same for none, in seconds for large files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_models import canonical_state, llava, load_float32, write
from safetensors.numpy import load_file, save_file
from test_export import RANK, adapt

from m3po_jax.errors import UserError
from m3po_jax.models import identity
from m3po_jax.models.export import export_model
from m3po_jax.models.identity import directory_identity, tree_identity


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pieces_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The pieces of files that were read, by file; files may be kept at once."""
    read: list[str] = []
    original = identity._hash_piece

    def counted(path: str, offset: int) -> bytes:
        read.append(Path(path).name)
        return original(path, offset)

    monkeypatch.setattr(identity, "_hash_piece", counted)
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -1.0)
    yield read


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    # Five megabytes in three tensors: neither end of the file is in the middle one.
    tensors = {name: np.full((1 << 18,), 1.0 + place, np.float32) for place, name in enumerate("abc")}
    tensors["b"] = np.arange(3 << 18, dtype=np.float32)
    save_file(tensors, directory / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_text(json.dumps({"of": name}))
    (directory / "tokenizer.model").write_bytes(bytes(range(256)))
    (directory / "merges.txt").write_text("a b")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "pytorch_model.bin").write_bytes(b"never read")
    (directory / "README.md").write_text("never read")
    return directory


def test_two_exports_of_one_base_are_two_models(tmp_path: Path) -> None:
    model = llava(seed=5)
    loaded = load_float32(write(tmp_path / "base", canonical_state(model), model.config.to_dict()))
    found = [directory_identity(loaded.directory)]
    for seed in (1, 2, 1):
        own = load_float32(loaded.directory)
        adapt(own.model, RANK, seed)
        out = export_model(own.model, own, tmp_path / "out", overwrite=True)
        found.append(directory_identity(out))
    assert len(set(found)) == 3 and found[1] == found[3]


def test_one_value_in_the_middle_of_a_file_counts_even_under_the_old_size_and_time(model_directory: Path) -> None:
    before, file = directory_identity(model_directory), model_directory / "model.safetensors"
    status = file.stat()
    tensors = load_file(file)
    tensors["b"][len(tensors["b"]) // 2] += 1
    save_file(tensors, model_directory / "other")
    content = (model_directory / "other").read_bytes()
    (model_directory / "other").unlink()
    file.write_bytes(content)  # in place: the same inode
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (status.st_size, status.st_mtime_ns, status.st_ino)
    assert directory_identity(model_directory) != before


def test_a_kept_hash_is_not_taken_for_a_file_replaced_under_its_old_size_and_time(
    model_directory: Path, pieces_read: list[str]
) -> None:
    before, file = directory_identity(model_directory), model_directory / "model.safetensors"
    pieces_read.clear()
    assert directory_identity(model_directory) == before and "model.safetensors" not in pieces_read
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(status.st_size // 2)
        stream.write(b"\x7f")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert directory_identity(model_directory) != before and "model.safetensors" in pieces_read


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"),
        *("tokenizer.model", "merges.txt", "chat_template.jinja"),
    ],
)
def test_every_file_that_is_read_counts(model_directory: Path, name: str) -> None:
    before, file = directory_identity(model_directory), model_directory / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    changed = directory_identity(model_directory)
    file.unlink()
    assert len({before, changed, directory_identity(model_directory)}) == 3


def test_further_templates_count_and_what_is_never_read_does_not(model_directory: Path) -> None:
    before = directory_identity(model_directory)
    (model_directory / "pytorch_model.bin").write_bytes(b"another")
    (model_directory / "README.md").unlink()
    (model_directory / "runs").mkdir()
    (model_directory / "runs/log.json").write_text("{}")
    assert directory_identity(model_directory) == before
    (model_directory / "additional_chat_templates").mkdir()
    (model_directory / "additional_chat_templates/tool.jinja").write_text("x")
    assert directory_identity(model_directory) != before


def test_names_count_and_places_do_not(model_directory: Path, tmp_path: Path) -> None:
    before = directory_identity(model_directory)
    shutil.copytree(model_directory, tmp_path / "elsewhere")
    assert directory_identity(tmp_path / "elsewhere") == before
    (model_directory / "merges.txt").rename(model_directory / "vocab.txt")
    assert directory_identity(model_directory) != before


def test_a_hub_snapshots_links_are_followed(model_directory: Path, tmp_path: Path, pieces_read: list[str]) -> None:
    snapshot, blobs = tmp_path / "hub/snapshots/main", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model_directory.iterdir():
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    (snapshot / "missing.json").symlink_to("../../blobs/absent")
    before = directory_identity(snapshot)
    assert before == directory_identity(model_directory)
    pieces_read.clear()
    assert directory_identity(snapshot) == before and "blob-model.safetensors" not in pieces_read
    other = bytearray((blobs / "blob-model.safetensors").read_bytes())
    other[len(other) // 2] ^= 1
    (blobs / "another").write_bytes(other)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/another")
    assert directory_identity(snapshot) != before


def test_a_file_changed_a_moment_ago_is_not_kept(model_directory: Path, cache_folder: Path) -> None:
    directory_identity(model_directory)
    assert not cache_folder.exists()


def test_pieces_read_side_by_side_make_one_hash(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, file = directory_identity(model_directory), model_directory / "model.safetensors"
    monkeypatch.setattr(identity, "_PIECE_BYTES", 1 << 16)
    pieces = directory_identity(model_directory)
    size = file.stat().st_size
    for place in (0, size // 2, size - 1):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
        assert directory_identity(model_directory) != pieces
        content[place] ^= 1
        file.write_bytes(content)
    assert directory_identity(model_directory) == pieces != before


@pytest.mark.parametrize("damage", ["garbage", "truncated", "digest", "shape", "folder"])
def test_a_damaged_cache_is_ignored(
    model_directory: Path, cache_folder: Path, pieces_read: list[str], damage: str
) -> None:
    before, file = directory_identity(model_directory), cache_folder / "m3po_jax/file-hashes.json"
    text = file.read_text()
    content = json.loads(text)
    ((name, entry),) = content["files"].items()
    assert name == os.path.realpath(model_directory / "model.safetensors")
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        other = {"version": 1, "check": content["check"], "files": {name: [entry[0], "0" * 64]}}
        damaged = {"garbage": "\x00[", "truncated": text[:-40], "digest": json.dumps(other), "shape": '{"files": 3}'}
        file.write_text(damaged[damage])
    pieces_read.clear()
    assert directory_identity(model_directory) == before and "model.safetensors" in pieces_read


def test_the_cache_forgets_files_that_are_gone(
    model_directory: Path, cache_folder: Path, tmp_path: Path, pieces_read: list[str]
) -> None:
    directory_identity(model_directory)
    shutil.copytree(model_directory, tmp_path / "other")
    shutil.rmtree(model_directory)
    directory_identity(tmp_path / "other")
    content = json.loads((cache_folder / "m3po_jax/file-hashes.json").read_text())
    assert list(content["files"]) == [os.path.realpath(tmp_path / "other/model.safetensors")]


def test_a_file_that_cannot_be_read_is_named(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, offset: int) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(identity, "_hash_piece", refused)
    with pytest.raises(UserError, match=r"model/.*: cannot be read \(Permission denied\)"):
        directory_identity(model_directory)


def test_a_folder_of_checkpoints_counts_whole(tmp_path: Path) -> None:
    (tmp_path / "tree/4/state").mkdir(parents=True)
    (tmp_path / "tree/4/state/array").write_bytes(b"weights")
    before = tree_identity(tmp_path / "tree")
    (tmp_path / "tree/4/state/array").write_bytes(b"weightz")
    assert tree_identity(tmp_path / "tree") != before
