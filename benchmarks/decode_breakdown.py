"""Where a decode step's time goes on this machine, by XLA's profiler, and what other layouts of its products take.

    python benchmarks/decode_breakdown.py --json OUT

The shapes, weights and inputs are those of `generation.py`'s `generate_with_confidence`; one pinned thread. Parts are
the named scopes of `m3po_jax.inference`. Seconds are wall time: run it on an idle machine.
"""

from __future__ import annotations

import collections
import json
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint import save_checkpoint, shapes_of
from generation import KINDS, Ours
from measuring import alternate, arguments, pin

PARTS = ("products", "prefix", "answers", "head", "sampling")
OTHER = "other"  # norms, rotary embedding, cache writes, bookkeeping
EQUATIONS = {
    "weight right, input-major": ("mk,kn->mn", False),
    "weight right, output-major": ("mk,nk->mn", False),
    "weight left, output-major": ("nk,mk->nm", True),
}


def part_of(line: str) -> str:
    """The part that an instruction of the compiled program belongs to."""
    origin = re.search(r'op_name="([^"]*)"', line)
    if origin is None:
        # Rewritten products lose their origin; only those of one row, the answers' own keys, are rewritten.
        return "answers" if " dot(" in line else OTHER
    return next((part for part in PARTS if f"/{part}/" in f"/{origin[1]}/"), OTHER)


def breakdown(ours: Ours) -> dict[str, Any]:
    """Milliseconds of a step by part, and the number of operations."""
    import jax

    from m3po_jax.hosts.sharding import use_mesh

    s = ours.shapes
    generator = ours.generator(candidates=s.candidates, new_tokens=s.new_tokens)
    parts: dict[str, str] = {}
    with use_mesh(ours.mesh):
        # The last size of the cache: its program has the same operations as the others.
        program = generator.programs(ours.batch)[-1]
        text = program.function.lower(*program.arguments).compile().as_text()
    for line in text.splitlines():
        if found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line):
            parts[found[1]] = part_of(line)
    generator(ours.batch)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            generator(ours.batch)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(trace))
    spent, count = collections.Counter(), 0
    for event in (e for plane in profile.planes for line in plane.lines for e in line.events):
        if dict(event.stats).get("hlo_module") == "jit__decode" and not event.name.startswith(("while", "cond")):
            spent[parts.get(event.name, OTHER)] += event.duration_ns
            count += 1
    steps = s.new_tokens - 1
    table = {part: spent[part] / 1e6 / steps for part in (*PARTS, OTHER)}
    return {"milliseconds": table, "sum": sum(table.values()), "operations": count / steps}


def multiply(x: Any, weights: list[Any], equation: str, left: bool) -> list[Any]:
    """One step's products of one kind, each with a weight of its own, so that none is found in a cache."""
    import jax
    import jax.numpy as jnp

    pairs = [(w, x) if left else (x, w) for w in weights]
    return [jnp.einsum(equation, *pair, precision=jax.lax.Precision.HIGHEST) for pair in pairs]


def layouts(ours: Ours) -> dict[str, dict[str, float]]:
    """Milliseconds of each product of a step, all layers together, in the layouts that it could have."""
    import jax

    program = jax.jit(multiply, static_argnums=(2, 3))
    layers, width, mlp, _ = ours.shapes.text
    rows = ours.shapes.prompts * ours.shapes.candidates
    found: dict[str, dict[str, float]] = {}
    products = {"qkv": (width, 3 * width), "gate_up": (width, 2 * mlp), "down": (mlp, width)}
    for name, (inputs, outputs) in {**products, "head": (width, ours.shapes.vocabulary)}.items():
        x, sides = jax.random.normal(jax.random.key(0), (rows, inputs)), {}
        for layout, (equation, left) in EQUATIONS.items():
            shape = (inputs, outputs) if equation == "mk,kn->mn" else (outputs, inputs)
            count = 1 if name == "head" else layers
            weights = [jax.random.normal(jax.random.key(i), shape) for i in range(count)]
            run = partial(program, x, weights, equation, left)
            sides[layout] = partial(_finished, run)
        found[name] = {layout: 1e3 * wall for layout, (wall, _) in alternate(sides, 15).items()}
    return found


def _finished(run: Callable[[], Any]) -> None:
    import jax

    jax.block_until_ready(run())


def main(argv: list[str]) -> None:
    options = arguments(__doc__.splitlines()[0], KINDS[:1]).parse_args(argv)
    pin(options.cpu)
    with tempfile.TemporaryDirectory() as folder:
        shapes = shapes_of(KINDS[0], tiny=options.tiny)
        ours = Ours(save_checkpoint(shapes, Path(folder)), shapes)
        report = {"step": breakdown(ours), "products": layouts(ours)}
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
