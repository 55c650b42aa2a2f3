"""Gemma 3 with images against transformers in float32: images, crops, ids, features, logits, answers, adapters."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import hf_gemma3
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_gemma3 import TOKENS
from hf_models import load_float32, torch_and_transformers
from hf_qwen import picture, prompt

from m3po_jax.config import LoRAConfig, MeshConfig
from m3po_jax.data.collation import PromptBatch
from m3po_jax.data.model_images import joined, stacked
from m3po_jax.data.padding import pad_prompts
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter
from m3po_jax.models.forward import blank_images, branch_log_probs, encode_images, reference_forward
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import Loaded

# Wide, tall, tiny, square, larger, no multiple of the patch; for pan-and-scan those that are cropped in two, three
# and four, that are nearly square, whose last crop is smaller, and that are too small.
SIZES = ((60, 12), (9, 70), (3, 2), (32, 32), (120, 90), (37, 29))
LARGE = ((620, 300), (900, 280), (270, 1101), (300, 320), (256, 310), (1500, 260), (511, 770), (601, 257))


class Asked(NamedTuple):
    """A prompt, and the same as transformers' chat templates take it."""

    prompt: Prompt
    sizes: tuple[tuple[int, int], ...]
    messages: list[dict[str, Any]]


def asked(name: str, sizes: tuple[tuple[int, int], ...], *turns: tuple[str, ...]) -> Asked:
    """Turns are a role, then images (``i``) and texts (``t…``)."""
    messages, said = [], []
    for role, *parts in turns:
        content = [{"type": "image"} if part == "i" else {"type": "text", "text": part[1:]} for part in parts]
        messages.append({"role": role, "content": content})
        said.append("".join("<image>" if part == "i" else part[1:] for part in parts))
    metadata: dict[str, Any] = {}
    if turns[0][0] == "system":
        metadata["system"] = said.pop(0)
    if len(said) > 1:
        metadata["history"] = [[said[place], said[place + 1]] for place in range(0, len(said) - 1, 2)]
    return Asked(prompt(name, said[-1], *sizes, **metadata), sizes, messages)


def conversations(first: tuple[int, int], second: tuple[int, int]) -> tuple[Asked, ...]:
    return (
        asked("two", (first, (37, 29)), ("user", "i", "tWhat is in the image?", "i", "tDescribe both, and then")),
        asked("text", (), ("user", "ta red bus")),
        asked("large", (second,), ("user", "i", "tWhat is in the image?")),
        asked(
            "later",
            ((9, 70),),
            ("system", "tYou are a bus."),
            ("user", "ta red bus"),
            ("assistant", "tis helpful."),
            ("user", "tWhat", "i", "tis in it?"),
        ),
    )


ASKED = {False: conversations((60, 12), (120, 90)), True: conversations((620, 300), (270, 1101))}
ANSWERS = np.random.default_rng(3).integers(10, 340, (4, 2, 6))
ANSWER_MASK = np.arange(6) < np.array([[6, 4], [2, 6], [5, 1], [3, 6]])[..., None]
NEW_TOKENS = 10


