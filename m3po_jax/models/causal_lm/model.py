"""A text decoder behind the interface of the vision-language models, for rows without images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.data.model_images import Images
from m3po_jax.errors import UserError
from m3po_jax.models.decoder import Decoder
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.forward import Positions, text_positions
from m3po_jax.models.text_decoders import text_decoder


@dataclass(frozen=True)
class CausalLMConfig:
    """A decoder; no token stands for an image."""

    text: DecoderConfig
    image_token_id: int = -1


class CausalLM(nnx.Module):
    """A `VisionLanguageModel` that is the decoder alone; everything about images is refused."""

    def __init__(self, config: CausalLMConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.text, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def encode_images(self, images: Images, *, remat: str = "none") -> Float[Array, "b f v"]:
        """Raises UserError: there is no tower."""
        raise _text_only()

    def blank_features(self, layout: Images, tokens: int) -> Float[Array, "1 f v"]:
        """Raises UserError: there is no tower."""
        raise _text_only()

    def embed_prompts(
        self, token_ids: Int[Array, "b s"], features: Float[Array, "b f v"] | None
    ) -> Float[Array, "b s d"]:
        """Token embeddings.

        Raises:
            UserError: there are `features`.
        """
        if features is not None:
            raise _text_only()
        return self.decoder.embed_tokens(token_ids)

    def prompt_positions(self, token_ids: Int[Array, "b s"], mask: Bool[Array, "b s"], layout: Images) -> Positions:
        """One by one."""
        return text_positions(mask)


def _text_only() -> UserError:
    return UserError("this model reads text only", where="model.path", remedy="use a vision-language model")


def causal_lm_config(raw: dict[str, Any], where: str) -> CausalLMConfig:
    """A text decoder's ``config.json``, its values checked by `check_fields`."""
    decoder = text_decoder(raw)
    assert decoder is not None, "the registry finds this family by the decoders' names"
    return CausalLMConfig(decoder.read_config(raw, where))


def build(config: CausalLMConfig, *, dtype: Any, param_dtype: Any, seed: int = 0) -> CausalLM:
    """A randomly initialised model; see `llava.model.build`."""
    return CausalLM(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(seed))
