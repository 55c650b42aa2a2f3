"""Figures that do not depend on the machine's mood: FLOPs of a program, the least possible, and cache copies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jax_core
from jax.interpreters import partial_eval

from m3po_jax.models.llava.config import LlavaConfig


def _dot_general(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def dot_flops(closed: jax_core.ClosedJaxpr, trips: Sequence[int] = ()) -> int:
    """Matrix-product FLOPs of a program: 2 × the multiplications of every `dot_general`, loops multiplied out.

    What the program computes and does not use is left out, as the compiler leaves it out.

    Args:
        trips: how often each while loop that holds a product runs, in program order.

    Raises:
        ValueError: another number of such loops, or a product that is not counted (a convolution).
    """
    remaining = list(trips)

    def count(jaxpr: Any) -> int:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        total = 0
        for equation in jaxpr.eqns:
            kind, params = equation.primitive.name, equation.params
            if kind == "dot_general":
                total += _dot_general(equation)
            elif kind == "conv_general_dilated":
                raise ValueError("convolutions are not counted")
            elif kind == "scan":
                total += params["length"] * count(params["jaxpr"])
            elif kind == "cond":
                total += max(count(branch) for branch in params["branches"])
            elif kind == "while":
                place = len(remaining)
                body = count(params["body_jaxpr"]) + count(params["cond_jaxpr"])
                if body and (place != len(remaining) or not remaining):
                    raise ValueError("a while loop with products whose trips were not given")
                total += body * remaining.pop(0) if body else 0
            else:
                total += sum(count(inner) for inner in jax_core.jaxprs_in_params(params))
        return total

    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    total = count(used)
    if remaining:
        raise ValueError(f"{len(remaining)} while loops fewer than trips were given for")
    return total


def _vision(config: LlavaConfig) -> int:
    """One image through the tower, up to the layer whose features are used, and the projector."""
    vision, encoder = config.vision, config.vision.encoder
    total = encoder.num_layers
    layers = max(layer if layer >= 0 else total + 1 + layer for layer in config.vision_feature_layers)
    d, f, tokens = encoder.hidden_size, encoder.intermediate_size, vision.num_patches + 1
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * d
    layer = 2 * tokens * (4 * d * d + 2 * d * f) + 4 * tokens * tokens * d
    width = config.text.hidden_size
    projector = 2 * config.tokens_per_image * (config.feature_width * width + width * width)
    return patches + layers * layer + projector


class _Decoder:
    """FLOPs of the decoder's parts for one token, forward."""

    def __init__(self, config: LlavaConfig, lora_rank: int = 0):
        c = config.text
        d, f, r = c.hidden_size, c.intermediate_size, lora_rank
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.layers, self.pair = c.num_layers, 4 * q  # a query with a key: its score and its value
        product = lambda i, o: 2 * (i * o + r * (i + o))  # noqa: E731
        self.keys_values = 2 * product(d, kv)
        self.rest = product(d, q) + product(q, d) + 2 * product(d, f) + product(f, d)
        self.head = 2 * d * c.vocab_size

    def prefix(self, length: int) -> int:
        """A prompt of which only the last token's state and all layers' keys and values are needed."""
        full = length * (self.keys_values + self.rest) + self.pair * (length * (length + 1) // 2)
        last = length * self.keys_values + self.rest + self.pair * length
        return (self.layers - 1) * full + last

    def answer(self, prefix: int, tokens: int) -> int:
        """`tokens` tokens that see the prefix and each other, all their states needed."""
        seen = tokens * prefix + tokens * (tokens + 1) // 2
        return self.layers * (tokens * (self.keys_values + self.rest) + self.pair * seen)


def generation_minimum(config: LlavaConfig, *, prompts: int, prefix: int, candidates: int, new_tokens: int) -> int:
    """Least matrix-product FLOPs of sampling: an image and a prefix once a prompt, one pass a token after that.

    Causal attention counts only the pairs that may see each other; in the last layer a prompt needs all keys and
    values but only its last token's state. The first tokens share their logits; the last is never fed back.
    """
    part = _Decoder(config)
    fed = new_tokens - 1
    answers = candidates * (part.answer(prefix, fed) + fed * part.head)
    return prompts * (_vision(config) + part.prefix(prefix) + part.head + answers)


# Scoring given answers needs the very same products, in another order.
scoring_minimum = generation_minimum


def dpo_minimum(config: LlavaConfig, *, pairs: int, prefix: int, new_tokens: int, lora_rank: int) -> int:
    """Least matrix-product FLOPs of a preference step with adapters on every linear layer, reference recorded.

    Forward as in `scoring_minimum` with two answers. Backward: a frozen weight costs one product a token (its
    input's gradient), an adapter's factor two, attention twice its forward, the head one. The tower and the
    projector are frozen, so they have no backward. Gradients of the first layer's input are not needed.
    """
    bare, adapted = _Decoder(config), _Decoder(config, lora_rank)
    fed = new_tokens - 1
    forward = lambda part: part.prefix(prefix) + 2 * part.answer(prefix, fed)  # noqa: E731
    attention_free = _Decoder(config, lora_rank)
    attention_free.pair = 0
    attention = forward(adapted) - forward(attention_free)
    bare.pair = 0
    frozen = forward(bare)
    factors = forward(attention_free) - frozen
    head = adapted.head * (1 + 2 * fed)
    c = config.text
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    tokens = prefix + 2 * fed
    unneeded = tokens * 2 * c.hidden_size * (q + 2 * kv) + tokens * 2 * 3 * c.hidden_size * lora_rank
    decoder = forward(adapted) + frozen + 2 * factors + 2 * attention - unneeded
    return pairs * (_vision(config) + decoder + 2 * head)


def _loop_lines(program: str) -> Iterator[str]:
    """Instructions of the entry computation's while bodies and of everything that they call."""
    computations: dict[str, list[str]] = {}
    name = ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else header[1]
        computations.setdefault(name, []).append(line)
    called = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
    waiting = [found for line in computations["ENTRY"] if " while(" in line for found in called.findall(line)]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [callee for line in computations[name] for callee in called.findall(line)]
    for name in sorted(seen):
        yield from computations[name]


def cache_copies(program: str, caches: Sequence[tuple[int, ...]]) -> int:
    """Copies and transpositions of arrays shaped like one of `caches` in the decode loops (axes in any order,
    those of length 1 left out).

    `program` is the compiled module's text.
    """
    wanted = [sorted(size for size in shape if size > 1) for shape in caches]
    moved = re.compile(r"= \w+\[([\d,]+)\]\{([\d,]+)[^}]*\} (copy|transpose)\(")
    count = 0
    for line in _loop_lines(program):
        if found := moved.search(line):
            shape, layout = ([int(number) for number in found[group].split(",")] for group in (1, 2))
            # A transposition into another layout than row by row renames axes and moves nothing.
            moves = found[3] == "copy" or layout == sorted(layout, reverse=True)
            count += moves and sorted(size for size in shape if size > 1) in wanted
    return count
