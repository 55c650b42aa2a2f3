"""What distinguishes one decoder from another, as data: the specification that the one decoder layer reads."""

from __future__ import annotations

from dataclasses import dataclass

from m3po_jax.models.rotary_scaling import RotaryScaling


@dataclass(frozen=True)
class LayerKind:
    """What the layers of one decoder differ in.

    Attributes:
        window: Tokens that a token sees, itself included and counted backwards; None: all before it.
        rope_theta: Base of the rotary positions.
        rope_scaling: How their frequencies are stretched; None: they are not.
    """

    window: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RotaryScaling | None = None

    @property
    def rotary(self) -> tuple[float, RotaryScaling | None]:
        """What the rotary tables of such a layer depend on."""
        return self.rope_theta, self.rope_scaling


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of layers with RMS norms, gated MLPs and rotary positions.

    Attributes:
        num_heads: `num_heads` · `head_dim` is the queries' width, which `hidden_size` need not be.
        rms_norm_eps: Of every norm.
        norms_of_results: Beside its inputs, what attention and MLP give is normalised before it is added.
        norm_offset: What is added to the stored gain of every norm, heads' norms included; 1 in Gemma.
        activation: Of the MLP's gate, see `layers.ACTIVATIONS`.
        biases: Projections that add a bias, by the name of the layer (``q_proj``, …, ``down_proj``).
        norms_of_heads: Queries and keys are normalised, each head on its own, before they are turned.
        query_scale: Factor of the products of queries and keys; None: 1/√`head_dim`.
        attention_soft_cap: c of those products' c · tanh(product / c), see `layers.soft_capped`; None: they are not
            capped.
        logits_soft_cap: The same of the logits.
        embedding_scale: Factor of tokens' embeddings as the decoder's inputs; images' features have none.
        tie_word_embeddings: The output layer is the embedding table.
        max_positions: Tokens that the model was made for; nothing is computed from it.
        rotary_axes: Where positions have several axes (text, height, width), the axis that each of the `head_dim`/2
            frequencies turns by: Qwen2-VL's sections of them, or Qwen3-VL's interleaved ones. Tokens with one
            position turn by it everywhere.
        image_span: Most tokens that follow each other in an image; they see each other whatever their order. 0: an
            image's tokens, too, see none after themselves.
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
    norms_of_results: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    norms_of_heads: bool = False
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    max_positions: int = 4096
    rotary_axes: tuple[int, ...] = ()
    image_span: int = 0
    injected_layers: int = 0
    layer_pattern: tuple[LayerKind, ...] = (LayerKind(),)
    attention: str = "xla"

    def kind(self, layer: int) -> LayerKind:
        """Of the layer with this number, counted from 0."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    @property
    def norms(self) -> tuple[str, ...]:
        """Of a layer, by the names of `decoder_layer.LayerWeights`."""
        results = ("attention_result_norm", "mlp_result_norm") if self.norms_of_results else ()
        heads = ("q_norm", "k_norm") if self.norms_of_heads else ()
        return ("input_norm", "post_attention_norm", *results, *heads)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Every kind that a layer has, once."""
        return tuple(dict.fromkeys(self.kind(layer) for layer in range(self.num_layers)))

    @property
    def kind_numbers(self) -> tuple[int, ...]:
        """The place in `kinds` of every layer's kind."""
        return tuple(self.kinds.index(self.kind(layer)) for layer in range(self.num_layers))
