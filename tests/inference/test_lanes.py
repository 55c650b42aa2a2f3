"""Bookkeeping of lanes against a plain replay, on random states."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from m3po_jax.inference.lanes import NEVER, assign, capacities, free_slots, needs_growth, slot_to_write

LANES, SLOTS, K = 5, 4, 3
ASSIGN = jax.jit(assign, static_argnames="identity")


@settings(max_examples=60)
@given(st.lists(st.sampled_from("wdr-"), min_size=SLOTS * K, max_size=SLOTS * K), st.permutations(range(SLOTS)))
def test_free_lanes_take_waiting_candidates_of_the_oldest_prompts(states, arrival):
    """w waits, d is done, r is decoded by a lane (as long as there are lanes)."""
    pending = np.array([s == "w" for s in states]).reshape(SLOTS, K)
    lane, place, busy = np.full(SLOTS * K, LANES), np.zeros(LANES, int), np.zeros(LANES, bool)
    order = [3, 0, 4, 1, 2]
    for at, state in enumerate(states):
        if state == "r" and order:
            number = order.pop()
            lane[at], place[number], busy[number] = number, at, True
    made = ASSIGN(
        *map(jnp.asarray, (busy, place, pending, lane.reshape(SLOTS, K), np.array(arrival))), identity=False
    )
    waiting = [n * K + k for n in np.argsort(arrival) for k in range(K) if pending[n, k]]
    free = np.flatnonzero(~busy)
    taken = dict(zip(free.tolist(), waiting, strict=False))
    assert [number for number in range(LANES) if made.fresh[number]] == list(taken)
    for number, at in taken.items():
        assert made.place[number] == at and made.lane.reshape(-1)[at] == number
        lane[at] = number
    np.testing.assert_array_equal(made.lane.reshape(-1), lane)
    np.testing.assert_array_equal(np.flatnonzero(made.pending), sorted(set(waiting) - set(taken.values())))
    assert all(made.place[number] == place[number] for number in np.flatnonzero(busy))
    still = {*np.flatnonzero(made.pending), *np.flatnonzero(lane < LANES)}
    expected = [not any(n * K + k in still for k in range(K)) for n in range(SLOTS)]
    assert free_slots(made.pending, made.lane, LANES).tolist() == expected


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=30))
def test_the_ring_never_overwrites_what_a_lane_sees(work):
    """Lanes with answers of up to 6 tokens write one slot a step; a lane finds all its tokens, in any slots."""
    longest, sizes = 6, capacities(6, first=2, multiple=1)
    written, content = jnp.full(sizes[0], NEVER), [None] * sizes[0]
    lanes, step, queue = [None, None], 0, list(work)
    while queue or any(lanes):
        for i, current in enumerate(lanes):
            if current is None and queue:
                pause, tokens = queue.pop(0)
                lanes[i] = {"start": step, "left": min(tokens, longest - 1), "fed": 0, "pause": pause}
        live = [current for current in lanes if current]
        start = jnp.array([current["start"] for current in live])
        if needs_growth(written, jnp.ones(len(live), bool), start):
            larger = sizes[sizes.index(len(written)) + 1]  # an IndexError would be a ring that is too small
            content += [None] * (larger - len(written))
            written = jnp.pad(written, (0, larger - len(written)), constant_values=NEVER)
        slot = int(slot_to_write(written))
        written, content[slot] = written.at[slot].set(step), step
        for i, current in enumerate(lanes):
            if current:
                current["fed"] += 1
                seen = sorted(content[c] for c in np.flatnonzero(written >= current["start"]))
                assert seen == list(range(current["start"], current["start"] + current["fed"]))
                current["left"] -= 1
                if not current["left"]:
                    lanes[i] = None
        step += 1


def test_capacities_double_up_to_what_is_fed_back():
    assert capacities(1) == [8] and capacities(17) == [16] and capacities(64) == [32, 64]
    assert capacities(257) == [32, 64, 128, 256]
    assert capacities(150) == [32, 64, 128, 152]
