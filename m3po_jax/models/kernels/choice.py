"""Which attention runs where: the recipe's choice, what it needs, and the one call that dispatches on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from m3po_jax.config import ModelConfig
from m3po_jax.errors import UserError
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.reading import check_value

ATTENTION = ("xla", "pallas", "cudnn")
_PLATFORMS = {"pallas": ("tpu", "a TPU"), "cudnn": ("gpu", "an NVIDIA GPU")}
HEAD_MULTIPLE = {"pallas": 64, "cudnn": 8}  # what the kernels' tiles want of a head's width
# A TPU's registers are 128 lanes wide: a cache of narrower heads would be copied into that shape at every step.
DECODER_HEAD_MULTIPLE = {"pallas": 128, "cudnn": 8}
CUDNN_WIDEST = 128  # on every GPU since Ampere

C = TypeVar("C")


def fits(kind: str, head_dim: int) -> bool:
    """Whether kernel `kind` takes heads of this width (``xla`` is no kernel).

    A vision tower whose heads it does not take stays on XLA; for a language model `check_attention` refuses.
    """
    if kind not in HEAD_MULTIPLE:
        return kind == "pallas_interpret"
    return head_dim % HEAD_MULTIPLE[kind] == 0 and not (kind == "cudnn" and head_dim > CUDNN_WIDEST)


def has_spans(kind: str) -> bool:
    """Whether kernel `kind` lets the tokens of an image see each other."""
    return kind == "cudnn"


def attention_note(kind: str, decoder: DecoderConfig | None) -> str:
    """A line where a kernel leaves a part of a model that it runs to XLA; else empty."""
    if decoder is None or kind == "xla" or not decoder.image_span or has_spans(kind):
        return ""
    return (
        f"model.attention={kind}: prompts with images are read by XLA, since this model's image tokens see each "
        "other; answers are drawn through the kernel"
    )


def check_attention(kind: str, *, platform: str, dtype: Any, decoder: DecoderConfig | None = None) -> None:
    """Refuses, before anything is loaded, what the kernels cannot run.

    Args:
        platform: Of the devices that will compute, as jax names it (cpu, gpu, tpu).
        decoder: The language model, where it is known.

    Raises:
        UserError: an unknown name, other devices than the kernel's, a type, head width or soft cap that it does not
            take.
    """
    where, remedy = "model.attention", "set model.attention=xla"
    check_value(ModelConfig, "attention", kind, "model")
    if kind == "xla":
        return
    needed, name = _PLATFORMS[kind]
    if platform not in {"gpu": ("gpu", "cuda")}.get(needed, (needed,)):
        raise UserError(f"{kind} needs {name}, and this machine computes on {platform}", where=where, remedy=remedy)
    if kind == "cudnn" and jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"cudnn takes bfloat16 and float16, not {jnp.dtype(dtype)}",
            where=where,
            remedy=f"{remedy}, or model.dtype=bfloat16",
        )
    if decoder is None:
        return
    if kind == "cudnn" and decoder.attention_soft_cap is not None:
        raise UserError("cudnn has no soft cap of attention, and this model has one", where=where, remedy=remedy)
    multiple, head_dim = DECODER_HEAD_MULTIPLE[kind], decoder.head_dim
    if head_dim % multiple or not fits(kind, head_dim):
        widest = f" and at most {CUDNN_WIDEST}" if kind == "cudnn" else ""
        raise UserError(
            f"{kind} wants heads of a multiple of {multiple}{widest}; this model's are {head_dim} wide",
            where=where,
            remedy=remedy,
        )


def with_attention(config: C, kind: str) -> C:
    """A model's configuration, nested ones included, with every field called `attention` set to `kind`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if field.name == "attention":
            changes[field.name] = kind
        elif dataclasses.is_dataclass(value):
            changes[field.name] = with_attention(value, kind)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def decode_kernel(kind: str) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None:
    """What reads a prompt's prefix once for all its candidates, see `grouped_decode`; None: XLA does.

    cuDNN has no such kernel; on GPUs XLA's products read the prefix once too.
    """
    if not kind.startswith("pallas"):
        return None
    from m3po_jax.models.kernels.grouped_decode import grouped_prefix_attention

    return partial(grouped_prefix_attention, interpret=kind == "pallas_interpret")


def self_attention(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "b s"],
    *,
    causal: bool,
    window: int | None = None,
    soft_cap: float | None = None,
    visible: Bool[Array, "b s s"] | None = None,
    kind: str,
) -> Float[Array, "b s h d"]:
    """Attention among the unpadded tokens of each row by kernel `kind` (not ``xla``), differentiable.

    Padded positions hold finite values of no meaning.

    Args:
        window: Tokens that a token of a `causal` row sees, itself included; None: all before it.
        soft_cap: See `layers.soft_capped`; for kernels that `check_attention` allows with one.
        visible: Which queries (second axis) see which keys, padding apart, in the place of `causal` and `window`; for
            kernels with `has_spans`.
    """
    if kind == "cudnn":
        from m3po_jax.models.kernels.fused_gpu import fused_attention

        assert soft_cap is None, "refused by check_attention"
        return fused_attention(q, k, v, mask, causal=causal, window=window, visible=visible)
    from m3po_jax.models.kernels.splash import splash_attention

    assert visible is None, "such rows go to XLA"
    interpret = kind == "pallas_interpret"
    return splash_attention(q, k, v, mask, causal=causal, window=window, soft_cap=soft_cap, interpret=interpret)
