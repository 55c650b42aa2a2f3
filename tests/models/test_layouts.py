"""Loading from every published layout, into every mesh, and the errors of broken directories."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_models import canonical_state, dual_encoder, llava, load_float32, shared_data, torch_and_transformers, write
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.config import MeshConfig
from m3po_jax.errors import UserError
from m3po_jax.hosts.sharding import make_mesh
from m3po_jax.models.llava import model as llava_model
from m3po_jax.models.llava.config import llava_config
from m3po_jax.models.llava.weights import canonical_name, tensor_map
from m3po_jax.models.registry import describe, load_model, resolve_directory
from m3po_jax.models.safetensors_io import PendingTensor, open_directory, write_directory
from m3po_jax.models.tensor_map import Source, expected_tensors, parameters


def flat(model: nnx.Module) -> dict[tuple[Any, ...], np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    left, right = flat(a), flat(b)
    assert left.keys() == right.keys()
    for path, value in left.items():
        np.testing.assert_array_equal(value, right[path], err_msg=str(path))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return llava(seed=3, text={"num_key_value_heads": 2})


@pytest.fixture
def canonical(tiny: Any, tmp_path: Path) -> Path:
    return write(tmp_path / "canonical", canonical_state(tiny), tiny.config.to_dict())


def as_4_52(name: str) -> str:
    rules = json.loads((shared_data() / "llava15/original_to_hf_keys.json").read_text())["hf_4_52_prefix_rules"]
    return next(new + name[len(old) :] for old, new in rules if name.startswith(old))


def as_5(name: str) -> str:
    return as_4_52(name).replace("vision_tower.vision_model.", "vision_tower.")


def as_original(name: str) -> str:
    rules = json.loads((shared_data() / "llava15/original_to_hf_keys.json").read_text())["prefix_rules"]
    return next(old + name[len(new) :] for old, new in rules if name.startswith(new))


@pytest.mark.parametrize("rename", [as_4_52, as_5, as_original])
def test_every_layout_loads_the_same(tiny: Any, canonical: Path, tmp_path: Path, rename: Any) -> None:
    state = {rename(name): value for name, value in canonical_state(tiny).items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    state["vision_tower.vision_model.embeddings.position_ids"] = np.ones(5, np.float32)
    other = write(tmp_path / "other", state, tiny.config.to_dict())
    assert_same(load_float32(canonical).model, load_float32(other).model)


def test_save_pretrained_of_this_transformers_loads_the_same(tiny: Any, canonical: Path, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "own", max_shard_size="20KB")
    assert (tmp_path / "own/model.safetensors.index.json").is_file()
    assert_same(load_float32(canonical).model, load_float32(tmp_path / "own").model)


def original_release(tiny: Any, directory: Path, rows: int) -> Path:
    """What the original LLaVA release looks like: no tower, `rows` of vocabulary, its own config keys."""
    state = {as_original(n): v for n, v in canonical_state(tiny).items() if not n.startswith("vision_tower")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = np.ascontiguousarray(state[name][:rows])
    text = tiny.config.text_config
    config = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": rows,
        "mm_vision_tower": "owner/not-reachable",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": tiny.config.vision_config.hidden_size,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
    }
    return write(directory, state, config)


def test_original_release_takes_its_tower_from_clip(tiny: Any, canonical: Path, tmp_path: Path) -> None:
    _, transformers = torch_and_transformers()
    tower = transformers.CLIPVisionModel(tiny.config.vision_config)
    tower.load_state_dict(tiny.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "clip")
    original = original_release(tiny, tmp_path / "original", rows=60)
    loaded = load_float32(original, vision_tower=tmp_path / "clip")
    full = load_float32(canonical)
    assert loaded.config == full.config
    assert loaded.raw_config["architectures"] == ["LlavaForConditionalGeneration"]
    ours, theirs = flat(loaded.model), flat(full.model)
    for path, value in theirs.items():
        padded = {("decoder", "embed_tokens", "table"): 0, ("decoder", "lm_head", "kernel"): 1}.get(path)
        if padded is None:
            np.testing.assert_array_equal(ours[path], value)
            continue
        mine, given = np.moveaxis(ours[path], padded, 0), np.moveaxis(value, padded, 0)
        np.testing.assert_array_equal(mine[:60], given[:60])
        np.testing.assert_allclose(mine[60:], np.tile(given[:60].mean(0), (4, 1)), rtol=1e-5, atol=1e-7)


def test_a_whole_clip_model_serves_as_the_tower(tiny: Any, canonical: Path, tmp_path: Path) -> None:
    clip = dual_encoder("clip", seed=9)
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="linear_1"):  # its width does not fit this projector
        load_float32(canonical, vision_tower=tmp_path / "clip")
    wide = llava(
        vision={"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    )
    wide.save_pretrained(tmp_path / "wide")
    loaded = load_float32(tmp_path / "wide", vision_tower=tmp_path / "clip")
    assert loaded.config.vision.encoder.num_layers == 3
    expected = clip.vision_model.pre_layrnorm.weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(loaded.model.vision_tower.pre_layernorm.scale[...]), expected)


def test_original_release_without_its_tower_says_so(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("We couldn't connect to the hub\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"owner/not-reachable.*couldn't connect"):
        load_float32(original_release(tiny, tmp_path / "original", rows=60))


def test_seven_billion_names_and_shapes_map_both_ways() -> None:
    """The published index of LLaVA-1.5-7B against our abstract tree: nothing missing, nothing left over."""
    facts = json.loads((shared_data() / "llava15/weight_index.json").read_text())
    hf = json.loads((shared_data() / "llava15/config_facts.json").read_text())["hf"]["stated"]
    config = llava_config(hf, "config_facts.json")
    abstract = nnx.eval_shape(partial(llava_model.build, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    leaves = parameters(abstract, tensor_map(config))
    published = {name: tuple(entry["shape"]) for name, entry in facts["tensors"].items()}
    assert len(published) == 686
    assert expected_tensors(leaves) == published
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == facts["n_params"]
    renamed = json.loads((shared_data() / "llava15/original_to_hf_keys.json").read_text())["map"]
    assert {canonical_name(original) for original in renamed} == set(published)
    assert all(canonical_name(original) == name for original, name in renamed.items())
    assert all(canonical_name(as_5(name)) == canonical_name(as_4_52(name)) == name for name in published)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_load_exactly(tiny: Any, tmp_path: Path, dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    state = canonical_state(tiny)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config.to_dict()))
    write_directory(tmp_path, [PendingTensor(n, v.shape, kind, lambda v=v: v) for n, v in state.items()])
    model = load_model(tmp_path, dtype="float32", param_dtype=dtype).model
    table = np.asarray(model.decoder.embed_tokens.table[...])
    assert table.dtype == kind
    np.testing.assert_array_equal(table, state["language_model.model.embed_tokens.weight"].astype(kind))


@pytest.mark.skipif(jax.device_count() < 8, reason="runs inside the next test, with eight devices")
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 1, 8)])
def test_sharded_loading_equals_unsharded(canonical: Path, sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    sharded = load_float32(canonical, mesh=mesh).model
    assert_same(sharded, load_float32(canonical).model)
    kernel = sharded.decoder.layers.mlp.up_proj.kernel[...]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // sizes[1], 48 // sizes[2])


@pytest.mark.skipif(jax.device_count() >= 8, reason="the test before runs as it is")
def test_sharded_loading_on_eight_devices() -> None:
    """The test before, in a process that has the devices."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "sharded_loading_equals",
        ],
        env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]


