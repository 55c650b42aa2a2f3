"""Exports against transformers and PEFT: equal logits, the published layout, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import (
    IMAGE,
    PATCHES,
    canonical_state,
    dual_encoder,
    images,
    llava,
    load_float32,
    torch_and_transformers,
    write,
)

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter, vllm_hint
from m3po_jax.models.forward import encode_images
from m3po_jax.models.llava.model import reference_forward
from m3po_jax.models.registry import Loaded, load_model
from m3po_jax.models.safetensors_io import open_directory, read_header

ROWS = np.array([[1, 5, *[IMAGE] * PATCHES, 7, 9], [1, *[IMAGE] * PATCHES, 8, 9, 2]])
PIXELS = images(2, seed=4)
RANK = LoRAConfig(lora_rank=4, lora_alpha=6.0)


def our_logits(model: nnx.Module) -> np.ndarray:
    def forward(model: Any, pixels: Any) -> Any:
        return reference_forward(model, jnp.asarray(ROWS), jnp.ones(ROWS.shape), encode_images(model, pixels))

    return np.asarray(nnx.jit(forward)(model, jnp.asarray(PIXELS.transpose(0, 2, 3, 1))[:, None]))


def their_logits(model: Any) -> np.ndarray:
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        return model(input_ids=torch.tensor(ROWS), pixel_values=torch.tensor(PIXELS)).logits.numpy()


def read_by_transformers(directory: Path) -> Any:
    torch, transformers = torch_and_transformers()
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def base_state() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    model = llava(seed=5, text={"num_key_value_heads": 2})
    return canonical_state(model), model.config.to_dict()


@pytest.fixture
def loaded(base_state: Any, tmp_path: Path) -> Loaded:
    directory = write(tmp_path / "base", *base_state)
    (directory / "chat_template.jinja").write_bytes("A chat\r\n—".encode())
    (directory / "tokenizer.model").write_bytes(bytes(range(256)))
    (directory / "nested").mkdir()
    (directory / "nested/notes.txt").write_text("kept")
    (directory / "pytorch_model.bin").write_bytes(b"not copied")
    (directory / ".cache").mkdir()
    (directory / ".cache/x.json").write_text("not copied")
    return load_float32(directory)


def adapt(model: nnx.Module, config: LoRAConfig = RANK, seed: int = 0) -> None:
    """An adapter that changes the logits: B is zero after `attach`."""
    lora.attach(model, config, scope="decoder", rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for linear in lora.adapters(model).values():
        linear.lora_b[...] = jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32)


def test_export_of_an_untouched_model_is_bitwise_the_base(loaded: Loaded, tmp_path: Path) -> None:
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    base, exported = open_directory(loaded.directory), open_directory(out)
    assert base.keys() == exported.keys()
    for name, tensor in base.items():
        np.testing.assert_array_equal(tensor.read(), exported[name].read(), err_msg=name)
    names = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    others = {"config.json", "chat_template.jinja", "tokenizer.model", "nested/notes.txt"}
    assert names == {"model.safetensors", *others}
    for name in others:
        assert (out / name).read_bytes() == (loaded.directory / name).read_bytes()
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_exported_logits_equal_transformers_with_and_without_adapter(
    loaded: Loaded, tmp_path: Path, record_property: Any
) -> None:
    plain = our_logits(loaded.model)
    theirs = their_logits(
        read_by_transformers(export_model(loaded.model, loaded, tmp_path / "plain", dtype="float32"))
    )
    record_property("plain", float(np.abs(plain - theirs).max()))
    assert np.abs(plain - theirs).max() < 1e-4

    adapt(loaded.model)
    adapted = our_logits(loaded.model)
    assert np.abs(adapted - plain).max() > 1e-2
    out = export_model(loaded.model, loaded.directory, tmp_path / "merged", dtype="float32")
    theirs = their_logits(read_by_transformers(out))
    record_property("merged", float(np.abs(adapted - theirs).max()))
    assert np.abs(adapted - theirs).max() < 1e-4
    assert lora.adapters(loaded.model), "the caller's model keeps its adapter"
    np.testing.assert_array_equal(our_logits(loaded.model), adapted)


def test_shards_and_index_are_read_by_transformers(loaded: Loaded, tmp_path: Path) -> None:
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32", shard_bytes=60_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((out / f"model-{i:05d}-of-{len(files):05d}.safetensors").is_file() for i in [1, 2])
    assert index["metadata"]["total_size"] == sum(t.read().nbytes for t in open_directory(out).values())
    assert all(sum(t.read().nbytes for t in read_header(out / f).values()) <= 60_000 for f in files)
    np.testing.assert_allclose(their_logits(read_by_transformers(out)), our_logits(loaded.model), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_merges_before_it_rounds(loaded: Loaded, tmp_path: Path, dtype: str) -> None:
    half = load_model(loaded.directory, dtype="float32", param_dtype="bfloat16")
    adapt(half.model)
    linear = half.model.decoder.layers.attention.q_proj
    a, b = (np.asarray(x[...], np.float64) for x in (linear.lora_a, linear.lora_b))
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    base = open_directory(loaded.directory)[name].read().astype(np.float64)
    exact = base + (linear.lora_scale * a @ b)[1].T  # onto what is stored, not onto what bfloat16 memory holds of it
    stored = open_directory(export_model(half.model, half, tmp_path / "out", dtype=dtype))[name].read()
    step = 2.0 ** (-10 if dtype == "float16" else -7)
    assert (np.abs(stored.astype(np.float64) - exact) <= 0.51 * step * np.abs(exact) + 1e-6).all()


def test_values_that_do_not_fit_are_refused_and_leave_nothing(loaded: Loaded, tmp_path: Path) -> None:
    scale = loaded.model.decoder.norm.scale
    scale[...] = scale[...].at[3].set(1e6)
    with pytest.raises(UserError, match=r"language_model\.model\.norm\.weight.*does not fit float16.*bfloat16"):
        export_model(loaded.model, loaded, tmp_path / "out", dtype="float16")
    scale[...] = scale[...].at[3].set(jnp.nan)
    with pytest.raises(UserError, match="not every value is finite"):
        export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base"]


def test_output_directories_are_never_clobbered(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="own directory"):
        export_model(loaded.model, loaded, loaded.directory, overwrite=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="already holds files"):
        export_model(loaded.model, loaded, out)
    assert (out / "precious").read_text() == "x"
    export_model(loaded.model, loaded, out, overwrite=True)
    assert not (out / "precious").exists() and (out / "model.safetensors").is_file()
    with pytest.raises(UserError, match="did you mean 'float16'"):
        export_model(loaded.model, loaded, tmp_path / "x", dtype="flaot16")


def test_peft_reads_the_adapter_and_wraps_the_decoder_only(
    loaded: Loaded, tmp_path: Path, record_property: Any
) -> None:
    peft = pytest.importorskip("peft")
    adapt(loaded.model)
    hint = export_adapter(loaded.model, str(loaded.directory), tmp_path / "adapter", RANK)
    assert hint is None
    wrapped = peft.PeftModel.from_pretrained(read_by_transformers(loaded.directory), tmp_path / "adapter").eval()
    wrapped_layers = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert len(wrapped_layers) == 3 * 7 and not any("vision" in name for name in wrapped_layers)
    difference = np.abs(their_logits(wrapped) - our_logits(loaded.model)).max()
    record_property("peft", float(difference))
    assert difference < 1e-4

    stored = read_header(tmp_path / "adapter/adapter_model.safetensors")
    prefix = "base_model.model.language_model.model.layers.2.mlp.down_proj.lora_"
    assert stored[f"{prefix}A.weight"].shape == (4, 48)
    assert stored[f"{prefix}B.weight"].shape == (32, 4)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    expected = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6.0, "bias": "none"},
        **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.0},
        "base_model_name_or_path": str(loaded.directory),
        "target_modules": r".*language_model.*\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)",
    }
    assert expected.items() <= written.items()


def test_an_adapter_comes_back_bitwise(loaded: Loaded, tmp_path: Path) -> None:
    config = LoRAConfig(lora_rank=3, lora_alpha=5.0, target_modules=["q_proj", "down_proj"], train_projector=True)
    adapt(loaded.model, config)
    bias = loaded.model.projector.linear_1.bias
    bias[...] = bias[...] + 0.5
    export_adapter(loaded.model, "owner/base", tmp_path / "adapter", config)
    fresh = load_float32(loaded.directory).model
    read = load_adapter(fresh, tmp_path / "adapter")
    assert (read.lora_rank, read.lora_alpha, read.train_projector) == (3, 5.0, True)
    assert read.target_modules == ["down_proj", "q_proj"]
    ours, theirs = lora.adapters(loaded.model), lora.adapters(fresh)
    assert ours.keys() == theirs.keys()
    for path, linear in ours.items():
        np.testing.assert_array_equal(linear.lora_a[...], theirs[path].lora_a[...])
        np.testing.assert_array_equal(linear.lora_b[...], theirs[path].lora_b[...])
        assert linear.lora_a.get_metadata()["axes"] == theirs[path].lora_a.get_metadata()["axes"]
        assert linear.lora_scale == theirs[path].lora_scale
    np.testing.assert_array_equal(our_logits(fresh), our_logits(loaded.model))


def test_a_trained_projector_travels_with_the_adapter(loaded: Loaded, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = LoRAConfig(lora_rank=4, lora_alpha=6.0, train_projector=True)
    adapt(loaded.model, config)
    kernel = loaded.model.projector.linear_2.kernel
    kernel[...] = kernel[...] * 1.5
    export_adapter(loaded.model, str(loaded.directory), tmp_path / "adapter", config)
    wrapped = peft.PeftModel.from_pretrained(read_by_transformers(loaded.directory), tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(wrapped), our_logits(loaded.model), atol=1e-4)


def test_adapters_of_the_tower_and_the_projector(loaded: Loaded, tmp_path: Path) -> None:
    """PEFT puts them where we have them, and they come back."""
    peft = pytest.importorskip("peft")
    names = ["projector.linear_1", "v_proj", "vision_tower.fc1", "vision_tower.q_proj"]
    config = LoRAConfig(lora_rank=4, lora_alpha=6.0, target_modules=names)
    adapt(loaded.model, config)
    parts = {path.split(".")[0] for path in lora.adapters(loaded.model)}
    assert parts == {"decoder", "projector", "vision_tower"} and len(lora.adapters(loaded.model)) == 4
    export_adapter(loaded.model, str(loaded.directory), tmp_path / "adapter", config)
    fresh = load_float32(loaded.directory).model
    assert load_adapter(fresh, tmp_path / "adapter").target_modules == names
    np.testing.assert_array_equal(our_logits(fresh), our_logits(loaded.model))
    wrapped = peft.PeftModel.from_pretrained(read_by_transformers(loaded.directory), tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(wrapped), our_logits(loaded.model), atol=1e-4)


def test_an_adapter_that_peft_wrote_is_read(loaded: Loaded, tmp_path: Path) -> None:
    torch, _ = torch_and_transformers()
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)", use_rslora=True
    )
    wrapped = peft.get_peft_model(read_by_transformers(loaded.directory), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    load_adapter(loaded.model, tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(loaded.model), their_logits(wrapped), atol=1e-4)


def test_bad_adapters_are_named(loaded: Loaded, tmp_path: Path) -> None:
    adapt(loaded.model)
    export_adapter(loaded.model, "x", tmp_path / "a", RANK)
    good = json.loads((tmp_path / "a/adapter_config.json").read_text())
    other = load_float32(loaded.directory).model

    def expect(message: str, **changes: Any) -> None:
        (tmp_path / "a/adapter_config.json").write_text(json.dumps({**good, **changes}))
        with pytest.raises(UserError, match=message):
            load_adapter(other, tmp_path / "a")

    expect("only plain LoRA", peft_type="IA3")
    expect("only plain LoRA", use_dora=True)
    expect("per-layer ranks", rank_pattern={"x": 2})
    expect(r"has shape \[4, 32\], not \[2, 32\]|has shape \[4, 48\]", r=2)
    expect("must be numbers", r="4")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    expect("no adapter_model.safetensors")
    with pytest.raises(UserError, match="has no adapter"):
        export_adapter(other, "x", tmp_path / "b", RANK)


def test_vllm_hint_names_a_rank_that_vllm_accepts() -> None:
    assert vllm_hint(16) is None
    assert "--max-lora-rank 32" in (vllm_hint(17) or "")
    assert "--max-lora-rank 128" in (vllm_hint(128) or "")
    assert "merged" in (vllm_hint(1000) or "")


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = llava(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    directory = write(tmp_path / "base", canonical_state(model), model.config.to_dict())
    loaded = load_float32(directory)
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    assert "language_model.lm_head.weight" not in open_directory(out)
    np.testing.assert_allclose(their_logits(read_by_transformers(out)), our_logits(loaded.model), atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_dual_encoders_come_back_bitwise(kind: str, tmp_path: Path) -> None:
    torch, transformers = torch_and_transformers()
    dual_encoder(kind).save_pretrained(tmp_path / "base")
    loaded = load_float32(tmp_path / "base")
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    base, exported = open_directory(tmp_path / "base"), open_directory(out)
    assert base.keys() == exported.keys()
    for name, tensor in base.items():
        np.testing.assert_array_equal(tensor.read(), exported[name].read(), err_msg=name)
    _, info = transformers.AutoModel.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_bias_that_clip_cannot_store_is_refused(tmp_path: Path) -> None:
    dual_encoder("clip").save_pretrained(tmp_path / "base")
    loaded = load_float32(tmp_path / "base")
    loaded.model.logit_bias[...] = jnp.ones(1)
    with pytest.raises(UserError, match="logit_bias was trained"):
        export_model(loaded.model, loaded, tmp_path / "out")


def test_a_text_only_llama_goes_through_transformers(tmp_path: Path) -> None:
    torch, transformers = torch_and_transformers()
    from hf_models import randomise

    config = transformers.LlamaConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    )
    oracle = randomise(transformers.LlamaForCausalLM(config), 0)
    oracle.save_pretrained(tmp_path / "base")
    loaded = load_float32(tmp_path / "base")
    adapt(loaded.model)
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    export_adapter(loaded.model, str(tmp_path / "base"), tmp_path / "adapter", RANK)
    ids = np.array([[1, 5, 6, 7]])
    ours = nnx.jit(reference_forward)(loaded.model, jnp.asarray(ids), jnp.ones(ids.shape), None)
    peft = pytest.importorskip("peft")
    merged = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    wrapped = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    for model in (merged, wrapped):
        with torch.no_grad():
            np.testing.assert_allclose(ours, model(torch.tensor(ids)).logits.numpy(), atol=1e-4)
