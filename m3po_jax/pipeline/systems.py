"""The systems that a run evaluates (the base, its decodings, every trained arm), each a model with its decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_jax.config import EvaluateConfig, Recipe
from m3po_jax.data import tables
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError
from m3po_jax.hosts.agreement import barrier, from_writer, is_writer
from m3po_jax.inference.generator import Generator
from m3po_jax.inference.settings import SamplingConfig
from m3po_jax.models.processor import Processor
from m3po_jax.pipeline import summary
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.evaluate import Benchmark, evaluate
from m3po_jax.workspace.cell import Cell
from m3po_jax.workspace.directory import RunDirectory
from m3po_jax.workspace.records import DONE, Record, settings
from m3po_jax.workspace.shards import now

MakeGenerator = Callable[[Any, SamplingConfig, int], Generator]  # of a model, its decoding, rows at once


@dataclass(frozen=True)
class EvaluatedSystem:
    """A model with its decoding.

    Attributes:
        name: As the table and the report call it.
        cell: Whose weights they are, and of which round (0: untrained); answers and results lie in its folder.
        model: Gives the weights; called only if something has yet to be answered.
        identity: A hash of these weights.
    """

    name: str
    cell: Cell
    model: Callable[[], Any]
    identity: str
    sampling: SamplingConfig


def greedy(config: EvaluateConfig) -> SamplingConfig:
    """The decoding of every system but the base's variations: one answer, always the likeliest token."""
    return SamplingConfig(num_candidates=1, temperature=0.0, max_new_tokens=config.max_new_tokens)


def stop_tokens(config: EvaluateConfig, processor: Processor) -> tuple[int, ...]:
    """Token ids of `evaluate.stop_words`, whose logits the stop bias moves beside EOS's.

    Raises:
        UserError: a word of several tokens.
    """
    stops = []
    for word in config.stop_words:
        ids = processor.text.encode(word)
        if len(ids) != 1:
            raise UserError(
                f"{word!r} is {len(ids)} tokens, not one",
                where="evaluate.stop_words",
                remedy="name words that the model's tokenizer keeps whole",
            )
        stops.append(ids[0])
    return tuple(stops)


def base_systems(
    config: EvaluateConfig,
    directory: RunDirectory,
    processor: Processor,
    benchmarks: Sequence[Benchmark],
    model: Callable[[], Any],
    identity: str,
) -> Iterator[tuple[EvaluatedSystem, list[Benchmark]]]:
    """The starting model, its stop-bias frontier (for metrics that have one) and contrastive decoding."""
    plain = greedy(config)
    base = directory.cell(0)
    yield EvaluatedSystem(summary.BASE, base, model, identity, plain), list(benchmarks)
    captions = [b for b in benchmarks if b.metric.frontier]
    for bias in config.stop_bias:
        name = summary.stop_bias_name(bias)
        sampling = dataclasses.replace(plain, stop_bias=bias, stop_token_ids=stop_tokens(config, processor))
        yield EvaluatedSystem(name, base.of(name), model, identity, sampling), captions
    for alpha in config.contrast_alpha:
        name = summary.contrast_name(alpha)
        sampling = dataclasses.replace(plain, contrast_alpha=alpha)
        yield EvaluatedSystem(name, base.of(name), model, identity, sampling), list(benchmarks)


class SystemEvaluator:
    """Evaluates systems one after another; those that share a decoding share its compiled program."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, processor: Processor, make_generator: MakeGenerator):
        self.recipe, self.directory, self.processor = recipe, directory, processor
        self._make_generator = make_generator
        self._generators: dict[SamplingConfig, Generator] = {}
        self._tokenised: dict[str, Benchmark] = {}

    def evaluate(self, system: EvaluatedSystem, benchmarks: Sequence[Benchmark]) -> None:
        """Answers and scores what is missing of `benchmarks`, and notes it in the manifest.

        Raises:
            Interrupted: a signal arrived; benchmarks that are finished stay so.
        """
        started = time.monotonic()
        config = self.recipe.evaluate
        inputs = tables.content_hash(system.identity, dataclasses.asdict(system.sampling))
        generator: Generator | None = None
        records = []
        for benchmark in benchmarks:
            artifact = system.cell.evaluation(benchmark.name)
            made_from = self.inputs(system, benchmark)
            status = from_writer(lambda artifact=artifact, made_from=made_from: vars(artifact.status(made_from)))
            if status["state"] != DONE:
                if is_writer() and (place := artifact.set_aside()) is not None:
                    reason = f" ({status['reason']})" if status["reason"] else ""
                    say(f"{artifact.folder}: {status['state']}{reason}; set aside in {place}", style="yellow")
                barrier("old results are set aside")
                if generator is None:
                    generator = self._loaded(system)
                results = evaluate(
                    self._asked(benchmark),
                    generator,
                    self.processor,
                    config,
                    artifact,
                    inputs=inputs,
                    seed=self.recipe.seed,
                    system=system.name,
                )
                if is_writer():
                    details = {"seconds": results["seconds"]}
                    artifact.write(Record(made_from, artifact.outputs(), finished=now(), details=details))
                barrier("results are recorded")
            records.append(artifact.read())
        finished = [record for record in records if record is not None and record.finished is not None]
        if finished:
            whole = Record(
                {},
                finished=max(str(record.finished) for record in finished),
                details={
                    "seconds": sum(record.details.get("seconds", 0.0) for record in finished),
                    "benchmarks": len(finished),
                },
            )
            self.directory.note_stage("evaluate", system.cell, whole)
        if generator is not None:
            say(f"evaluated {system.name} in {time.monotonic() - started:.0f} s")

    def inputs(self, system: EvaluatedSystem, benchmark: Benchmark) -> dict[str, Any]:
        """What a system's results on a benchmark are made from, as their record names it."""
        rule = settings(f"evaluate.benchmarks.{benchmark.name}", benchmark.config)
        return {
            "model": system.identity,
            "questions": benchmark.fingerprint,
            "seed": self.recipe.seed,
            "evaluate.bootstrap_samples": self.recipe.evaluate.bootstrap_samples,
            **settings("decoding", system.sampling),
            **{key: value for key, value in rule.items() if ".data." not in key},
        }

    def _asked(self, benchmark: Benchmark) -> Benchmark:
        """The benchmark with questions that are tokenised once for all systems."""
        if benchmark.name not in self._tokenised:
            prompts = TokenisedPrompts(benchmark.prompts, self.processor.tokenise)
            self._tokenised[benchmark.name] = dataclasses.replace(benchmark, prompts=prompts)
        return self._tokenised[benchmark.name]

    def _loaded(self, system: EvaluatedSystem) -> Generator:
        """The decoding's generator, holding the system's weights."""
        loaded = self._generators.get(system.sampling)
        if loaded is not None:
            loaded.load(system.model())
            return loaded
        generator = self._make_generator(system.model(), system.sampling, self.recipe.evaluate.batch_size)
        self._generators[system.sampling] = generator
        return generator
