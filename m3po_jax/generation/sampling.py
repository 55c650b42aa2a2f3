"""Drawing tokens: random streams that belong to a candidate, the usual warpers, and a cheap Gumbel-max draw.

Everything is a pure function of its arguments. A candidate's stream is a function of (seed, prompt id,
candidate index) and of its own step count, so neither the batch that a prompt travels in nor the machines
change it.

Shape suffixes: N rows (candidates of all prompts), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32


def candidate_keys(seed: int, prompt_ids: Sequence[str], num_candidates: int) -> UInt32[np.ndarray, "b k 2"]:
    """Threefry key words of every candidate, from BLAKE2b over (seed, candidate index, prompt id)."""
    keys = np.empty((len(prompt_ids), num_candidates, 2), np.uint32)
    for row, prompt_id in enumerate(prompt_ids):
        for candidate in range(num_candidates):
            message = f"{seed}\0{candidate}\0{prompt_id}".encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(message, digest_size=8, person=b"m3po candidate").digest()
            keys[row, candidate] = np.frombuffer(digest, "<u4")
    return keys


def step_keys(keys: UInt32[Array, "n 2"], step: Int[Array, ""]) -> jax.Array:
    """The typed keys of one step of every candidate's stream."""
    return jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys, impl="threefry2x32"), step)


def _ordered(x: Float[Array, " ..."]) -> Int[Array, " ..."]:
    """Integers in the order of the float32 values (−0 and +0 differ, NaN is not covered)."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_true(holds: Callable[[jax.Array], jax.Array], rows: int) -> Int[Array, "n 1"]:
    """Per row the largest int32 for which `holds` (true up to some point, then false) by bisection.

    32 passes of compare and sum over the vocabulary are several times cheaper than sorting it.
    """

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean rounded up, without overflow
        true = holds(middle)
        return jnp.where(true, middle, low), jnp.where(true, high, middle - 1)

    low = jnp.full((rows, 1), jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.full((rows, 1), jnp.iinfo(jnp.int32).max - 1, jnp.int32)
    return jax.lax.fori_loop(0, 33, halve, (low, high))[0]


def keep_top_k(logits: Float[Array, "n v"], top_k: int) -> Float[Array, "n v"]:
    """−inf below the k-th largest logit; ties with it stay, as in Hugging Face's TopKLogitsWarper."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    order = _ordered(logits)
    least = _largest_true(lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= top_k, logits.shape[0])
    return jnp.where(order >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "n v"], top_p: float) -> Float[Array, "n v"]:
    """The nucleus (Holtzman et al., arXiv:1904.09751) by Hugging Face's rule.

    A token goes when it and all less likely ones together have a probability of at most 1 − p. Tokens that
    tie at the cut stay or go together (a sort would split them by its own order). The likeliest always stays.
    """
    if top_p >= 1.0:
        return logits
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = _ordered(probabilities)
    cut = _largest_true(
        lambda t: jnp.sum(jnp.where(order <= t, probabilities, 0.0), axis=-1, keepdims=True) <= 1.0 - top_p,
        logits.shape[0],
    )
    keep = (order > cut) | (order == jnp.max(order, axis=-1, keepdims=True))
    return jnp.where(keep, logits, -jnp.inf)


def warp(logits: Float[Array, "n v"], temperature: float, top_k: int, top_p: float) -> Float[Array, "n v"]:
    """Temperature, then top-k, then top-p: the order and the meaning of `transformers`' warpers.

    Temperature 0 (greedy) leaves the order of the logits and truncates nothing.
    """
    if temperature == 0.0:
        return logits
    return keep_top_p(keep_top_k(logits / temperature, top_k), top_p)


def sample(keys: jax.Array, logits: Float[Array, "n v"]) -> Int[Array, " n"]:
    """One draw a row from softmax(logits) by Gumbel-max in two levels, row i with `keys[i]` alone.

    The vocabulary is cut into about √V blocks; Gumbel noise on the blocks' log-sum-exps picks a block, noise
    on its logits the token. The distribution is the same (p(block) · p(token | block)), and 2√V random values
    replace V: at 32,000 tokens, noise for all of them costs more than the output layer.
    """
    rows, vocab = logits.shape
    width = 2 ** math.ceil(math.log2(max(vocab, 1)) / 2)
    count = -(-vocab // width)
    blocks = jnp.pad(logits, ((0, 0), (0, count * width - vocab)), constant_values=-jnp.inf)
    blocks = blocks.reshape(rows, count, width)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (count + width,), jnp.float32))(keys)
    top = jnp.max(logits, axis=-1)[:, None, None]
    mass = jnp.log(jnp.sum(jnp.exp(blocks - top), axis=-1))
    block = jnp.argmax(mass + noise[:, :count], axis=-1)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * width + jnp.argmax(within + noise[:, count:], axis=-1)


def contrast(
    logits: Float[Array, "n v"], blank: Float[Array, "n v"], alpha: float, beta: float
) -> Float[Array, "n v"]:
    """Visual contrastive decoding (Leng et al., arXiv:2311.16922, equations 3 and 5).

    (1 + α)·logits − α·blank among the tokens whose probability with the image is at least β times the best.
    """
    plausible = logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(beta)
    return jnp.where(plausible, (1.0 + alpha) * logits - alpha * blank, -jnp.inf)


def sampling_bias(
    vocab_size: int, suppress: Sequence[int], eos_token_id: int, stop_bias: float, stop_token_ids: Sequence[int] = ()
) -> tuple[Bool[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """Which tokens are never drawn, and what is added to the logits before a draw (to the end's by default)."""
    never = np.zeros(vocab_size, bool)
    never[[token for token in suppress if 0 <= token < vocab_size and token != eos_token_id]] = True
    bias = np.zeros(vocab_size, np.float32)
    bias[list(stop_token_ids) or [eos_token_id]] = stop_bias
    return never, bias
