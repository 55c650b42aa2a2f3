"""The two programs of generation, shared by all generators of one architecture, mesh and decoding.

Weights, the seed and what changes a logit by a constant are arguments: another round, arm, seed or stop bias runs
programs that are compiled already.

Shape suffixes: as in `state.py`; F prompts that a shard prefills at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from m3po_jax.hosts.sharding import constrain
from m3po_jax.inference import lanes as lane
from m3po_jax.inference import sampling as draw
from m3po_jax.inference.decoder import decode_step, pin_stationary, prefill
from m3po_jax.inference.fused import FusedLayer, fuse
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.inference.state import Board, Cache, Lanes, PromptSlots, Report, Sizes, StateLayout
from m3po_jax.models.attention_parts import KV
from m3po_jax.models.decoder_config import DecoderConfig
from m3po_jax.models.forward import blank_images, embedded_prompts, encode_images


class Weights(NamedTuple):
    """The model as the programs take it: the decoder's layers fused, the rest as it is."""

    state: nnx.State
    layers: tuple[FusedLayer, ...]


@partial(jax.jit, static_argnums=0)
def fuse_layers(graph: Any, state: Any) -> tuple[FusedLayer, ...]:
    """Compiled once for all generators and all updates of the weights of one kind of model."""
    return fuse(nnx.merge(graph, state))


def programs_for(
    mesh: Mesh,
    config: DecoderConfig,
    dtype: Any,
    sampling: SamplingConfig,
    *,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
) -> Programs:
    """The programs of a decoding: those that were made before where what they depend on is equal.

    Args:
        config: Of the decoder, and
        dtype: in which it computes.
    """
    # The defaults of what reaches the programs as arguments, or not at all.
    compiled_in = dataclasses.replace(sampling, seed=0, stop_bias=0.0, stop_token_ids=(), suppress_token_ids=())
    return _programs(mesh, config, jnp.dtype(dtype), compiled_in, eos_token_ids, pad_token_id)


@lru_cache(maxsize=32)
def _programs(*key: Any) -> Programs:
    return Programs(*key)


