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
    prompt(
        "later", "What <image>is in it?", (9, 70), history=[["a red bus", "is helpful."]], system="You are a bus."
    ),
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


def parts_of(turn: tuple[str, ...]) -> list[dict[str, str]]:
    """Of a role, then images (``i``) and texts (``t…``)."""
    return [{"type": "image"} if part == "i" else {"type": "text", "text": part[1:]} for part in turn[1:]]


def test_images_and_ids_are_transformers_own(pair: Pair) -> None:
    torch_and_transformers()
    theirs, reader = hf_qwen.image_processor(pair.kind), pair.processor.image_reader
    for size in SIZES:
        made = theirs([picture(*size)], return_tensors="np")
        plan, arrays = reader.plan(lambda size=size: size), reader.read(picture(*size))
        assert [1, *plan.layout["grid"][0].tolist()] == made["image_grid_thw"][0].tolist()
        assert plan.shapes == {name: x.shape for name, x in arrays.items()}
        assert 4 * plan.tokens == len(arrays["patches"])
        twice = np.repeat(arrays["patches"].reshape(-1, 3, 1, 16), 2, axis=2).reshape(made["pixel_values"].shape)
        np.testing.assert_allclose(twice, made["pixel_values"], rtol=0, atol=1e-6)
    whole = hf_qwen.processor(pair.kind)
    messages: list[Any] = [
        [("user", "i", "tWhat is in the image?", "i", "t Describe both, and then")],
        [("user", "ta red bus")],
        [("user", "i", "tWhat is in the image?")],
        [
            ("system", "tYou are a bus."),
            ("user", "ta red bus"),
            ("assistant", "tis helpful."),
            ("user", "tWhat ", "i", "tis in it?"),
        ],
    ]
    pictures = [[picture(60, 12), picture(37, 29)], None, [picture(120, 90)], [picture(9, 70)]]
    for one, turns, shown in zip(PROMPTS, messages, pictures, strict=True):
        chat = [{"role": turn[0], "content": parts_of(turn)} for turn in turns]
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