def test_random_initialisation_needs_no_weights(canonical: Path) -> None:
    (canonical / "model.safetensors").unlink()
    first = load_float32(canonical, init="random", seed=1).model
    assert_same(first, load_float32(canonical, init="random", seed=1).model)
    other = load_float32(canonical, init="random", seed=2).model
    assert not np.array_equal(
        flat(first)["decoder", "embed_tokens", "table"], flat(other)["decoder", "embed_tokens", "table"]
    )
    with pytest.raises(UserError, match="did you mean"):
        load_float32(canonical, init="randm")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_slice_of_any_source_equals_the_slice_of_the_whole(data: Any) -> None:
    """What a device shard reads is what the whole parameter holds there, for every kind of source."""
    kind = data.draw(st.sampled_from(["same", "linear", "conv", "part", "padded"]))
    rng = np.random.default_rng(0)
    shape = {"conv": (2 * 2 * 3, 5), "padded": (7, 4)}.get(kind, (6, 4))
    whole = rng.normal(size=shape).astype(np.float32)
    source = {
        "part": Source("x", "linear", part=(1, 3)),
        "padded": Source("x", pad_rows=True),
    }.get(kind) or Source("x", kind)
    stored = source.to_stored(whole)
    if kind == "part":
        stored = np.concatenate([stored + 1, stored, stored + 2])
    if kind == "padded":
        stored = whole[:5]
        whole = np.concatenate([stored, np.tile(stored.astype(np.float64).mean(0), (2, 1)).astype(np.float32)])

    class Memory:
        shape = stored.shape

        def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
            return stored[index]

    index = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    np.testing.assert_array_equal(source.read(Memory(), tuple(index), shape), whole[tuple(index)])
    if kind != "padded":
        assert source.stored_shape(shape) == stored.shape


