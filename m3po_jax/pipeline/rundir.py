"""The run directory: paths, the manifest, and files that appear whole or not at all (DESIGN section 3)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from m3po_jax import yaml_text
from m3po_jax.config import Recipe
from m3po_jax.data.tables import atomic_write, write_json
from m3po_jax.errors import UserError
from m3po_jax.recipes import essential, to_yaml
from m3po_jax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets")


def is_writer() -> bool:
    """Whether this process writes what all processes know."""
    return jax.process_index() == 0


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it when complete."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where it is absent."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON ({error})", where=str(path), remedy="delete it and repeat") from None


def versions() -> dict[str, str]:
    """Versions of this package and of those that it computes with, as the manifest keeps them."""
    from importlib import metadata

    found = {"m3po-jax": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunDirectory:
    """Paths of one run, and its manifest."""

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        """The directory of a recipe's run.

        Raises:
            UserError: a name that leads out of `output_dir`, or into another run's folder.
        """
        return cls(Path(recipe.output_dir) / recipe.name)

    def open(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Creates the directory, or continues one made by the same recipe.

        Raises:
            UserError: the directory holds a run of another recipe; mixing them would mislead.
        """
        resolved, config = to_yaml(recipe), self.root / "config.yaml"
        if config.exists():
            stored = config.read_text(encoding="utf-8")
            if _essential(stored) != _essential(resolved):
                raise UserError(
                    f"holds a run of another recipe ({_first_difference(_essential(stored), _essential(resolved))})",
                    where=str(self.root),
                    remedy="choose another name=... or delete the directory",
                )
            if stored != resolved and is_writer():
                write_text(config, resolved)
        elif is_writer():
            write_text(config, resolved)
        manifest = self.manifest()
        if not manifest and is_writer():
            write_json(
                self.root / "manifest.json",
                {
                    "name": recipe.name,
                    "seed": recipe.seed,
                    "versions": versions(),
                    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
                    "processes": jax.process_count(),
                    "started": now(),
                    "stages": [],
                    **facts,
                },
            )

    def manifest(self) -> dict[str, Any]:
        return read_json(self.root / "manifest.json") or {}

    def note_stage(self, stage: str, *, round: int, arm: str | None, seconds: float, **details: Any) -> None:
        """Adds a finished stage to the manifest, once."""
        if not is_writer():
            return
        manifest = self.manifest()
        stages = manifest.setdefault("stages", [])
        key = (stage, round, arm)
        stages[:] = [s for s in stages if (s["stage"], s["round"], s["arm"]) != key]
        entry = {"stage": stage, "round": round, "arm": arm, "seconds": round_seconds(seconds), "finished": now()}
        stages.append(entry | details)
        write_json(self.root / "manifest.json", manifest)

    def round(self, number: int, arm: str | None = None) -> Path:
        base = self.root if arm is None else self.root / "arms" / arm
        return base / f"round-{number}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps two runs out of one directory; a lock whose process is gone is taken over.

        Raises:
            UserError: another live process on this machine works in the directory, or nothing can be written there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / ".lock").touch()
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory ({error.strerror})",
                where=str(self.root),
                remedy="choose another output_dir=...",
            ) from None
        if not is_writer():
            yield
            return
        import fcntl

        with (self.root / ".lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "another process is working in this run directory",
                    where=str(self.root),
                    remedy="wait for it, or choose another name=...",
                ) from None
            yield


def round_seconds(seconds: float) -> float:
    """Seconds to two places, as the manifest keeps them."""
    return float(f"{seconds:.2f}")


def _essential(text: str) -> str:
    """A stored recipe without what changes no result; text that is no recipe stays as it is."""
    try:
        stored = yaml.safe_load(text)
    except Exception:  # yaml.YAMLError and its kin: a damaged file differs from any recipe
        return text
    if not isinstance(stored, dict):
        return text
    return yaml_text.write(essential({str(key): value for key, value in stored.items()}))


def _first_difference(old: str, new: str) -> str:
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        if before != after:
            return f"it has {before.strip()!r}, this one {after.strip()!r}"
    return "they differ in length"
