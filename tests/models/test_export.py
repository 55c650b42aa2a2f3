"""Exports against transformers and PEFT: equal logits, the published layout, nothing half-written."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
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
from model_inputs import encoded

from m3po_jax.config import LoRAConfig
from m3po_jax.errors import UserError
from m3po_jax.models import lora
from m3po_jax.models.export import export_adapter, export_model, load_adapter, read_adapter, vllm_hint
from m3po_jax.models.forward import reference_forward
from m3po_jax.models.registry import Loaded, load_model
from m3po_jax.models.safetensors_io import DTYPES, PendingTensor, open_directory, read_header, write_directory

ROWS = np.array([[1, 5, *[IMAGE] * PATCHES, 7, 9], [1, *[IMAGE] * PATCHES, 8, 9, 2]])
PIXELS = images(2, seed=4)
RANK = LoRAConfig(lora_rank=4, lora_alpha=6.0)


def our_logits(model: nnx.Module) -> np.ndarray:
    def forward(model: Any, pixels: Any) -> Any:
        return reference_forward(model, jnp.asarray(ROWS), jnp.ones(ROWS.shape), encoded(model, pixels))

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


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, None), (8, None), (16, None), (17, 32), (32, 32), (65, 128), (128, 128), (129, 256), (257, 320), (321, 512)],
)
def test_vllm_hint_names_a_rank_that_vllm_accepts(rank: int, expected: int | None) -> None:
    flags = f"vLLM needs --enable-lora --max-lora-rank {expected} for this adapter"
    assert vllm_hint(rank) == (flags if expected else None)


def test_adapters_that_vllm_refuses_are_told_so() -> None:
    instead = "export the merged model with --format huggingface"
    assert vllm_hint(4, trained_projector=True) == f"vLLM serves no adapter with a trained projector: {instead}"
    assert vllm_hint(4, parts=["vision_tower"]) == f"vLLM serves no adapter of the vision tower: {instead}"
    assert vllm_hint(513) == f"vLLM serves no adapter of rank 513 (at most 512): {instead}"


def test_an_adapters_own_layers_decide_what_vllm_is_said_to_serve(loaded: Loaded, tmp_path: Path) -> None:
    config = LoRAConfig(
        lora_rank=4, lora_alpha=6.0, target_modules=["q_proj", "vision_tower.fc1", "projector.linear_1"]
    )
    adapt(loaded.model, config)
    hint = export_adapter(loaded.model, "x", tmp_path / "a", config)
    assert hint is not None and hint.startswith("vLLM serves no adapter of the projector and the vision tower:")


def in_dtypes(loaded: Loaded, kinds: Any) -> dict[str, np.ndarray]:
    """Rewrites the base with types from `kinds` in turn; returns its tensors."""
    tensors = {name: tensor.read() for name, tensor in open_directory(loaded.directory).items()}
    cast = {
        name: tensors[name].astype(kind) for name, kind in zip(sorted(tensors), itertools.cycle(kinds), strict=False)
    }
    pending = [PendingTensor(name, value.shape, value.dtype, lambda v=value: v) for name, value in cast.items()]
    write_directory(loaded.directory, pending)
    return cast


F16, BF16, F32 = DTYPES["F16"], DTYPES["BF16"], DTYPES["F32"]


@pytest.mark.parametrize("kinds", [[F16], [BF16], [F32], [BF16, F16, F32]], ids=["f16", "bf16", "f32", "mixed"])
@pytest.mark.parametrize("memory", ["bfloat16", "float32"])
def test_what_training_left_alone_comes_out_bit_by_bit(
    loaded: Loaded, tmp_path: Path, kinds: list[np.dtype], memory: str
) -> None:
    """Whatever memory rounded it to; and config.json says a type that loses nothing of it."""
    base = in_dtypes(loaded, kinds)
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    config = LoRAConfig(lora_rank=4, lora_alpha=6.0, target_modules=["q_proj"])
    half = load_model(loaded.directory, dtype="float32", param_dtype=memory)
    adapt(half.model, config)
    bias = half.model.projector.linear_1.bias
    bias[...] = bias[...] + 0.25
    touched = {key for key in base if key.endswith("q_proj.weight") and key.startswith("language_model")}
    touched |= {"multi_modal_projector.linear_1.bias"}
    out = export_model(half.model, half, tmp_path / "out")
    exported = open_directory(out)
    assert exported.keys() == base.keys()
    for key, tensor in exported.items():
        assert tensor.dtype == base[key].dtype, key
        assert (tensor.read().tobytes() == base[key].tobytes()) == (key not in touched), key
    # W + (α/r) B A onto what is stored, rounded once.
    linear = half.model.decoder.layers.attention.q_proj
    a, b = (np.asarray(x[...][1], np.float64) for x in (linear.lora_a, linear.lora_b))
    exact = base[name].astype(np.float64) + linear.lora_scale * (a @ b).T
    rounded = exact.astype(np.float32).astype(base[name].dtype).astype(np.float64)
    spacing = np.abs(exact) * float(ml_dtypes.finfo(base[name].dtype).eps)
    assert (np.abs(exported[name].read().astype(np.float64) - exact) <= 0.51 * spacing + 1e-6).all()
    if base[name].dtype != F32:  # float32 sums differ in their last bit by the order of summation
        assert np.mean(exported[name].read().astype(np.float64) == rounded) > 0.98

    # Without a dtype of ours, transformers loads every value as it was written.
    _, transformers = torch_and_transformers()
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    theirs = canonical_state(model.float())
    for key, tensor in exported.items():
        np.testing.assert_array_equal(theirs[key], tensor.read().astype(np.float32), err_msg=key)


@pytest.mark.parametrize("stated", ["torch_dtype", "dtype", None])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_config_says_the_written_type(loaded: Loaded, tmp_path: Path, stated: str | None, dtype: str) -> None:
    """A base that says float16 with a value that float16 does not hold: transformers must not read inf."""
    torch, transformers = torch_and_transformers()
    in_dtypes(loaded, [BF16])
    path = loaded.directory / "config.json"
    raw = json.loads(path.read_text())
    for section in (raw, raw["text_config"], raw["vision_config"]):
        section.pop("dtype", None)
        section.update({stated: "float16"} if stated else {})
    path.write_text(json.dumps(raw))
    base = load_model(loaded.directory, dtype="float32", param_dtype="float32")
    scale = base.model.decoder.norm.scale
    scale[...] = scale[...].at[3].set(70000.0)
    if dtype == "float16":
        with pytest.raises(UserError, match="does not fit float16; export with --dtype bfloat16"):
            export_model(base.model, base, tmp_path / "out", dtype=dtype)
        return
    out = export_model(base.model, base, tmp_path / "out", dtype=dtype)
    written = json.loads((out / "config.json").read_text())
    if stated is None:  # and none is needed where the tensors have the base's own type
        assert written == (raw if dtype == "bfloat16" else {**raw, "torch_dtype": dtype})
    else:
        parts = {part: {**raw[part], stated: dtype} for part in ("text_config", "vision_config")}
        assert written == {**raw, stated: dtype, **parts}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    norm = model.state_dict()["model.language_model.norm.weight"]
    assert norm.dtype == getattr(torch, dtype) and norm[3] == torch.tensor(70000.0).to(norm.dtype)


def test_base_and_adapter_in_peft_are_the_merged_model(loaded: Loaded, tmp_path: Path) -> None:
    """Of a float16 base that memory held in bfloat16: PEFT's own merge of the exported adapter, to a rounding."""
    peft = pytest.importorskip("peft")
    in_dtypes(loaded, [F16])
    config = LoRAConfig(lora_rank=4, lora_alpha=6.0, train_projector=True)
    half = load_model(loaded.directory, dtype="float32", param_dtype="bfloat16")
    adapt(half.model, config)
    kernel = half.model.projector.linear_2.kernel
    kernel[...] = kernel[...] * 1.5
    export_adapter(half.model, str(loaded.directory), tmp_path / "adapter", config, base=half)
    out = export_model(half.model, half, tmp_path / "merged")
    wrapped = peft.PeftModel.from_pretrained(read_by_transformers(loaded.directory), tmp_path / "adapter")
    theirs = canonical_state(wrapped.merge_and_unload())
    for name, tensor in open_directory(out).items():
        np.testing.assert_allclose(
            tensor.read().astype(np.float64), theirs[name], rtol=2.0**-11, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize(("dtype", "code"), [("auto", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_an_adapter_is_written_in_the_type_asked_for(loaded: Loaded, tmp_path: Path, dtype: str, code: str) -> None:
    config = LoRAConfig(lora_rank=4, lora_alpha=6.0, train_projector=True)
    adapt(loaded.model, config)
    export_adapter(loaded.model, "x", tmp_path / "a", config, dtype=dtype)
    stored = read_header(tmp_path / "a/adapter_model.safetensors")
    assert {tensor.code for tensor in stored.values()} == {code}
    linear = loaded.model.decoder.layers.attention.q_proj
    factor = stored["base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_B.weight"].read()
    np.testing.assert_array_equal(factor, np.asarray(linear.lora_b[...][0]).T.astype(DTYPES[code]))


@pytest.mark.parametrize("said", [LoRAConfig(lora_rank=8, lora_alpha=12.0), LoRAConfig(lora_rank=4, lora_alpha=8.0)])
def test_an_adapter_is_not_exported_under_another_rank_or_alpha(
    loaded: Loaded, tmp_path: Path, said: LoRAConfig
) -> None:
    adapt(loaded.model)
    with pytest.raises(UserError, match=f"rank 4 and alpha 6, not {said.lora_rank} and {said.lora_alpha:g}"):
        export_adapter(loaded.model, "x", tmp_path / "a", said)


def test_the_bases_readme_is_not_the_exports(loaded: Loaded, tmp_path: Path) -> None:
    (loaded.directory / "README.md").write_text("---\nlicense: llama2\n---\n# The base")
    (loaded.directory / "LICENSE.txt").write_text("kept")
    out = export_model(loaded.model, loaded, tmp_path / "plain")
    assert not (out / "README.md").exists() and (out / "LICENSE.txt").read_text() == "kept"
    out = export_model(loaded.model, loaded, tmp_path / "own", texts={"README.md": "# Ours"})
    assert (out / "README.md").read_text() == "# Ours"


def test_every_field_of_pefts_adapters_is_read_refused_or_without_effect() -> None:
    """Fails when PEFT gains a field: decide what it does to an adapter that is loaded."""
    peft = pytest.importorskip("peft")
    fields = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    sorted_out = {*read_adapter.READ, *read_adapter.WITHOUT_EFFECT, *read_adapter.ONLY}
    assert not fields.keys() - sorted_out
    assert len(sorted_out) == len(read_adapter.READ) + len(read_adapter.WITHOUT_EFFECT) + len(read_adapter.ONLY)
    for name, (only, _) in read_adapter.ONLY.items():
        if name in fields:
            field = fields[name]
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            assert default == only, f"{name}: PEFT's default is {default!r}"


REWRITING = ("pissa", "pissa_niter_4", "olora", "OLoRA", "loftq", "corda", "lora_ga", "tomorrow's")
PLAIN: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": False},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "mica"},
    {"use_rslora": True, "lora_dropout": 0.5, "layers_to_transform": [1]},
]


@pytest.mark.parametrize("settings", PLAIN, ids=str)
def test_initialisations_that_leave_the_base_alone_are_read_as_peft_reads_them(
    loaded: Loaded, tmp_path: Path, settings: dict[str, Any]
) -> None:
    torch, _ = torch_and_transformers()
    peft = pytest.importorskip("peft")
    modules = ["q_proj", "up_proj"] if "layers_to_transform" in settings else r".*language_model.*\.(q_proj|up_proj)"
    if "layers_to_transform" in settings:
        settings = settings | {"exclude_modules": ".*vision.*", "layers_pattern": "layers"}
    init = settings.get("init_lora_weights", True)
    # The file names the initialisation that is asked about; what it draws is not what is compared.
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, **{**settings, "init_lora_weights": True})
    wrapped = peft.get_peft_model(read_by_transformers(loaded.directory), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": init}))
    again = peft.PeftModel.from_pretrained(read_by_transformers(loaded.directory), tmp_path / "adapter").eval()
    load_adapter(loaded.model, tmp_path / "adapter")
    np.testing.assert_allclose(our_logits(loaded.model), their_logits(again), atol=1e-4)


@pytest.mark.parametrize(
    "field",
    [
        *({"init_lora_weights": name} for name in REWRITING),
        *({name: value} for name, value in {
            "use_dora": True, "fan_in_fan_out": True, "bias": "lora_only", "lora_bias": True, "use_qalora": True,
            "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "layer_replication": [[0, 2], [1, 3]],
            "trainable_token_indices": [5], "target_parameters": ["experts.up"], "alora_invocation_tokens": [3],
            "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1.0},
            "monteclora_config": {"x": 1}, "velora_config": {"scale": 1.0}, "megatron_config": {"x": 1},
            "ensure_weight_tying": True, "a_field_of_tomorrow": 3,
        }.items()),
    ],
    ids=str,
)  # fmt: skip
def test_adapters_that_are_not_plain_are_refused_by_the_fields_name(
    loaded: Loaded, tmp_path: Path, field: dict[str, Any]
) -> None:
    adapt(loaded.model)
    export_adapter(loaded.model, "x", tmp_path / "a", RANK)
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(UserError, match=f"only plain LoRA adapters are read.*{next(iter(field))}=.*merge it"):
        load_adapter(loaded.model, tmp_path / "a")


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = llava(text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    directory = write(tmp_path / "base", canonical_state(model), model.config.to_dict())
    loaded = load_float32(directory)
    out = export_model(loaded.model, loaded, tmp_path / "out", dtype="float32")
    assert "language_model.lm_head.weight" not in open_directory(out)
    np.testing.assert_allclose(their_logits(read_by_transformers(out)), our_logits(loaded.model), atol=1e-4)


def test_a_head_of_its_own_is_not_tied_again(loaded: Loaded, tmp_path: Path) -> None:
    """Of a config.json that ties beside weights that do not: as transformers 4 reads it, the head would be lost."""
    tied = {**loaded.raw_config, "tie_word_embeddings": True}
    tied["text_config"] = {**tied["text_config"], "tie_word_embeddings": True}
    out = export_model(
        loaded.model,
        dataclasses.replace(loaded, description=dataclasses.replace(loaded.description, raw_config=tied)),
        tmp_path / "out",
    )
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["text_config"]["tie_word_embeddings"] is False
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
