"""The `evaluate` stage: benchmark answers of one system, scored by the benchmark's own rule."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m3po_jax.config import BenchmarkConfig, EvaluateConfig
from m3po_jax.data import tables
from m3po_jax.data.schema import Prompt
from m3po_jax.data.sources import PromptSource, fingerprint
from m3po_jax.errors import UserError
from m3po_jax.evaluation.metric import Metric, image_of
from m3po_jax.evaluation.records import id_text
from m3po_jax.evaluation.registry import METRICS, check, intervals, score
from m3po_jax.hosts.agreement import barrier, is_writer
from m3po_jax.hosts.rows import Shares
from m3po_jax.hosts.signals import stoppable
from m3po_jax.inference.generator import Generator
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline.console import progress
from m3po_jax.pipeline.generate import prompt_rows
from m3po_jax.pipeline.models import read_rows
from m3po_jax.reading import check_values
from m3po_jax.workspace.evaluation import Evaluation
from m3po_jax.workspace.shards import now


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark with its questions.

    Attributes:
        fingerprint: Of the questions, for resumption and the report's header.
    """

    name: str
    config: BenchmarkConfig
    prompts: Sequence[Prompt]
    image_root: Path
    fingerprint: str

    @property
    def metric(self) -> Metric:
        """Whose rule scores the answers."""
        return METRICS[self.config.metric]

    def images(self, items: Sequence[Mapping[str, Any]]) -> list[str]:
        """What tells the images of scored items apart."""
        by_id = {prompt.id: prompt for prompt in self.prompts}
        return [image_of(by_id[item["id"]]) for item in items]

    @property
    def title(self) -> str:
        """The metric's name, with its rule where there are several."""
        rule = f" (rule: {self.metric.rule(self.config)})" if len(self.metric.rules) > 1 else ""
        return self.config.metric + rule


def read_benchmark(name: str, config: BenchmarkConfig) -> Benchmark:
    """Opens a benchmark's questions.

    Raises:
        UserError: an unknown metric, no rows, or rows without what the metric needs.
    """
    where = f"evaluate.benchmarks.{name}"
    check_values(config, where)
    check(name, config)
    if not config.data.path:
        raise UserError("no questions", where=f"{where}.data.path", remedy="name a file, a folder or a builder")
    return open_benchmark(name, config, read_rows(config.data))


def open_benchmark(name: str, config: BenchmarkConfig, source: PromptSource) -> Benchmark:
    """A benchmark on questions that are read.

    Raises:
        UserError: as `read_benchmark`.
    """
    metric = check(name, config)
    rows = [source[i] for i in range(len(source))]
    if config.kind:
        rows = [row for row in rows if row.metadata.get("kind") == config.kind]
    if not rows:
        raise UserError(f"no row of kind {config.kind!r}", where=f"evaluate.benchmarks.{name}")
    for row in rows:
        if lacking := metric.missing(row):
            raise UserError(lacking[0], where=row.where, remedy=f"{config.metric}: {lacking[1]}")
    return Benchmark(name, config, rows, source.image_root, fingerprint(source))


def check_scoring(benchmark: Benchmark) -> None:
    """Scores "yes" as the answer to every question: what a metric cannot read is found before a model has answered.

    Raises:
        UserError: fields of other shapes than the metric reads, files or packages that it lacks.
    """
    metric = benchmark.metric
    if metric.judged:
        return
    answers = [{"id": prompt.id, "text": "yes", "tokens": 1} for prompt in benchmark.prompts]
    try:
        scored = score(benchmark.prompts, answers, benchmark.config)
        intervals(metric, scored["items"], benchmark.images(scored["items"]), 2, 0)
    except UserError as error:
        # A rule knows the ids of its questions, and not whence they come.
        rows = {f"id {prompt.id!r}": prompt.where for prompt in benchmark.prompts}
        place = rows.get(error.where or "") or ", ".join(
            filter(None, (f"evaluate.benchmarks.{benchmark.name}", error.where))
        )
        raise UserError(error.what, where=place, remedy=error.remedy) from None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"{benchmark.config.metric} cannot score its rows ({type(error).__name__}: {error})",
            where=f"evaluate.benchmarks.{benchmark.name}",
            remedy="docs/evaluation.md lists the fields that it reads",
        ) from error


