"""Benchmark of a whole LLaVA-1.5-7B on one accelerator: drawing, scoring and a preference step.

    python benchmarks/accelerator.py --json OUT

Weights are random and bfloat16, so nothing is downloaded. Every side runs in a process of its own on the same card,
one after another, since none of them leaves room for another: ours with XLA's attention and with the card's kernels;
on a GPU transformers (`generate`, one teacher-forced pass) and TRL's trainer too. `docs/performance.md` explains
the report.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import TINY, Shapes, answers, images_of, peer_config, prompts
from measuring import chosen_workloads, clock, installed_versions

WORKLOADS = ("generate", "score", "dpo_step")
LLAVA15_7B = Shapes(16, 32, 8, 128, (24, 1024, 16, 336, 14), (32, 4096, 11_008, 32), 32_064)
RANK = 128  # of the adapters, as in the recipes
# Of memory, bytes a second, by jax's `device_kind` (makers' data sheets); TPUs are in `m3po_jax.plan.CHIPS`.
GPU_BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H200": 4.8e12,
}
KERNELS = {"gpu": "cudnn", "tpu": "pallas"}
# Of the mean log-probability of a token between two programs, by the type that they compute in.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-4}


@dataclass(frozen=True)
class Run:
    """What a side needs to know: the shapes, the type of weights and arithmetic, and how often to repeat."""

    shapes: Shapes
    dtype: str
    repeats: int
    remat: str
    rank: int

    def seconds(self, call: Callable[[], Any]) -> float:
        """The median wall time of the warm call, which must have finished its work on return."""
        call()
        samples = []
        for _ in range(self.repeats):
            gc.collect()
            samples.append(clock(call)[0])
        return statistics.median(samples)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"nothing is reported: {what}")


def decoder_parameters(config: Any) -> int:
    """Weights of a LLaMA decoder's linear layers, the output layer included and the embedding not."""
    c = config
    attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.hidden_size * c.vocab_size


def decode_bytes(config: Any, shapes: Shapes, itemsize: int) -> float:
    """The least that drawing reads after the first token, bytes: at every step the decoder's weights, every prompt's
    keys and values once for all its candidates, and those of what its candidates have said so far.
    """
    s = shapes
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    steps = s.new_tokens - 1
    answered = s.prompts * s.candidates * steps * s.new_tokens / 2
    return itemsize * (steps * (decoder_parameters(config) + s.prompts * s.prefix * per_token) + answered * per_token)


