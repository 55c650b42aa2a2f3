"""The run directory as a whole: opening and continuing it, its lock, its recipe and its manifest; and a comparison's,
in which the runs of its seeds lie."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml

from m3po_jax import yaml_text
from m3po_jax.config import Recipe
from m3po_jax.data.tables import write_json
from m3po_jax.errors import UserError, full_disk, full_disk_number
from m3po_jax.hosts.agreement import is_writer
from m3po_jax.recipes import essential, leaves, to_yaml
from m3po_jax.version import __version__
from m3po_jax.workspace import layout
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.files import read_json, write_text
from m3po_jax.workspace.layout import arms, rounds, system_folder
from m3po_jax.workspace.records import Record, free_name
from m3po_jax.workspace.shards import now
from m3po_jax.workspace.training import TrainingArtifact

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets")
# With another value of one of these, everything that a directory holds would be made anew.
PROTECTED = ("seed", "model.", "data.")
# What it names is compared by its content: pinning the commit that a run began with changes nothing.
UNPROTECTED = ("model.revision",)


def versions() -> dict[str, str]:
    """Versions of this package and of those that it computes with, as the manifest keeps them."""
    from importlib import metadata

    installed = {"m3po-jax": __version__}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


class RunDirectory:
    """Paths of one run, its recipe and its manifest."""

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def of(cls, output_dir: str, name: str) -> RunDirectory:
        """The directory of the run that a recipe with these keys names."""
        return cls(Path(output_dir) / name)

    def cell(self, round: int) -> Cell:
        """A round of the run's own system; `Cell.of` gives another's."""
        return Cell(self.root, round)

    @property
    def training(self) -> TrainingArtifact:
        """What the verb `train` alone leaves of a training on rows, which has no rounds."""
        return TrainingArtifact(self.root)

    @property
    def config(self) -> Path:
        return self.root / layout.CONFIG

    @property
    def report(self) -> Path:
        return self.root / layout.REPORT

    def saved_answers(self, benchmark: str) -> Path:
        """Where the results of answers from elsewhere go."""
        return self.root / layout.SAVED_ANSWERS / benchmark

    def save_evaluation(self, tables: Mapping[str, Any], text: str) -> None:
        """Writes the table that ends a run, for the report and as Markdown."""
        write_json(self.root / layout.EVALUATION, tables)
        write_text(self.root / layout.EVALUATION_TEXT, text)

    def arm_folder(self, arm: str) -> Path:
        return system_folder(self.root, arm)

    def arm_settings(self, arm: str) -> dict[str, Any] | None:
        """What `save_arm_settings` noted of an arm; None where it noted nothing."""
        return read_json(self.arm_folder(arm) / layout.ARM)

    def save_arm_settings(self, arm: str, settings: Mapping[str, Any]) -> None:
        write_json(self.arm_folder(arm) / layout.ARM, settings)

    def pairs_cap(self) -> dict[str, Any] | None:
        """The number of ``pairs`` of every arm and the ``cap`` that all are held to; None before they are counted."""
        return read_json(self.root / layout.PAIRS_CAP)

    def save_pairs_cap(self, content: Mapping[str, Any]) -> None:
        write_json(self.root / layout.PAIRS_CAP, content)

    def open(
        self, recipe: Recipe, facts: Mapping[str, Any], *, force: bool = False, one_recipe: bool = False
    ) -> list[str]:
        """Creates the directory, or continues the run in it; returns lines about what has changed.

        Which stages are out of date with another recipe is told by their records. `config.yaml` becomes the last
        resolved recipe.

        Args:
            facts: Of model and data, for the manifest.
            force: Go on although nothing in the directory would be kept, or its recipe is gone.
            one_recipe: Refuse any other recipe.

        Raises:
            UserError: the directory holds a run of another seed, model or data; or its recipe is gone or garbled.
        """
        self.check_recipe(recipe, force=force, one_recipe=one_recipe)
        lines = []
        manifest, problem = self._read_manifest()
        if problem is not None:
            lines.append(f"{self.root / layout.MANIFEST}: {problem}; it is made anew")
        for name, fact in facts.items():
            if manifest and name in ("model", "data") and manifest.get(name) != fact:
                noted = manifest.get(name)
                if isinstance(noted, dict) and "hash" in fact and noted.get("hash") == fact["hash"]:
                    lines.append(f"{name}: another path or commit than this run began with, of the same content")
                    continue
                lines.append(f"{name}: has changed since this run began; what was made from it is out of date")
        if is_writer():
            resolved = to_yaml(recipe)
            if not self.config.exists() or self.config.read_bytes() != resolved.encode():
                write_text(self.config, resolved)
            if problem is not None:
                self._set_manifest_aside()
            devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
            current = {
                "started": now(),
                "stages": [],
                **manifest,
                "name": recipe.name,
                "seed": recipe.seed,
                "versions": versions(),
                "device": devices,
                "processes": jax.process_count(),
                **facts,
            }
            if current != manifest:
                write_json(self.root / layout.MANIFEST, current)
        return lines

    def check_recipe(self, recipe: Recipe, *, force: bool = False, one_recipe: bool = False) -> None:
        """Whether `recipe` may continue what the directory holds; arguments and errors are those of `open`."""
        remedy = "choose another name=..., or add --force: what this recipe did not make is set aside, not deleted"
        try:
            saved = self.saved_recipe()
        except UserError as error:
            if force:
                return
            raise UserError(error.what, where=error.where, remedy=f"put it back, or {remedy}") from None
        if saved is None:
            if self.holds_work() and not force:
                raise UserError(
                    "the recipe that made what is there is gone",
                    where=str(self.config),
                    remedy=f"put it back, or {remedy}",
                )
            return
        changes = changed_keys(saved, recipe)
        if not one_recipe:
            changes = {key: values for key, values in changes.items() if _is_protected(key) and not force}
        if changes:
            key, (before, value) = next(iter(changes.items()))
            leaf = key.rpartition(".")[2]
            old, new = (f"'{leaf}: {_yaml(x)}'" for x in (before, value))
            raise UserError(
                f"holds a run of another recipe (it has {old}, this one {new}: {key})",
                where=str(self.root),
                remedy="choose another name=... or delete the directory" if one_recipe else remedy,
            )

    def holds_work(self) -> bool:
        """Whether a stage has left something."""
        if any((self.root / name).exists() for name in (layout.MANIFEST, layout.CHECKPOINTS, layout.DONE)):
            return True
        return bool(rounds(self.root)) or bool(arms(self.root))

    def saved_recipe(self) -> dict[str, Any] | None:
        """The recipe in `config.yaml`, as nested dictionaries; None where there is none.

        Raises:
            UserError: it cannot be read.
        """
        try:
            loaded = yaml.safe_load(self.config.read_bytes().decode("utf-8"))
        except FileNotFoundError:
            return None
        except Exception as error:  # YAML raises many types for what is no recipe
            raise UserError(
                f"the saved recipe cannot be read ({type(error).__name__})", where=str(self.config)
            ) from None
        if not isinstance(loaded, dict) or "seed" not in loaded:
            raise UserError("the saved recipe is none", where=str(self.config))
        return {str(key): value for key, value in loaded.items()}

    # The manifest.

    def _read_manifest(self) -> tuple[dict[str, Any], str | None]:
        """The manifest, empty where there is none, and what is wrong with it."""
        try:
            content = json.loads((self.root / layout.MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}, None
        except (OSError, ValueError, RecursionError):
            return {}, "cannot be read"
        stages = content.get("stages", []) if isinstance(content, dict) else None
        whole = isinstance(stages, list) and all(
            isinstance(stage, dict) and {"stage", "round", "arm", "seconds"} <= stage.keys() for stage in stages
        )
        return (content, None) if whole else ({}, "is not what a run writes")

    def _set_manifest_aside(self) -> None:
        place = free_name(self.root / layout.SET_ASIDE / "damaged" / layout.MANIFEST)
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.root / layout.MANIFEST).rename(place)

    def manifest(self) -> dict[str, Any]:
        """The manifest; empty where there is none.

        Raises:
            UserError: it is not what a run writes.
        """
        manifest, problem = self._read_manifest()
        if problem is not None:
            raise UserError(
                problem,
                where=str(self.root / layout.MANIFEST),
                remedy="the next stage of the run, `m3po run`, mends it",
            )
        return manifest

    def note_stage(self, stage: str, cell: Cell, record: Record | None) -> None:
        """Sees to it that the manifest has a finished stage once, as its record tells of it.

        Called also for a stage that was finished before: one killed after its record was written is noted now.
        """
        if not is_writer() or record is None or record.finished is None:
            return
        entry = {"stage": stage, "round": cell.round, "arm": cell.arm, **record.details, "finished": record.finished}
        entry["seconds"] = float(f"{entry.get('seconds', 0.0):.2f}")
        manifest = self.manifest()
        stages = manifest.setdefault("stages", [])
        if entry in stages:
            return
        key = (stage, cell.round, cell.arm)
        stages[:] = [other for other in stages if (other["stage"], other["round"], other["arm"]) != key] + [entry]
        write_json(self.root / layout.MANIFEST, manifest)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps two runs out of one directory; a lock whose process is gone is taken over.

        Raises:
            UserError: another live process on this machine works in the directory, or nothing can be written there.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / layout.LOCK).touch()
        except OSError as error:
            number = full_disk_number(error)
            if number is not None:
                raise full_disk(number, self.root) from None
            raise UserError(
                f"cannot write to the run directory ({error.strerror})",
                where=str(self.root),
                remedy="choose another output_dir=...",
            ) from None
        if not is_writer():
            yield
            return
        import fcntl

        with (self.root / layout.LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    "another process is working in this run directory",
                    where=str(self.root),
                    remedy="wait for it, or choose another name=...",
                ) from None
            yield


class ComparisonDirectory(RunDirectory):
    """Where a recipe's comparison lies."""

    @classmethod
    def of(cls, output_dir: str, name: str) -> ComparisonDirectory:
        return cls(RunDirectory.of(output_dir, name).root / layout.COMPARISON)

    def save_recipe(self, recipe: Recipe) -> None:
        write_text(self.config, to_yaml(recipe))

    def save(self, results: Mapping[str, Any], times: Mapping[str, Any], text: str) -> None:
        """Writes the tables; seconds have a file of their own, as they never repeat."""
        write_json(self.root / layout.RESULTS, results)
        write_json(self.root / layout.TIMES, times)
        write_text(self.root / layout.RESULTS_TEXT, text)

    def text(self) -> str:
        """The tables as Markdown."""
        return (self.root / layout.RESULTS_TEXT).read_text(encoding="utf-8")


def changed_keys(saved: Mapping[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved, current) of what differs and changes a result, in the recipe's order.

    A key that the saved recipe lacks had its default; one that recipes no longer have is passed over.
    """
    current, default = (leaves(essential(dataclasses.asdict(one))) for one in (recipe, Recipe()))
    before = leaves(essential(saved))
    changes = {}
    for key, value in current.items():
        old = before.get(key, default.get(key))
        if old != value:
            changes[key] = (old, value)
    for key in before.keys() - current.keys():
        parts = key.split(".")
        if any(default.get(".".join(parts[:count])) == {} for count in range(1, len(parts))):
            changes[key] = (before[key], None)  # an entry of a mapping
    return changes


def _is_protected(key: str) -> bool:
    return key.startswith(PROTECTED) and key not in UNPROTECTED


def _yaml(value: Any) -> str:
    return yaml_text.write({"x": value}).removeprefix("x:").strip()