def results_key(benchmark: Benchmark, config: EvaluateConfig, inputs: str) -> str:
    """A hash of what a benchmark's results depend on."""
    settings = {name: value for name, value in vars(benchmark.config).items() if name != "data"}
    rules = benchmark.metric.rules[benchmark.metric.rule(benchmark.config)]
    return tables.content_hash(inputs, benchmark.fingerprint, settings, rules, config.max_new_tokens)


def evaluate(
    benchmark: Benchmark,
    generator: Generator,
    processor: Processor,
    config: EvaluateConfig,
    out: Evaluation,
    *,
    inputs: str,
    seed: int,
    system: str,
) -> dict[str, Any]:
    """Answers and scores one benchmark into `out`.

    Args:
        generator: With one greedy candidate, already holding the system's weights.
        inputs: A hash of the system's weights and decoding.
    """
    started = time.monotonic()
    key = results_key(benchmark, config, inputs)
    limit = benchmark.config.data.max_image_pixels
    processor = dataclasses.replace(processor, image_root=benchmark.image_root, max_image_pixels=limit)
    texts: dict[str, dict[str, Any]] = {}
    cut = 0
    shares = Shares(generator.mesh)
    stream = generator.stream(prompt_rows(benchmark.prompts, processor, shares), len(benchmark.prompts))
    shown = progress(stream, f"{system}: {benchmark.name}", len(benchmark.prompts))
    for answer in stoppable(shown, f"evaluating {system} on {benchmark.name}"):
        shares.answered(answer.hosts)
        (ids,) = answer.answers
        texts[answer.id] = {"id": answer.id, "text": processor.decode(ids), "tokens": len(ids)}
        cut += not generator.ended(ids)
    return save_results(
        benchmark,
        [texts[prompt.id] for prompt in benchmark.prompts],
        config,
        out,
        seed=seed,
        header={"inputs": key, "system": system, "cut": cut},
        seconds=time.monotonic() - started,
    )


def save_results(
    benchmark: Benchmark,
    texts: Sequence[Mapping[str, Any]],
    config: EvaluateConfig,
    out: Evaluation,
    *,
    seed: int,
    header: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Scores answers and writes items, then results (the mark that the benchmark is finished)."""
    scored = score(benchmark.prompts, texts, benchmark.config)
    prompts = {prompt.id: prompt for prompt in benchmark.prompts}
    items = [
        {"id": item["id"], "prompt": prompts[item["id"]].instruction, "output": item.get("text"), **item}
        for item in scored["items"]
    ]
    results = {
        "benchmark": benchmark.name,
        "metric": benchmark.config.metric,
        "data": benchmark.fingerprint,
        "n": len(items),
        "decoding": {"temperature": 0, "max_new_tokens": config.max_new_tokens},
        "date": now(),
        "seconds": round(seconds, 2),
        **header,
        **{name: value for name, value in scored.items() if name != "items"},
        "intervals": intervals(
            benchmark.metric,
            scored["items"],
            benchmark.images(scored["items"]),
            config.bootstrap_samples,
            seed,
        ),
    }
    if is_writer():
        out.save(items, results)
    barrier("evaluated")
    return results


def score_file(
    benchmark: Benchmark, answers_file: Path, config: EvaluateConfig, folder: Path, *, seed: int
) -> tuple[dict[str, Any], Path]:
    """(results, where they lie) of saved answers, ``{"id", "text"}`` (or LLaVA's ``question_id``) a line.

    They lie under `folder` in a place of their own, named after the file and a hash of the answers, the questions and
    the rule, so that other answers and other rules leave them alone.
    """
    texts = []
    for where, row in tables.read_json_lines(answers_file):
        key, text = row.get("id"), row.get("text")
        key = row.get("question_id") if key is None else key
        if key is None or not isinstance(text, str):
            raise UserError("a line needs 'id' and 'text'", where=where)
        texts.append({"id": id_text(key, where), "text": text})
    inputs = results_key(benchmark, config, tables.file_hash(answers_file))
    out = folder / f"{answers_file.stem}-{inputs[:8]}"
    header = {"inputs": inputs, "system": str(answers_file), "cut": None}
    return save_results(benchmark, texts, config, Evaluation(out), seed=seed, header=header, seconds=0.0), out
