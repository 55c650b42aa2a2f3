"""Padding: what lengths are rounded up to, so that few programs are compiled, and ragged rows in one array.

Training pads to shapes chosen for its data (`data.lengths`), or to `LENGTHS`; prompts that are answered or scored to
buckets of their own, as prompts differ by their images' many tokens and answers by few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

# Padded lengths: powers of two and the points half-way between them, so at most a third of a row is padding.
LENGTHS = tuple(sorted({step << power for power in range(1, 14) for step in (4, 6)}))


def padded_length(length: int) -> int:
    """The least of `LENGTHS` that is not below `length`."""
    return next((size for size in LENGTHS if size >= length), length)


def bucket(length: int, multiple: int) -> int:
    """The least multiple of `multiple` that holds `length`, at least one."""
    return max(-(-length // multiple), 1) * multiple


def prompt_bucket(length: int, multiple: int) -> int:
    """As `bucket`, in coarser steps beyond 32 multiples: long prompts need at most 16 programs an octave."""
    coarse = multiple
    while length > 32 * coarse:
        coarse *= 2
    return bucket(length, coarse)


def answer_bucket(tokens: int) -> int:
    """What answers are padded to: 8, 12, 16, 24, 32, 48 or 64 tokens, then multiples of 32.

    Short answers are the most frequent, and half of a program padded for longer ones would be wasted.
    """
    return padded_length(tokens) if tokens <= 64 else bucket(tokens, 32)


def pad_rows(x: np.ndarray, rows: int, columns: int | None = None, value: Any = 0) -> np.ndarray:
    """`x` with its last row repeated up to `rows`, and axis 1 filled with `value` up to `columns`."""
    if columns is not None and x.shape[1] < columns:
        filler = np.full((x.shape[0], columns - x.shape[1], *x.shape[2:]), value, x.dtype)
        x = np.concatenate([x, filler], axis=1)
    if x.shape[0] < rows:
        x = np.concatenate([x, np.repeat(x[-1:], rows - x.shape[0], axis=0)], axis=0)
    return x


def pad_ragged(
    rows: Sequence[Any], shape: tuple[int, ...], value: int = 0
) -> tuple[Int[np.ndarray, ...], Bool[np.ndarray, ...]]:
    """Ragged rows of token ids [..., tokens] in an array of `shape` filled up with `value`, and the mask of what is
    theirs."""
    ids, mask = np.full(shape, value, np.int32), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        if len(shape) > 2:
            ids[index], mask[index] = pad_ragged(row, shape[1:], value)
        else:
            ids[index, : len(row)], mask[index, : len(row)] = row, True
    return ids, mask


def pad_prompts(
    rows: Sequence[Sequence[int] | np.ndarray], value: int = 0
) -> tuple[Int[np.ndarray, "b p"], Bool[np.ndarray, "b p"]]:
    """Token ids and mask of prompts, padded on the right to the longest."""
    return pad_ragged(rows, (len(rows), max(map(len, rows), default=0)), value)


def pad_answers(
    answers: Sequence[Sequence[np.ndarray]],
) -> tuple[Int[np.ndarray, "b k t"], Bool[np.ndarray, "b k t"]]:
    """Token ids and mask of every prompt's answers, padded on the right, to the same k."""
    most = max(map(len, answers), default=0)
    longest = max((len(tokens) for pool in answers for tokens in pool), default=0)
    return pad_ragged(answers, (len(answers), most, longest))
