"""Idefics3 and SmolVLM against transformers in float32: tiles, ids, features, logits, answers, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import hf_idefics3
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_idefics3 import TILE, TOKENS
from hf_models import load_float32, torch_and_transformers
from hf_qwen import picture
from test_gemma3 import ANSWER_MASK, ANSWERS, NEW_TOKENS, RANK, Asked, conversations, generator

from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.padding import pad_prompts
from m3po_jax.errors import UserError
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter
from m3po_jax.models.forward import blank_images, branch_log_probs, encode_images, reference_forward
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import Loaded

# Wide, tall, tiny, square, larger, of whole tiles, and so long that one row of tiles is left.
SIZES = ((60, 12), (9, 70), (3, 2), (32, 32), (120, 90), (37, 29), (96, 48), (200, 1), (5, 300))
ASKED = conversations((60, 12), (120, 90))


class Pair(NamedTuple):
    """A model of transformers, ours from its files, and what reads prompts for either."""

    theirs: Any
    loaded: Loaded
    processor: Processor
    asked: tuple[Asked, ...] = ASKED


@pytest.fixture(scope="module", params=("smolvlm", "idefics3"))
def pair(request: Any, tmp_path_factory: Any) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    theirs, loaded = hf_idefics3.saved(request.param, folder)
    return Pair(theirs, loaded, Processor.from_pretrained(folder, "chat", "pad"))


def inputs(pair: Pair, rows: tuple[int, ...] = (0, 1, 2, 3), side: str = "right") -> PromptBatch:
    chosen = [ASKED[row].prompt for row in rows]
    ids = [pair.processor.encode_prompt(one) for one in chosen]
    token_ids, mask = pad_prompts(ids, pair.processor.pad_token_id)
    if side == "left":
        for row, one in enumerate(ids):
            token_ids[row], mask[row] = np.roll(token_ids[row], -len(one)), np.roll(mask[row], -len(one))
    images = stacked([joined(pair.processor.images(one)) for one in chosen])
    return PromptBatch([one.id for one in chosen], token_ids, mask, images)


def their_inputs(ids: np.ndarray, mask: np.ndarray, rows: tuple[int, ...]) -> dict[str, Any]:
    """With the tiles of transformers' own processor, as many a row as the row with most has."""
    torch, _ = torch_and_transformers()
    tensors = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    shown = [[picture(*size) for size in ASKED[row].sizes] for row in rows]
    if any(shown):
        made = hf_idefics3.image_processor()(shown, return_tensors="np")
        tensors |= {name: torch.tensor(made[name]) for name in ("pixel_values", "pixel_attention_mask")}
    return tensors


