"""What distinguishes one decoder from another, as data: the specification that the one decoder layer reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one decoder differ in.

    Attributes:
        window: Tokens that a token sees, itself included and counted backwards; None: all before it.
        rope_theta: Base of the rotary positions.
    """

    window: int | None = None
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of pre-norm layers with gated MLPs and rotary positions.

    Attributes:
        num_heads: `num_heads` · `head_dim` is the queries' width, which `hidden_size` need not be.
        rms_norm_eps: Of every norm.
        activation: Of the MLP's gate, see `layers.ACTIVATIONS`.
        biases: Projections that add a bias, by the name of the layer (``q_proj``, …, ``down_proj``).
        norms_of_heads: Queries and keys are normalised, each head on its own, before they are turned.
        tie_word_embeddings: The output layer is the embedding table.
        max_positions: Tokens that the model was made for; nothing is computed from it.
        rotary_axes: Where positions have several axes (text, height, width), the axis that each of the `head_dim`/2
            frequencies turns by: Qwen2-VL's sections of them, or Qwen3-VL's interleaved ones. Tokens with one
            position turn by it everywhere.
        injected_layers: So many first layers after each of which features of images are added to the states of their
            tokens; see `forward.VisionLanguageModel.injected_states`.
        layer_pattern: The kinds of the layers, from the first on, repeated as often as there are layers.
        attention: The kernels that attention runs on, see `models/kernels`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    norms_of_heads: bool = False
    tie_word_embeddings: bool = False
    max_positions: int = 4096
    rotary_axes: tuple[int, ...] = ()
    injected_layers: int = 0
    layer_pattern: tuple[LayerKind, ...] = (LayerKind(),)
    attention: str = "xla"

    def kind(self, layer: int) -> LayerKind:
        """Of the layer with this number, counted from 0."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Every kind that a layer has, once."""
        return tuple(dict.fromkeys(self.kind(layer) for layer in range(self.num_layers)))

    @property
    def kind_numbers(self) -> tuple[int, ...]:
        """The place in `kinds` of every layer's kind."""
        return tuple(self.kinds.index(self.kind(layer)) for layer in range(self.num_layers))
