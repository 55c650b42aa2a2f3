"""Rows to batches of static shape: Grain pipelines with a deterministic order and a resumable position.

Every pipeline is random access: batch i is a function of (rows, seed, i) alone, so the position of an
iterator is one integer and a restored run sees exactly the batches that it would have seen. Images are
decoded lazily, in Grain's prefetching threads. Training batches hold rows of similar length, padded to one of a
few shapes chosen for the data (`data.lengths`); the others are padded up to `LENGTHS`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import grain
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from m3po_jax.data.feature_cache import PromptFeatures
from m3po_jax.data.lengths import Lengths, Order, Shape, cheapest, plan_shapes
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError

# Padded lengths: powers of two and the points half-way between them, so at most a third of a row is padding.
LENGTHS = tuple(sorted({step << power for power in range(1, 14) for step in (4, 6)}))


class TreeBatch(NamedTuple):
    """B prompts (images included) with K answers each: the layout of `models.forward.branch_log_probs`.

    Arrays are NumPy's on the host and JAX's in a step. Padding is at the end of every axis. `reference` holds
    Σ_t log π_ref(token) of each answer in nats, NaN where nothing was recorded; `row_index` is the row's place in
    the source (see `BatchSource.ids`). Where a frozen tower's output is cached, `features` stand in for
    `pixel_values`, and `blank_features` are those of the mean colour.
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    pixel_values: Float[Any, "b m h w 3"] | None
    branch_ids: Int[Any, "b k t"]
    branch_mask: Bool[Any, "b k t"]
    reference: Float[Any, "b k"]
    row_index: Int[Any, b]
    features: Float[Any, "b m n v"] | None = None
    blank_features: Float[Any, "1 n v"] | None = None


class PromptBatch(NamedTuple):
    """B prompts to be answered, in source order; `row_index` is −1 in rows that only fill the last batch.

    `features` stand in for `pixel_values`, as in `TreeBatch`.
    """

    prefix_ids: Int[Any, "b p"]
    prefix_mask: Bool[Any, "b p"]
    pixel_values: Float[Any, "b m h w 3"] | None
    row_index: Int[Any, b]
    features: Float[Any, "b m n v"] | None = None


class ContrastiveBatch(NamedTuple):
    """B images, C texts and which text is true of which image: +1 or −1."""

    pixel_values: Float[Any, "b h w 3"]
    labels: Int[Any, "b c"]
    text_ids: Int[Any, "c t"]
    text_mask: Bool[Any, "c t"]
    row_index: Int[Any, b]


Batch = TypeVar("Batch", TreeBatch, PromptBatch, ContrastiveBatch)


class PixelProcessor(Protocol):
    """What `contrastive_batches` needs of `data.dual_inputs.DualEncoderProcessor`."""

    def pixel_values(self, prompt: Prompt) -> np.ndarray: ...


class PromptProcessor(PixelProcessor, Protocol):
    """What the other pipelines need of `data.processing.Processor`."""

    def encode_prompt(self, prompt: Prompt) -> Sequence[int] | np.ndarray: ...

    def encode_answer(self, text: str) -> Sequence[int] | np.ndarray: ...

    def image_keys(self, prompt: Prompt) -> list[str]: ...


@dataclass(frozen=True)
class BatchSource(Generic[Batch]):
    """Batches by number. Iterators start at batch 0 and have `get_state()` and `set_state(state)` (JSON).

    Attributes:
        dataset: Batch i of the (for training: endless) stream.
        ids: Row ids; `row_index` points into them.
        batch_size: Rows of a batch.
        fingerprint: Hash of the rows, their order and the batch size.
        has_reference: Every answer comes with recorded reference log-probs.
        take: Row numbers to one batch of these rows.
        row_key: Row number to a hash of its prompt, images and answers.
        shapes: The (prefix width, branch width) that batches are padded to; empty: any of `LENGTHS`.
    """

    dataset: grain.MapDataset
    ids: tuple[str, ...]
    batch_size: int
    fingerprint: str
    has_reference: bool = False
    threads: int = 4
    take: Callable[[Sequence[int]], Batch] | None = None
    row_key: Callable[[int], str] | None = None
    shapes: tuple[Shape, ...] = ()

    def __iter__(self) -> grain.DatasetIterator:
        # Grain's default keeps 500 elements, here whole batches, in flight.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.threads)
        return iter(self.dataset.to_iter_dataset(options))

    def steps(self, epochs: float) -> int:
        """Batches in `epochs` passes over the rows, rounded up."""
        return max(1, math.ceil(epochs * len(self.ids) / self.batch_size - 1e-9))

    def row_ids(self, row_index: Iterable[int]) -> list[str]:
        return [self.ids[i] for i in row_index if i >= 0]


class TableRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table as dicts, converted one by one when they are read."""

    def __init__(self, table: pa.Table):
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows

    def without_images(self) -> Iterator[dict[str, Any]]:
        """All rows but for their images: a pass over the texts need not copy encoded images."""
        names = [name for name in self.table.column_names if name != "images"]
        for chunk in self.table.select(names).to_batches(max_chunksize=256):
            yield from chunk.to_pylist()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def padded_length(length: int) -> int:
    """The least of `LENGTHS` that is not below `length`."""
    return next((size for size in LENGTHS if size >= length), length)


def _pad(rows: Sequence[Any], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ragged rows of token ids [..., tokens] in an array of `shape`, and the mask of what is not padding."""
    ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        if len(shape) > 2:
            ids[index], mask[index] = _pad(row, shape[1:])
        else:
            ids[index, : len(row)], mask[index, : len(row)] = row, True
    return ids, mask


def _stack_images(pixels: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Each row's images [m, H, W, 3], padded with black ones to the most that a row has; None without any."""
    most = max((len(images) for images in pixels if images is not None), default=0)
    if most == 0:
        return None
    size = next(images.shape[1:] for images in pixels if images is not None and len(images))
    kind = next(images.dtype for images in pixels if images is not None and len(images))
    stacked = np.zeros((len(pixels), most, *size), kind)
    for row, images in enumerate(pixels):
        if images is not None and len(images):
            stacked[row, : len(images)] = images
    return stacked


class TreeRow(NamedTuple):
    """One element before batching; the ragged form of a `TreeBatch` row."""

    prefix: np.ndarray
    pixels: np.ndarray | None
    branches: tuple[np.ndarray, ...]
    reference: tuple[float, ...]
    row: int
    features: np.ndarray | None = None


def collate_tree(rows: Sequence[TreeRow], shapes: Sequence[Shape] = ()) -> TreeBatch:
    """Pads rows with equally many branches to the cheapest of `shapes`; without any, to the next of `LENGTHS`."""
    branches = len(rows[0].branches)
    prefix = max(len(row.prefix) for row in rows)
    longest = max((len(branch) for row in rows for branch in row.branches), default=0)
    if shapes:
        prefix, longest = cheapest(shapes, prefix, longest, branches)
    else:
        prefix, longest = padded_length(prefix), padded_length(longest)
    prefix_ids, prefix_mask = _pad([row.prefix for row in rows], (len(rows), prefix))
    branch_ids, branch_mask = _pad([row.branches for row in rows], (len(rows), branches, longest))
    return TreeBatch(
        prefix_ids=prefix_ids,
        prefix_mask=prefix_mask,
        pixel_values=_stack_images([row.pixels for row in rows]),
        branch_ids=branch_ids,
        branch_mask=branch_mask,
        reference=np.array([row.reference for row in rows], np.float32).reshape(len(rows), branches),
        row_index=np.array([row.row for row in rows], np.int32),
        features=_stack_images([row.features for row in rows]),
    )


def _seen(
    processor: PixelProcessor, prompt: Prompt, features: PromptFeatures | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(pixels, features) of a prompt's images, of which one is given at most."""
    if features is None:
        return pixels_of(processor, prompt), None
    return None, features(prompt)


def _collate(features: PromptFeatures | None, shapes: Sequence[Shape]) -> Callable[[Sequence[TreeRow]], TreeBatch]:
    """`collate_tree`, with the blank image's features beside cached ones."""

    def collate(rows: Sequence[TreeRow]) -> TreeBatch:
        most = max((len(row.features) for row in rows if row.features is not None), default=0)
        if features is None or most == 0:
            return collate_tree(rows, shapes)
        # Padding is what the tower makes of black padding: swapped images meet the same either way.
        padding = np.repeat(features.blank, most, axis=0)
        seen = [padding[:0] if row.features is None else row.features for row in rows]
        whole = [np.concatenate([given, padding])[:most] for given in seen]
        filled = [row._replace(features=given) for row, given in zip(rows, whole, strict=True)]
        return collate_tree(filled, shapes)._replace(blank_features=features.blank)

    return collate


def pixels_of(processor: PixelProcessor, prompt: Prompt) -> np.ndarray | None:
    """Pixels of a prompt's images, or None; whatever a decoder raises becomes one line that names the row."""
    if not prompt.images:
        return None
    try:
        return np.asarray(processor.pixel_values(prompt), np.float32)
    except UserError:
        raise
    except Exception as error:  # decoders of hostile files raise anything
        raise UserError(
            f"cannot read the image ({type(error).__name__}: {error})",
            where=_where(prompt),
            remedy="replace the image or drop the row",
        ) from error


def _where(prompt: Prompt) -> str:
    return prompt.where or f"id {prompt.id!r}"


def _prefix(processor: PromptProcessor, prompt: Prompt) -> np.ndarray:
    return np.asarray(processor.encode_prompt(prompt), np.int32)


def _answer(ids: Sequence[int] | np.ndarray, limit: int, where: str) -> np.ndarray:
    """Token ids of one answer, checked: cutting an answer would teach the model to stop nowhere."""
    if len(ids) == 0:
        raise UserError("the answer has no tokens", where=where, remedy="drop the row")
    if len(ids) > limit:
        raise UserError(
            f"the answer has {len(ids)} tokens, more than train.max_answer_tokens = {limit}",
            where=where,
            remedy="raise it, or drop the row",
        )
    return np.asarray(ids, np.int32)


def _endless(order: Order, load: Callable[[int], Any], collate: Any) -> Any:
    """Batches of an endless stream that visits all rows once an epoch, each epoch in an order of its own."""
    dataset = grain.MapDataset.range(order.batches)
    return dataset.map(lambda number: collate([load(row) for row in order.rows(number)]))


def _tree_source(
    answers: Sequence[Sequence[np.ndarray]],
    prefix_of: Callable[[int], np.ndarray],
    load: Callable[[int], TreeRow],
    *,
    batch_size: int,
    seed: int,
    length_window: int,
    max_shapes: int,
    features: PromptFeatures | None,
) -> dict[str, Any]:
    """What the sources of prompts with answers have in common: fields of `BatchSource`."""
    for name, value in (("length_window", length_window), ("max_shapes", max_shapes)):
        if value < 1:
            raise UserError(f"{name} must be positive, not {value}", where=f"train.{name}")
    lengths = Lengths(
        np.array([len(prefix_of(row)) for row in range(len(answers))]),
        np.array([max(map(len, row)) for row in answers]),
        len(answers[0]),
    )
    order = Order(len(answers), seed, batch_size, length_window, lengths)
    shapes = plan_shapes(order, lengths, max_shapes)
    collate = _collate(features, shapes)
    return {
        "dataset": _endless(order, load, collate),
        "batch_size": batch_size,
        "take": lambda rows: collate([load(row) for row in rows]),
        "shapes": shapes,
    }


def _fingerprint(*parts: Any) -> str:
    """A hash of nested sequences of texts, numbers and arrays."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, (list, tuple)):
            digest.update(b"[%d" % len(part))
            for item in part:
                add(item)
        else:
            content = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
            digest.update(b"%d:" % len(content) + content)

    add(parts)
    return digest.hexdigest()


def _require_rows(count: int, batch_size: int) -> None:
    if count == 0:
        raise UserError("there is no row to train on", remedy="look at the earlier stages' reports")
    if batch_size < 1:
        raise UserError(f"batch_size must be positive, not {batch_size}", where="train.batch_size")


def message_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of one message list in TRL's vision format (or with plain string contents)."""
    parts = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            parts.append(content)
        else:
            parts += [part["text"] for part in content if part["type"] == "text" and part["text"] is not None]
    return "".join(parts)


def pair_prompt(row: Mapping[str, Any], where: str = "") -> Prompt:
    """The prompt of a PAIR row: its images, the last user message and the turns before it."""
    *earlier, last = row["prompt"]
    turns = [message_text([message]) for message in earlier]
    history = [[user, assistant] for user, assistant in zip(turns[::2], turns[1::2], strict=True)]
    images = tuple(Image(bytes=image.get("bytes"), path=image.get("path")) for image in row.get("images") or ())
    return Prompt(
        id=row["id"],
        images=images,
        instruction=message_text([last]),
        metadata={"history": history} if history else {},
        where=where,
    )


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
) -> BatchSource[TreeBatch]:
    """Preference pairs (PAIR rows) as branches 0 (chosen) and 1 (rejected) of their prompt, endless and
    shuffled.

    Recorded token ids are used as they are, since tokenising text again need not give them back; rows without
    them are tokenised. Texts are checked here, before anything runs; images when they are read.

    Args:
        features: Cached vision features, which take the pixels' place in the batches.
        length_window: Batches of the shuffled order whose rows are exchanged until each holds similar lengths.
        max_shapes: Most pairs of widths that batches are padded to (programs that are compiled).

    Raises:
        UserError: no rows, an answer that is empty or too long, log-probs that do not match their tokens.
    """
    if isinstance(rows, pa.Table):
        rows = TableRows(rows)
    _require_rows(len(rows), batch_size)
    ids, answers, references = [], [], []
    texts = rows.without_images() if isinstance(rows, TableRows) else rows
    for number, row in enumerate(texts):
        place = f"{where}:{number + 1} (id {row['id']!r})"
        ids.append(row["id"])
        pair, sums = [], []
        for side in ("chosen", "rejected"):
            tokens = row.get(f"{side}_token_ids")
            recorded = row.get(f"reference_{side}_logprobs") if tokens is not None else None
            if tokens is None:
                tokens = processor.encode_answer(message_text(row[side]))
            pair.append(_answer(tokens, max_answer_tokens, place))
            sums.append(_reference_sum(recorded, pair[-1], place))
        answers.append(tuple(pair))
        references.append(tuple(sums))

    def prompt_of(index: int) -> Prompt:
        return pair_prompt(rows[index], f"{where}:{index + 1} (id {ids[index]!r})")

    def load(index: int) -> TreeRow:
        prompt = prompt_of(index)
        pixels, seen = _seen(processor, prompt, features)
        return TreeRow(_prefix(processor, prompt), pixels, answers[index], references[index], index, seen)

    def key(index: int) -> str:
        prompt = prompt_of(index)
        prefix = _prefix(processor, prompt)
        images = processor.image_keys(prompt) if prompt.images else []
        return content_hash(prefix.tobytes(), images, *(answer.tobytes() for answer in answers[index]))

    return BatchSource(
        **_tree_source(
            answers,
            lambda index: _prefix(processor, prompt_of(index)),
            load,
            batch_size=batch_size,
            seed=seed,
            length_window=length_window,
            max_shapes=max_shapes,
            features=features,
        ),
        ids=tuple(ids),
        fingerprint=_fingerprint(seed, batch_size, ids, answers, references, length_window, max_shapes),
        has_reference=not np.isnan(references).any(),
        row_key=key,
    )


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
) -> BatchSource[TreeBatch]:
    """Prompts with their reference answers as the only branch (K = 1), endless and shuffled.

    Args:
        answer_ids: Token ids to learn instead of the references' (sampled answers, which tokenising their text
            again need not give back).
        features, length_window, max_shapes: As of `pair_batches`.

    Raises:
        UserError: no rows, or an answer that is missing, empty or too long.
    """
    _require_rows(len(prompts), batch_size)
    ids, instructions, answers = [], [], []
    for number, prompt in enumerate(prompts):
        if answer_ids is not None:
            tokens: Any = answer_ids[number]
        elif prompt.reference is not None:
            tokens = processor.encode_answer(prompt.reference)
        else:
            raise UserError(
                "the row has no reference answer", where=_where(prompt), remedy="add `reference` or drop it"
            )
        ids.append(prompt.id)
        instructions.append(prompt.instruction)
        answers.append(_answer(tokens, max_answer_tokens, _where(prompt)))

    def load(index: int) -> TreeRow:
        prompt = prompts[index]
        pixels, seen = _seen(processor, prompt, features)
        return TreeRow(_prefix(processor, prompt), pixels, (answers[index],), (math.nan,), index, seen)

    return BatchSource(
        **_tree_source(
            [(answer,) for answer in answers],
            lambda index: _prefix(processor, prompts[index]),
            load,
            batch_size=batch_size,
            seed=seed,
            length_window=length_window,
            max_shapes=max_shapes,
            features=features,
        ),
        ids=tuple(ids),
        fingerprint=_fingerprint(seed, batch_size, ids, instructions, answers, length_window, max_shapes),
    )


