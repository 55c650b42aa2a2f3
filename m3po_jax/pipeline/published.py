"""`m3po evaluate --references`: any framework's answers to a published benchmark, without a recipe or a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3po_jax.config import BenchmarkConfig, EvaluateConfig
from m3po_jax.data.tables import content_hash, file_hash
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.markdown import table
from m3po_jax.evaluation.published import PUBLISHED
from m3po_jax.evaluation.registry import METRICS, check
from m3po_jax.pipeline.evaluate import Benchmark, results_key, save_results
from m3po_jax.workspace.evaluation import Evaluation

FOLDER = Path("evaluations")


def listing() -> str:
    """The benchmarks whose files are read as they are: what they take, where it comes from, and their rules."""
    blocks = []
    for name, published in PUBLISHED.items():
        rules = METRICS[published.metric].rules
        lines = [
            name,
            f"  --references  {published.references}",
            f"  --answers     {published.answers}",
            f"  from          {published.source}",
            *(f"  --rule        {rule}: {whose}" for rule, whose in rules.items()),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def score_published(
    name: str, references: Sequence[Path], answers: Path, *, rule: str = "", output: Path | None = None, seed: int = 0
) -> tuple[dict[str, Any], Path]:
    """(results, their folder) of answers to a published benchmark.

    Args:
        rule: Whose rule reads the answers; empty: the benchmark's own.
        output: The folder; default: one under `FOLDER`, named after the answers and a hash of all that counts.

    Raises:
        UserError: an unknown benchmark or rule, files that do not fit, or other results in `output`.
    """
    if name not in PUBLISHED:
        raise UserError(f"unknown benchmark {name!r}{nearest(name, PUBLISHED)}", where="--benchmark")
    published = PUBLISHED[name]
    metric = METRICS[published.metric]
    if rule and rule not in metric.rules:
        raise UserError(f"{name} has no rule {rule!r}", where="--rule", remedy=f"one of {', '.join(metric.rules)}")
    if published.needs_references and not references:
        raise UserError(f"{name} needs them", where="--references", remedy=published.references)
    for path in (answers, *references):
        if not path.exists():
            raise UserError("no such file", where=str(path), remedy="check the path")
    # A table of words is no rule of COCO's: the official one is the default where the benchmark has it.
    rule = rule or ("official" if name == "chair" else "")
    files = published.read(references, answers, rule)
    config = BenchmarkConfig(metric=published.metric, rule=rule, **files.settings)
    check(name, config)
    for prompt in files.prompts:
        if lacking := metric.missing(prompt):
            raise UserError(lacking[0], where=prompt.where, remedy=f"{published.metric}: {lacking[1]}")
    hashes = {str(path): _hash(path) for path in (answers, *references)}
    benchmark = Benchmark(name, config, files.prompts, Path(), content_hash(sorted(hashes.values())))
    inputs = results_key(benchmark, EvaluateConfig(), hashes[str(answers)])
    out = output or FOLDER / f"{name}-{answers.stem}-{inputs[:8]}"
    before = Evaluation(out).results()
    if before is not None and before.get("inputs") != inputs:
        raise UserError(
            "holds other results, which stay",
            where=str(out),
            remedy="name another folder with --output, or leave it out: then every result has a folder of its own",
        )
    header = {"inputs": inputs, "system": str(answers), "cut": None, "files": hashes, "notes": list(files.notes)}
    results = save_results(
        benchmark, files.answers, EvaluateConfig(), Evaluation(out), seed=seed, header=header, seconds=0.0
    )
    return results, out


def _hash(path: Path) -> str:
    """Of a file's bytes, or of all text files' in a folder."""
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".json", ".jsonl") and file.is_file())
    return content_hash([[str(file.relative_to(path)), file_hash(file)] for file in files])


def summary_table(results: dict[str, Any]) -> str:
    """The benchmark's numbers with their intervals, as Markdown, and the rule that made them."""
    metric = METRICS[results["metric"]]
    rows = []
    for column in metric.drawn:
        value = results["summary"].get(column.key)
        if value is None:
            continue
        bounds = results["intervals"].get(column.key)
        shown = [f"{column.factor * number:.{column.digits}f}" for number in (value, *(bounds or ()))]
        rows.append([column.label, shown[0], " to ".join(shown[1:])])
    rule = results["rule"]
    return "\n".join(
        [
            table(["number", "value", "95 % interval"], rows),
            "",
            f"n = {results['n']}; rule {rule['name']}: {rule['version']}",
            *(f"Note: {note}." for note in results["notes"]),
            *(f"Note: {reason}." for reason in results["summary"].get("degenerate", ())),
        ]
    )
