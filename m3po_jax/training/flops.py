"""Analytic FLOPs of a training step, and the share of the chip's peak that they are (MFU).

Counted is the arithmetic that the mathematics needs: two FLOPs a multiply-add in matrix products and attention,
for tokens that are not padding. What rematerialisation computes again, and the rest (norms, softmax, optimizer),
is not counted, as in PaLM's definition of MFU (Chowdhery et al., arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx

from m3po_jax.models.forward import PROJECTOR, VISION_TOWER
from m3po_jax.models.layers import Linear, LoRAParam
from m3po_jax.models.quantization import Quantized, kernel_shape
from m3po_jax.models.registry import family_of_model

# Dense bfloat16 peak in FLOP/s of one jax device, by `device_kind`; makers' data sheets, without sparsity.
# Chips with two devices each (TPU v2, v3, 7x) and unknown ones are left out: no figure beats a wrong one.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Multiply-adds per token of each part of a vision-language model, forward and of weight gradients.

    Attributes:
        decoder, head, vision, projector: Forward multiply-adds per token of the part's linear layers (adapters
            included).
        decoder_learns, …: Those of layers whose weights learn.
        idle, idle_learns: Those of the last decoder layer's queries, output projection and MLP, which nothing needs
            at a prompt's positions but the last where adapters alone learn (`Decoder.needed_states`); 0 otherwise.
        idle_attention: Multiply-adds per (query, key) pair of that layer, likewise.
        attention: Multiply-adds per (query, key) pair of a decoder layer.
        windows: The window of every decoder layer, see `LayerKind`.
        vision_attention: The same in the tower.
        positions, image_tokens: A typical image's positions in the tower, and its tokens in the prompt.
    """

    decoder: float
    decoder_learns: float
    head: float
    head_learns: float
    vision: float
    vision_learns: float
    projector: float
    projector_learns: float
    attention: float
    windows: tuple[int | None, ...]
    vision_attention: float
    positions: int
    image_tokens: int
    idle: float = 0.0
    idle_learns: float = 0.0
    idle_attention: float = 0.0

    def flops(
        self,
        prefixes: np.ndarray,
        answers: np.ndarray,
        *,
        image_tokens: int,
        cached_images: bool,
        reference: bool,
    ) -> float:
        """FLOPs of one optimizer step.

        Args:
            prefixes: [b] prompt tokens of each row, image tokens included.
            answers: [b, k] answer tokens.
            image_tokens: Those of the batch's images, which are in the prefixes already; as many images are
                counted as typical ones have so many tokens.
            cached_images: The tower does not run.
            reference: The reference runs the same rows too, without gradient.
        """
        images = image_tokens / self.image_tokens if image_tokens else 0.0
        p, a = prefixes.astype(float), answers.astype(float)
        tokens, predicted = p.sum() + a.sum(), a.sum()
        pairs = 0.0  # of a query and a key that it sees, all layers
        for window, layers in Counter(self.windows).items():
            prefix, whole = seen_pairs(p, window), seen_pairs(p[:, None] + a, window)
            pairs += layers * (prefix.sum() + (whole - prefix[:, None]).sum())
        encoded = 0 if cached_images else images * self.positions
        vision = encoded * (self.vision + self.positions * self.vision_attention)
        before = (p - 1).sum()
        text = tokens * self.decoder + pairs * self.attention + predicted * self.head
        text -= before * self.idle + seen_pairs(p - 1, self.windows[-1]).sum() * self.idle_attention
        projected = image_tokens * self.projector
        forward = vision + projected + text
        # Gradients of activations cost one more forward each, from the loss down to the lowest part that learns.
        vision_learns, projector_learns = self.vision_learns > 0, self.projector_learns > 0
        backward = text if self.decoder_learns or self.head_learns or vision_learns or projector_learns else 0.0
        backward += projected if vision_learns else 0.0
        backward += vision if vision_learns else 0.0
        weights = (
            tokens * self.decoder_learns
            - before * self.idle_learns
            + predicted * self.head_learns
            + encoded * self.vision_learns
            + image_tokens * self.projector_learns
        )
        return 2.0 * (forward * (2 if reference else 1) - (vision if reference else 0.0) + backward + weights)


def seen_pairs(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """How many keys the first `tokens` tokens of a row see in a causal layer with this window, added up."""
    if window is None:
        return tokens * (tokens + 1) / 2
    inside = np.minimum(tokens, window)
    return inside * (inside + 1) / 2 + (tokens - inside) * window


def step_cost(model: Any, trainable: set[str]) -> StepCost | None:
    """The cost of a vision-language model whose leaves `trainable` learn; None for other models.

    Args:
        trainable: Dotted names of the leaves that learn.
    """
    images = family_of_model(model).images
    if images is None:
        return None
    sums = {f"{part}{kind}": 0.0 for part in ("decoder", "head", "vision", "projector") for kind in ("", "_learns")}
    only_adapters, idle, idle_learns = True, 0.0, 0.0  # of the last decoder layer, all of whose layers are alike
    names = {"decoder": "decoder", VISION_TOWER: "vision", PROJECTOR: "projector"}
    for path, linear in nnx.iter_modules(model):
        if not isinstance(linear, Linear):
            continue
        dotted = ".".join(map(str, path))
        part = "head" if str(path[-1]) == "lm_head" else names[str(path[0])]
        for leaf, variable in nnx.to_flat_state(nnx.state(linear, (nnx.Param, Quantized))):
            if str(leaf[-1]) in ("bias", "kernel_scale"):
                continue
            coded = isinstance(variable, Quantized)
            size = float(math.prod(kernel_shape(variable) if coded else variable.shape))
            adapter = issubclass(variable.type, LoRAParam)
            learns = f"{dotted}.{'.'.join(map(str, leaf))}" in trainable
            active = not adapter or linear.lora_scale != 0
            sums[part] += size if active else 0.0
            sums[f"{part}_learns"] += size if learns else 0.0
            only_adapters &= adapter or part != "decoder" or not learns
            if part == "decoder" and str(path[-1]) not in ("k_proj", "v_proj"):
                idle += size if active else 0.0
                idle_learns += size if learns else 0.0
    text, tower = model.config.text, images.tower_cost(model.config)
    sums["vision"] *= tower.share
    sums["vision_learns"] *= tower.share
    if sums["head"] == 0.0:  # tied to the embedding
        sums["head"] = float(text.vocab_size * text.hidden_size)
    a_layer = 2.0 * text.num_heads * text.head_dim
    return StepCost(
        **sums,
        attention=a_layer,
        windows=tuple(text.kind(layer).window for layer in range(text.num_layers)),
        vision_attention=tower.attention,
        positions=tower.positions,
        image_tokens=images.typical(model.config).tokens,
        idle=idle / text.num_layers if only_adapters else 0.0,
        idle_learns=idle_learns / text.num_layers if only_adapters else 0.0,
        idle_attention=a_layer if only_adapters else 0.0,
    )


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Peak FLOP/s of all `devices` together; None where a kind is unknown."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    return None if None in peaks else float(sum(peak for peak in peaks if peak is not None))