def prompt_batches(
    prompts: Sequence[Prompt],
    processor: PromptProcessor,
    *,
    batch_size: int,
    features: PromptFeatures | None = None,
    images: bool = True,
) -> BatchSource[PromptBatch]:
    """Prompts once, in order, for generation and scoring; copies of the last row fill the last batch.

    Args:
        features: Cached features of the vision tower, which then stand for the images.
        images: False: neither is read, for who blanks the images.
    """
    _require_rows(len(prompts), batch_size)
    ids = tuple(prompt.id for prompt in prompts)
    total = math.ceil(len(prompts) / batch_size) * batch_size

    def load(index: int) -> TreeRow:
        prompt = prompts[min(index, len(prompts) - 1)]
        prefix = _prefix(processor, prompt)
        place = index if index < len(prompts) else -1
        pixels, seen = _seen(processor, prompt, features) if images else (None, None)
        return TreeRow(prefix, pixels, (), (), place, features=seen)

    def collate(rows: Sequence[TreeRow]) -> PromptBatch:
        tree = _collate(features, ())(rows)
        return PromptBatch(tree.prefix_ids, tree.prefix_mask, tree.pixel_values, tree.row_index, tree.features)

    return BatchSource(
        dataset=grain.MapDataset.range(total).map(load).batch(batch_size, batch_fn=collate),
        ids=ids,
        batch_size=batch_size,
        fingerprint=_fingerprint(batch_size, ids),
    )