class Pair(NamedTuple):
    """A model of transformers, ours from its files, and what reads prompts for either."""

    theirs: Any
    loaded: Loaded
    processor: Processor

    @property
    def asked(self) -> tuple[Asked, ...]:
        return ASKED[self.processor.image_reader.pan_and_scan]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> tuple[Any, Loaded]:
    return hf_gemma3.saved(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(params=(False, True), ids=("squares", "pan_and_scan"))
def pair(request: Any, saved: tuple[Any, Loaded]) -> Pair:
    processor = Processor.from_pretrained(saved[1].directory, "chat", "pad", pan_and_scan=request.param)
    return Pair(*saved, processor)


def inputs(pair: Pair, rows: tuple[int, ...] = (0, 1, 2, 3), side: str = "right") -> PromptBatch:
    chosen = [pair.asked[row].prompt for row in rows]
    ids = [pair.processor.encode_prompt(one) for one in chosen]
    token_ids, mask = pad_prompts(ids, pair.processor.pad_token_id)
    if side == "left":
        for row, one in enumerate(ids):
            token_ids[row], mask[row] = np.roll(token_ids[row], -len(one)), np.roll(mask[row], -len(one))
    images = stacked([joined(pair.processor.images(one)) for one in chosen])
    return PromptBatch([one.id for one in chosen], token_ids, mask, images)


def their_pixels(pair: Pair, rows: tuple[int, ...]) -> dict[str, Any]:
    """Of some prompts, as transformers' own processor gives them."""
    torch, _ = torch_and_transformers()
    pictures = [picture(*size) for row in rows for size in pair.asked[row].sizes]
    if not pictures:
        return {}
    return {"pixel_values": torch.tensor(crops(pair, pictures)["pixel_values"])}


def crops(pair: Pair, pictures: list[Any]) -> Any:
    options = {name: hf_gemma3.processor().images_kwargs[name] for name in hf_gemma3.processor().images_kwargs}
    options["do_pan_and_scan"] = pair.processor.image_reader.pan_and_scan
    return hf_gemma3.image_processor()(pictures, return_tensors="np", **options)


def their_inputs(pair: Pair, ids: np.ndarray, mask: np.ndarray, rows: tuple[int, ...]) -> dict[str, Any]:
    torch, _ = torch_and_transformers()
    arrays = {"input_ids": ids, "attention_mask": mask.astype(int)}
    arrays["token_type_ids"] = (ids == pair.processor.image_token_id).astype(int)
    tensors = {name: torch.tensor(x, dtype=torch.long) for name, x in arrays.items()}
    return {**tensors, **their_pixels(pair, rows)}


def their_logits(pair: Pair, model: Any, ids: np.ndarray, mask: np.ndarray, rows: tuple[int, ...]) -> np.ndarray:
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        return model(**their_inputs(pair, ids, mask, rows)).logits.numpy()


def their_log_probs(pair: Pair, model: Any, row: int, prefix: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Of one answer behind its unpadded prompt."""
    torch, _ = torch_and_transformers()
    line = np.concatenate([prefix, answer])[None]
    logits = their_logits(pair, model, line, np.ones_like(line), (row,))[0, len(prefix) - 1 : -1]
    return torch.tensor(logits).log_softmax(-1).numpy()[np.arange(len(answer)), answer]


def test_images_and_ids_are_transformers_own(pair: Pair) -> None:
    torch_and_transformers()
    reader = pair.processor.image_reader
    for size in (*SIZES, *(LARGE if reader.pan_and_scan else ())):
        made = crops(pair, [picture(*size)])
        plan, arrays = reader.plan(lambda size=size: size), reader.read(picture(*size))
        assert plan.shapes == {"pixels": (1 + made["num_crops"][0], 28, 28, 3)}
        assert plan.tokens == TOKENS * (1 + made["num_crops"][0]) == sum(plan.runs)
        np.testing.assert_allclose(arrays["pixels"].transpose(0, 3, 1, 2), made["pixel_values"], rtol=0, atol=1e-6)
    whole = hf_gemma3.processor()
    for one in pair.asked:
        text = whole.apply_chat_template(one.messages, add_generation_prompt=True)
        shown = [[picture(*size) for size in one.sizes]] if one.sizes else None
        options = {"add_special_tokens": False, "do_pan_and_scan": reader.pan_and_scan}
        made = whole(text=[text], images=shown, **(options if shown else {"add_special_tokens": False}))
        assert pair.processor.encode_prompt(one.prompt).tolist() == made["input_ids"][0]
    assert hf_gemma3.tokenizer().token_to_id("user\n\n\n") is not None, "texts beside images must merge with them"


def test_features_logits_and_log_probs_are_transformers_own(pair: Pair, record_property: Any) -> None:
    torch, _ = torch_and_transformers()
    branches = (jnp.asarray(ANSWERS), jnp.asarray(ANSWER_MASK))

    @nnx.jit
    def ours(model: Any, ids: jax.Array, mask: jax.Array, images: Any) -> tuple[jax.Array, ...]:
        encoded = encode_images(model, images)
        given = (ids, mask, encoded, *branches)
        logits = reference_forward(model, *given[:3])
        log_probs = branch_log_probs(model, *given), branch_log_probs(model, *given, base_learns=True)
        return model.projector(encoded.features), logits, *log_probs

    worst, rows = {}, (0, 1, 2, 3)
    wanted = np.zeros(ANSWERS.shape, np.float32)
    for row, branch in np.ndindex(*ANSWERS.shape[:2]):
        answer = ANSWERS[row, branch][ANSWER_MASK[row, branch]]
        prefix = pair.processor.encode_prompt(pair.asked[row].prompt)
        wanted[row, branch, : len(answer)] = their_log_probs(pair, pair.theirs, row, prefix, answer)
    for side in ("left", "right"):
        batch = inputs(pair, rows, side)
        found = ours(pair.loaded.model, jnp.asarray(batch.token_ids), jnp.asarray(batch.mask), batch.images)
        features, logits, *log_probs = map(np.asarray, found)
        expected = their_logits(pair, pair.theirs, batch.token_ids, batch.mask, rows)
        assert np.abs(expected).max() > 0.3, "the oracle's logits must carry a signal"
        worst[f"logits_{side}"] = np.abs(logits - expected)[batch.mask].max()
        worst[f"log_probs_{side}"] = max(np.abs(one - wanted).max() for one in log_probs)
    with torch.no_grad():
        pooled = pair.theirs.model.get_image_features(**their_pixels(pair, rows)).pooler_output.numpy()
    assert batch.images is not None
    counts = batch.images["tokens"].sum(axis=1)
    flat = np.concatenate([features[row, :count] for row, count in enumerate(counts)])
    worst["features"] = np.abs(flat - pooled.reshape(flat.shape)).max()
    for key, value in worst.items():
        record_property(key, float(value))
    assert max(worst.values()) < 1e-4, worst


def generator(pair: Pair, **sampling: Any) -> Generator:
    return Generator(
        pair.loaded.model,
        eos_token_id=pair.processor.eos_token_ids,
        pad_token_id=pair.processor.pad_token_id,
        mesh=make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS, **sampling),
        batch_size=4,
        tokenizer_size=pair.processor.text.size,
    )


def test_answers_are_transformers_own(pair: Pair) -> None:
    """Greedy tokens, and what sampled ones are worth."""
    torch, _ = torch_and_transformers()
    processor = pair.processor
    batch = inputs(pair)
    greedy = generator(pair, temperature=0.0)(batch)
    sampled = generator(pair, num_candidates=3, temperature=1.2, seed=5)(batch)
    never = [processor.image_token_id, processor.pad_token_id, *range(processor.text.size, 352)]
    for row in range(len(pair.asked)):
        ids = batch.token_ids[row][batch.mask[row]][None]
        with torch.no_grad():
            answer = pair.theirs.generate(
                **their_inputs(pair, ids, np.ones_like(ids), (row,)),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                suppress_tokens=never,
                pad_token_id=processor.pad_token_id,
                eos_token_id=list(processor.eos_token_ids),
            )
        assert greedy.token_ids[row, 0, : greedy.lengths[row, 0]].tolist() == answer[0, ids.shape[1] :].tolist()
        for k in range(3):
            drawn = sampled.token_ids[row, k, : sampled.lengths[row, k]]
            wanted = their_log_probs(pair, pair.theirs, row, ids[0], drawn)
            np.testing.assert_allclose(sampled.log_probs[row, k, : len(drawn)], wanted, rtol=0, atol=1e-4)


def test_contrastive_decoding_equals_two_plain_passes(saved: tuple[Any, Loaded]) -> None:
    """Against transformers with the image and with one of the mean colour."""
    torch, _ = torch_and_transformers()
    pair = Pair(*saved, Processor.from_pretrained(saved[1].directory, "chat", "pad", pan_and_scan=True))
    alpha, beta, batch = 4.0, 0.02, inputs(pair, (0, 2))
    out = generator(pair, temperature=0.0, contrast_alpha=alpha, contrast_beta=beta)(batch)
    never = [pair.processor.image_token_id, pair.processor.pad_token_id, *range(pair.processor.text.size, 352)]
    plain_differs = False
    for place, row in enumerate((0, 2)):
        ids, answer = batch.token_ids[place][batch.mask[place]], out.token_ids[place, 0, : out.lengths[place, 0]]
        line = np.concatenate([ids, answer])[None]
        given = their_inputs(pair, line, np.ones_like(line), (row,))
        with torch.no_grad():
            seen, blank = (
                model.log_softmax(-1)[0, len(ids) - 1 : -1].numpy()
                for model in (
                    pair.theirs(**given).logits,
                    pair.theirs(**given | {"pixel_values": torch.zeros_like(given["pixel_values"])}).logits,
                )
            )
        plausible = seen >= seen.max(-1, keepdims=True) + np.log(beta)
        combined = np.where(plausible, (1 + alpha) * seen - alpha * blank, -np.inf)
        combined[:, never] = -np.inf
        assert combined.argmax(-1).tolist() == answer.tolist()
        plain_differs |= bool((combined.argmax(-1) != seen.argmax(-1)).any())
    assert plain_differs


@pytest.mark.parametrize("kind", ("int8", "nf4"))
def test_a_quantised_base_is_transformers_with_the_rounded_weights(kind: str, tmp_path: Path) -> None:
    theirs, _ = hf_gemma3.saved(tmp_path, text={"hidden_size": 64, "intermediate_size": 128})
    loaded = load_float32(tmp_path, quantization=kind)
    pair = Pair(theirs, loaded, Processor.from_pretrained(tmp_path, "chat", "pad"))
    batch, rows = inputs(pair), (0, 1, 2, 3)
    before = their_logits(pair, theirs, batch.token_ids, batch.mask, rows)
    assert hf_models.quantise(theirs, kind) == 28
    expected = their_logits(pair, theirs, batch.token_ids, batch.mask, rows)
    assert np.abs(expected - before)[batch.mask].max() > 0.003
    forward = nnx.jit(lambda model, *x: reference_forward(model, *x[:2], encode_images(model, x[2])))
    found = np.asarray(forward(loaded.model, batch.token_ids, batch.mask, batch.images))
    np.testing.assert_allclose(found[batch.mask], expected[batch.mask], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_eight_devices_equal_one(saved: tuple[Any, Loaded]) -> None:
    """Logits, answers and gradients of adapters, data parallel and split three ways."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, [here, here.parent, here.parents[1]])),
    }
    command = [sys.executable, str(here / "mesh_gemma3.py"), str(saved[1].directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal on") == 2


RANK = LoRAConfig(lora_rank=2, lora_alpha=4.0, target_modules=["q_proj", "v_proj", "down_proj"], train_projector=True)


def test_adapters_and_exports_are_pefts_own(saved: tuple[Any, Loaded], tmp_path: Path) -> None:
    """An adapter of ours says in PEFT what it says here, alone and merged, and comes back bit by bit."""
    torch, _ = torch_and_transformers()
    peft = pytest.importorskip("peft")
    pair = Pair(*saved, Processor.from_pretrained(saved[1].directory, "chat", "pad"))
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
    assert len(adapted) == 12 and not any("vision" in name for name in adapted)
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
    assert batch.images is not None
    tokens = int(batch.images["tokens"].sum(axis=1).max())

    @nnx.jit
    def both(model: Any, images: Any) -> Any:
        zeros = images | {"pixels": jnp.zeros_like(images["pixels"])}
        return blank_images(model, images, 4, tokens).features, encode_images(model, zeros).features

    blank, zeros = both(pair.loaded.model, batch.images)
    np.testing.assert_allclose(blank[:, : zeros.shape[1]], zeros[:, : blank.shape[1]], rtol=0, atol=1e-5)
    assert blank.shape[1] >= tokens


VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False, "text": {"tie_word_embeddings": False, "attention_bias": True}},
    "untied_at_the_top": {"tie_word_embeddings": False},
    "full_alone": {
        "text": {"layer_types": ["full_attention"] * 4, "num_key_value_heads": 1, "rms_norm_eps": 1e-2},
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-2, "image_size": 32},
        "mm_tokens_per_image": 16,
    },
    "sliding_alone": {"text": {"layer_types": ["sliding_attention"] * 4, "final_logit_softcapping": 5.0}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_switches_are_transformers_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs behind the last layer that computes every token, and before it."""
    fields = VARIANTS[name]
    monkeypatch.setattr(hf_gemma3, "SIDE", fields.get("vision", {}).get("image_size", hf_gemma3.SIDE))
    theirs, loaded = hf_gemma3.saved(tmp_path, seed=len(name), **fields)
    pair = Pair(theirs, loaded, Processor.from_pretrained(tmp_path, "chat", "pad"))
    batch = inputs(pair, (0, 3))
    branches = (jnp.asarray(ANSWERS[[0, 3]]), jnp.asarray(ANSWER_MASK[[0, 3]]))

    @nnx.jit
    def ours(model: Any, ids: jax.Array, mask: jax.Array, images: Any) -> tuple[jax.Array, jax.Array]:
        inputs = (ids, mask, encode_images(model, images), *branches)
        return branch_log_probs(model, *inputs), branch_log_probs(model, *inputs, base_learns=True)

    for found in ours(loaded.model, batch.token_ids, batch.mask, batch.images):
        for place, row in enumerate((0, 3)):
            answer = ANSWERS[row, 0][ANSWER_MASK[row, 0]]
            prefix = pair.processor.encode_prompt(pair.asked[row].prompt)
            wanted = their_log_probs(pair, theirs, row, prefix, answer)
            np.testing.assert_allclose(found[place, 0, : len(answer)], wanted, rtol=0, atol=1e-4)


def test_what_cannot_be_read_is_one_line(saved: tuple[Any, Loaded], tmp_path: Path) -> None:
    folder = saved[1].directory
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    contents = {name: json.loads((folder / name).read_text()) for name in files}
    vision, text = contents["config.json"]["vision_config"], contents["config.json"]["text_config"]
    for file, changes, message in (
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIP"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}}, "config.json says 28 x 28 pixels"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize and do_convert_rgb must be true"),
        ("preprocessor_config.json", {"image_std": [1]}, "malformed image processor settings"),
        ("config.json", {"boi_token_index": 9}, "<start_of_image> stands beside images, 9 in config.json"),
        ("config.json", {"image_token_index": 9}, "image_token_index is 9 in config.json"),
        ("config.json", {"mm_tokens_per_image": 10}, "mm_tokens_per_image is 10"),
        ("config.json", {"mm_tokens_per_image": 25}, "mm_tokens_per_image is 25"),
        ("config.json", {"vision_config": {**vision, "vision_use_head": True}}, r"vision_config\.vision_use_head"),
        ("config.json", {"vision_config": {**vision, "model_type": "clip_vision_model"}}, "vision_config.model_type"),
        ("config.json", {"text_config": {**text, "model_type": "gemma2"}}, "gemma3 model has gemma3_text"),
    ):
        for name, content in contents.items():
            (tmp_path / name).write_text(json.dumps({**content, **(changes if name == file else {})}))
        with pytest.raises(UserError, match=message) as caught:
            Processor.from_pretrained(tmp_path, "chat", "pad")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"model\.max_pixels: images of a gemma3 model are all of one size"):
        Processor.from_pretrained(folder, "chat", "pad", max_pixels=100)
    with pytest.raises(UserError, match=r"model\.pan_and_scan: a llava model is shown no crops"):
        Processor.from_pretrained("builtin:quickstart-base", "plain", "pad", pan_and_scan=True)
    plain = Processor.from_pretrained(folder, "chat", "pad")
    cropped = Processor.from_pretrained(folder, "chat", "pad", pan_and_scan=True)
    assert plain.image_reader.key() != cropped.image_reader.key()
    one = ASKED[True][0].prompt
    travelling = dataclasses.replace(one, tokens=plain.tokenise(one))
    assert cropped.encode_prompt(travelling).tolist() == cropped.encode_prompt(one).tolist()