def test_host_memory_stays_one_layer_deep(canonical: Path, monkeypatch: Any) -> None:
    """No read is larger than one stored tensor, although parameters stack all layers."""
    from m3po_jax.models import safetensors_io

    sizes = []
    read = safetensors_io.StoredTensor.read

    def spy(self: Any, index: tuple[slice, ...] = ()) -> np.ndarray:
        value = read(self, index)
        assert value.base is None, "a view would keep the file mapped"
        sizes.append(value.size)
        return value

    monkeypatch.setattr(safetensors_io.StoredTensor, "read", spy)
    load_float32(canonical)
    stored = open_directory(canonical).values()
    assert sorted(sizes) == sorted(int(np.prod(tensor.shape)) for tensor in stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("multi_modal_projector.linear_1.bias"), r"1 tensors are missing: multi_modal_projector"),
        (lambda s: s.update(extra=np.ones(2, np.float32)), r"1 tensors have no place in the model: extra"),
        (
            lambda s: s.update({"language_model.model.norm.weight": np.ones(31, np.float32)}),
            r"language_model.model.norm.weight has shape \[31\], config.json says \[32\]",
        ),
        (
            lambda s: s.update({"language_model.lm_head.weight": np.ones((65, 32), np.float32)}),
            r"lm_head.weight has shape \[65, 32\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": np.ones(32, np.float32)}),
            "are the same tensor",
        ),
        (lambda s: s.update({"language_model.model.norm.weight": np.ones(32, np.int8)}), "stored as I8"),
    ],
)
def test_wrong_tensors_are_named(tiny: Any, tmp_path: Path, change: Any, message: str) -> None:
    state = canonical_state(tiny)
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        load_float32(write(tmp_path, state, tiny.config.to_dict()))
    assert "\n" not in str(caught.value)


def test_broken_directories_are_named(tiny: Any, canonical: Path, tmp_path: Path) -> None:
    def expect(message: str, path: Path) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_float32(path)
        assert "\n" not in str(caught.value)

    expect("no such directory", tmp_path / "nowhere")
    expect("a file, not a model directory", canonical / "config.json")
    expect("no config.json", tmp_path)

    truncated = tmp_path / "truncated"
    shutil.copytree(canonical, truncated)
    data = (canonical / "model.safetensors").read_bytes()
    for size in (len(data) - 1, len(data) // 2, 20, 4, 0):
        (truncated / "model.safetensors").write_bytes(data[:size])
        expect("truncated or not a safetensors file", truncated)

    (truncated / "model.safetensors").unlink()
    expect("holds no weights", truncated)
    (truncated / "adapter_model.safetensors").write_bytes(data)
    expect("PEFT adapter", truncated)
    (truncated / "adapter_model.safetensors").unlink()
    (truncated / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    expect(r"holds \.bin weights only", truncated)

    sharded = tmp_path / "sharded"
    tiny.save_pretrained(sharded, max_shard_size="40KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (sharded / first).rename(tmp_path / "aside")
    expect(f"names {first}, which is missing", sharded)
    index["weight_map"] = {"x": "../aside"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    expect("not a safetensors file of this directory", sharded)
    (sharded / "model.safetensors.index.json").write_text("[1]")
    expect("not a JSON object", sharded)
    (canonical / "config.json").write_text("{")
    expect("not valid JSON", canonical)
    (canonical / "config.json").write_text('{"model_type": "llavа"}')
    expect("model_type 'llavа' is not supported", canonical)
    (canonical / "config.json").write_text('{"model_type": "llava", "text_config": {"hidden_size": "wide"}}')
    expect("config.json: text_config.hidden_size is 'wide', and must be a whole number", canonical)


def test_where_models_may_come_from(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_directory("owner/name") == tmp_path
    assert asked[0][0] == "owner/name"
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0][1])
    with pytest.raises(UserError, match="no such directory"):
        resolve_directory("a/b/c")
    with pytest.raises(UserError, match="mount the bucket"):
        resolve_directory("gs://bucket/model")
    with pytest.raises(UserError, match="no checkpoint of that name ships"):
        resolve_directory("builtin:../../secrets")
    with pytest.raises(UserError, match="no model was given"):
        resolve_directory("")


def test_a_dual_encoder_takes_no_tower(tmp_path: Path) -> None:
    dual_encoder("clip").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes no vision tower"):
        describe(tmp_path, vision_tower=tmp_path)


def test_random_initialisation_keeps_a_given_tower(tmp_path: Path) -> None:
    clip = dual_encoder("clip", seed=9)
    clip.save_pretrained(tmp_path / "clip")
    wide = llava(vision={"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4})
    config = tmp_path / "model"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(wide.config.to_dict()))
    loaded = load_float32(config, init="random", vision_tower=tmp_path / "clip")
    expected = clip.vision_model.encoder.layers[2].mlp.fc1.weight.detach().numpy().T
    found = np.asarray(loaded.model.vision_tower.encoder.layers.mlp.fc1.kernel[...])[2]
    np.testing.assert_array_equal(found, expected)