def contrastive_batches(
    prompts: Sequence[Prompt],
    processor: PixelProcessor,
    *,
    encode_texts: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    seed: int,
    claim_template: str = "{claim}",
    max_texts: int = 256,
) -> BatchSource[ContrastiveBatch]:
    """Images against the claims that are true of them, which each prompt lists in ``metadata["objects"]``.

    The texts of a batch are all claims of the data set when there are at most `max_texts`, so that absent
    objects are negatives too; else the union over the batch, filled up to `max_texts` with other claims (a
    static shape).

    Args:
        processor: Gives the pixels, at the dual encoder's size; an example has exactly one image.
        encode_texts: Texts to (ids [C, T], mask [C, T]) at a fixed T, by the dual encoder's tokenizer.
        claim_template: Text that stands for one claim, e.g. ``a photo of {claim}``.

    Raises:
        UserError: no rows, a row without objects or without exactly one image, or a batch with too many
            claims.
    """
    _require_rows(len(prompts), batch_size)
    ids, objects = [], []
    for prompt in prompts:
        named = prompt.metadata.get("objects")
        if not isinstance(named, (list, tuple)) or not all(isinstance(claim, str) for claim in named):
            raise UserError("metadata.objects is not a list of texts", where=_where(prompt))
        if len(prompt.images) != 1:
            raise UserError(f"{len(prompt.images)} images where one is needed", where=_where(prompt))
        ids.append(prompt.id)
        objects.append(frozenset(named))
    vocabulary = sorted(set().union(*objects))
    if not vocabulary:
        raise UserError("no row names an object", remedy="fill metadata.objects")
    text_ids, text_mask = encode_texts([claim_template.replace("{claim}", claim) for claim in vocabulary])
    column = {claim: place for place, claim in enumerate(vocabulary)}

    def load(index: int) -> tuple[np.ndarray, int]:
        pixels = pixels_of(processor, prompts[index])
        assert pixels is not None
        return pixels[0], index

    def collate(rows: Sequence[tuple[np.ndarray, int]]) -> ContrastiveBatch:
        chosen = np.arange(len(vocabulary))
        if len(vocabulary) > max_texts:
            present = sorted({column[claim] for _, index in rows for claim in objects[index]})
            if len(present) > max_texts:
                raise UserError(
                    f"{len(present)} claims in one batch, more than {max_texts}", remedy="use a smaller batch"
                )
            # Fillers depend on the batch alone, so that a resumed run sees the same ones.
            others = np.setdiff1d(chosen, present)
            order = np.random.default_rng([seed, *(index for _, index in rows)]).permutation(others)
            chosen = np.sort(np.concatenate([present, order[: max_texts - len(present)]])).astype(int)
        labels = np.full((len(rows), len(chosen)), -1, np.int32)
        for row, (_, index) in enumerate(rows):
            labels[row, np.isin(chosen, [column[claim] for claim in objects[index]])] = 1
        return ContrastiveBatch(
            pixel_values=np.stack([pixels for pixels, _ in rows]),
            labels=labels,
            text_ids=np.asarray(text_ids, np.int32)[chosen],
            text_mask=np.asarray(text_mask, bool)[chosen],
            row_index=np.array([index for _, index in rows], np.int32),
        )

    return BatchSource(
        dataset=_endless(Order(len(prompts), seed, batch_size), load, collate),
        ids=tuple(ids),
        batch_size=batch_size,
        fingerprint=_fingerprint(
            seed,
            batch_size,
            claim_template,
            ids,
            [sorted(named) for named in objects],
        ),
    )