class Ours:
    """m3po_jax on random weights."""

    def __init__(self, run: Run, attention: str):
        import jax

        from m3po_jax.config import MeshConfig
        from m3po_jax.data.collation import PromptBatch
        from m3po_jax.hosts.sharding import make_mesh
        from m3po_jax.models.registry import load_model

        self.run, self.shapes, self.device = run, run.shapes, jax.devices()[0]
        self.mesh = make_mesh(MeshConfig(1, 1, 1), [self.device])
        with tempfile.TemporaryDirectory() as folder:
            peer_config(run.shapes).save_pretrained(folder)
            self.model = load_model(
                folder, dtype=run.dtype, param_dtype=run.dtype, mesh=self.mesh, init="random", attention=attention
            ).model
        ids, pixels = prompts(run.shapes)
        names = [f"prompt-{index}" for index in range(run.shapes.prompts)]
        self.batch = PromptBatch(names, ids, np.ones(ids.shape, bool), images_of(run.shapes, pixels))

    def generator(self, new_tokens: int) -> Any:
        from m3po_jax.inference.generator import Generator
        from m3po_jax.inference.settings import SamplingConfig

        return Generator(
            self.model,
            eos_token_id=-1,  # no token ends an answer, for any side
            pad_token_id=self.shapes.pad_token_id,
            mesh=self.mesh,
            sampling=SamplingConfig(num_candidates=self.shapes.candidates, max_new_tokens=new_tokens),
            batch_size=self.shapes.prompts,
        )

    def drawn(self, new_tokens: int) -> tuple[float, Any]:
        """Seconds of drawing answers of this length, and the answers."""
        generator = self.generator(new_tokens)
        return self.run.seconds(lambda: generator(self.batch)), generator(self.batch)

    def scorer(self) -> Any:
        from m3po_jax.inference.scorer import Scorer

        return Scorer(self.model, self.mesh, batch_size=self.shapes.prompts)

    def generate(self) -> dict[str, Any]:
        """Seconds of a prompt's first tokens and of whole answers; sampled log-probs agree with `Scorer`'s."""
        # One generator after another: each has a copy of the decoder's layers.
        first_seconds, _ = self.drawn(1)
        seconds, result = self.drawn(self.shapes.new_tokens)
        peak = self.peak()
        given = self.scorer().log_probs(self.batch, result.token_ids, np.ones(result.token_ids.shape, bool))
        difference = abs(float(np.mean(result.log_probs - given)))
        _must(
            difference <= TOLERANCE[self.run.dtype], f"sampled log-probs differ from scored ones by {difference:.1e}"
        )
        return {"seconds": seconds, "first_seconds": first_seconds, "log_prob_difference": difference, "peak": peak}

    def score(self) -> dict[str, Any]:
        scorer, given = self.scorer(), answers(self.shapes, self.shapes.candidates)
        mask = np.ones(given.shape, bool)
        seconds = self.run.seconds(lambda: scorer.log_probs(self.batch, given, mask))
        _must(bool(np.all(np.isfinite(scorer.log_probs(self.batch, given, mask)))), "a log-prob is not finite")
        return {"seconds": seconds, "peak": self.peak()}

    def dpo_step(self) -> dict[str, Any]:
        """A step on fresh adapters, of which the first loss must be ln 2."""
        from flax import nnx

        from m3po_jax.config import LoRAConfig, TrainConfig
        from m3po_jax.data.collation import PromptRow, collate_tree
        from m3po_jax.data.lengths import rounded
        from m3po_jax.hosts.sharding import shard_batch, to_host
        from m3po_jax.models import lora
        from m3po_jax.training.step import make_step, place_frozen, split_model

        s, model = self.shapes, self.model
        both = answers(s, 2)
        reference = self.scorer().log_probs(self.batch, both, np.ones(both.shape, bool)).sum(-1)
        adapters = LoRAConfig(lora_rank=self.run.rank, lora_alpha=2.0 * self.run.rank)
        lora.attach(model, adapters, scope="decoder", rngs=nnx.Rngs(0))
        rows = [
            PromptRow(
                name,
                self.batch.token_ids[i],
                {key: x[i] for key, x in self.batch.images.items()},
                tuple(both[i]),
                reference=tuple(reference[i].tolist()),
                place=i,
            )
            for i, name in enumerate(self.batch.ids)
        ]
        batch = collate_tree(rows, [(rounded(s.prefix), rounded(s.new_tokens))])
        config = TrainConfig(lora=adapters, lr_schedule="constant", warmup_ratio=0.0, batch_size=s.prompts)
        partition, trainable, frozen = split_model(model, config)
        step = make_step(partition, trainable, config, total_steps=1_000, mesh=self.mesh, remat=self.run.remat)
        frozen = place_frozen(frozen, self.mesh)
        state = [step.init(trainable)]

        def take() -> float:
            state[0], metrics, _ = step(state[0], frozen, None, shard_batch(batch, self.mesh))
            return float(to_host(metrics["loss"]))

        # β times a sum of log-probs, each as far off as bfloat16 lets it be.
        difference = abs(take() - math.log(2))
        _must(
            difference <= max(0.1, config.beta) * TOLERANCE[self.run.dtype] * 10, f"first loss: {difference:.1e} off"
        )
        return {"seconds": self.run.seconds(take), "first_loss_difference": difference, "peak": self.peak()}

    def peak(self) -> float | None:
        stats = self.device.memory_stats() or {}
        return stats.get("peak_bytes_in_use")