def their_logits(model: Any, ids: np.ndarray, mask: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        return model(**their_inputs(ids, mask, rows)).logits.numpy()


def their_log_probs(pair: Pair, row: int, prefix: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Of one answer behind its unpadded prompt."""
    torch, _ = torch_and_transformers()
    line = np.concatenate([prefix, answer])[None]
    logits = their_logits(pair.theirs, line, np.ones_like(line), (row,))[0, len(prefix) - 1 : -1]
    return torch.tensor(logits).log_softmax(-1).numpy()[np.arange(len(answer)), answer]


def test_tiles_and_ids_are_transformers_own(pair: Pair) -> None:
    torch_and_transformers()
    for splits in (True, False):
        theirs = hf_idefics3.image_processor(splits)
        reader = pair.processor.image_reader
        reader = type(reader)(**{**vars(reader), "splits": splits})
        for size in SIZES:
            made = theirs([picture(*size)], return_tensors="np", return_row_col_info=True)
            plan, arrays = reader.plan(lambda size=size: size), reader.read(picture(*size))
            count = made["rows"][0][0] * made["cols"][0][0] + 1
            assert plan.shapes == {"pixels": (count, TILE, TILE, 3)} and plan.runs == (TOKENS,) * count
            pixels = arrays["pixels"].transpose(0, 3, 1, 2)
            np.testing.assert_allclose(pixels, made["pixel_values"][0], rtol=0, atol=1e-6)
    whole = hf_idefics3.processor()
    for one in ASKED:
        text = whole.apply_chat_template(one.messages, add_generation_prompt=True)
        shown = [[picture(*size) for size in one.sizes]] if one.sizes else None
        made = whole(text=[text], images=shown, add_special_tokens=False)
        assert pair.processor.encode_prompt(one.prompt).tolist() == made["input_ids"][0]


def test_features_logits_and_log_probs_are_transformers_own(pair: Pair, record_property: Any) -> None:
    torch, _ = torch_and_transformers()
    branches = (jnp.asarray(ANSWERS), jnp.asarray(ANSWER_MASK))

    @nnx.jit
    def ours(model: Any, ids: jax.Array, mask: jax.Array, images: Any) -> tuple[jax.Array, ...]:
        encoded = encode_images(model, images)
        given = (ids, mask, encoded, *branches)
        return (
            model.projector(encoded.features),
            reference_forward(model, *given[:3]),
            branch_log_probs(model, *given),
        )

    worst, rows = {}, (0, 1, 2, 3)
    wanted = np.zeros(ANSWERS.shape, np.float32)
    for row, branch in np.ndindex(*ANSWERS.shape[:2]):
        answer = ANSWERS[row, branch][ANSWER_MASK[row, branch]]
        prefix = pair.processor.encode_prompt(ASKED[row].prompt)
        wanted[row, branch, : len(answer)] = their_log_probs(pair, row, prefix, answer)
    for side in ("left", "right"):
        batch = inputs(pair, rows, side)
        found = ours(pair.loaded.model, jnp.asarray(batch.token_ids), jnp.asarray(batch.mask), batch.images)
        features, logits, log_probs = map(np.asarray, found)
        expected = their_logits(pair.theirs, batch.token_ids, batch.mask, rows)
        assert np.abs(expected).max() > 0.3, "the oracle's logits must carry a signal"
        worst[f"logits_{side}"] = np.abs(logits - expected)[batch.mask].max()
        worst[f"log_probs_{side}"] = np.abs(log_probs - wanted).max()
    given = their_inputs(batch.token_ids, batch.mask, rows)
    with torch.no_grad():
        pooled = pair.theirs.model.get_image_features(
            given["pixel_values"], given["pixel_attention_mask"]
        ).pooler_output
    assert batch.images is not None
    counts = batch.images["tokens"].sum(axis=1)
    flat = np.concatenate([features[row, :count] for row, count in enumerate(counts)])
    worst["features"] = np.abs(flat - torch.cat(list(pooled)).numpy()).max()
    for key, value in worst.items():
        record_property(key, float(value))
    assert max(worst.values()) < 1e-4, worst


def test_answers_are_transformers_own(pair: Pair) -> None:
    torch, _ = torch_and_transformers()
    processor, batch = pair.processor, inputs(pair)
    greedy = generator(pair, temperature=0.0)(batch)
    sampled = generator(pair, num_candidates=2, temperature=1.2, seed=5)(batch)
    never = [processor.image_token_id, processor.pad_token_id, *range(processor.text.size, 368)]
    for row in range(len(ASKED)):
        ids = batch.token_ids[row][batch.mask[row]][None]
        with torch.no_grad():
            answer = pair.theirs.generate(
                **their_inputs(ids, np.ones_like(ids), (row,)),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                suppress_tokens=never,
                pad_token_id=processor.pad_token_id,
                eos_token_id=list(processor.eos_token_ids),
            )
        assert greedy.token_ids[row, 0, : greedy.lengths[row, 0]].tolist() == answer[0, ids.shape[1] :].tolist()
        for k in range(2):
            drawn = sampled.token_ids[row, k, : sampled.lengths[row, k]]
            wanted = their_log_probs(pair, row, ids[0], drawn)
            np.testing.assert_allclose(sampled.log_probs[row, k, : len(drawn)], wanted, rtol=0, atol=1e-4)


def test_adapters_and_exports_are_pefts_own(pair: Pair, tmp_path: Path) -> None:
    """An adapter of ours says in PEFT what it says here, alone and merged, and comes back bit by bit."""
    torch, _ = torch_and_transformers()
    peft = pytest.importorskip("peft")
    model = nnx.merge(*nnx.split(pair.loaded.model))
    lora.attach(model, RANK, scope="decoder", rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for linear in lora.adapters(model).values():
        linear.lora_b[...] = jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32)
    for _, value in nnx.to_flat_state(nnx.state(model.projector)):
        value[...] = value[...] + jnp.asarray(rng.normal(size=value.shape) * 0.02, jnp.float32)
    export_adapter(model, str(pair.loaded.directory), tmp_path / "adapter", RANK, base=pair.loaded)
    out = export_model(model, pair.loaded, tmp_path / "merged", dtype="float32")
    base = type(pair.theirs).from_pretrained(pair.loaded.directory, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    adapted = {name.split(".lora_")[0] for name, _ in wrapped.named_parameters() if "lora_" in name}
    assert len(adapted) == 9 and not any("vision" in name for name in adapted)
    merged = type(pair.theirs).from_pretrained(out, dtype=torch.float32).eval()
    batch = inputs(pair, (0, 3))
    forward = nnx.jit(lambda model, *x: reference_forward(model, *x[:2], encode_images(model, x[2])))
    ours = np.asarray(forward(model, batch.token_ids, batch.mask, batch.images))
    for peer in (wrapped, merged):
        theirs = their_logits(peer, batch.token_ids, batch.mask, (0, 3))
        np.testing.assert_allclose(ours[batch.mask], theirs[batch.mask], rtol=0, atol=1e-4)
    again = nnx.merge(*nnx.split(pair.loaded.model))
    load_adapter(again, tmp_path / "adapter")
    for path, linear in lora.adapters(model).items():
        np.testing.assert_array_equal(lora.adapters(again)[path].lora_b[...], linear.lora_b[...])
    exported = load_float32(out)
    copy = export_model(exported.model, exported, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_blank_images_are_encoded_zeros(pair: Pair) -> None:
    batch = inputs(pair)
    assert batch.images is not None
    tokens = int(batch.images["tokens"].sum(axis=1).max())

    @nnx.jit
    def both(model: Any, images: Any) -> Any:
        zeros = images | {"pixels": jnp.zeros_like(images["pixels"])}
        return blank_images(model, images, 4, tokens).features, encode_images(model, zeros).features

    blank, zeros = both(pair.loaded.model, batch.images)
    np.testing.assert_allclose(blank[:, :tokens], zeros[:, :tokens], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True, "text": {"num_key_value_heads": 4, "attention_bias": True}},
        {"text": {"tie_word_embeddings": True}, "vision": {"hidden_act": "gelu"}, "scale_factor": 3},
    ],
    ids=("tied", "shuffled_by_three"),
)
def test_switches_are_transformers_own(fields: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(hf_idefics3, "TOKENS", 4 if "scale_factor" in fields else TOKENS)
    theirs, loaded = hf_idefics3.saved("smolvlm", tmp_path, seed=3, **fields)
    pair = Pair(theirs, loaded, Processor.from_pretrained(tmp_path, "chat", "pad"))
    batch = inputs(pair, (0, 3))
    forward = nnx.jit(lambda model, *x: reference_forward(model, *x[:2], encode_images(model, x[2])))
    ours = np.asarray(forward(loaded.model, batch.token_ids, batch.mask, batch.images))
    expected = their_logits(theirs, batch.token_ids, batch.mask, (0, 3))
    np.testing.assert_allclose(ours[batch.mask], expected[batch.mask], rtol=0, atol=1e-4)


def test_what_cannot_be_read_is_one_line(pair: Pair, tmp_path: Path) -> None:
    folder = pair.loaded.directory
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    contents = {name: json.loads((folder / name).read_text()) for name in files}
    vision, text = contents["config.json"]["vision_config"], contents["config.json"]["text_config"]
    for file, changes, message in (
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIP"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 32}}, "config.json says 24 x 24 pixels"),
        (
            "preprocessor_config.json",
            {"size": {"height": 32}},
            "size is {'height': 32}, and must have a longest_edge",
        ),
        ("preprocessor_config.json", {"do_image_splitting": 1}, "do_image_splitting is 1"),
        ("preprocessor_config.json", {"image_std": [1]}, "malformed image processor settings"),
        ("config.json", {"scale_factor": 4}, "scale_factor 4 does not divide 6 patches"),
        ("config.json", {"vision_config": {**vision, "image_size": 100}}, "25 patches along a side"),
        ("config.json", {"text_config": {**text, "model_type": "phi"}}, "decoder 'phi' is not supported"),
    ):
        for name, content in contents.items():
            (tmp_path / name).write_text(json.dumps({**content, **(changes if name == file else {})}))
        with pytest.raises(UserError, match=message) as caught:
            Processor.from_pretrained(tmp_path, "chat", "pad")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"model\.max_pixels: images of a idefics3 model are all of one size"):
        Processor.from_pretrained(folder, "chat", "pad", max_pixels=100)
