"""Pairs from elsewhere in a run: `train.pairs` and `reward.pairs`, read, told and checked in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from m3po_jax.config import DataConfig, RewardConfig, TrainConfig
from m3po_jax.data.batch_source import BatchSource
from m3po_jax.data.pair_rows import message_text, pair_prompt, place_of
from m3po_jax.data.preference_files import FilePairs, read_preferences
from m3po_jax.data.row_inputs import checked_answer
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError
from m3po_jax.models.processor import Processor
from m3po_jax.objectives.objective import Learner
from m3po_jax.objectives.registry import objective_of
from m3po_jax.pipeline.console import say

SIDES = ("chosen", "rejected")


def pairs_instead_of_prompts(train: TrainConfig, reward: RewardConfig) -> str:
    """The file of pairs that a recipe's training reads, where it reads no prompts; empty: it reads `data`."""
    if objective_of(train).learner is Learner.REWARD_MODEL:
        return reward.pairs
    return train.pairs


def read_pair_file(path: str, data: DataConfig) -> FilePairs:
    """The pairs of a file; says what was read.

    Raises:
        UserError: names the first row that is no pair.
    """
    pairs = read_preferences(path, image_root=data.image_root, exif=data.exif)
    say(pairs.summary_line())
    return pairs


def any_recorded(pairs: FilePairs) -> bool:
    """Whether a row brings the reference's log-probs along."""
    return any(row[f"reference_{side}_logprobs"] for row in pairs.without_images() for side in SIDES)


def with_identity(source: BatchSource[Any], pairs: FilePairs) -> BatchSource[Any]:
    """Batches of a file's pairs whose fingerprint changes with whatever the file says or shows."""
    return dataclasses.replace(source, fingerprint=content_hash(source.fingerprint, pairs.fingerprint))


def check_recorded_tokens(pairs: FilePairs, processor: Processor) -> None:
    """Token ids that a file brings along must be this tokenizer's: they are learned as they are.

    Raises:
        UserError: names the first row whose tokens are not its text.
    """
    for number, row in enumerate(pairs.without_images()):
        for side in SIDES:
            _check_tokens(row, side, processor, place_of(row, number, pairs.path))


def _check_tokens(row: Mapping[str, Any], side: str, processor: Processor, place: str) -> None:
    tokens = row[f"{side}_token_ids"]
    if tokens is None:
        return
    # A token that ends an answer may reach beyond its text: into a stop string.
    valid = all(0 <= token < processor.text.size for token in tokens)
    if not valid or not processor.decode(tokens).startswith(message_text(row[side]).strip()):
        raise UserError(
            f"`{side}_token_ids` are not the text of `{side}` in this model's tokens",
            where=place,
            remedy="another model recorded them: drop the columns of token ids and log-probs",
        )


def check_pairs(
    train: TrainConfig,
    reward: RewardConfig,
    data: DataConfig,
    processor: Callable[[], Processor],
    report: Callable[[UserError], None],
) -> list[str]:
    """What `validate` finds in `train.pairs` and `reward.pairs`: every row, its tokens and its images.

    Args:
        processor: Gives the policy's.
        report: Gets every error, with file and row; what is wrong with the model's files is another check's.

    Returns:
        What was read, a line for each file.
    """
    summaries = []
    for path in dict.fromkeys(filter(None, (train.pairs, reward.pairs))):
        try:
            problems: list[UserError] = []
            pairs = read_preferences(path, image_root=data.image_root, exif=data.exif, problems=problems)
            for problem in problems:
                report(problem)
        except UserError as error:
            report(error)
            continue
        summaries.append(pairs.summary_line())
        try:
            of_pairs = dataclasses.replace(processor(), image_root=pairs.image_root)
        except UserError:
            continue
        for number, row in enumerate(pairs):
            try:
                _check_row(row, place_of(row, number, path), of_pairs, train.max_answer_tokens)
            except UserError as error:
                report(error)
    return summaries


def _check_row(row: Mapping[str, Any], place: str, processor: Processor, longest: int) -> None:
    prompt = pair_prompt(row, place)
    processor.encode_prompt(prompt)
    for side in SIDES:
        _check_tokens(row, side, processor, place)
        tokens = row[f"{side}_token_ids"]
        checked_answer(processor.encode_answer(message_text(row[side])) if tokens is None else tokens, longest, place)
    processor.images(prompt)
