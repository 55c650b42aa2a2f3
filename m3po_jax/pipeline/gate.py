"""`evaluate.gate` on a run's results: a verdict for every trained system, and the failure that ends the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3po_jax.config import EvaluateConfig
from m3po_jax.errors import GateFailed
from m3po_jax.evaluation.gate import FAILED, decide, read_gate, sentence
from m3po_jax.pipeline.arms import BASE
from m3po_jax.pipeline.evaluate import Benchmark
from m3po_jax.workspace.cell import Cell


def gate_verdicts(
    systems: Sequence[tuple[str, str, Cell]],
    benchmarks: Sequence[Benchmark],
    config: EvaluateConfig,
    *,
    deciding: Cell,
    seed: int,
) -> list[dict[str, Any]]:
    """What the gate says of every trained system that was evaluated beside the base, see `evaluation.gate.decide`.

    The deciding ones come first. Each verdict has its ``system``, its ``text``, and whether it ``decides`` the exit
    status: the recipe's own system after its last round does, the arms that it is compared with do not.

    Args:
        systems: (name, kind, cell) of everything that was evaluated.
        deciding: The recipe's own system after its last round.
    """
    by_name = {benchmark.name: benchmark for benchmark in benchmarks}
    entries = read_gate(config.gate, {name: benchmark.metric for name, benchmark in by_name.items()})
    base = next((cell for name, _, cell in systems if name == BASE), None)
    if base is None:
        return []
    verdicts = []
    for name, kind, cell in systems:
        if kind != "arm" or name == BASE:
            continue
        for entry in entries:
            benchmark = by_name[entry.benchmark]
            both = [_answered(one, benchmark) for one in (base, cell)]
            if both[0] is None or both[1] is None:
                continue
            verdict = decide(entry, benchmark.metric, both[0], both[1], resamples=config.bootstrap_samples, seed=seed)
            verdicts.append({"system": name, "decides": cell == deciding, **verdict, "text": sentence(verdict, name)})
    return sorted(verdicts, key=lambda verdict: not verdict["decides"])


def _answered(cell: Cell, benchmark: Benchmark) -> tuple[list[str], list[dict[str, Any]]] | None:
    """The images of a system's items, and the items; None where it has not answered."""
    items = cell.evaluation(benchmark.name).items()
    return None if items is None else (benchmark.images(items), items)


def require_gate(verdicts: Sequence[Mapping[str, Any]]) -> None:
    """
    Raises:
        GateFailed: the recipe's own system dropped by more than the gate allows.
    """
    failed = [verdict["text"] for verdict in verdicts if verdict["decides"] and verdict["outcome"] == FAILED]
    if failed:
        raise GateFailed(failed)
