"""Where everything of a run lies: every file name of the run directory stands here and nowhere else.

::

    NAME/config.yaml  manifest.json  evaluation.json  evaluation.md  report.html
    NAME/round-R/candidates/  scores/  pairs/  training-pairs/  checkpoints/  evaluation/BENCHMARK/  reward/
    NAME/arms/ARM/round-R/...                  the same of a comparison arm
    NAME/round-R/set-aside/HASH/...            what was replaced
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CONFIG, MANIFEST, LOCK = "config.yaml", "manifest.json", ".lock"
EVALUATION, EVALUATION_TEXT, REPORT = "evaluation.json", "evaluation.md", "report.html"
CANDIDATES, SCORES, PAIRS, TRAINING_PAIRS, REWARD = "candidates", "scores", "pairs", "training-pairs", "reward"
CALIBRATION, SUMMARY, DROPS, PROMPTS = "calibration.json", "summary.json", "drops.jsonl", "prompts.parquet"
CHECKPOINTS, DONE, TRAINING = "checkpoints", "done.json", "training.json"
METRICS, WARNINGS, TIMING, ROLLOUTS = "metrics.jsonl", "warnings.jsonl", "timing.jsonl", "rollouts"
BENCHMARKS, ITEMS, RESULTS = "evaluation", "items.jsonl", "results.json"
REWARD_DESCRIPTION = "reward.json"
ARMS, ARM, SAVED_ANSWERS = "arms", "arm.json", "saved-answers"
COMPARISON, TIMES, RESULTS_TEXT, PAIRS_CAP = "compare", "times.json", "results.md", "pairs-cap.json"

# What one training leaves in its folder, beside the record `TRAINING`; trackers' folders among them.
TRAINING_FILES = (
    *(DONE, CHECKPOINTS, METRICS, WARNINGS, TIMING, ROLLOUTS, "tensorboard", "wandb", RESULTS, REWARD_DESCRIPTION),
)

_ROUND = re.compile(r"round-(\d+)")


def round_name(number: int) -> str:
    return f"round-{number}"


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
        return (self.root if self.arm is None else self.root / ARMS / self.arm) / round_name(self.round)

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"round {self.round}" if self.arm is None else f"round {self.round} of {self.arm}"

    @property
    def candidates(self) -> Path:
        return self.folder / CANDIDATES

    @property
    def scores(self) -> Path:
        return self.folder / SCORES

    @property
    def calibration(self) -> Path:
        return self.scores / CALIBRATION

    @property
    def pairs(self) -> Path:
        return self.folder / PAIRS

    @property
    def summary(self) -> Path:
        return self.pairs / SUMMARY

    @property
    def drops(self) -> Path:
        return self.pairs / DROPS

    @property
    def training_pairs(self) -> Path:
        """Of a later round: its own and earlier pairs, with their reference's log-probs."""
        return self.folder / TRAINING_PAIRS

    @property
    def prompts(self) -> Path:
        return self.folder / PROMPTS

    @property
    def reward(self) -> Path:
        return self.folder / REWARD

    @property
    def metrics(self) -> Path:
        return self.folder / METRICS

    @property
    def warnings(self) -> Path:
        return self.folder / WARNINGS

    @property
    def done(self) -> Path:
        return self.folder / DONE

    def benchmark(self, name: str) -> Path:
        return self.folder / BENCHMARKS / name

    def results(self, benchmark: str) -> Path:
        return self.benchmark(benchmark) / RESULTS

    def items(self, benchmark: str) -> Path:
        return self.benchmark(benchmark) / ITEMS

    def benchmark_folders(self) -> list[Path]:
        """Of the benchmarks that have been evaluated, by name."""
        return sorted(path for path in (self.folder / BENCHMARKS).glob("*") if path.is_dir())


def cells(root: Path, arm: str | None = None) -> list[Cell]:
    """The rounds that are there of one system, in order."""
    base = root if arm is None else root / ARMS / arm
    numbers = [
        int(found[1]) for path in base.glob("round-*") if path.is_dir() and (found := _ROUND.fullmatch(path.name))
    ]
    return [Cell(root, number, arm) for number in sorted(numbers)]


def arms(root: Path) -> list[str]:
    """The comparison arms that have a folder, by name."""
    return sorted(path.name for path in (root / ARMS).glob("*") if path.is_dir())
