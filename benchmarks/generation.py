"""Benchmark of candidate generation with confidence, and of scoring given answers.

    python benchmarks/generation.py --json OUT

Ours and the peers get the same weights and inputs and take turns in one process with one pinned thread. Nothing is
timed before every side's results agree. `docs/performance.md` explains the report.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import (
    VARIATIONS,
    Shapes,
    answers,
    channels_first,
    images_of,
    load_ours,
    load_peer,
    prompts,
    save_checkpoint,
    shapes_of,
)
from measuring import (
    alternate,
    arguments,
    chosen_workloads,
    measure_all,
    peak_in_child,
    peak_memory,
    pin,
    row,
    use_compilation_cache,
)

KINDS = ("generate_with_confidence", "score")
WORKLOADS = tuple(kind + variation for kind in KINDS for variation in VARIATIONS)
TOLERANCE = 3e-4  # of a token's log-probability, between float32 programs
GREEDY_TOKENS = 16


class Ours:
    """m3po_jax on the workload's shapes."""

    def __init__(self, directory: Path, shapes: Shapes):
        import jax

        from m3po_jax.config import MeshConfig
        from m3po_jax.data.collation import PromptBatch
        from m3po_jax.hosts.sharding import make_mesh

        self.model, self.shapes = load_ours(directory), shapes
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        ids, pixels = prompts(shapes)
        names = [f"prompt-{index}" for index in range(shapes.prompts)]
        self.batch = PromptBatch(names, ids, np.ones(ids.shape, bool), images_of(shapes, pixels))

    def generator(self, *, candidates: int, new_tokens: int, temperature: float = 1.0) -> Any:
        from m3po_jax.inference.generator import Generator
        from m3po_jax.inference.settings import SamplingConfig

        return Generator(
            self.model,
            eos_token_id=-1,  # no token ends an answer, for any side
            pad_token_id=self.shapes.pad_token_id,
            mesh=self.mesh,
            sampling=SamplingConfig(num_candidates=candidates, max_new_tokens=new_tokens, temperature=temperature),
            batch_size=self.shapes.prompts,
        )

    def sampling(self) -> tuple[Callable[[], Any], dict[str, Any]]:
        """A call that samples, and the compiled program's figures."""
        import counting

        s = self.shapes
        generator = self.generator(candidates=s.candidates, new_tokens=s.new_tokens)
        c, lanes = self.model.config.text, s.prompts * s.candidates
        programs = generator.programs(self.batch)
        minimum = counting.generation_minimum(
            self.model.config,
            prompts=s.prompts,
            prefix=s.prefix,
            candidates=s.candidates,
            new_tokens=s.new_tokens,
        )
        figures: dict[str, Any] = {"dot_flops_minimum": minimum}
        total = {"compile_s": 0.0, "dot_flops": 0, "temp_mb": 0.0, "cache_copies": 0}
        for program in programs:
            prefix, own = (s.prompts, c.num_kv_heads, s.prefix), (lanes, c.num_kv_heads, program.slots)
            caches = [(*prefix, c.head_dim), (*own, c.head_dim)]
            found = compile_figures(
                program.function,
                program.arguments,
                self.mesh,
                minimum,
                trips=[program.steps] if program.steps else [],
                caches=caches if program.steps else None,
            )
            total["compile_s"] += found["compile_s"]
            total["dot_flops"] += program.calls * found["dot_flops"]
            # The caches live between programs: what counts is the most that is held at any moment.
            total["temp_mb"] = max(total["temp_mb"], found["temp_mb"] + program.state / 1e6)
            total["cache_copies"] += found["cache_copies"] or 0
        return lambda: generator(self.batch), figures | total

    def scoring(self, given_answers: np.ndarray) -> tuple[Callable[[], Any], dict[str, Any]]:
        """A call that scores, and the compiled program's figures."""
        import counting

        from m3po_jax.inference.scorer import Scorer

        s = self.shapes
        scorer = Scorer(self.model, self.mesh, batch_size=s.prompts)
        mask = np.ones(given_answers.shape, bool)
        run = lambda: scorer.log_probs(self.batch, given_answers, mask)  # noqa: E731
        minimum = counting.scoring_minimum(
            self.model.config,
            prompts=s.prompts,
            prefix=s.prefix,
            candidates=s.candidates,
            new_tokens=s.new_tokens,
        )
        program, given = scorer.log_probs_program(self.batch, *given_answers.shape[1:])
        return run, compile_figures(program, given, self.mesh, minimum)


