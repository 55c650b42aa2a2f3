"""Which fields of a published ``config.json`` a family reads, which mean nothing to it, and which it refuses.

A file from elsewhere may ask for a computation that is not implemented, and a field that is passed over gives
another model without a word. So a family lists every field of the `transformers` class that it stands for as one
of three kinds (`Fields`), with the values that it takes, and everything else in the file is judged by name:
refused where it is known to change a computation (`CHANGES_THE_COMPUTATION`) and is not off, noted otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.models.rotary_scaling import SCALINGS, needed, scaling_kind

# What a value has to be; gives the words for "must be ..." where it is not, and None where it is.
Check = Callable[[Any], str | None]

# No published model comes near these; a file that states more is broken or meant to exhaust the memory.
MOST_LAYERS = 1024
WIDEST = 2**18
MOST_TOKENS = 2**23
LARGEST_IMAGE = 2**14


def shown(value: Any) -> str:
    """A value of a stranger's file in a few characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole(low: int, high: int, *, null: bool = False) -> Check:
    """A whole number of a range; `null` stands for the default where it is allowed."""

    def check(value: Any) -> str | None:
        if value is None and null:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"a whole number from {low} to {high}"
        return None

    return check


def real(low: float, high: float, *, above: bool = False, null: bool = False) -> Check:
    """A finite number of a range, `low` itself excluded with `above`; `null` stands for none where it is allowed."""

    def check(value: Any) -> str | None:
        if value is None and null:
            return None
        valid = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= high
        if not valid or not math.isfinite(value) or value < low or (above and value == low):
            return f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"
        return None

    return check


def flag(value: Any) -> str | None:
    """true or false."""
    return None if isinstance(value, bool) else "true or false"


def flag_or_null(value: Any) -> str | None:
    """true or false; null stands for false."""
    return None if value is None else flag(value)


def word(names: tuple[str, ...] | Mapping[str, Any]) -> Check:
    """One of `names`."""
    return lambda value: None if isinstance(value, str) and value in names else f"one of {', '.join(names)}"


def only(*values: Any) -> Check:
    """One of `values`: no other is implemented."""
    words = {None: "null", True: "true", False: "false"}
    choices = " or ".join(
        words[value] if value is None or isinstance(value, bool) else repr(value) for value in values
    )
    return lambda value: None if any(type(value) is type(x) and value == x for x in values) else choices


def text(value: Any) -> str | None:
    """A text or null."""
    return None if value is None or isinstance(value, str) else "a text"


def section(value: Any) -> str | None:
    """An object, or null for the defaults."""
    return None if value is None or isinstance(value, dict) else "an object"


def token_id(value: Any) -> str | None:
    """A token's id or null; older files say -1 for none."""
    return whole(-1, MOST_TOKENS, null=True)(value)


def token_ids(value: Any) -> str | None:
    """A token's id, several of them, or null."""
    values = value if isinstance(value, list) else [value]
    return "a token's id or a list of them" if any(token_id(one) for one in values) else None


def side(low: int, high: int) -> Check:
    """A square's side, also as a pair of equal numbers."""

    def check(value: Any) -> str | None:
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        complaint = whole(low, high)(value)
        return complaint and f"{complaint}, the side of a square"

    return check


_ROTARY_NUMBERS: Mapping[str, Check] = {
    "rope_theta": real(0, 1e12, above=True),
    "factor": real(1, 1e6),
    "original_max_position_embeddings": whole(1, 2**31),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), real(0, 1e6, above=True)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), real(0, 1e6)),
    "truncate": flag,
}


def rope(value: Any) -> str | None:
    """Rotary positions, scaled or not: ``rope_parameters``, or the older ``rope_scaling``."""
    if value is None:
        return None
    if not isinstance(value, dict):
        return "an object"
    kind = scaling_kind(value)
    if kind not in ("default", *SCALINGS):
        return f"rope_type default, {', '.join(SCALINGS)}"
    if value.get("partial_rotary_factor") not in (None, 1, 1.0):
        return "without partial_rotary_factor"
    if "mrope_section" in value or any(isinstance(part, dict) for part in value.values()):
        return "the same for all layers and dimensions"
    for name, check in _ROTARY_NUMBERS.items():
        complaint = check(value[name]) if value.get(name) is not None else None
        if complaint is not None:
            return f"with a {name} that is {complaint}"
    missing = next((name for name in needed(kind) if value.get(name) is None), None)
    if missing is not None:
        return f"with a {missing}"
    if kind == "llama3" and value["high_freq_factor"] <= value["low_freq_factor"]:
        return "with a high_freq_factor above the low_freq_factor"
    return None


def rope_of_kinds(value: Any) -> str | None:
    """``rope_parameters`` with such an object for each kind of layer."""
    if value is None:
        return None
    if not isinstance(value, dict) or not set(value) <= {"full_attention", "sliding_attention"}:
        return "an object with full_attention and sliding_attention"
    return next((complaint for part in value.values() if (complaint := rope(part)) is not None), None)


@dataclass(frozen=True)
class Fields:
    """Every field of one published configuration.

    Attributes:
        config_class: The class of `transformers` whose fields these are, "" where it has none.
        read: Fields that enter the computation, with the values that are implemented. A field of which one value
            alone is implemented (`only`) is refused with any other.
        harmless: Fields that change nothing that is computed here.
    """

    config_class: str
    read: Mapping[str, Check]
    harmless: frozenset[str] = field(default_factory=frozenset)

    @property
    def names(self) -> frozenset[str]:
        """Of the class itself, without what all classes share."""
        return self.harmless.union(self.read)

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in COMMON or name in DECODING


