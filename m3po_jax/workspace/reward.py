"""The folder of a trained reward model: a training, what it is a model of, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.data import tables
from m3po_jax.errors import UserError
from m3po_jax.workspace.files import read_json
from m3po_jax.workspace.layout import RESULTS, REWARD, REWARD_DESCRIPTION, round_name, rounds
from m3po_jax.workspace.training import TrainingArtifact


class RewardFolder(TrainingArtifact):
    """A training, its description and its results on held-out pairs, which are written last."""

    @classmethod
    def find(cls, path: str) -> RewardFolder:
        """A trained reward model: in the folder itself, or the latest one of a run directory.

        Raises:
            UserError: there is none.
        """
        root = Path(path).expanduser()
        folders = [root, *(root / round_name(number) / REWARD for number in reversed(rounds(root)))]
        for folder in map(cls, folders):
            if all(file.is_file() for file in folder.facts):
                return folder
        raise UserError(
            "no trained reward model",
            where=f"score.model {path!r}",
            remedy="name a run directory whose `m3po train train.objective=reward` has finished, or its reward "
            "folder",
        )

    @property
    def facts(self) -> list[Path]:
        """The files that say what it is."""
        return [self.folder / REWARD_DESCRIPTION, self.folder / RESULTS]

    def description(self) -> dict[str, Any]:
        """The base model's hash and the settings that it was trained with."""
        return read_json(self.folder / REWARD_DESCRIPTION)

    def results(self) -> dict[str, Any] | None:
        return read_json(self.folder / RESULTS)

    def save(self, description: Mapping[str, Any], results: Mapping[str, Any]) -> None:
        tables.write_json(self.folder / REWARD_DESCRIPTION, description)
        tables.write_json(self.folder / RESULTS, results)