class Programs:
    """`prefill` and `decode`, and the layout of the state that they work on; use `programs_for`.

    Attributes:
        compilations: Shapes that were compiled so far.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: DecoderConfig,
        dtype: Hashable,
        sampling: SamplingConfig,
        ends: tuple[int, ...],
        pad: int,
    ):
        self.sampling, self.settings = sampling, sampling.by_name()
        self.eos_token_ids, self.pad_token_id = ends, pad
        self.compilations = 0
        self.layout = where = StateLayout(mesh, config, dtype, config.vocab_size)
        self.prefill = jax.jit(
            self._prefill,
            static_argnums=0,
            donate_argnums=(2, 3),
            out_shardings=(where.prompts_sharding, where.rows),
        )
        self.decode = jax.jit(
            self._decode,
            static_argnums=(0, 1),
            donate_argnums=(4, 5, 6),
            out_shardings=(where.rows, where.rows, where.cache_sharding, where.whole),
        )

    def _prefill(
        self, graph: nnx.GraphDef, weights: Weights, prompts: PromptSlots, board: Board, arrays: dict[str, Any]
    ) -> tuple[PromptSlots, Board]:
        """Puts F prompts a shard into the slots named in `arrays`; slot N stands for no prompt."""
        self.compilations += 1
        model, s = nnx.merge(graph, weights.state), self.sampling
        token_ids, length, slots = arrays["token_ids"], arrays["length"], arrays["slot"]
        a, f = slots.shape
        images = encode_images(model, arrays.get("images"))
        # Contrastive decoding runs every prompt twice, in neighbouring rows: with its image and with a blank.
        views = prompts.hidden.shape[2]
        mask = jnp.arange(token_ids.shape[1]) < length[:, None]
        if views == 2:
            if images is not None:
                blank = blank_images(model, images.layout, *images.features.shape[:2])
                both = lambda x, y: jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])  # noqa: E731
                images = jax.tree.map(both, images, blank)
            token_ids, mask = jnp.repeat(token_ids, 2, axis=0), jnp.repeat(mask, 2, axis=0)
        places = (slots[:, :, None] * views + jnp.arange(views)).reshape(a, f * views)

        def put(into: jax.Array, new: jax.Array, places: jax.Array = slots) -> jax.Array:
            """Rows `new` [A·F, ...] into the shards' `places`; those beyond the end are dropped."""
            new = new.reshape(a, -1, *new.shape[1:]).astype(into.dtype)
            return jax.vmap(lambda x, y, at: x.at[at].set(y, mode="drop"))(into, new, places)

        kv = list(prompts.kv)

        def keep(index: int, computed: KV) -> None:
            """Keys and values into the slots; what lies beyond the prompt's length is never read."""

            def write(old: jax.Array, new: jax.Array) -> jax.Array:
                x, y = (z.reshape(a, -1, *z.shape[1:]) for z in (old, new))
                into = jax.vmap(lambda x, y, at: x.at[at, :, : y.shape[2]].set(y, mode="drop"))
                return into(x, y, places).reshape(old.shape)

            kv[index] = (write(kv[index][0], computed[0]), write(kv[index][1], computed[1]))

        x, positions, injected, spans = embedded_prompts(model, token_ids, mask, images)
        hidden = prefill(
            model.config.text, weights.layers, x, positions.of_prompt, mask, keep, injected=injected, spans=spans
        )
        penalized = prompts.penalized
        if penalized is not None:
            fresh = jnp.zeros((a * f, penalized.shape[-1]), bool)
            if s.repetition_penalty_prompt:
                fresh = fresh.at[jnp.arange(a * f)[:, None], arrays["token_ids"]].max(mask[::views])
            penalized = put(penalized, fresh)
        prompts = PromptSlots(
            kv,
            put(prompts.length, length),
            put(prompts.following, positions.following[::views]),
            put(prompts.hidden, hidden.reshape(a * f, views, -1)),
            put(prompts.keys, arrays["keys"]),
            put(prompts.arrival, arrays["arrival"]),
            penalized,
        )
        clear = lambda x, value: put(x, jnp.full((a * f, *x.shape[2:]), value, x.dtype))  # noqa: E731
        return prompts, Board(
            put(board.pending, arrays["wanted"]),
            board.lane,
            clear(board.token_ids, self.pad_token_id),
            clear(board.log_probs, 0.0),
            clear(board.lengths, 0),
            board.broken,
        )

    def _decode(
        self,
        graph: nnx.GraphDef,
        sizes: Sizes,
        weights: Weights,
        prompts: PromptSlots,
        board: Board,
        lanes: Lanes,
        cache: Cache,
        constants: dict[str, jax.Array],
        quota: Int[Array, " a"],
    ) -> tuple[Board, Lanes, Cache, Report]:
        """Tokens for all lanes until none is left, `quota` prompts a shard (0: none) should come or the cache is
        full."""
        self.compilations += 1
        model = nnx.merge(graph, weights.state)
        a, n, k, views, count = sizes.shards, sizes.slots, sizes.candidates, sizes.views, sizes.lanes
        first_step, capacity = cache.step, cache.written.shape[0]
        rows = lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1))  # noqa: E731

        def to_grid(x: jax.Array, at: jax.Array) -> jax.Array:
            """[A, L, ...] to [A, N, K, ...]; of no meaning where no lane decodes."""
            if not sizes.identity:
                x = lane.take(x, at.reshape(a, n * k))
            return x.reshape(a, n, k, *x.shape[2:])

        def from_grid(x: jax.Array, place: jax.Array) -> jax.Array:
            x = x.reshape(a, n * k, *x.shape[3:])
            return x if sizes.identity else lane.take(x, place)

        def apart(y: jax.Array) -> jax.Array:
            return y.reshape(a, count, views, *y.shape[2:])

        def rows_to_grid(y: jax.Array, at: jax.Array) -> jax.Array:
            """[A·L·V, ...] to [A·N·V, K, ...]."""
            grid = to_grid(y.reshape(a, count, views, *y.shape[1:]), at)
            return jnp.moveaxis(grid, 3, 2).reshape(a * n * views, k, *y.shape[1:])

        def rows_from_grid(y: jax.Array, place: jax.Array) -> jax.Array:
            grid = jnp.moveaxis(y.reshape(a, n, views, k, *y.shape[2:]), 2, 3)
            return from_grid(grid, place).reshape(a * count * views, *y.shape[2:])

        def refill(board: Board, lanes: Lanes, start: jax.Array) -> tuple[Board, Lanes, jax.Array]:
            taken = jax.vmap(partial(lane.assign, identity=sizes.identity))(
                lanes.busy, lanes.place, board.pending, board.lane, prompts.arrival
            )
            fresh, penalized = taken.fresh, lanes.penalized
            if penalized is not None:
                assert prompts.penalized is not None
                penalized = jnp.where(fresh[..., None], lane.take(prompts.penalized, taken.place // k), penalized)
            lanes = Lanes(
                taken.place,
                jnp.where(fresh, 0, lanes.age),
                jnp.where(fresh, start, lanes.start),
                lanes.token,
                lanes.busy | fresh,
                penalized,
            )
            return board._replace(pending=taken.pending, lane=taken.lane), lanes, fresh

        def advance(
            hidden: Float[Array, "a l v e"], board: Board, lanes: Lanes, live: Bool[Array, "a l"]
        ) -> tuple[Board, Lanes]:
            """Draws the next token of every live lane from the state that predicts it."""
            with jax.named_scope("head"):
                # A few rows of states and logits travel, the vocabulary's weights stay.
                hidden = pin_stationary(model.decoder.norm(hidden.reshape(a, count * views, -1)))
                logits = model.decoder.logits(hidden)
            logits = constrain(logits, "batch", None, None).reshape(a * count, views, -1)
            raw = logits[:, 0]
            with jax.named_scope("sampling"):
                token, log_prob, bad = self._drawn(raw, logits[:, -1], prompts, lanes, constants)
            token, log_prob, bad = (x.reshape(a, count) for x in (token, log_prob, bad))
            token = jnp.where(live, token, self.pad_token_id)
            stop = draw.is_any(token, self.eos_token_ids)
            ends = live & (stop | bad | (lanes.age + 1 >= sizes.tokens))
            penalized = lanes.penalized
            if penalized is not None:
                penalized |= token[..., None] == jnp.arange(penalized.shape[-1])
            running = board.lane < count
            grid = lambda x: to_grid(x, board.lane)  # noqa: E731
            drawn = running & grid(live)
            age = grid(lanes.age)
            here = drawn[..., None] & (age[..., None] == jnp.arange(sizes.tokens))
            board = Board(
                board.pending,
                rows(jnp.where(drawn & grid(ends), count, board.lane)),
                rows(jnp.where(here, grid(token)[..., None], board.token_ids)),
                rows(jnp.where(here, grid(log_prob)[..., None], board.log_probs)),
                rows(jnp.where(drawn, age + 1, board.lengths)),
                rows(board.broken | jnp.any(drawn & grid(bad), axis=2)),
            )
            lanes = Lanes(
                rows(lanes.place),
                rows(lanes.age + live),
                rows(lanes.start),
                rows(jnp.where(live, token, lanes.token)),
                rows(lanes.busy & ~ends),
                penalized,
            )
            return board, lanes

        def grows(lanes: Lanes, cache: Cache) -> jax.Array:
            if capacity >= sizes.tokens - 1:
                return jnp.bool_(False)
            return lane.needs_growth(cache.written, lanes.busy, lanes.start)

        def goes_on(carry: tuple[Board, Lanes, Cache]) -> jax.Array:
            board, lanes, cache = carry
            free = jax.vmap(partial(lane.free_slots, lanes=count))(board.pending, board.lane)
            room, starving = jax.vmap(lane.wants_prompts)(lanes.busy, board.pending, free, quota)
            more = jnp.any(quota > 0) & (jnp.all(room) | jnp.any(starving))
            work = jnp.any(lanes.busy) | jnp.any(board.pending)
            return work & ~more & ~grows(lanes, cache) & ~jnp.any(board.broken)

        def body(carry: tuple[Board, Lanes, Cache]) -> tuple[Board, Lanes, Cache]:
            board, lanes, cache = carry
            board, lanes, fresh = refill(board, lanes, cache.step + 1)
            slot = lane.slot_to_write(cache.written)
            written = jnp.where(jnp.arange(capacity) == slot, cache.step, cache.written)
            length, following = (lane.take(x, lanes.place // k) for x in (prompts.length, prompts.following))
            each = lambda x: jnp.repeat(x, views, axis=1)  # noqa: E731
            hidden, kv = decode_step(
                model.config.text,
                weights.layers,
                model.decoder.embed_tokens(each(lanes.token)),
                each(following + lanes.age - 1),
                each(length + lanes.age - 1),
                prefix=prompts.kv,
                # A kernel leaves out the prompts of which nothing is being decoded.
                length=each(jnp.where(jnp.any(board.lane < count, axis=2), prompts.length, 0)).reshape(-1),
                to_grid=lambda y: rows_to_grid(y, board.lane),
                from_grid=lambda y: rows_from_grid(y, lanes.place),
                cache=cache.kv,
                slot=slot,
                written=each(written >= lanes.start[..., None]).reshape(-1, capacity),
                back=cache.step - written,
            )
            first = lane.take(prompts.hidden, lanes.place // k)
            hidden = jnp.where(fresh[..., None, None], first, apart(hidden))
            board, lanes = advance(hidden, board, lanes, lanes.busy)
            return board, lanes, Cache(kv, written, cache.step + 1)

        # First tokens need no step of the decoder. Where every lane is free that step is left out; later, lanes that
        # take a candidate draw its first token while the others decode.
        def begin() -> tuple[Board, Lanes]:
            taken, begun, fresh = refill(board, lanes, cache.step)
            return advance(lane.take(prompts.hidden, begun.place // k), taken, begun, fresh)

        begins = ~jnp.any(lanes.busy) & jnp.any(board.pending)
        board, lanes = jax.lax.cond(begins, begin, lambda: (board, lanes))
        board, lanes, cache = jax.lax.while_loop(goes_on, body, (board, lanes, cache))
        free = jax.vmap(partial(lane.free_slots, lanes=count))(board.pending, board.lane)
        steps = cache.step - first_step + begins
        return board, lanes, cache, Report(free, board.broken, grows(lanes, cache), steps)

    def _drawn(
        self, raw: jax.Array, blank: jax.Array, prompts: PromptSlots, lanes: Lanes, constants: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens, their raw log-probabilities, and whether logits are not finite, of all lanes [A·L]."""
        s, k = self.sampling, self.sampling.num_candidates
        a, count = lanes.place.shape
        keys = lane.take(prompts.keys.reshape(a, -1, 2), lanes.place).reshape(a * count, 2)
        age, candidate = lanes.age.reshape(-1), (lanes.place % k).reshape(-1)
        per_candidate = {
            name: constants[name][candidate][:, None] for name, x in self.settings.items() if isinstance(x, list)
        }
        settings = draw.Settings(**{**self.settings, **per_candidate})
        shaped = raw
        if s.contrast_alpha > 0:
            shaped = draw.contrast(raw, blank, s.contrast_alpha, s.contrast_beta)
        shaped = jnp.where(constants["never"], -jnp.inf, shaped + constants["bias"])
        penalized = None if lanes.penalized is None else lanes.penalized.reshape(a * count, -1)
        ends = self.eos_token_ids
        shaped = draw.process(shaped, settings, step=age[:, None], eos_token_id=ends, penalized=penalized)
        token = draw.choose(draw.step_keys(keys, age), shaped, settings).astype(jnp.int32)
        normaliser = jax.nn.logsumexp(raw, axis=-1)
        log_prob = jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0] - normaliser
        return token, log_prob, ~jnp.isfinite(normaliser)
