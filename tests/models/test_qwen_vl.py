"""Qwen2.5-VL and Qwen3-VL against transformers in float32: images, ids, features, logits, answers, adapters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import hf_qwen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import load_float32, torch_and_transformers
from hf_qwen import SIZES, picture, prompt

from m3po_jax.config import LoRAConfig, MeshConfig
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.padding import pad_prompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter
from m3po_jax.models.forward import blank_images, branch_log_probs, encode_images, reference_forward
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import Loaded

KINDS = ("qwen2_5_vl", "qwen3_vl")
PROMPTS = (
    prompt("two", "<image>\nWhat is in the image?<image> Describe both, and then", (60, 12), (37, 29)),
    prompt("text", "a red bus"),
    prompt("large", "What is in the image?", (120, 90)),
    prompt("later", "What <image>is in it?", (9, 70), history=[["a red bus", "is helpful."]], system="You are a bus."),
)
ANSWERS = np.random.default_rng(3).integers(10, 250, (len(PROMPTS), 2, 6))
ANSWER_MASK = np.arange(6) < np.array([[6, 4], [2, 6], [5, 1], [3, 6]])[..., None]
NEW_TOKENS = 10


class Pair(NamedTuple):
    """A model of transformers, ours from its files, and what reads prompts for either."""

    kind: str
    theirs: Any
    loaded: Loaded
    processor: Processor


@pytest.fixture(scope="module", params=KINDS)
def pair(request: Any, tmp_path_factory: Any) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs, loaded = hf_qwen.saved(request.param, folder)
    return Pair(request.param, theirs, loaded, Processor.from_pretrained(folder, "chat", "pad"))


def inputs(pair: Pair, rows: tuple[int, ...] = (0, 1, 2, 3), side: str = "right") -> PromptBatch:
    chosen = [PROMPTS[row] for row in rows]
    ids = [pair.processor.encode_prompt(one) for one in chosen]
    token_ids, mask = pad_prompts(ids, pair.processor.pad_token_id)
    if side == "left":
        for row, one in enumerate(ids):
            token_ids[row], mask[row] = np.roll(token_ids[row], -len(one)), np.roll(mask[row], -len(one))
    images = stacked([joined(pair.processor.images(one)) for one in chosen])
    return PromptBatch([one.id for one in chosen], token_ids, mask, images)


def their_images(pair: Pair, rows: tuple[int, ...]) -> dict[str, Any]:
    """Pixels and grids of some prompts, as transformers' own processor gives them."""
    torch, _ = torch_and_transformers()
    sizes = {0: [(60, 12), (37, 29)], 1: [], 2: [(120, 90)], 3: [(9, 70)]}
    pictures = [picture(*size) for row in rows for size in sizes[row]]
    if not pictures:
        return {}
    made = hf_qwen.image_processor(pair.kind)(pictures, return_tensors="np")
    return {name: torch.tensor(made[name]) for name in ("pixel_values", "image_grid_thw")}


