"""Published text decoders, each a specification read from its ``config.json``; shared by all model families.

To add one, write its fields and its reader in a file of its own and append its name to `TEXT_DECODERS`.
"""

from collections.abc import Mapping
from typing import Any

from m3po_jax.models.text_decoders.fields import TextDecoder
from m3po_jax.models.text_decoders.gemma2 import GEMMA2
from m3po_jax.models.text_decoders.gemma3 import GEMMA3
from m3po_jax.models.text_decoders.llama import LLAMA
from m3po_jax.models.text_decoders.mistral import MISTRAL
from m3po_jax.models.text_decoders.qwen2 import QWEN2
from m3po_jax.models.text_decoders.qwen3 import QWEN3

TEXT_DECODERS = {decoder.model_type: decoder for decoder in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)}


def text_decoder(raw: Mapping[str, Any]) -> TextDecoder | None:
    """The decoder of a ``config.json`` or of its text section, LLaMA where none is named; None: not one of these."""
    kind = raw.get("model_type", LLAMA.model_type)
    return TEXT_DECODERS.get(kind) if isinstance(kind, str) else None
