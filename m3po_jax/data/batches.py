"""Prompts, with or without answers, to batches of static shape.

Training batches hold rows of similar length, padded to one of a few shapes chosen for the data (`data.lengths`); the
others are padded up to `collation.LENGTHS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from m3po_jax.config import TrainConfig
from m3po_jax.data.batch_source import (
    BatchSource,
    SharedRows,
    endless_batches,
    fingerprint_of,
    read_ahead,
    require_rows,
)
from m3po_jax.data.collation import PromptBatch, PromptRow, TreeBatch, collate_prompts, collate_tree
from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.lengths import Lengths, Order, plan_shapes
from m3po_jax.data.model_images import spoilt
from m3po_jax.data.pair_rows import PairPrompts, PairRows, TableRows, message_text, place_of
from m3po_jax.data.row_inputs import PromptProcessor, checked_answer, prompt_row, where_of
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.rows import OwnRows
from m3po_jax.reading import check_value


def pair_batches(
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    processor: PromptProcessor,
    *,
    batch_size: int,
    seed: int,
    max_answer_tokens: int = 256,
    where: str = "pairs",
    features: PromptFeatures | None = None,
    length_window: int = 1,
    max_shapes: int = 1,
    own_rows: OwnRows | None = None,
) -> BatchSource[TreeBatch]:
    """Preference pairs (PAIR rows) as branches 0 (chosen) and 1 (rejected) of their prompt, endless and
    shuffled.

    Recorded token ids are used as they are, since tokenising text again need not give them back; rows without
    them are tokenised. Texts are checked here, before anything runs; images when they are read.

    Args:
        features: Cached vision features, which take the pixels' place in the batches.
        length_window: Batches of the shuffled order whose rows are exchanged until each holds similar lengths.
        max_shapes: Most pairs of widths that batches are padded to (programs that are compiled).
        own_rows: On several hosts: the rows of a batch whose images this one reads, see `SharedRows`.

    Raises:
        UserError: no rows, an answer that is empty or too long, log-probs that do not match their tokens.
    """
    if isinstance(rows, pa.Table):
        rows = TableRows(rows)
    if isinstance(rows, PairRows):
        prompts = rows.prompts(processor.tokenise, where)
    else:
        prompts = TokenisedPrompts(PairPrompts(rows, where), processor.tokenise)
    require_rows(len(rows), batch_size)
    ids, answers, references = [], [], []
    texts = rows.without_images() if isinstance(rows, PairRows) else rows
    for number, row in enumerate(texts):
        place = place_of(row, number, where)
        ids.append(row["id"])
        pair, sums = [], []
        for side in ("chosen", "rejected"):
            tokens = row.get(f"{side}_token_ids")
            recorded = row.get(f"reference_{side}_logprobs") if tokens is not None else None
            if tokens is None:
                tokens = processor.encode_answer(message_text(row[side]))
            pair.append(checked_answer(tokens, max_answer_tokens, place))
            sums.append(_reference_sum(recorded, pair[-1], place))
        answers.append(tuple(pair))
        references.append(tuple(sums))

    def load(index: int, needed: bool) -> PromptRow:
        return prompt_row(
            processor,
            prompts[index],
            features,
            needed=needed,
            answers=answers[index],
            reference=references[index],
            place=index,
        )

    def key(index: int) -> str:
        prompt = prompts[index]
        prefix = np.asarray(processor.encode_prompt(prompt), np.int32)
        images = processor.image_keys(prompt) if prompt.images else []
        return content_hash(prefix.tobytes(), images, *(answer.tobytes() for answer in answers[index]))

    return BatchSource(
        **_tree_source(
            answers,
            lambda index: len(processor.encode_prompt(prompts[index])),
            load,
            batch_size=batch_size,
            seed=seed,
            length_window=length_window,
            max_shapes=max_shapes,
            own_rows=own_rows,
        ),
        ids=tuple(ids),
        fingerprint=fingerprint_of(seed, batch_size, ids, answers, references, length_window, max_shapes),
        cut_answers=_without_end([chosen for chosen, _ in answers], processor),
        has_reference=not np.isnan(references).any(),
        row_key=key,
    )


def reference_tokens(prompt: Prompt, processor: PromptProcessor) -> Sequence[int] | np.ndarray:
    """Token ids of a row's reference answer, EOS included.

    Raises:
        UserError: there is none, or it is empty: a model that learned it would end at once.
    """
    if prompt.reference is None or not prompt.reference.strip():
        what = "the row has no reference answer" if prompt.reference is None else "the reference answer is empty"
        raise UserError(what, where=where_of(prompt), remedy="add `reference` or drop the row")
    return processor.encode_answer(prompt.reference)


def sft_batches(
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    *,
    batch_size: int,
    seed: int,
    max_answer_tokens: int = 256,
    answer_ids: Sequence[Sequence[int]] | None = None,
    features: PromptFeatures | None = None,
    length_window: int = 1,
    max_shapes: int = 1,
    own_rows: OwnRows | None = None,
) -> BatchSource[TreeBatch]:
    """Prompts with their reference answers as the only branch (K = 1), endless and shuffled.

    Args:
        answer_ids: Token ids to learn instead of the references' (sampled answers, which tokenising their text
            again need not give back).
        features, length_window, max_shapes, own: As of `pair_batches`.

    Raises:
        UserError: no rows, or an answer that is missing, empty or too long.
    """
    require_rows(len(prompts), batch_size)
    ids, instructions, answers = [], [], []
    for number, prompt in enumerate(prompts):
        if answer_ids is not None:
            tokens: Any = answer_ids[number]
        else:
            tokens = reference_tokens(prompt, processor)
        ids.append(prompt.id)
        instructions.append(prompt.instruction)
        answers.append(checked_answer(tokens, max_answer_tokens, where_of(prompt)))

    tokenised = TokenisedPrompts(prompts, processor.tokenise)

    def load(index: int, needed: bool) -> PromptRow:
        answer = (answers[index],)
        return prompt_row(processor, tokenised[index], features, needed=needed, answers=answer, place=index)

    return BatchSource(
        **_tree_source(
            [(answer,) for answer in answers],
            lambda index: len(processor.encode_prompt(tokenised[index])),
            load,
            batch_size=batch_size,
            seed=seed,
            length_window=length_window,
            max_shapes=max_shapes,
            own_rows=own_rows,
        ),
        ids=tuple(ids),
        fingerprint=fingerprint_of(seed, batch_size, ids, instructions, answers, length_window, max_shapes),
        cut_answers=_without_end(answers, processor),
    )


def prompt_batches(
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    *,
    batch_size: int,
    features: PromptFeatures | None = None,
    images: bool = True,
    needed: Bool[np.ndarray, " b"] | None = None,
) -> Iterator[PromptBatch]:
    """Prompts once, in order, for scoring; threads read images ahead.

    Args:
        features: Cached features of the vision tower, which then stand for the images.
        images: False: neither is read, for who blanks the images; how they lie is there.
        needed: Rows of a batch whose images this process needs; the others are zeros. None: all.
    """
    require_rows(len(prompts), batch_size)

    def load(index: int) -> PromptRow:
        here = needed is None or bool(needed[index % batch_size])
        return prompt_row(processor, prompts[index], features, needed=here, pixels=images)

    rows = grain.MapDataset.range(len(prompts)).map(load)
    return read_ahead(rows.batch(batch_size, batch_fn=collate_prompts))


def _tree_source(
    answers: Sequence[Sequence[np.ndarray]],
    prefix_length: Callable[[int], int],
    load: Callable[[int, bool], PromptRow],
    *,
    batch_size: int,
    seed: int,
    length_window: int,
    max_shapes: int,
    own_rows: OwnRows | None,
) -> dict[str, Any]:
    """What the sources of prompts with answers have in common: fields of `BatchSource`."""
    check_value(TrainConfig, "length_window", length_window, "train")
    check_value(TrainConfig, "max_shapes", max_shapes, "train")
    lengths = Lengths(
        np.array([prefix_length(row) for row in range(len(answers))]),
        np.array([max(map(len, row)) for row in answers]),
        len(answers[0]),
    )
    order = Order(len(answers), seed, batch_size, length_window, lengths)
    shapes = plan_shapes(order, lengths, max_shapes)
    collate = partial(collate_tree, shapes=shapes)
    shared = SharedRows(load, _spoilt, own_rows)
    return {
        "dataset": endless_batches(order, shared, collate),
        "batch_size": batch_size,
        "take": lambda rows: collate(shared.together(rows)),
        "failures": shared.failures,
        "answer_tokens": float(np.mean([len(row[0]) for row in answers])),
        "shapes": shapes,
    }


def _without_end(answers: Sequence[np.ndarray], processor: PromptProcessor) -> int:
    """How many answers close with none of the end tokens: they were cut at generation's limit or at a stop string."""
    return sum(int(answer[-1]) not in processor.eos_token_ids for answer in answers)


def _spoilt(row: PromptRow) -> PromptRow:
    return dataclasses.replace(row, images=spoilt(row.images))


def _reference_sum(logprobs: Sequence[float] | None, answer: np.ndarray, where: str) -> float:
    if logprobs is None:
        return math.nan
    if len(logprobs) != len(answer):
        raise UserError(
            f"{len(logprobs)} reference log-probs for {len(answer)} tokens",
            where=where,
            remedy="drop the recorded log-probs, or make the pairs again",
        )
    return float(np.sum(np.asarray(logprobs, np.float64)))