def compile_figures(
    program: Any,
    given: tuple[Any, ...],
    mesh: Any,
    minimum: int,
    *,
    trips: list[int] | None = None,
    caches: list[tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Seconds to trace and compile a jitted program, and what can be read from it."""
    import counting

    from m3po_jax.hosts.sharding import use_mesh

    started = time.perf_counter()
    with use_mesh(mesh):
        traced = program.trace(*given)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - started
    return {
        "compile_s": seconds,
        "dot_flops": counting.dot_flops(traced.jaxpr, trips or ()),
        "dot_flops_minimum": minimum,
        "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "cache_copies": None if caches is None else counting.cache_copies(compiled.as_text(), caches),
    }


class Theirs:
    """transformers and the hand-written torch engine on the same weights and inputs."""

    def __init__(self, model: Any, shapes: Shapes):
        import torch

        self.model, self.shapes = model, shapes
        ids, pixels = prompts(shapes)
        self.ids = torch.from_numpy(ids).long().to(model.device)
        self.pixels = torch.from_numpy(channels_first(pixels)).to(model.device, model.dtype)

    def generate(self, *, candidates: int, new_tokens: int, greedy: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """`generate` with K returns; log-probabilities from its logits. Tokens and log-probs [P, K, T]."""
        import torch
        import transformers

        config = transformers.GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=not greedy,
            num_return_sequences=candidates,
            eos_token_id=None,
            pad_token_id=self.shapes.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
            **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0}),
        )
        self.model.generation_config = config
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), pixel_values=self.pixels
            )
            tokens = out.sequences[:, self.ids.shape[1] :]
            log_probs = torch.stack(
                [
                    logits.gather(1, tokens[:, t, None])[:, 0] - logits.logsumexp(-1)
                    for t, logits in enumerate(out.logits)
                ],
                dim=1,
            )
        shape = (self.shapes.prompts, candidates, new_tokens)
        return tokens.cpu().numpy().reshape(shape), log_probs.float().cpu().numpy().reshape(shape)

    def score(self, given_answers: np.ndarray) -> np.ndarray:
        """Teacher forcing of every prompt and answer in one forward, logits at the answers only."""
        import torch

        _, k, t = given_answers.shape
        chosen = torch.tensor(given_answers, dtype=torch.long, device=self.model.device).flatten(0, 1)
        ids = torch.cat([self.ids.repeat_interleave(k, 0), chosen], 1)[:, :-1]
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=self.pixels.repeat_interleave(k, 0),
                use_cache=False,
                logits_to_keep=t,
            ).logits
            log_probs = logits.gather(2, chosen[..., None])[..., 0] - logits.logsumexp(-1)
        return log_probs.float().cpu().numpy().reshape(given_answers.shape)

    def expert(self, *, compiled: bool = False) -> Any:
        from expert_torch import Expert

        return Expert(self.model, longest=self.shapes.prefix + self.shapes.new_tokens, compiled=compiled)


def sides(kind: str, ours: Ours | None, theirs: Theirs | None, *, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Every side's call; those of an absent party are left out."""
    calls: dict[str, Callable[[], Any]] = {}
    s = (ours or theirs).shapes  # type: ignore[union-attr]
    given_answers = answers(s, s.candidates)
    sizes = {"candidates": s.candidates, "new_tokens": s.new_tokens}
    if ours is not None:
        calls["ours"] = ours.sampling()[0] if kind == KINDS[0] else ours.scoring(given_answers)[0]
    if theirs is None:
        return calls
    expert = theirs.expert()
    if kind == KINDS[0]:
        calls["transformers"] = partial(theirs.generate, **sizes)
        calls["expert"] = partial(expert.generate, theirs.ids, theirs.pixels, **sizes)
        if compiled:
            calls["expert_compiled"] = partial(
                theirs.expert(compiled=True).generate, theirs.ids, theirs.pixels, **sizes
            )
    else:
        import torch

        calls["transformers"] = partial(theirs.score, given_answers)
        calls["expert"] = partial(expert.score, theirs.ids, theirs.pixels, torch.from_numpy(given_answers).long())
    return calls


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"nothing is reported: {what}")


def check_generation(ours: Ours, theirs: Theirs, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Every side's sampled log-probs against teacher forcing in transformers, and greedy tokens against its own."""
    worst = {}
    for name, run in calls.items():
        result = run()
        tokens, log_probs = (result.token_ids, result.log_probs) if name == "ours" else map(np.asarray, result)
        worst[name] = float(np.abs(log_probs - theirs.score(tokens)).max())
        _must(worst[name] <= TOLERANCE, f"{name}: log-probs differ by {worst[name]:.1e}")
    length = min(ours.shapes.new_tokens, GREEDY_TOKENS)
    want = theirs.generate(candidates=1, new_tokens=length, greedy=True)[0]
    greedy = {"ours": ours.generator(candidates=1, new_tokens=length, temperature=0.0)(ours.batch).token_ids}
    sizes = {"candidates": 1, "new_tokens": length, "greedy": True}
    greedy["expert"] = theirs.expert().generate(theirs.ids, theirs.pixels, **sizes)[0].numpy()
    for name, tokens in greedy.items():
        _must(np.array_equal(tokens, want), f"{name}: greedy tokens differ from transformers'")
    return {"log_prob_difference": worst, "greedy_tokens_equal": length}


def check_scoring(calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Every side's log-probs against those of transformers."""
    want = np.asarray(calls["transformers"]())
    worst = {name: float(np.abs(np.asarray(run()) - want).max()) for name, run in calls.items()}
    for name, difference in worst.items():
        _must(difference <= TOLERANCE, f"{name}: log-probs differ by {difference:.1e}")
    return {"log_prob_difference": worst}


def run_workload(name: str, directory: Path, options: Any) -> list[dict[str, Any]]:
    """The rows of one workload, one for each peer."""
    kind = next(kind for kind in KINDS if name.startswith(kind))
    shapes = shapes_of(name, tiny=options.tiny)
    ours, theirs = Ours(directory, shapes), Theirs(load_peer(directory), shapes)
    if kind == KINDS[0]:
        run, compiled = ours.sampling()
    else:
        run, compiled = ours.scoring(answers(shapes, shapes.candidates))
    calls = {"ours": run, **sides(kind, None, theirs, compiled=options.compile)}
    checks = check_generation(ours, theirs, calls) if kind == KINDS[0] else check_scoring(calls)
    times = alternate(calls, options.repeats)
    peaks: dict[str, float | None] = {}
    if not options.no_peaks:
        flags = [*(["--tiny"] if options.tiny else []), *(["--compile"] if options.compile else [])]
        peaks = {side: peak_in_child(__file__, name, side, directory, *flags) for side in calls}
    return [
        row(name, peer, shapes.as_json(), times, peaks=peaks, compiled=compiled, checks=checks)
        for peer in calls
        if peer != "ours"
    ]


def report_peak(directory: Path, options: Any) -> None:
    """In a child process: the peak memory of one side, as a line of JSON."""
    name, side = options.peak_of.split(":")
    shapes = shapes_of(name, tiny=options.tiny)
    kind = next(kind for kind in KINDS if name.startswith(kind))
    ours = Ours(directory, shapes) if side == "ours" else None
    theirs = None if ours else Theirs(load_peer(directory), shapes)
    run = sides(kind, ours, theirs, compiled=side == "expert_compiled")[side]
    print(json.dumps({"peak_mb": peak_memory(run)}))


def main(argv: list[str]) -> None:
    parser = arguments(__doc__.splitlines()[0], WORKLOADS)
    parser.add_argument("--compile", action="store_true", help="also the expert's loop under torch.compile")
    options = parser.parse_args(argv)
    names = chosen_workloads(options.workloads, WORKLOADS, parser)
    pin(options.cpu)
    if options.directory is not None:
        use_compilation_cache(options.directory / "xla")
        return report_peak(options.directory, options)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        use_compilation_cache(directory / "xla")
        base = shapes_of(KINDS[0], tiny=options.tiny)
        save_checkpoint(base, directory)
        width, mlp = base.text[1], base.text[2]
        tokens, candidates = base.prompts * base.prefix, base.prompts * base.candidates
        gemm_shapes = {
            "prefill_mlp": (tokens, width, mlp),
            "decode_mlp": (candidates, width, 2 * mlp),
            "decode_head": (candidates, width, base.vocabulary),
        }
        measure_all(options, names, lambda name: run_workload(name, directory, options), gemm_shapes)


if __name__ == "__main__":
    main(sys.argv[1:])
