"""The systems that a run evaluates (the base, its decodings, every trained arm), each a model with its decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3po_jax.config import EvaluateConfig, Recipe
from m3po_jax.data import tables
from m3po_jax.data.processing import Processor
from m3po_jax.errors import UserError
from m3po_jax.generation.engine import Generator
from m3po_jax.generation.settings import SamplingConfig
from m3po_jax.pipeline import summary
from m3po_jax.pipeline.console import say
from m3po_jax.pipeline.evaluate import Benchmark, evaluate, is_finished
from m3po_jax.pipeline.rundir import RunDirectory

MakeGenerator = Callable[[Any, SamplingConfig, int], Generator]  # of a model, its decoding, rows at once


@dataclass(frozen=True)
class System:
    """A model with its decoding.

    Attributes:
        name: As the table and the report call it.
        folder: ``round-R`` of the arm; answers and results lie in its ``evaluation/``.
        model: Gives the weights; called only if something has yet to be answered.
        identity: A hash of these weights.
        round: The training round that made them (0: none), and
        arm: whose they are; both as the manifest notes them.
    """

    name: str
    folder: Path
    model: Callable[[], Any]
    identity: str
    sampling: SamplingConfig
    round: int
    arm: str | None


def greedy(config: EvaluateConfig) -> SamplingConfig:
    """The decoding of every system but the base's variations: one answer, always the likeliest token."""
    return SamplingConfig(num_candidates=1, temperature=0.0, max_new_tokens=config.max_new_tokens)


def stop_tokens(config: EvaluateConfig, processor: Processor) -> tuple[int, ...]:
    """Token ids of `evaluate.stop_words`, whose logits the stop bias moves beside EOS's.

    Raises:
        UserError: a word of several tokens.
    """
    found = []
    for word in config.stop_words:
        ids = processor.text.encode(word)
        if len(ids) != 1:
            raise UserError(
                f"{word!r} is {len(ids)} tokens, not one",
                where="evaluate.stop_words",
                remedy="name words that the model's tokenizer keeps whole",
            )
        found.append(ids[0])
    return tuple(found)


def base_systems(
    config: EvaluateConfig,
    directory: RunDirectory,
    processor: Processor,
    benchmarks: Sequence[Benchmark],
    model: Callable[[], Any],
    identity: str,
) -> Iterator[tuple[System, list[Benchmark]]]:
    """The starting model, its stop-bias frontier (for metrics that have one) and contrastive decoding."""
    plain = greedy(config)
    yield System(summary.BASE, directory.round(0), model, identity, plain, 0, None), list(benchmarks)
    captions = [b for b in benchmarks if b.metric.frontier]
    for bias in config.stop_bias:
        name = summary.stop_bias_name(bias)
        sampling = dataclasses.replace(plain, stop_bias=bias, stop_token_ids=stop_tokens(config, processor))
        yield System(name, directory.round(0, name), model, identity, sampling, 0, name), captions
    for alpha in config.contrast_alpha:
        name = summary.contrast_name(alpha)
        sampling = dataclasses.replace(plain, contrast_alpha=alpha)
        yield System(name, directory.round(0, name), model, identity, sampling, 0, name), list(benchmarks)


class SystemEvaluator:
    """Evaluates systems one after another; those that share a decoding share its compiled program."""

    def __init__(self, recipe: Recipe, directory: RunDirectory, processor: Processor, make_generator: MakeGenerator):
        self.recipe, self.directory, self.processor = recipe, directory, processor
        self._make_generator = make_generator
        self._generators: dict[SamplingConfig, Generator] = {}

    def evaluate(self, system: System, benchmarks: Sequence[Benchmark]) -> None:
        """Answers and scores what is missing of `benchmarks`, and notes it in the manifest.

        Raises:
            Interrupted: a signal arrived; benchmarks that are finished stay so.
        """
        started, fresh = time.monotonic(), 0
        config = self.recipe.evaluate
        inputs = tables.content_hash(system.identity, dataclasses.asdict(system.sampling))
        generator: Generator | None = None
        for benchmark in benchmarks:
            out = system.folder / "evaluation" / benchmark.name
            if generator is None and not is_finished(benchmark, config, out, inputs):
                generator = self._loaded(system)
            if generator is not None:
                evaluate(
                    benchmark,
                    generator,
                    self.processor,
                    config,
                    out,
                    inputs=inputs,
                    seed=self.recipe.seed,
                    system=system.name,
                )
                fresh += 1
        if fresh:
            seconds = time.monotonic() - started
            self.directory.note_stage(
                "evaluate", round=system.round, arm=system.arm, seconds=seconds, benchmarks=fresh
            )
            say(f"evaluated {system.name} in {seconds:.0f} s")

    def _loaded(self, system: System) -> Generator:
        """The decoding's generator, holding the system's weights."""
        known = self._generators.get(system.sampling)
        if known is not None:
            known.load(system.model())
            return known
        made = self._make_generator(system.model(), system.sampling, self.recipe.evaluate.batch_size)
        self._generators[system.sampling] = made
        return made