# Of `PreTrainedConfig`, and what versions before 5 wrote for every model.
COMMON: Mapping[str, Check | None] = {
    "is_encoder_decoder": only(False),
    "add_cross_attention": only(False, None),
    "pruned_heads": only({}, None),
    **dict.fromkeys(("architectures", "model_type", "_name_or_path", "transformers_version", "dtype", "torch_dtype")),
    **dict.fromkeys(("id2label", "label2id", "num_labels", "problem_type", "output_hidden_states", "return_dict")),
    **dict.fromkeys(("output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task")),
    **dict.fromkeys(("tokenizer_class", "prefix", "task_specific_params", "cross_attention_hidden_size")),
    **dict.fromkeys(("tie_encoder_decoder", "is_decoder", "sep_token_id", "decoder_start_token_id", "auto_map")),
    # The feed-forward layers in chunks give the same numbers.
    **dict.fromkeys(("chunk_size_feed_forward", "_commit_hash", "attn_implementation", "_attn_implementation")),
    **dict.fromkeys(("_attn_implementation_autoset", "_attn_implementation_internal", "name_or_path")),
    **dict.fromkeys(("_experts_implementation_internal", "unsloth_version", "unsloth_fixed")),
}

# How older files say that answers are drawn; here the recipe says it. End tokens are read, by `token_ids.py`.
DECODING = frozenset(
    {
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    }
)

# Fields of other architectures, which people carry over into files of these; refused unless they are off.
CHANGES_THE_COMPUTATION = frozenset(
    {
        *(
            "sliding_window",
            "use_sliding_window",
            "sliding_window_pattern",
            "layer_types",
            "attention_chunk_size",
            "max_window_layers",
        ),
        *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv", "logit_scale"),
        *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "logits_scale"),
        *("qk_norm", "use_qk_norm", "qk_layernorm", "use_qk_layernorm", "no_rope_layers", "no_rope_layer_interval"),
        *(
            "partial_rotary_factor",
            "rotary_pct",
            "rotary_dim",
            "rope_local_base_freq",
            "use_dynamic_ntk",
            "rope_ratio",
        ),
        *("original_max_position_embeddings", "longrope_scaling", "mrope_section", "alibi", "use_alibi"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "n_routed_experts", "moe_intermediate_size"),
        *(
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "use_bias",
            "attention_out_bias",
            "attention_qkv_bias",
            "lm_head_bias",
            "o_bias",
            "use_qkv_bias",
        ),
        *("parallel_attn", "use_parallel_residual", "post_norm", "use_post_norm", "norm_type", "layernorm_type"),
        *(
            "scale_embeddings",
            "embedding_scale",
            "per_layer_config",
            "quantization_config",
            "compression_config",
            "kv_lora_rank",
        ),
        *("vision_aspect_ratio", "image_grid_pinpoints", "use_image_newline_parameter", "spatial_merge_size"),
        *("temporal_patch_size", "num_mtp_layers", "block_configs", "skip_layers", "num_kv_shared_layers"),
        *("cross_attention_layers", "linear_attn_config", "mamba_d_state", "attn_temperature_tuning"),
    }
)


def _is_off(name: str, value: Any, siblings: Mapping[str, Any]) -> bool:
    if name in ("sliding_window", "max_window_layers") and siblings.get("use_sliding_window") is False:
        return True
    if name == "max_window_layers" and siblings.get("sliding_window") is None:
        return True
    if name == "layer_types":
        return value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"})
    if name in ("partial_rotary_factor", "rotary_pct") or name.endswith(("_multiplier", "logits_scaling")):
        return value in (None, 1)
    return value is None or value is False or value == 0 or value in ([], {}, "")


def _problems(fields: Fields, raw: Mapping[str, Any], path: str) -> Iterator[str]:
    checks = {**{name: check for name, check in COMMON.items() if check is not None}, **fields.read}
    for name, value in raw.items():
        if name in checks:
            wanted = checks[name](value)
            if wanted is not None:
                yield f"{path}{name} is {shown(value)}, and must be {wanted}"
        elif name not in fields and name in CHANGES_THE_COMPUTATION and not _is_off(name, value, raw):
            yield f"{path}{name} is {shown(value)}, which is not implemented"


def check_fields(sections: Mapping[str, Fields], raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Judges every field of a ``config.json`` and of its nested sections.

    Args:
        sections: The fields by the name of the section, "" for the top.
        raw: The file's content in Hugging Face layout.

    Returns:
        A note for the user where the file has fields that nobody here knows; they are not read.

    Raises:
        UserError: a field has a value that is not implemented; all such fields of the file are named.
    """
    problems: list[str] = []
    unknown: list[str] = []
    for name, fields in sections.items():
        part, path = (raw.get(name), f"{name}.") if name else (raw, "")
        if part is None:
            continue
        if not isinstance(part, dict):
            raise UserError(f"{name} is {shown(part)}, and must be an object", where=where)
        problems += _problems(fields, part, path)
        unknown += [
            f"{path}{key}" for key in part if key not in fields and key not in CHANGES_THE_COMPUTATION | {*sections}
        ]
    if problems:
        more = f" (and {len(problems) - 3} more fields)" if len(problems) > 3 else ""
        raise UserError(
            "; ".join(problems[:3]) + more,
            where=where,
            remedy="use a checkpoint without it, or correct the file where it is wrong",
        )
    if not unknown:
        return ()
    named = ", ".join(shown(name).strip("'\"") for name in unknown[:5]) + (" and more" if len(unknown) > 5 else "")
    return (f"{where}: fields of an unknown meaning are not read: {named}",)