def their_logits(pair: Pair, model: Any, ids: np.ndarray, mask: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    torch, _ = torch_and_transformers()
    arrays = {"input_ids": ids, "attention_mask": mask.astype(int)}
    arrays["mm_token_type_ids"] = (ids == pair.processor.image_token_id).astype(int)
    with torch.no_grad():
        tensors = {name: torch.tensor(x, dtype=torch.long) for name, x in arrays.items()}
        return model(**tensors, **their_images(pair, rows)).logits.numpy()


def their_log_probs(pair: Pair, model: Any, row: int, prefix: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Of one answer behind its unpadded prompt."""
    torch, _ = torch_and_transformers()
    line = np.concatenate([prefix, answer])[None]
    logits = their_logits(pair, model, line, np.ones_like(line), (row,))[0, len(prefix) - 1 : -1]
    return torch.tensor(logits).log_softmax(-1).numpy()[np.arange(len(answer)), answer]


def test_images_and_ids_are_transformers_own(pair: Pair) -> None:
    torch_and_transformers()
    theirs, reader = hf_qwen.image_processor(pair.kind), pair.processor.image_reader
    for size in SIZES:
        made = theirs([picture(*size)], return_tensors="np")
        plan, arrays = reader.plan(lambda size=size: size), reader.read(picture(*size))
        assert [1, *plan.layout["grid"][0].tolist()] == made["image_grid_thw"][0].tolist()
        assert plan.shapes == {name: x.shape for name, x in arrays.items()} and 4 * plan.tokens == len(arrays["patches"])
        twice = np.repeat(arrays["patches"].reshape(-1, 3, 1, 16), 2, axis=2).reshape(made["pixel_values"].shape)
        np.testing.assert_allclose(twice, made["pixel_values"], rtol=0, atol=1e-6)
    whole = hf_qwen.processor(pair.kind)
    messages: list[Any] = [
        [("user", "i", "tWhat is in the image?", "i", "t Describe both, and then")],
        [("user", "ta red bus")],
        [("user", "i", "tWhat is in the image?")],
        [("system", "tYou are a bus."), ("user", "ta red bus"), ("assistant", "tis helpful."), ("user", "tWhat ", "i")],
    ]
    messages[3][3] = ("user", "tWhat ", "i", "tis in it?")
    pictures = [[picture(60, 12), picture(37, 29)], None, [picture(120, 90)], [picture(9, 70)]]
    for one, turns, shown in zip(PROMPTS, messages, pictures, strict=True):
        parts = lambda turn: [  # noqa: E731
            {"type": "image"} if part == "i" else {"type": "text", "text": part[1:]} for part in turn[1:]
        ]
        chat = [{"role": turn[0], "content": parts(turn)} for turn in turns]
        text = whole.apply_chat_template(chat, add_generation_prompt=True)
        assert pair.processor.encode_prompt(one).tolist() == whole(text=[text], images=shown)["input_ids"][0]


def test_features_logits_and_log_probs_are_transformers_own(pair: Pair, record_property: Any) -> None:
    torch, _ = torch_and_transformers()
    branches = (jnp.asarray(ANSWERS), jnp.asarray(ANSWER_MASK))

    @nnx.jit
    def ours(model: Any, ids: jax.Array, mask: jax.Array, images: Any) -> tuple[jax.Array, ...]:
        encoded = encode_images(model, images)
        logits = reference_forward(model, ids, mask, encoded)
        return model.project(encoded.features), logits, branch_log_probs(model, ids, mask, encoded, *branches)

    worst, rows = {}, (0, 1, 2, 3)
    wanted = np.zeros(ANSWERS.shape, np.float32)
    for row, branch in np.ndindex(*ANSWERS.shape[:2]):
        answer = ANSWERS[row, branch][ANSWER_MASK[row, branch]]
        prefix = pair.processor.encode_prompt(PROMPTS[row])
        wanted[row, branch, : len(answer)] = their_log_probs(pair, pair.theirs, row, prefix, answer)
    for side in ("left", "right"):
        batch = inputs(pair, rows, side)
        found = ours(pair.loaded.model, jnp.asarray(batch.token_ids), jnp.asarray(batch.mask), batch.images)
        features, logits, log_probs = map(np.asarray, found)
        expected = their_logits(pair, pair.theirs, batch.token_ids, batch.mask, rows)
        assert np.abs(expected).max() > 0.3, "the oracle's logits must carry a signal"
        worst[f"logits_{side}"] = np.abs(logits - expected)[batch.mask].max()
        worst[f"log_probs_{side}"] = np.abs(log_probs - wanted).max()
    with torch.no_grad():
        made = their_images(pair, rows)
        pooled = pair.theirs.model.get_image_features(made["pixel_values"], made["image_grid_thw"]).pooler_output
    counts = batch.images["tokens"].sum(axis=1)
    flat = np.concatenate([features[row, :count] for row, count in enumerate(counts)])
    worst["features"] = np.abs(flat - torch.cat(pooled).numpy()).max()
    for key, value in worst.items():
        record_property(key, float(value))
    assert max(worst.values()) < 1e-4, worst


def generator(pair: Pair, model: Any, **sampling: Any) -> Generator:
    config = SamplingConfig(max_new_tokens=NEW_TOKENS, **sampling)
    return Generator(
        model,
        eos_token_id=pair.processor.eos_token_ids,
        pad_token_id=pair.processor.pad_token_id,
        mesh=make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
        sampling=config,
        batch_size=4,
        tokenizer_size=pair.processor.text.size,
    )


def test_answers_are_transformers_own(pair: Pair) -> None:
    """Greedy tokens, and what sampled ones are worth."""
    torch, _ = torch_and_transformers()
    image_token, pad = pair.processor.image_token_id, pair.processor.pad_token_id
    batch = inputs(pair)
    greedy = generator(pair, pair.loaded.model, temperature=0.0)(batch)
    sampled = generator(pair, pair.loaded.model, num_candidates=3, temperature=1.2, seed=5)(batch)
    never = [image_token, pad, *range(pair.processor.text.size, 320)]
    for row in range(len(PROMPTS)):
        ids = batch.token_ids[row][batch.mask[row]][None]
        pair.theirs.model.rope_deltas = None  # of the row before
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "suppress_tokens": never, "pad_token_id": pad}
        kinds = {"mm_token_type_ids": torch.tensor((ids == image_token).astype(int))} if row != 1 else {}
        with torch.no_grad():
            answer = pair.theirs.generate(
                input_ids=torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.ones(ids.shape, dtype=torch.long),
                eos_token_id=list(pair.processor.eos_token_ids),
                **their_images(pair, (row,)),
                **kinds,
                **options,
            )
        assert greedy.token_ids[row, 0, : greedy.lengths[row, 0]].tolist() == answer[0, ids.shape[1] :].tolist()
        for k in range(3):
            drawn = sampled.token_ids[row, k, : sampled.lengths[row, k]]
            wanted = their_log_probs(pair, pair.theirs, row, ids[0], drawn)
            np.testing.assert_allclose(sampled.log_probs[row, k, : len(drawn)], wanted, rtol=0, atol=1e-4)
