"""Every field of a published ``config.json``: read, harmless, or refused by name; against transformers' classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hf_gemma3 import gemma3
from hf_models import dual_encoder, llava, load_float32, torch_and_transformers
from hf_qwen import qwen

from m3po_jax.errors import UserError
from m3po_jax.models.config_fields import CHANGES_THE_COMPUTATION, COMMON, DECODING, Fields
from m3po_jax.models.registry import FAMILIES, describe

TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
VISION = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3},
    **{"image_size": 28, "patch_size": 14},
}
ENCODER_TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 12},
}
_PATCHES = {
    **{"depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **{"model_type": "qwen2_5_vl", "image_token_id": 60},
        "text_config": {
            **{**TEXT, "num_hidden_layers": 3, "rope_parameters": {"mrope_section": [2, 1, 1]}},
            **{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        },
        "vision_config": {**_PATCHES, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **{"model_type": "qwen3_vl", "image_token_id": 60},
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": {"mrope_section": [2, 1, 1]}},
        "vision_config": {**_PATCHES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
    },
    "gemma3": {
        **{"model_type": "gemma3", "image_token_index": 60, "mm_tokens_per_image": 4},
        "text_config": {
            **{"model_type": "gemma3_text", **TEXT, "num_hidden_layers": 3},
            **{"sliding_window": 8, "sliding_window_pattern": 3},
        },
        "vision_config": {**VISION, "image_size": 56, "vision_use_head": False},
    },
    **{
        kind: {
            **{"model_type": kind, "image_token_id": 60, "scale_factor": 2},
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {**VISION, "image_size": 56},
        }
        for kind in ("idefics3", "smolvlm")
    },
    "llama": {"model_type": "llama", **TEXT},
    "mistral": {"model_type": "mistral", **TEXT, "sliding_window": 8},
    "qwen2": {
        **{"model_type": "qwen2", **TEXT, "num_hidden_layers": 3},
        **{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    },
    "qwen3": {
        **{"model_type": "qwen3", **TEXT, "num_hidden_layers": 3},
        **{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    },
    "gemma2": {"model_type": "gemma2", **TEXT, "num_hidden_layers": 3, "sliding_window": 8},
    "gemma3_text": {
        **{"model_type": "gemma3_text", **TEXT, "num_hidden_layers": 3},
        **{"sliding_window": 8, "sliding_window_pattern": 3},
    },
    "llava": {"model_type": "llava", "image_token_index": 60, "text_config": TEXT, "vision_config": VISION},
    "clip": {
        **{"model_type": "clip", "projection_dim": 20, "vision_config": VISION},
        "text_config": {**ENCODER_TEXT, "eos_token_id": 63},
    },
    "siglip": {"model_type": "siglip", "text_config": ENCODER_TEXT, "vision_config": {**VISION, "hidden_size": 24}},
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_field(kind: str, section: str, **values: Any) -> dict[str, Any]:
    config = CONFIGS[kind]
    return {**config, section: {**config[section], **values}} if section else {**config, **values}


def sections() -> list[tuple[str, str, Fields]]:
    tables = []
    for kind, config in CONFIGS.items():
        family = next(family for family in FAMILIES if kind in family.model_types)
        tables += [(kind, name, fields) for name, fields in family.sections(config).items()]
    return tables


@pytest.mark.parametrize(("kind", "section", "fields"), sections(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_field_of_transformers_is_classified(kind: str, section: str, fields: Fields) -> None:
    """A field that a later version adds fails here until someone says what it does."""
    _, transformers = torch_and_transformers()
    base = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    theirs = {field.name for field in dataclasses.fields(getattr(transformers, fields.config_class))}
    unclassified = theirs - base - fields.names
    assert not unclassified, f"{fields.config_class} has {sorted(unclassified)}"
    assert not base - COMMON.keys(), f"every configuration has {sorted(base - COMMON.keys())}"
    assert not fields.harmless & fields.read.keys()
    assert not CHANGES_THE_COMPUTATION & (fields.harmless | COMMON.keys() | DECODING)


def test_every_family_lists_its_fields() -> None:
    kinds = {kind for family in FAMILIES for kind in family.model_types} - {"llava_llama"}
    assert kinds == CONFIGS.keys()


# Another valid value of every field that is read, where the value makes another model.
OTHER = {
    **{"vocab_size": 65, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    **{"hidden_act": "relu", "max_position_embeddings": 99},
    **{"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 7.0},
    **{"rope_scaling": {"type": "default", "rope_theta": 9.0}, "tie_word_embeddings": True, "layer_norm_eps": 0.1},
    **{"image_size": 42, "patch_size": 7, "image_token_index": 61, "projector_hidden_act": "relu"},
    **{"vision_feature_select_strategy": "full", "vision_feature_layer": [1, -1], "multimodal_projector_bias": False},
    **{"attention_bias": True, "mlp_bias": True, "sliding_window": 9},
    **{"use_sliding_window": False, "max_window_layers": 2},
    **{"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    **{"hidden_activation": "relu", "query_pre_attn_scalar": 100, "rope_local_base_freq": 7.0},
    **{"sliding_window_pattern": 4, "attn_logit_softcapping": 7.0, "final_logit_softcapping": 7.0},
    **{"projection_dim": 21, "projection_size": 22, "m3po_pooling": "patches"},
}
# Those of towers whose layers are counted by `depth`, and of decoders whose positions have three axes.
_MROPE = {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [2, 1, 1]}
OTHER_PATCHES = {
    **{"depth": 4, "num_heads": 2, "spatial_merge_size": 1, "temporal_patch_size": 1, "window_size": 24},
    **{"fullatt_block_indexes": [0], "num_position_embeddings": 25, "deepstack_visual_indexes": [1]},
    **{"rope_parameters": {"rope_type": "axial", "rope_theta": 5.0}, "patch_size": 2, "hidden_size": 48},
}
OTHER_OF = {
    ("qwen2_5_vl", "text_config"): {
        "rope_parameters": _MROPE,
        "rope_scaling": _MROPE,
        "num_attention_heads": None,
        "head_dim": None,
    },
    ("qwen3_vl", "text_config"): {"rope_parameters": _MROPE, "rope_scaling": _MROPE, "head_dim": None},
    ("qwen2_5_vl", "vision_config"): OTHER_PATCHES,
    ("qwen3_vl", "vision_config"): OTHER_PATCHES,
    ("qwen2_5_vl", ""): {"image_token_id": 61},
    ("qwen3_vl", ""): {"image_token_id": 61},
    ("gemma3", ""): {
        "tie_word_embeddings": False,
        "boi_token_index": 61,
        "eoi_token_index": 61,
        "mm_tokens_per_image": 16,
    },
    ("gemma3", "vision_config"): {"image_size": 70},
    **{(kind, ""): {"scale_factor": 4} for kind in ("idefics3", "smolvlm")},
    **{(kind, "vision_config"): {"image_size": 84} for kind in ("idefics3", "smolvlm")},
}
# Sections, ids that the tokenizer's reader compares, and fields of which one value alone is implemented.
NO_OTHER = {
    *("text_config", "vision_config", "pad_token_id", "bos_token_id", "eos_token_id", "image_token_id"),
    *("num_channels", "vision_use_head", "in_channels", "in_chans", "use_bidirectional_attention"),
    # They have to be what other fields say.
    *("out_hidden_size", "spatial_patch_size"),
}


OF_ONE_VALUE = {
    "gemma3_text": {"attn_logit_softcapping"},
    # transformers has an output layer of the whole model.
    "gemma3": {"attn_logit_softcapping", "final_logit_softcapping"},
}
OF_KIND: dict[tuple[str, str], Any] = {
    **{(kind, "tie_word_embeddings"): False for kind in ("gemma2", "gemma3_text")},
    **{
        (kind, "rope_parameters"): {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}
        for kind in ("gemma3", "gemma3_text")
    },
}


@pytest.mark.parametrize(("kind", "section", "fields"), sections(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_called_read_is_read(kind: str, section: str, fields: Fields, tmp_path: Path) -> None:
    plain = describe(write(tmp_path / "plain", CONFIGS[kind])).config
    others = {**OTHER, **OTHER_OF.get((kind, section), {})}
    width = {"hidden_size"} if (kind, section) in OTHER_OF and section == "text_config" else set()  # the tower's too
    for name in fields.read.keys() - NO_OTHER - width - OF_ONE_VALUE.get(kind, set()):
        value = OF_KIND.get((kind, name), others.get(name))
        if value is None or (kind == "qwen3_vl" and name == "use_sliding_window"):
            continue  # the sections of its positions would not fit
        changed = describe(write(tmp_path / name, with_field(kind, section, **{name: value}))).config
        assert changed != plain, name


ROPE_KINDS = ("dynamic", "longrope", "proportional", "llama3")  # the last needs more than a factor
QUANTISED = ("bitsandbytes", "awq", "gptq", "fp8", "compressed-tensors", "torchao")


@pytest.mark.parametrize(
    ("kind", "section", "name", "value"),
    [
        ("llama", "", "sliding_window", 8),
        ("llava", "text_config", "sliding_window", 8),
        ("llama", "", "layer_types", ["sliding_attention", "full_attention"]),
        ("llama", "", "attention_bias", "yes"),
        ("qwen2", "", "sliding_window", -1),
        ("qwen2", "", "layer_types", ["chunked_attention"] * 3),
        ("qwen2", "", "max_window_layers", 1.5),
        ("qwen2", "", "use_sliding_window", 1),
        ("qwen3", "", "attention_bias", "yes"),
        ("qwen3", "", "head_dim", None),
        ("mistral", "", "sliding_window", 0),
        ("mistral", "", "layer_types", ["sliding_attention", "full_attention"]),
        ("mistral", "", "attention_bias", True),
        ("llama", "", "rope_scaling", {"type": "linear", "factor": 0.5}),
        ("llama", "", "rope_scaling", {"type": "linear"}),
        ("llama", "", "rope_parameters", {"rope_type": "yarn", "factor": "4"}),
        ("llama", "", "rope_parameters", {"rope_type": ["yarn"], "factor": 4.0}),
        ("gemma3_text", "", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
        ("gemma3_text", "", "rope_parameters", {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}),
        ("gemma3_text", "", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "", "use_bidirectional_attention", True),
        ("gemma2", "", "attn_logit_softcapping", 0.0),
        ("gemma2", "", "query_pre_attn_scalar", -1),
        ("llama", "", "rope_parameters", {"rope_type": "llama3", "factor": 8.0}),
        ("llama", "", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("llama", "", "rope_parameters", {"rope_type": "default", "mrope_section": [8, 12, 12]}),
        ("llama", "", "rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("llama", "", "partial_rotary_factor", 0.5),
        ("llama", "", "attn_logit_softcapping", 50.0),
        ("llama", "", "num_local_experts", 8),
        ("llama", "", "residual_multiplier", 0.22),
        *(("llama", "", "rope_scaling", {"type": kind, "factor": 2.0}) for kind in ROPE_KINDS),
        *(("qwen2", "", "rope_parameters", {"rope_type": kind, "factor": 2.0}) for kind in ROPE_KINDS),
        *(("mistral", "", "quantization_config", {"quant_method": kind}) for kind in QUANTISED),
        ("llava", "", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("llava", "text_config", "quantization_config", {"quant_method": "awq"}),
        ("llava", "vision_config", "quantization_config", {"quant_method": "fp8"}),
        ("llama", "", "compression_config", {"quant_method": "compressed-tensors"}),
        ("llama", "", "pruned_heads", {"0": [1]}),
        ("llama", "", "hidden_act", "gelu_new"),
        ("llava", "", "projector_hidden_act", "softmax"),
        ("llava", "", "vision_feature_select_strategy", "cls"),
        ("llava", "", "vision_feature_layer", []),
        ("llava", "", "image_grid_pinpoints", [[336, 672]]),
        ("llava", "vision_config", "num_channels", 1),
        ("llava", "vision_config", "image_size", [28, 56]),
        ("llava", "vision_config", "hidden_act", "swish"),
        ("siglip", "vision_config", "vision_use_head", False),
        ("gemma3", "vision_config", "vision_use_head", True),
        ("gemma3", "text_config", "attn_logit_softcapping", 50.0),
        ("gemma3", "", "mm_tokens_per_image", 0),
        ("smolvlm", "", "scale_factor", 0),
        ("idefics3", "text_config", "sliding_window", 8),
        ("qwen2_5_vl", "vision_config", "fullatt_block_indexes", [1.5]),
        ("qwen2_5_vl", "vision_config", "in_channels", 1),
        ("qwen2_5_vl", "vision_config", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("qwen2_5_vl", "text_config", "rope_scaling", {"type": "mrope", "mrope_section": [2, 2]}),
        ("qwen2_5_vl", "text_config", "rope_scaling", {"type": "dynamic", "factor": 2.0, "mrope_section": [2, 1, 1]}),
        ("qwen2_5_vl", "text_config", "attention_bias", True),
        ("qwen3_vl", "text_config", "rope_scaling", {"mrope_interleaved": False, "mrope_section": [2, 1, 1]}),
        ("qwen3_vl", "text_config", "use_sliding_window", True),
        ("qwen3_vl", "text_config", "num_experts", 8),
        ("qwen3_vl", "vision_config", "hidden_act", "swish"),
        ("clip", "text_config", "eos_token_id", [62, 63]),
        ("clip", "", "is_encoder_decoder", True),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    kind: str, section: str, name: str, value: Any, tmp_path: Path
) -> None:
    config = with_field(kind, section, **{name: value})
    with pytest.raises(UserError, match=rf"config.json: {f'{section}.' if section else ''}{name} is ") as caught:
        describe(write(tmp_path, config))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "section", "values"),
    [
        ("llama", "", {"sliding_window": None, "use_sliding_window": False}),
        ("llama", "", {"sliding_window": 8, "use_sliding_window": False}),
        (
            "llama",
            "",
            {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0, "residual_multiplier": 1},
        ),
        ("llama", "", {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("llama", "", {"pretraining_tp": 2, "attention_dropout": 0.1, "torch_dtype": "float16", "temperature": 0.7}),
        ("llama", "", {"eos_token_id": [2, 7], "pad_token_id": -1, "quantization_config": None}),
        ("qwen2", "", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("qwen3", "", {"head_dim": 128, "attention_bias": False}),
        ("llava", "vision_config", {"image_size": [28, 28], "projection_dim": 99}),
        ("llava", "", {"image_seq_length": 576, "vision_feature_layer": -2}),
    ],
)
def test_what_changes_nothing_is_accepted(kind: str, section: str, values: dict[str, Any], tmp_path: Path) -> None:
    plain = describe(write(tmp_path / "plain", CONFIGS[kind]))
    same = describe(write(tmp_path / "same", with_field(kind, section, **values)))
    assert same.config == plain.config and same.notes == ()


def test_fields_of_an_unknown_meaning_are_noted(tmp_path: Path) -> None:
    (note,) = describe(write(tmp_path, with_field("llava", "text_config", wobble=3))).notes
    assert "unknown meaning" in note and note.endswith("text_config.wobble")


NAN, INFINITY = float("nan"), float("inf")
HOSTILE = [-1, 0, 1.5, NAN, INFINITY, 10**30, "32", True, None, [], [32], {}, {"a": 1}]


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_sizes_are_one_line(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"text_config.{name} is .*must be a whole number") as caught:
        describe(write(tmp_path, with_field("llava", "text_config", **{name: value})))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("kind", "section", "values", "message"),
    [
        ("llava", "vision_config", {"patch_size": 0}, "patch_size is 0"),
        ("llava", "vision_config", {"patch_size": -14}, "patch_size is -14"),
        ("llava", "vision_config", {"patch_size": 56}, "patch_size 56 is larger than image_size 28"),
        ("llava", "vision_config", {"image_size": 10**6}, "image_size is 1000000"),
        ("llava", "vision_config", {"num_attention_heads": 5}, "hidden_size 24 is not a multiple"),
        ("llava", "vision_config", {"layer_norm_eps": NAN}, "layer_norm_eps is nan"),
        ("llava", "text_config", {"num_attention_heads": 3}, "hidden_size 32 is not a multiple"),
        ("llava", "text_config", {"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ("llava", "text_config", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ("llava", "text_config", {"head_dim": 7}, "odd width"),
        ("llava", "text_config", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ("llava", "text_config", {"rms_norm_eps": INFINITY}, "rms_norm_eps is inf"),
        ("llava", "text_config", {"rope_theta": 0}, "rope_theta is 0"),
        ("llava", "text_config", {"rope_theta": NAN}, "rope_theta is nan"),
        ("llava", "text_config", {"rope_scaling": "linear"}, "rope_scaling is 'linear', and must be an object"),
        ("llava", "text_config", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ("llava", "text_config", {"eos_token_id": ["</s>"]}, "eos_token_id is"),
        ("llava", "text_config", {"model_type": ["llama"]}, "decoder"),
        ("llava", "", {"text_config": []}, r"text_config is \[\], and must be an object"),
        ("llava", "", {"vision_config": "clip"}, "vision_config is 'clip', and must be an object"),
        ("llava", "", {"image_token_index": "<image>"}, "image_token_index is '<image>'"),
        ("llava", "", {"vision_feature_layer": 9}, "vision_feature_layer 9, and the tower has 3 layers"),
        ("llava", "", {"vision_feature_layer": "last"}, "vision_feature_layer is 'last'"),
        ("llava", "", {"model_type": {"a": 1}}, "is not supported"),
        ("llava", "", {"model_type": "x" * 10_000}, "is not supported"),
        (
            "llava",
            "",
            {"model_type": "mllama"},
            r"'mllama' is not supported; supported are image-text-to-text: llava,",
        ),
        ("clip", "", {"model_type": "blip"}, r"'blip' is not supported; supported are (?!.*did you mean)"),
        ("qwen2", "", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, and there are 3 layers"),
        ("qwen2", "", {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "there is no window"),
        ("clip", "text_config", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ("clip", "", {"projection_dim": -3}, "projection_dim is -3"),
        ("clip", "", {"m3po_pooling": "mean"}, "m3po_pooling 'mean' is unknown"),
        ("siglip", "text_config", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple"),
        ("qwen2_5_vl", "vision_config", {"num_heads": 4}, "does not make 4 heads of a multiple of 4"),
        ("qwen2_5_vl", "vision_config", {"window_size": 7}, "window_size 7 is less than the square"),
        ("qwen2_5_vl", "vision_config", {"spatial_patch_size": 2}, "two patch sizes"),
        ("qwen2_5_vl", "text_config", {"num_attention_heads": 8}, r"mrope_section \[2, 1, 1\] does not add up"),
        ("qwen3_vl", "vision_config", {"out_hidden_size": 24}, "out_hidden_size is 24, and the decoder is 32 wide"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [2, 0]}, "must be layers of the tower in their"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [3]}, "must be layers of the tower in their"),
    ],
)
def test_hostile_values_are_one_line(
    kind: str, section: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe(write(tmp_path, with_field(kind, section, **values)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{", '{"model_type": ' + "[" * 100_000, "\ufeff{}", "\x00"])
def test_files_that_are_no_object_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: (not valid JSON|not a JSON object)") as caught:
        describe(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_drawn(tmp_path: Path) -> None:
    huge = {"hidden_size": 2**17, "intermediate_size": 2**18, "num_hidden_layers": 1000}
    config = with_field("llava", "text_config", **huge, num_attention_heads=2**10, num_key_value_heads=2**10)
    with pytest.raises(UserError, match=r"config.json: the model's weights take [\d,]+ GiB a device"):
        load_float32(write(tmp_path, config), init="random")


@pytest.mark.parametrize("kind", CONFIGS)
def test_absent_fields_take_transformers_defaults(kind: str, tmp_path: Path) -> None:
    """A file that states nothing, and a section that states one thing, as transformers completes them."""
    _, transformers = torch_and_transformers()
    config_class = next(fields.config_class for name, section, fields in sections() if (name, section) == (kind, ""))
    plain: list[dict[str, Any]] = [{}]
    widths = {"qwen2_5_vl": 8192, "qwen3_vl": 4096}  # of the defaults; those of tower and decoder do not fit together
    if kind in widths:
        plain = [{"vision_config": {"out_hidden_size": widths[kind]}, "text_config": {"num_hidden_layers": 29}}]
    elif kind == "gemma3":  # whose tower has no head, and patches of 16 pixels by default
        vision = {"image_size": 512, "vision_use_head": False}
        plain = [{"vision_config": vision, "text_config": {"num_hidden_layers": 3}}]
    elif kind in ("idefics3", "smolvlm"):  # of whose default patches there are seven along a side
        plain = [{"vision_config": {"image_size": 448}, "text_config": {"num_hidden_layers": 3}}]
    elif "text_config" in CONFIGS[kind]:
        plain.append({"vision_config": {"image_size": 448}, "text_config": {"num_hidden_layers": 3}})
    for number, given in enumerate(plain):
        stated = getattr(transformers, config_class)(**given).to_dict()
        ours = describe(write(tmp_path / f"{number}-ours", {"model_type": kind, **given}))
        theirs = describe(write(tmp_path / f"{number}-theirs", stated))
        assert ours.config == theirs.config


def test_sections_of_the_first_versions_win_whole(tmp_path: Path) -> None:
    """``text_config_dict`` replaces what ``text_config`` says, unstated fields included, as transformers does."""
    _, transformers = torch_and_transformers()
    raw = with_field("clip", "text_config", num_hidden_layers=5, layer_norm_eps=0.5)
    raw |= {"text_config_dict": {"num_hidden_layers": 2, "vocab_size": 70, "hidden_size": 64}}
    raw |= {"vision_config_dict": {"image_size": 56}}
    stated = transformers.CLIPConfig(**json.loads(json.dumps(raw))).to_dict()
    assert describe(write(tmp_path / "a", raw)).config == describe(write(tmp_path / "b", stated)).config


def test_saved_files_of_transformers_give_no_notes(tmp_path: Path) -> None:
    for name, model in {"llava": llava(), "clip": dual_encoder("clip"), "siglip": dual_encoder("siglip")}.items():
        model.config.save_pretrained(tmp_path / name)
        assert describe(tmp_path / name).notes == ()
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        qwen(kind).config.save_pretrained(tmp_path / kind)
        assert describe(tmp_path / kind).notes == ()
    gemma3().config.save_pretrained(tmp_path / "gemma3")
    assert describe(tmp_path / "gemma3").notes == ()
    for folder in (Path(__file__).parents[2] / "m3po_jax/quickstart/checkpoints").iterdir():
        assert describe(folder).notes == ()
