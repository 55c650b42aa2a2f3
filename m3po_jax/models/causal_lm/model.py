"""A text decoder behind the interface of the vision-language models, for rows without images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from m3po_jax.errors import UserError
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.text_decoders import text_decoder


@dataclass(frozen=True)
class CausalLMConfig:
    """A decoder, and what the vision-language models' shared code asks of a configuration."""

    text: DecoderConfig
    image_token_id: int = -1  # no id: token ids are never negative
    tokens_per_image: int = 0


class CausalLM(nnx.Module):
    """The decoder alone; everything about images is refused."""

    def __init__(self, config: CausalLMConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.text, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def image_features(self, pixel_values: jax.Array, *, remat: str = "none") -> jax.Array:
        """Raises UserError: there is no tower."""
        raise UserError("this model reads text only", where="model.path", remedy="use a vision-language model")

    def embed_prompts(self, token_ids: Int[Array, "b s"], features: jax.Array | None) -> Float[Array, "b s d"]:
        """Token embeddings.

        Raises:
            UserError: there are `features`.
        """
        if features is not None:
            raise UserError("this model reads text only", where="model.path", remedy="use a vision-language model")
        return self.decoder.embed_tokens(token_ids)


def causal_lm_config(raw: dict[str, Any], where: str) -> CausalLMConfig:
    """A text decoder's ``config.json``, its values checked by `check_fields`."""
    decoder = text_decoder(raw)
    assert decoder is not None, "the registry finds this family by the decoders' names"
    return CausalLMConfig(decoder.read_config(raw, where))


def build(config: CausalLMConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> CausalLM:
    """A randomly initialised model; see `llava.model.build`."""
    return CausalLM(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
