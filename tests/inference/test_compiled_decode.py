"""What the compiled program must not hold: K copies of a prefix cache, or cache copies in the decode loop."""

import re
import sys
from pathlib import Path

import pytest
from tiny_llava import make_generator, prompts, tiny_model

from m3po_jax.hosts.sharding import use_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import decode_breakdown

PROMPTS, CANDIDATES, PREFIX, WIDTH, GROUPS, SLOTS = 3, 5, 32, 8, 2, 64


def compiled(batch):
    """The decode program of a cache of 64 slots, which no other axis is as long as."""
    generator = make_generator(tiny_model(), num_candidates=CANDIDATES, max_new_tokens=80)
    program = next(program for program in generator.programs(batch) if program.slots == SLOTS)
    with use_mesh(generator.mesh):
        lowered = program.function.lower(*program.arguments)
        # As outside the tests, whose workers have one thread each: XLA lays out single-threaded products otherwise.
        return lowered.compile(compiler_options={"xla_cpu_multi_thread_eigen": True}).as_text()


@pytest.fixture(scope="module")
def program():
    return compiled(prompts())


@pytest.fixture(scope="module")
def streaming():
    """More prompts than lanes serve at once: 3 slots for each of 3 rows, lanes go from one to another."""
    return compiled(prompts((1, 2, 3, 4)))


def loop_lines(program):
    """Instructions of the top-level while loops' bodies and of everything that they call."""
    computations, name = {}, ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "ENTRY" if line.startswith("ENTRY") else header.group(1)
        computations.setdefault(name, []).append(line)
    called = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
    waiting = [called.search(line).group(1) for line in computations["ENTRY"] if " while(" in line]
    assert waiting
    seen = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [callee for line in computations[name] for callee in called.findall(line)]
    return [line for name in seen for line in computations[name]]


def shape(line):
    found = re.search(r"= \w+\[([\d,]*)\]", line)
    return sorted(int(d) for d in found.group(1).split(",") if d not in ("", "1")) if found else []


def test_no_prefix_cache_is_held_per_candidate(program):
    shapes = {tuple(int(d) for d in text.split(",")) for text in re.findall(r"f32\[([\d,]+)\]", program)}
    assert (PROMPTS, GROUPS, PREFIX, WIDTH) in shapes  # the one copy
    per_candidate = {CANDIDATES, PROMPTS * CANDIDATES}
    assert not [s for s in shapes if per_candidate & set(s) and PREFIX in s and WIDTH in s]


@pytest.mark.parametrize(("kind", "slots"), [("program", PROMPTS), ("streaming", 3 * PROMPTS)])
def test_no_cache_is_copied_in_the_decode_loop(kind, slots, request):
    text = request.getfixturevalue(kind)
    caches = [sorted((slots, GROUPS, PREFIX, WIDTH)), sorted((PROMPTS * CANDIDATES, GROUPS, SLOTS, WIDTH))]
    assert all(any(shape(line) == cache for line in text.splitlines()) for cache in caches)
    moved = [line for line in loop_lines(text) if re.search(r" (copy|transpose)\(", line)]
    assert moved  # the small ones: a step's queries and keys
    assert not [line for line in moved if shape(line) in caches]


def test_every_part_of_a_step_is_found_by_its_scope(program):
    """`benchmarks/decode_breakdown.py` adds up a step's time by these names."""
    found = {decode_breakdown.part_of(line) for line in loop_lines(program) if " = " in line}
    assert found == {*decode_breakdown.PARTS, decode_breakdown.OTHER}