RANK = LoRAConfig(lora_rank=2, lora_alpha=4.0, target_modules=["q_proj", "v_proj", "down_proj"], train_projector=True)


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
    assert len(adapted) == 9 and not any("visual" in name for name in adapted)
    merged = type(pair.theirs).from_pretrained(out, dtype=torch.float32).eval()
    batch = inputs(pair, (0, 3))
    forward = nnx.jit(lambda model, *x: reference_forward(model, *x[:2], encode_images(model, x[2])))
    ours, plain = (
        np.asarray(forward(one, batch.token_ids, batch.mask, batch.images)) for one in (model, pair.loaded.model)
    )
    assert np.abs(ours - plain)[batch.mask].max() > 0.05
    for peer in (wrapped, merged):
        theirs = their_logits(pair, peer, batch.token_ids, batch.mask, (0, 3))
        np.testing.assert_allclose(ours[batch.mask], theirs[batch.mask], rtol=0, atol=1e-4)
    again = nnx.merge(*nnx.split(pair.loaded.model))
    load_adapter(again, tmp_path / "adapter")
    for path, linear in lora.adapters(model).items():
        np.testing.assert_array_equal(lora.adapters(again)[path].lora_b[...], linear.lora_b[...])
    for learned, read in zip(*(jax.tree.leaves(nnx.state(one.projector)) for one in (model, again)), strict=True):
        np.testing.assert_array_equal(learned, read)
    exported = load_float32(out)
    assert exported.config == pair.loaded.config
    copy = export_model(exported.model, exported, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_blank_images_are_encoded_zeros(pair: Pair) -> None:
    batch = inputs(pair)
    tokens = int(batch.images["tokens"].sum(axis=1).max())

    @nnx.jit
    def both(model: Any, images: Any) -> Any:
        zeros = images | {"patches": jnp.zeros_like(images["patches"])}
        return blank_images(model, images, 4, tokens).features, encode_images(model, zeros).features

    blank, zeros = both(pair.loaded.model, batch.images)
    for row, count in enumerate(batch.images["tokens"].sum(axis=1)):
        np.testing.assert_allclose(blank[row, :count], zeros[row, :count], rtol=0, atol=1e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied_full": (
        "qwen2_5_vl",
        {"tie_word_embeddings": True, "vision": {"fullatt_block_indexes": [0, 1, 2], "hidden_act": "gelu"}},
    ),
    "windows_alone": ("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [], "window_size": 24}}),
    "sliding": (
        "qwen2_5_vl",
        {"text": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rms_norm_eps": 1e-2}},
    ),
    # Positions beyond the length that the decoder began with, as the published cards set them for long videos.
    "yarn": (
        "qwen2_5_vl",
        {
            "text": {
                "rope_parameters": {
                    **{"rope_type": "yarn", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                    **{"factor": 4.0, "original_max_position_embeddings": 16},
                }
            }
        },
    ),
    "no_deepstack": (
        "qwen3_vl",
        {"tie_word_embeddings": True, "vision": {"deepstack_visual_indexes": [], "num_position_embeddings": 4}},
    ),
    "deep_everywhere": (
        "qwen3_vl",
        {
            "text": {"attention_bias": True, "num_key_value_heads": 1},
            "vision": {"deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu"},
        },
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_switches_are_transformers_own(name: str, tmp_path: Path) -> None:
    """Log-probs behind the last layer that computes every token, and before it."""
    kind, fields = VARIANTS[name]
    theirs, loaded = hf_qwen.saved(kind, tmp_path, seed=len(name), **fields)
    pair = Pair(kind, theirs, loaded, Processor.from_pretrained(tmp_path, "chat", "pad"))
    batch = inputs(pair, (0, 3))
    branches = (jnp.asarray(ANSWERS[[0, 3]]), jnp.asarray(ANSWER_MASK[[0, 3]]))

    @nnx.jit
    def ours(model: Any, ids: jax.Array, mask: jax.Array, images: Any) -> tuple[jax.Array, jax.Array]:
        inputs = (ids, mask, encode_images(model, images), *branches)
        return branch_log_probs(model, *inputs), branch_log_probs(model, *inputs, base_learns=True)

    for found in ours(loaded.model, batch.token_ids, batch.mask, batch.images):
        for place, row in enumerate((0, 3)):
            answer = ANSWERS[row, 0][ANSWER_MASK[row, 0]]
            wanted = their_log_probs(pair, theirs, row, pair.processor.encode_prompt(PROMPTS[row]), answer)
            np.testing.assert_allclose(found[place, 0, : len(answer)], wanted, rtol=0, atol=1e-4)


def test_flat_files_and_new_names_are_the_same_model(tmp_path: Path) -> None:
    """The published layout has the decoder's fields at the top, and names without ``language_model``."""
    from safetensors.numpy import load_file, save_file

    _, loaded = hf_qwen.saved("qwen2_5_vl", tmp_path / "new")
    raw = json.loads((tmp_path / "new" / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    tower = raw["vision_config"] | {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 4}
    old = {**text, **raw, "vision_config": tower}
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    renamed = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): x
        for name, x in tensors.items()
    }
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    again = load_float32(tmp_path / "old")
    assert again.config == loaded.config and not again.description.notes
    for ours, other in zip(*(jax.tree.leaves(nnx.state(one.model)) for one in (again, loaded)), strict=True):
        np.testing.assert_array_equal(ours, other)


def test_what_cannot_be_read_is_one_line(pair: Pair, tmp_path: Path) -> None:
    """Images, processor files and limits; an image's row is named before a pixel is read."""
    long = dataclasses.replace(prompt("long", "What is in the image?", (201, 1)), where="rows.jsonl:3 (id 'long')")
    for read in (pair.processor.encode_prompt, pair.processor.images):
        with pytest.raises(UserError, match=r"rows.jsonl:3 .*201 x 1 pixels\) is more than 200 times as long"):
            read(long)
    folder = pair.loaded.directory
    limited = Processor.from_pretrained(folder, "chat", "pad", min_pixels=64, max_pixels=256)
    assert (
        limited.image_plans(PROMPTS[2])[0].tokens == 2
        and limited.image_reader.key() != pair.processor.image_reader.key()
    )
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for changes, message in (
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
        ({"patch_size": 14}, "patch_size is 14, config.json says 4"),
        ({"merge_size": 1}, "merge_size is 1, config.json says 2"),
        ({"do_resize": False}, "do_resize and do_convert_rgb must be true"),
        ({"max_pixels": "many"}, "max_pixels is 'many'"),
        ({"min_pixels": 9000}, "min_pixels 9000 is more than max_pixels"),
        ({"image_std": [1]}, "malformed image processor settings"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, **changes}))
        with pytest.raises(UserError, match=message) as caught:
            Processor.from_pretrained(tmp_path, "chat", "pad")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"model\.max_pixels: max_pixels is 0"):
        Processor.from_pretrained(folder, "chat", "pad", max_pixels=0)
    with pytest.raises(UserError, match=r"model\.max_pixels: images of a llava model are all of one size"):
        Processor.from_pretrained("builtin:quickstart-base", "plain", "pad", max_pixels=100)
