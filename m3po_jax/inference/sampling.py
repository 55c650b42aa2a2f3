"""Drawing tokens: random streams that belong to a candidate, the usual warpers, and a cheap Gumbel-max draw.

Everything is a pure function of its arguments. A candidate's stream is a function of (seed, prompt id,
candidate index, attempt) and of its own step count, so neither the batch that a prompt travels in nor the
machines change it.

A setting is a number for all rows or an array [N, 1] with one for each; a number that switches a rule off costs
nothing at run time.

Shape suffixes: N rows (candidates of all prompts), V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

Setting = float | Float[Array, "n 1"] | Int[Array, "n 1"]


class Settings(NamedTuple):
    """The settings that shape a draw, each a number or an array [N, 1]; `SamplingConfig` tells their meaning."""

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    min_new_tokens: Any = 0


def candidate_keys(
    seed: int, prompt_ids: Sequence[str], num_candidates: int, attempt: int = 0
) -> UInt32[np.ndarray, "b k 2"]:
    """Threefry key words of every candidate, from BLAKE2b over (seed, candidate index, prompt id).

    Attempts after the first are streams of their own, for duplicates that are drawn again.
    """
    keys = np.empty((len(prompt_ids), num_candidates, 2), np.uint32)
    head, person = (f"{seed}", b"m3po candidate") if attempt == 0 else (f"{seed}\0{attempt}", b"m3po again")
    for row, prompt_id in enumerate(prompt_ids):
        for candidate in range(num_candidates):
            message = f"{head}\0{candidate}\0{prompt_id}".encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(message, digest_size=8, person=person).digest()
            keys[row, candidate] = np.frombuffer(digest, "<u4")
    return keys


def step_keys(keys: UInt32[Array, "n 2"], step: Int[Array, "#n"] | Int[Array, ""]) -> jax.Array:
    """The typed keys of every candidate's stream at its own step, or at one step for all."""
    steps = jnp.broadcast_to(step, keys.shape[:1])
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys, impl="threefry2x32"), steps)


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


def _is(setting: Setting, value: float) -> bool:
    """Whether every row has `value`, as far as can be told without looking into an array."""
    return isinstance(setting, int | float) and setting == value


def keep_top_k(logits: Float[Array, "n v"], top_k: Setting) -> Float[Array, "n v"]:
    """−inf below the k-th largest logit; ties with it stay, as in Hugging Face's TopKLogitsWarper. 0 keeps all."""
    vocab = logits.shape[-1]
    if isinstance(top_k, int) and not 0 < top_k < vocab:
        return logits
    order = _ordered(logits)
    count = top_k if isinstance(top_k, int) else jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    least = _largest_true(lambda t: jnp.sum(order >= t, axis=-1, keepdims=True) >= count, logits.shape[0])
    return jnp.where(order >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "n v"], top_p: Setting) -> Float[Array, "n v"]:
    """The nucleus (Holtzman et al., arXiv:1904.09751) by Hugging Face's rule.

    A token goes when it and all less likely ones together have a probability of at most 1 − p. Tokens that
    tie at the cut stay or go together (a sort would split them by its own order). The likeliest always stays.
    """
    if _is(top_p, 1.0):
        return logits
    probabilities = jax.nn.softmax(logits, axis=-1)
    order = _ordered(probabilities)
    cut = _largest_true(
        lambda t: jnp.sum(jnp.where(order <= t, probabilities, 0.0), axis=-1, keepdims=True) <= 1.0 - top_p,
        logits.shape[0],
    )
    keep = (order > cut) | (order == jnp.max(order, axis=-1, keepdims=True))
    if not isinstance(top_p, int | float):
        keep |= top_p >= 1.0
    return jnp.where(keep, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "n v"], min_p: Setting) -> Float[Array, "n v"]:
    """−inf where a token is less likely than `min_p` times the likeliest, as in Hugging Face's MinPLogitsWarper."""
    if _is(min_p, 0.0):
        return logits
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits < top + jnp.log(jnp.float32(min_p)), -jnp.inf, logits)


def warp(
    logits: Float[Array, "n v"], temperature: Setting, top_k: Setting, top_p: Setting, min_p: Setting = 0.0
) -> Float[Array, "n v"]:
    """Temperature, then top-k, top-p and min-p: the order and the meaning of `transformers`' warpers.

    Temperature 0 (greedy) leaves the order of the logits; as a number it truncates nothing either.
    """
    if _is(temperature, 0.0):
        return logits
    if not isinstance(temperature, int | float):
        temperature = jnp.where(temperature == 0.0, 1.0, temperature)
    return keep_min_p(keep_top_p(keep_top_k(logits / temperature, top_k), top_p), min_p)


def penalize(logits: Float[Array, "n v"], penalized: Bool[Array, "n v"], penalty: Setting) -> Float[Array, "n v"]:
    """Hugging Face's RepetitionPenaltyLogitsProcessor over the tokens marked in `penalized`."""
    return jnp.where(penalized, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def as_ids(eos_token_id: int | Sequence[int]) -> tuple[int, ...]:
    """One end token or several."""
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def is_any(tokens: Int[Array, ...], ids: Sequence[int]) -> Bool[Array, ...]:
    """Which tokens are one of `ids`, of which there are few."""
    return functools.reduce(jnp.logical_or, [tokens == token for token in ids], jnp.zeros(tokens.shape, bool))


def process(
    logits: Float[Array, "n v"],
    settings: Settings,
    *,
    step: Int[Array, "n 1"] | Int[Array, ""],
    eos_token_id: int | Sequence[int],
    penalized: Any = None,
) -> Float[Array, "n v"]:
    """What holds for greedy draws too: repetition penalty, and no end before `min_new_tokens`.

    Args:
        step: tokens that the candidate has drawn already.
        penalized: [N, V], the tokens to penalise; None without a penalty.
    """
    if penalized is not None:
        logits = penalize(logits, penalized, settings.repetition_penalty)
    if not _is(settings.min_new_tokens, 0):
        end = is_any(jnp.arange(logits.shape[-1]), as_ids(eos_token_id))
        logits = jnp.where((step < settings.min_new_tokens) & end, -jnp.inf, logits)
    return logits


def choose(keys: jax.Array, logits: Float[Array, "n v"], settings: Settings) -> Int[Array, " n"]:
    """One token a row: the likeliest at temperature 0, else a draw from the warped logits with the row's key."""
    if _is(settings.temperature, 0.0):
        return jnp.argmax(logits, axis=-1)
    token = sample(keys, warp(logits, settings.temperature, settings.top_k, settings.top_p, settings.min_p))
    if isinstance(settings.temperature, int | float):
        return token
    return jnp.where(settings.temperature[:, 0] == 0.0, jnp.argmax(logits, axis=-1), token)


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
    vocab_size: int,
    suppress: Sequence[int],
    eos_token_id: int | Sequence[int],
    stop_bias: float,
    stop_token_ids: Sequence[int] = (),
) -> tuple[Bool[np.ndarray, " v"], Float[np.ndarray, " v"]]:
    """Which tokens are never drawn, and what is added to the logits before a draw (to all ends' by default)."""
    never = np.zeros(vocab_size, bool)
    never[[token for token in suppress if 0 <= token < vocab_size and token not in as_ids(eos_token_id)]] = True
    bias = np.zeros(vocab_size, np.float32)
    bias[list(stop_token_ids or as_ids(eos_token_id))] = stop_bias
    return never, bias
