"""Where everything of a run lies: every file name of the run directory stands here and nowhere else.

::

    NAME/config.yaml  manifest.json  evaluation.json  evaluation.md  report.html
    NAME/round-R/candidates/  scores/  pairs/  training-pairs/  checkpoints/  evaluation/BENCHMARK/  reward/
    NAME/arms/ARM/round-R/...                  the same of a comparison arm
    NAME/round-R/set-aside/HASH/...            what was replaced
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, MANIFEST, LOCK = "config.yaml", "manifest.json", ".lock"
RECORD, SET_ASIDE = "record.json", "set-aside"
EVALUATION, EVALUATION_TEXT, REPORT = "evaluation.json", "evaluation.md", "report.html"
CANDIDATES, SCORES, PAIRS, TRAINING_PAIRS, REWARD = "candidates", "scores", "pairs", "training-pairs", "reward"
CALIBRATION, SUMMARY, DROPS, PROMPTS = "calibration.json", "summary.json", "drops.jsonl", "prompts.parquet"
CHECKPOINTS, CHECKSUMS, DONE, TRAINING = "checkpoints", "checksums.json", "done.json", "training.json"
METRICS, WARNINGS, TIMING, ROLLOUTS = "metrics.jsonl", "warnings.jsonl", "timing.jsonl", "rollouts"
TENSORBOARD, WANDB, ROLLOUT_FILES = "tensorboard", "wandb", "rollout-*.npz"
BENCHMARKS, ITEMS, RESULTS = "evaluation", "items.jsonl", "results.json"
REWARD_DESCRIPTION = "reward.json"
ARMS, ARM, SAVED_ANSWERS = "arms", "arm.json", "saved-answers"
COMPARISON, TIMES, RESULTS_TEXT, PAIRS_CAP = "compare", "times.json", "results.md", "pairs-cap.json"

# What one training leaves in its folder, beside the record `TRAINING`; trackers' folders among them.
TRAINING_FILES = (
    *(DONE, CHECKPOINTS, METRICS, WARNINGS, TIMING, ROLLOUTS, TENSORBOARD, WANDB, RESULTS, REWARD_DESCRIPTION),
)

_ROUND = re.compile(r"round-(\d+)")


def rollout_name(number: int) -> str:
    return ROLLOUT_FILES.replace("*", f"{number:06d}")


def round_name(number: int) -> str:
    return f"round-{number}"


def system_folder(root: Path, arm: str | None) -> Path:
    """Where the rounds of one system lie: the run's own (`arm` is None), a comparison arm or a decoding."""
    return root if arm is None else root / ARMS / arm


def rounds(root: Path, arm: str | None = None) -> list[int]:
    """The rounds of one system that have a folder, in order."""
    folders = [path for path in system_folder(root, arm).glob("round-*") if path.is_dir()]
    return sorted(int(named[1]) for path in folders if (named := _ROUND.fullmatch(path.name)))


def arms(root: Path) -> list[str]:
    """The comparison arms and decodings that have a folder, by name."""
    return sorted(path.name for path in (root / ARMS).glob("*") if path.is_dir())