class Theirs:
    """transformers and TRL on random weights of the same shapes, on the GPU (`--tiny`: on the CPU)."""

    def __init__(self, run: Run):
        import torch
        import transformers

        self.run, self.shapes = run, run.shapes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        transformers.logging.set_verbosity_error()
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, run.dtype))
        try:
            with torch.device(self.device):
                self.model = transformers.LlavaForConditionalGeneration(peer_config(run.shapes)).eval()
        finally:
            torch.set_default_dtype(before)

    def call(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work, waited for."""
        import torch

        def run() -> Any:
            result = work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def peak(self) -> float | None:
        import torch

        return float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else None

    def generate(self) -> dict[str, Any]:
        import generation

        side = generation.Theirs(self.model, self.shapes)
        draw = lambda count: self.call(lambda: side.generate(candidates=self.shapes.candidates, new_tokens=count))  # noqa: E731
        seconds = self.run.seconds(draw(self.shapes.new_tokens))
        return {"seconds": seconds, "first_seconds": self.run.seconds(draw(1)), "peak": self.peak()}

    def score(self) -> dict[str, Any]:
        import generation

        # A pass for every prompt: all at once do not fit beside a model of this size.
        side = generation.Theirs(self.model, replace(self.shapes, prompts=1))
        given = answers(self.shapes, self.shapes.candidates)
        every = self.call(lambda: [side.score(given[row : row + 1]) for row in range(self.shapes.prompts)])
        return {"seconds": self.run.seconds(every), "peak": self.peak()}

    def dpo_step(self) -> dict[str, Any]:
        import training

        with tempfile.TemporaryDirectory() as folder:
            trainer = training.Theirs(
                self.model, Path(folder), self.shapes, self.run.rank, answer_head=True, checkpointing=True
            )
            step = self.call(trainer.step)
            _must(math.isfinite(step()), "TRL's loss is not finite")
            return {"seconds": self.run.seconds(step), "peak": self.peak()}


def device_facts() -> dict[str, Any]:
    """The device, its platform, and the rates that its maker states (null where they are not known here)."""
    import jax

    from m3po_jax.plan import CHIPS
    from m3po_jax.training.flops import peak_flops

    device = jax.devices()[0]
    bandwidths = {**GPU_BANDWIDTH, **{kind: chip.bandwidth for kind, chip in CHIPS.items()}}
    return {
        "device": device.device_kind,
        "platform": {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform),
        "peak_flops": peak_flops([device]),
        "bandwidth": bandwidths.get(device.device_kind),
    }


def figures(workload: str, run: Run, measured: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the seconds: rates, and shares of what the device can do."""
    import counting

    from m3po_jax.models.llava.config import llava_config

    s = run.shapes
    config = llava_config(peer_config(s).to_dict(), "benchmark")
    seconds, peak, bandwidth = measured["seconds"], facts["peak_flops"], facts["bandwidth"]
    sizes = {"prompts": s.prompts, "prefix": s.prefix, "candidates": s.candidates}
    if workload == "generate":
        decode = seconds - measured["first_seconds"]
        first = counting.generation_minimum(config, new_tokens=1, **sizes)
        least = decode_bytes(config.text, s, {"float32": 4, "bfloat16": 2}[run.dtype])
        return {
            "tokens_per_second": s.prompts * s.candidates * (s.new_tokens - 1) / decode,
            "bandwidth_share": None if bandwidth is None else least / decode / bandwidth,
            "prefill_mfu": None if peak is None else first / measured["first_seconds"] / peak,
        }
    if workload == "score":
        least = counting.scoring_minimum(config, new_tokens=s.new_tokens, **sizes)
        rate = {"answers_per_second": s.prompts * s.candidates / seconds}
        return {**rate, "mfu": None if peak is None else least / seconds / peak}
    least = counting.dpo_minimum(
        config, pairs=s.prompts, prefix=s.prefix, new_tokens=s.new_tokens, lora_rank=run.rank
    )
    tokens = s.prompts * (s.prefix + 2 * s.new_tokens)
    return {
        "pairs_per_second": s.prompts / seconds,
        "mfu": None if peak is None else least / seconds / peak,
        "mfu_4n": None if peak is None else 4 * decoder_parameters(config.text) * tokens / seconds / peak,
    }


def table(report: Mapping[str, Any]) -> str:
    """Markdown of the report, ready to be pasted."""
    lines = [
        f"{report['device']}; {', '.join(f'{name} {version}' for name, version in report['versions'].items())}\n",
        "| workload | side | seconds | rate | share of the device | peak GB |",
        "|---|---|--:|--:|---|--:|",
    ]
    units = {"tokens_per_second": "tokens/s", "answers_per_second": "answers/s", "pairs_per_second": "pairs/s"}
    names = {
        "bandwidth_share": "of bandwidth (decoding)",
        "prefill_mfu": "of FLOP/s (prefill)",
        "mfu": "of FLOP/s",
        "mfu_4n": "of FLOP/s at 4N a token",
    }
    for row in report["rows"]:
        if "problem" in row:
            lines.append(f"| `{row['workload']}` | {row['side']} | {row['problem']} | | | |")
            continue
        rate = next(f"{row[key]:,.1f} {unit}" for key, unit in units.items() if key in row)
        shares = [f"{row[key]:.1%} {name}" for key, name in names.items() if row.get(key) is not None]
        peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}"
        lines.append(
            f"| `{row['workload']}` | {row['side']} | {row['seconds']:.3f} | {rate} | {', '.join(shares)} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def _child(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The JSON that a process of this script printed last; a ``problem`` where it failed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        return {"problem": said[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, type=Path, help="where the report goes")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: checks the benchmark, measures nothing")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each side; medians are reported")
    parser.add_argument("--prompts", type=int, help="prompts drawn for at once; pairs of a step are half of them")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"), help="as `model.remat`")
    parser.add_argument("--rank", type=int, default=RANK, help="of the adapters on the decoder's linear layers")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # WORKLOAD:SIDE or "facts", in child processes
    options = parser.parse_args(argv)
    workloads = chosen_workloads(options.workloads, WORKLOADS, parser)
    shapes = TINY if options.tiny else LLAVA15_7B
    shapes = replace(shapes, prompts=options.prompts or shapes.prompts)
    dtype = "float32" if options.tiny else "bfloat16"
    run = Run(shapes, dtype, options.repeats, options.remat, options.rank)
    runs = dict.fromkeys(WORKLOADS, run)
    runs["dpo_step"] = replace(run, shapes=replace(shapes, prompts=max(shapes.prompts // 2, 1)))
    if options.side == "facts":
        print(json.dumps(device_facts()))
        return
    if options.side is not None:
        name, side = options.side.split(":")
        kind = Theirs(runs[name]) if side == "peer" else Ours(runs[name], side)
        print(json.dumps(getattr(kind, name)()))
        return
    # A child process may take nearly all of the card, and torch's children never start jax on it.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    facts = _child(["--json", os.devnull, "--side", "facts"], environment)
    _must("problem" not in facts, facts.get("problem", ""))
    sides = {"ours": "xla"}
    if facts["platform"] in KERNELS:
        sides[f"ours, {KERNELS[facts['platform']]} kernels"] = KERNELS[facts["platform"]]
    if not options.no_peers and (facts["platform"] == "gpu" or options.tiny):
        sides["transformers, TRL"] = "peer"
    report: dict[str, Any] = {**facts, "versions": installed_versions(), "tiny": options.tiny, "rows": []}
    for name in workloads:
        for label, side in sides.items():
            measured = _child([*argv, "--side", f"{name}:{side}"], environment)
            row = {
                "workload": name,
                "side": label,
                "shapes": runs[name].shapes.as_json() | {"dtype": dtype},
                **measured,
            }
            if "problem" not in measured:
                row |= figures(name, runs[name], measured, facts)
            report["rows"].append(row)
            options.json.write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name:10} {label:24} {measured.get('problem') or format(measured['seconds'], '.3f') + ' s'}",
                flush=True,
            )
    print(table(report))
    if all("problem" in row for row in report["rows"]):
        raise SystemExit("nothing could be measured")


if __name__ == "__main__":
    main(sys.argv[1:])
