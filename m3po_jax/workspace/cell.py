"""One round of one system of a run, and what its stages leave there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from m3po_jax.workspace import layout
from m3po_jax.workspace.evaluation import Evaluation
from m3po_jax.workspace.layout import round_name, system_folder
from m3po_jax.workspace.records import Artifact
from m3po_jax.workspace.reward import RewardFolder
from m3po_jax.workspace.selection import PairFolder
from m3po_jax.workspace.shards import ScoreFolder, ShardFolder
from m3po_jax.workspace.training import TrainingArtifact


@dataclass(frozen=True)
class Cell:
    """One round of one system: the run's own (`arm` is None), or a comparison arm or decoding.

    Attributes:
        root: The run directory.
        round: From 1; 0 is the untrained model.
    """

    root: Path
    round: int
    arm: str | None = None

    @property
    def folder(self) -> Path:
        return system_folder(self.root, self.arm) / round_name(self.round)

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"round {self.round}" if self.arm is None else f"round {self.round} of {self.arm}"

    def at(self, round: int) -> Cell:
        """Another round of the same system."""
        return replace(self, round=round)

    def of(self, arm: str | None) -> Cell:
        """The same round of another system."""
        return replace(self, arm=arm)

    @property
    def before(self) -> Cell:
        """The round before; that of round 1 is the untrained model."""
        return self.at(self.round - 1)

    @property
    def candidates(self) -> ShardFolder:
        return ShardFolder(self.folder / layout.CANDIDATES, "m3po generate")

    @property
    def scores(self) -> ScoreFolder:
        return ScoreFolder(self.folder / layout.SCORES, "m3po score")

    @property
    def selection(self) -> PairFolder:
        return PairFolder(self.folder / layout.PAIRS, self._pairs_of_round())

    @property
    def reward(self) -> RewardFolder:
        return RewardFolder(self.folder / layout.REWARD)

    @property
    def reward_selection(self) -> PairFolder:
        """The pairs that a reward model is trained on."""
        return PairFolder(self.reward.folder / layout.PAIRS, self._pairs_of_round())

    def _pairs_of_round(self) -> list[Path]:
        """The folders of pairs that this round has in any system."""
        name = round_name(self.round)
        return [self.root / name / layout.PAIRS, *sorted(self.root.glob(f"{layout.ARMS}/*/{name}/{layout.PAIRS}"))]

    @property
    def training_pairs(self) -> Artifact:
        """Of a later round: its own and earlier pairs, with their reference's log-probs."""
        return Artifact(self.folder / layout.TRAINING_PAIRS)

    @property
    def training(self) -> TrainingArtifact:
        return TrainingArtifact(self.folder)

    def evaluation(self, benchmark: str) -> Evaluation:
        return Evaluation(self.folder / layout.BENCHMARKS / benchmark, home=self.folder)

    def evaluations(self) -> list[Evaluation]:
        """Of the benchmarks that have a folder, by name."""
        folders = sorted(path for path in (self.folder / layout.BENCHMARKS).glob("*") if path.is_dir())
        return [self.evaluation(folder.name) for folder in folders]

    def export(self, form: str) -> Path:
        """Where an export of its weights goes by default."""
        arm = "" if self.arm is None else f"{self.arm}-"
        return self.root / f"export-{arm}{round_name(self.round)}-{form}"
