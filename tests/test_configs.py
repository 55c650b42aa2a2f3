"""The recipes that ship: they load, their settings can be meant, and their headers say what the models weigh."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from m3po_jax.config import LoRAConfig, Recipe
from m3po_jax.data.images import IMAGE_FITS
from m3po_jax.data.templates import CHAT, get_template
from m3po_jax.hosts.sharding import spec_for
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models import lora
from m3po_jax.models.config_fields import check_fields
from m3po_jax.models.layers import LoRAParam
from m3po_jax.models.registry import family_of
from m3po_jax.objectives.registry import check_objective
from m3po_jax.pipeline.mock import shrink
from m3po_jax.recipes import load_recipe, override
from m3po_jax.scoring.confidence import VARIANTS
from m3po_jax.selection import check_config
from m3po_jax.training.optimizer import OptimizerSettings, learning_rate_schedule

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("quickstart"))
# Chips that each recipe's header speaks of.
CHIPS = {"llava15_7b_single_gpu": 1, "llava15_13b_m3po_pod": 16}


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [
        line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]
    ]
    return " ".join(comments)


def chips(path: Path) -> int:
    return CHIPS.get(path.stem, 8)


def mesh_sizes(recipe: Recipe, count: int) -> dict[str, int]:
    sizes = dataclasses.asdict(recipe.mesh)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}


def check(recipe: Recipe) -> None:
    check_config(recipe.select)
    check_objective(recipe.train)
    learning_rate_schedule(OptimizerSettings.of(recipe.train), 100)
    assert recipe.model.template == CHAT or get_template(recipe.model.template)
    assert recipe.model.image_fit in IMAGE_FITS
    g = recipe.generate
    SamplingConfig(g.num_candidates, g.temperature, g.top_k, g.top_p, g.max_new_tokens)
    assert g.max_new_tokens <= recipe.train.max_answer_tokens, "a candidate could not be trained on"
    assert set(recipe.score.confidence) <= set(VARIANTS)
    wanted = {recipe.select.confidence, recipe.select.confidence_dispreferred} - {""}
    assert wanted <= set(recipe.score.confidence), "selection needs a variant that is not computed"
    for benchmark in recipe.evaluate.benchmarks.values():
        assert benchmark.metric in ("pope", "chair", "short_answer")


def test_there_are_recipes():
    assert len(FILES) >= 6


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_and_arms_can_be_meant(path):
    recipe = load_recipe(path)
    assert recipe.name != Recipe().name
    check(recipe)
    for name, changes in recipe.arms.items():
        changed = override(recipe, changes, where=name)
        assert changed != recipe
        check(changed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_mock_keeps_the_settings_of_the_method(path):
    recipe = load_recipe(path)
    small = shrink(recipe)
    check(small)
    assert (small.select.rule, small.train.loss_type, small.arms) == (
        recipe.select.rule,
        recipe.train.loss_type,
        recipe.arms,
    )
    assert mesh_sizes(small, 1) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_takes_the_model_that_it_is_named_after(path):
    recipe = load_recipe(path)
    letters = re.sub(r"[^a-z0-9]", "", recipe.model.path.rpartition("/")[2].lower())
    name = next(name for name in MODELS if path.stem.startswith(name))
    assert letters.startswith(name.replace("_", "")) and recipe.score.model != recipe.model.path


def test_names_do_not_collide():
    names = [load_recipe(path).name for path in FILES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_mesh_and_batches_fit_the_hardware_of_the_header(path):
    recipe, count = load_recipe(path), chips(path)
    sizes = mesh_sizes(recipe, count)
    assert math.prod(sizes.values()) == count
    rows = sizes["data"] * sizes["fsdp"]
    micro = recipe.train.batch_size // recipe.train.gradient_accumulation_steps
    assert micro % rows == 0, "rows that do not divide are replicated on every chip"
    assert recipe.generate.batch_size % rows == 0
    # What the header's sums are made of.
    row = "rows" if recipe.train.objective == "sft" else "pairs"
    assert f"{micro // rows} {row} ×" in header(path)
    if recipe.train.objective == "preference":
        assert f"2 × {recipe.train.max_answer_tokens} answer tokens" in header(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_tells_hardware_memory_and_time(path):
    text = header(path)
    assert all(f" {word}" in text for word in ("Hardware:", "Memory, an estimate by arithmetic"))
    assert "Time: not measured." in text
    assert f"configs/{path.name}" in text or "launch/" in text


def llava(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """LLaVA-1.5's ``config.json``."""
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "rms_norm_eps": 1e-5}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064, "model_type": "llama"}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model"}
    return {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": vision}


def qwen25(width: int, layers: int, heads: int, kv_heads: int, mlp: int, rows: int, tied: bool) -> dict[str, Any]:
    """Qwen2.5-VL's ``config.json``, the decoder's fields at the top as it is published."""
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": width}
    return {
        **{"model_type": "qwen2_5_vl", "image_token_id": 151655, "tie_word_embeddings": tied, "rms_norm_eps": 1e-6},
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": rows},
        **{"num_key_value_heads": kv_heads, "intermediate_size": mlp, "max_position_embeddings": 128000},
        **{"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        **{"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 70},
        "vision_config": {**vision, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14},
    }


def qwen3(
    width: int, mlp: int, tied: bool, depth: int, tower: int, tower_mlp: int, deep: list[int]
) -> dict[str, Any]:
    """Qwen3-VL's ``config.json``."""
    text = {
        **{"hidden_size": width, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"head_dim": 128, "intermediate_size": mlp, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 5e6},
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }
    vision = {
        **{"depth": depth, "hidden_size": tower, "num_heads": 16, "intermediate_size": tower_mlp, "patch_size": 16},
        **{"out_hidden_size": width, "num_position_embeddings": 2304, "deepstack_visual_indexes": deep},
    }
    model = {"model_type": "qwen3_vl", "image_token_id": 151655, "tie_word_embeddings": tied}
    return {**model, "text_config": text, "vision_config": vision}


def gemma3(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Gemma 3's ``config.json``, with the values that the published ones leave to the class."""
    text = {
        **{"model_type": "gemma3_text", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "vocab_size": 262208},
        **{"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    }
    vision = {
        **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14},
        "vision_use_head": False,
    }
    model = {"model_type": "gemma3", "image_token_index": 262144, "mm_tokens_per_image": 256}
    return {**model, "text_config": text, "vision_config": vision}


def smolvlm() -> dict[str, Any]:
    """SmolVLM2's ``config.json`` of 500M."""
    text = {
        **{"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32},
        **{"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280},
        **{"rms_norm_eps": 1e-5, "rope_theta": 100000, "max_position_embeddings": 8192},
    }
    vision = {
        **{"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        **{"image_size": 512, "patch_size": 16},
    }
    model = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": 4}
    return {**model, "text_config": text, "vision_config": vision}


# The published configurations, by the beginning of a recipe's name.
MODELS: dict[str, dict[str, Any]] = {
    "smolvlm2_500m": smolvlm(),
    "gemma3_4b": gemma3(2560, 10240, 34, 8, 4),
    "gemma3_12b": gemma3(3840, 15360, 48, 16, 8),
    "llava15_13b": llava(5120, 13824, 40, 40),
    "llava15_7b": llava(4096, 11008, 32, 32),
    "qwen25_vl_3b": qwen25(2048, 36, 16, 2, 11008, 151936, True),
    "qwen25_vl_7b": qwen25(3584, 28, 28, 4, 18944, 152064, False),
    "qwen3_vl_4b": qwen3(2560, 9728, True, 24, 1024, 4096, [5, 11, 17]),
    "qwen3_vl_8b": qwen3(4096, 12288, False, 27, 1152, 4304, [8, 16, 24]),
}
# How many parameters their published indices count.
PARAMETERS = {
    **{"llava15_7b": 7_063_427_072, "qwen25_vl_3b": 3_754_622_976, "qwen25_vl_7b": 8_292_166_656},
    **{"qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696},
    **{"gemma3_4b": 4_300_079_472, "gemma3_12b": 12_187_325_040},
    "smolvlm2_500m": 507_482_304,
}


@functools.cache
def model_of(name: str) -> nnx.Module:
    """One of `MODELS` as a tree of shapes, with the recipes' adapters."""
    raw = MODELS[name]
    family = family_of(raw, name)
    raw = family.normalize(raw, name)
    check_fields(family.sections(raw), raw, name)

    def make() -> nnx.Module:
        config = family.read_config(raw, name)
        model = family.build(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, seed=0)
        lora.attach(model, LoRAConfig(), scope="decoder", rngs=nnx.Rngs(0))
        return model

    return nnx.eval_shape(make)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_the_published_number_of_parameters(name):
    state = nnx.to_flat_state(nnx.state(model_of(name), nnx.Param))
    counts = [math.prod(variable.shape) for _, variable in state if not issubclass(variable.type, LoRAParam)]
    assert sum(counts) == PARAMETERS[name]


class Sizes:
    def __init__(self, shape: dict[str, int]):
        self.shape = shape


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameter_counts_of_the_header(path):
    """The estimates start from counts that the code itself gives: parameters, and a chip's part of the adapters."""
    recipe = load_recipe(path)
    assert recipe.train.lora == LoRAConfig(lora_rank=128, lora_alpha=256)
    model = model_of(next(name for name in MODELS if path.stem.startswith(name)))
    mesh = Sizes(mesh_sizes(recipe, chips(path)))
    frozen = adapters = part = frozen_part = 0.0
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        count = math.prod(variable.shape)
        spec = spec_for(variable.get_metadata()["axes"], variable.shape, mesh)
        split = [(axes,) if isinstance(axes, str) else axes or () for axes in spec]
        share = count / math.prod(mesh.shape[axis] for axes in split for axis in axes)
        if issubclass(variable.type, LoRAParam):
            adapters, part = adapters + count, part + share
        else:
            frozen, frozen_part = frozen + count, frozen_part + share
    text = header(path)
    assert f"{frozen / 1e9:.2f} B parameters × 2 bytes" in text
    assert f"{adapters / 1e6:.0f} M parameters" in text
    assert part == adapters or f"a chip holds {part / 1e6:.0f} M" in text
    numbers = re.search(r"frozen weights .*? ([\d.]+) GB .*?adapters .*? ([\d.]+) GB", text)
    assert numbers is not None
    assert float(numbers[1]) == round(frozen_part * 2 / 1e9, 1)
    assert float(numbers[2]) == round(part * 20 / 1e9, 1)


def test_the_three_baselines_differ_in_the_rule_alone():
    main = load_recipe(ROOT / "configs/llava15_7b_m3po.yaml")
    for stem in ("dpo", "mas_dpo"):
        other = load_recipe(ROOT / f"configs/llava15_7b_{stem}.yaml")
        rule = main.arms[stem]["select.rule"]
        assert dataclasses.replace(other, name=main.name, arms=main.arms) == override(main, {"select.rule": rule})
