"""Models of the Hugging Face hub: which commit a name stands for, its files, and its weights' headers.

A name is ``owner/name`` or ``owner/name@revision`` (a branch, a tag or a commit). Everything is read through
`huggingface_hub`'s cache, whose folders are named after the repository and the commit; so a folder tells both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from m3po_jax.errors import UserError
from m3po_jax.models.safetensors_io import StoredTensor, no_weights, weight_files

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^\s@]+))?")
# What a model directory's readers read, of its top folder.
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHTS = "*.safetensors"
_HEADERS_AT_ONCE = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository, as its folder in the cache of `huggingface_hub` names it."""

    repository: str
    commit: str
    folder: Path


def pinned(path: str, revision: str, key: str = "model.revision") -> str:
    """A model's name with the revision that a recipe states apart from it.

    Raises:
        UserError: `path` is no hub id, or names another revision itself.
    """
    if not revision:
        return path
    named = HUB_ID.fullmatch(path)
    if named is None or Path(path).expanduser().exists():
        raise UserError(
            f"{path!r} is not a hub id, which alone has revisions", where=key, remedy="remove it, or name a hub id"
        )
    if named["revision"] not in (None, revision):
        raise UserError(f"{revision!r}, and the path says {named['revision']!r}", where=key, remedy="state one")
    return f"{named['name']}@{revision}"


def fetch(hub_id: str, *, weights: bool) -> Path:
    """The folder of a repository's commit, downloaded as far as it is not in the cache.

    Args:
        weights: Those too; else what is read beside them.

    Raises:
        UserError: there is no such repository or revision, or the hub cannot be reached.
    """
    import huggingface_hub

    named = HUB_ID.fullmatch(hub_id)
    assert named is not None, hub_id
    patterns = [*_SMALL_FILES, *([_WEIGHTS] if weights else [])]
    return Path(
        _asked(
            hub_id,
            "no such directory, and the hub gave",
            lambda: huggingface_hub.snapshot_download(
                named["name"], revision=named["revision"], allow_patterns=patterns, ignore_patterns=["*/*"]
            ),
        )
    )


def snapshot_of(directory: Path) -> Snapshot | None:
    """The commit that a folder of the cache holds; None: it is no such folder."""
    parts = directory.absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    repository = parts[-3].removeprefix("models--").replace("--", "/", 1)
    return Snapshot(repository, parts[-1], directory)


def listed_tensors(snapshot: Snapshot) -> dict[str, StoredTensor]:
    """Names, shapes and types of a commit's weights, read from the headers of its files where these lie.

    Raises:
        UserError: no safetensors there, a file without a header, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api, where = HfApi(), f"{snapshot.repository}@{snapshot.commit}"

    def header(name: str) -> dict[str, StoredTensor]:
        metadata = api.parse_safetensors_file_metadata(snapshot.repository, name, revision=snapshot.commit)
        file = Path(where) / name
        return {
            tensor: StoredTensor(tensor, file, tuple(info.shape), str(info.dtype), info.data_offsets[0])
            for tensor, info in metadata.tensors.items()
        }

    def read() -> dict[str, StoredTensor]:
        present = api.list_repo_files(snapshot.repository, revision=snapshot.commit)
        names = [file.name for file in weight_files(snapshot.folder, [name for name in present if "/" not in name])]
        if not names:
            raise no_weights(where, present)
        tensors: dict[str, StoredTensor] = {}
        with ThreadPoolExecutor(_HEADERS_AT_ONCE) as threads:
            for name, of_file in zip(names, threads.map(header, names), strict=True):
                if twice := tensors.keys() & of_file.keys():
                    raise UserError(
                        f"{min(twice)} is also in {tensors[min(twice)].file.name}", where=f"{where}/{name}"
                    )
                tensors |= of_file
        return tensors

    return _asked(where, "the hub gave", read)


def _asked(where: str, complaint: str, ask: Callable[[], _T]) -> _T:
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # network clients raise their own kinds; none of them is a defect of ours
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{complaint}: {reason[0] if reason else type(error).__name__}",
            where=where,
            remedy="check the name and the network, or download the model and give its directory",
        ) from None
