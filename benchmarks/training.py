"""Benchmark of one preference-optimization step with adapters, against `trl.DPOTrainer`.

    python benchmarks/training.py --json OUT

Ours and TRL's trainer get the same checkpoint, adapter and pairs and take turns in one process with one pinned
thread. Nothing is timed before log-probs and losses agree. `docs/performance.md` explains the report.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import (
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

WORKLOADS = ("dpo_step", "dpo_step_new16", "dpo_step_new256", "dpo_step_reference")
# What the trainer is given: name -> (head at the answers only, as on GPUs; gradient checkpointing).
PEERS = {
    "trl": (False, False),
    "trl_checkpointing": (False, True),
    "trl_answer_head": (True, False),
    "trl_answer_head_checkpointing": (True, True),
}
LOG_PROB_TOLERANCE, LOSS_TOLERANCE = 3e-4, 1e-4  # of an answer's sum, and of the batch's mean loss
BETA, RATE = 0.1, 1e-5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Theirs:
    """TRL's own trainer: its loss, backward, clipping, optimizer and schedule, fed with a ready batch."""

    def __init__(
        self, model: Any, folder: Path, shapes: Shapes, rank: int, *, answer_head: bool, checkpointing: bool
    ):
        import peft
        import torch
        import transformers
        import trl
        from datasets import Dataset, disable_progress_bars
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        disable_progress_bars()
        words = Tokenizer(WordLevel({"<pad>": 0, "a": 1, "b": 2, "c": 3}, unk_token="a"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="a")
        self.answer_head = answer_head
        self.batch = {name: x.to(model.device) for name, x in pair_tensors(shapes).items()}
        self.batch["pixel_values"] = self.batch["pixel_values"].to(model.dtype)
        self.trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=str(folder / "trl"),
                beta=BETA,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                per_device_train_batch_size=shapes.prompts,
                gradient_checkpointing=checkpointing,
                max_length=None,
                bf16=model.dtype == torch.bfloat16,
                use_cpu=model.device.type == "cpu",
                report_to=[],
                disable_tqdm=True,
            ),
            # Rows for the trainer to have; the step is given the batch below.
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                target_modules=rf".*language_model\..*\.({'|'.join(TARGETS)})",
                task_type="CAUSAL_LM",
            ),
        )
        self.model = self.trainer.model
        if checkpointing:  # as the trainer's loop does at its start
            arguments = self.trainer.args.gradient_checkpointing_kwargs
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        # An adapter that does something: at B = 0 every policy is its reference.
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in sorted(self.model.named_parameters()):
                if "lora_" in name:
                    scale = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        self.trainer.create_optimizer_and_scheduler(1_000)
        self.trainer.current_gradient_accumulation_steps = 1

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """The head's positions: on a GPU TRL scores the answers' only, elsewhere all of them."""
        import trl.trainer.utils as module

        before = module._use_triton
        if self.answer_head:
            module._use_triton = lambda device: True
        try:
            yield
        finally:
            module._use_triton = before

    def step(self) -> float:
        """One optimizer step as `Trainer.train` makes it; returns the loss before the update."""
        import torch

        trainer = self.trainer
        with self.head():
            loss = trainer.training_step(self.model, dict(self.batch))
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        torch.nn.utils.clip_grad_norm_(trainable, trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return float(loss)

    def look(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Sums of log-probs of policy and reference [P, 2], and the loss, without an update."""
        import torch
        from trl.trainer.utils import use_adapter

        labels = self.batch["input_ids"].masked_fill(self.batch["completion_mask"] == 0, -100)
        inputs = {name: value for name, value in self.batch.items() if name != "completion_mask"}
        forward = lambda: self.model(**inputs, labels=labels, fused_lm_head=True, use_cache=False)  # noqa: E731
        with torch.no_grad(), self.head():
            policy = forward().log_probs.sum(1)
            with use_adapter(self.model, None):
                reference = forward().log_probs.sum(1)
            loss = float(self.trainer.compute_loss(self.model, dict(self.batch)))
        # Chosen answers come first, then the rejected ones.
        return policy.view(2, -1).T.numpy(), reference.view(2, -1).T.numpy(), loss


def pair_tensors(shapes: Shapes) -> dict[str, Any]:
    """The pairs as TRL's collator gives them: every prompt twice, chosen answers first."""
    import torch

    ids, pixels = prompts(shapes)
    both = answers(shapes, 2)
    rows = [np.concatenate([ids, both[:, side]], axis=1) for side in (0, 1)]
    input_ids = torch.tensor(np.concatenate(rows), dtype=torch.long)
    completion = torch.zeros_like(input_ids)
    completion[:, shapes.prefix :] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "completion_mask": completion,
        "pixel_values": torch.tensor(channels_first(pixels)).repeat(2, 1, 1, 1),
    }


class Ours:
    """m3po_jax's training step on the same adapter and pairs."""

    def __init__(self, directory: Path, shapes: Shapes, rank: int, remat: str, *, compute_reference: bool):
        import jax

        from m3po_jax.config import LoRAConfig, MeshConfig, TrainConfig
        from m3po_jax.data.collation import PromptBatch, PromptRow, collate_tree
        from m3po_jax.data.lengths import rounded
        from m3po_jax.hosts.sharding import make_mesh
        from m3po_jax.inference.scorer import Scorer
        from m3po_jax.models.export import load_adapter
        from m3po_jax.training.step import make_step, place_frozen, split_model

        self.shapes = shapes
        self.mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        model = load_ours(directory)
        load_adapter(model, directory / "adapter")
        self.model_config = model.config
        ids, pixels = prompts(shapes)
        both = answers(shapes, 2)
        names = [f"pair-{index}" for index in range(shapes.prompts)]
        images = images_of(shapes, pixels)
        batch = PromptBatch(names, ids, np.ones(ids.shape, bool), images)
        scorer = Scorer(model, self.mesh, batch_size=shapes.prompts)
        mask = np.ones(both.shape, bool)
        self.policy = scorer.log_probs(batch, both, mask).sum(-1)
        self.reference = scorer.log_probs(batch, both, mask, reference=True).sum(-1)
        recorded = np.full_like(self.reference, np.nan) if compute_reference else self.reference
        rows = [
            PromptRow(
                names[i],
                ids[i],
                {name: x[i] for name, x in images.items()},
                tuple(both[i]),
                reference=tuple(recorded[i].tolist()),
                place=i,
            )
            for i in range(shapes.prompts)
        ]
        # Widths as `data.lengths.plan_shapes` gives them to rows that are all of this length.
        self.batch = collate_tree(rows, [(rounded(shapes.prefix), rounded(shapes.new_tokens))])
        config = TrainConfig(
            beta=BETA,
            reference="computed" if compute_reference else "recorded",
            lora=LoRAConfig(lora_rank=rank, lora_alpha=2.0 * rank),
            learning_rate=RATE,
            lr_schedule="constant",
            warmup_ratio=0.0,
            batch_size=shapes.prompts,
        )
        partition, trainable, frozen = split_model(model, config)
        self.step_fn = make_step(
            partition,
            trainable,
            config,
            total_steps=1_000,
            mesh=self.mesh,
            remat=remat,
            compute_reference=compute_reference,
        )
        self.base = partition.base_weights(trainable) if compute_reference else None
        self.frozen = place_frozen(frozen, self.mesh)
        self.state = self.step_fn.init(trainable)
        self.rank = rank

    def step(self) -> float:
        """One optimizer step, the batch's way to the device included; returns the loss before the update."""
        from m3po_jax.hosts.sharding import shard_batch, to_host

        batch = shard_batch(self.batch, self.mesh)
        self.state, metrics, _ = self.step_fn(self.state, self.frozen, self.base, batch)
        return float(to_host(metrics["loss"]))

    def figures(self) -> dict[str, Any]:
        """Seconds to trace and compile the step, and what can be read from the program."""
        import counting

        from m3po_jax.hosts.sharding import shard_batch, use_mesh

        s = self.shapes
        started = time.perf_counter()
        with use_mesh(self.mesh):
            batch = shard_batch(self.batch, self.mesh)
            traced = self.step_fn.jitted.trace(self.state, self.frozen, self.base, batch)
            compiled = traced.lower().compile()
        seconds = time.perf_counter() - started
        minimum = counting.dpo_minimum(
            self.model_config, pairs=s.prompts, prefix=s.prefix, new_tokens=s.new_tokens, lora_rank=self.rank
        )
        return {
            "compile_s": seconds,
            "dot_flops": counting.dot_flops(traced.jaxpr),
            "dot_flops_minimum": minimum,
            "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
            "cache_copies": None,
        }


def check(ours: Ours, theirs: dict[str, Theirs]) -> dict[str, Any]:
    """Log-probs of policy and reference, and the loss of the first step, against every form of the trainer."""
    differences: dict[str, Any] = {}
    loss = ours.step()
    for name, peer in theirs.items():
        policy, reference, their_loss = peer.look()
        worst = max(np.abs(ours.policy - policy).max(), np.abs(ours.reference - reference).max())
        differences[name] = {"log_prob_sum": float(worst), "loss": abs(loss - their_loss)}
        if not (worst <= LOG_PROB_TOLERANCE and abs(loss - their_loss) <= LOSS_TOLERANCE):
            raise SystemExit(f"nothing is reported: {name} differs by {differences[name]}")
    return {"difference": differences, "loss": loss}


def workload_shapes(name: str, *, tiny: bool) -> Shapes:
    """The shapes of a workload; a pair is two answers."""
    shapes = shapes_of(name.removesuffix("_reference"), tiny=tiny)
    return Shapes(**{**shapes.__dict__, "candidates": 2})


def run_workload(name: str, directory: Path, options: Any) -> list[dict[str, Any]]:
    """The rows of one workload, one for each form of the trainer."""
    shapes = workload_shapes(name, tiny=options.tiny)
    theirs: dict[str, Theirs] = {}
    for peer, (answer_head, checkpointing) in PEERS.items():
        theirs[peer] = Theirs(
            load_peer(directory),
            directory,
            shapes,
            options.rank,
            answer_head=answer_head,
            checkpointing=checkpointing,
        )
    theirs["trl"].model.save_pretrained(directory / "adapter")
    computed = name.endswith("_reference")
    ours = Ours(directory, shapes, options.rank, options.remat, compute_reference=computed)
    compiled = ours.figures()
    checks = check(ours, theirs)
    calls: dict[str, Callable[[], Any]] = {"ours": ours.step}
    calls |= {peer: trainer.step for peer, trainer in theirs.items()}
    times = alternate(calls, options.repeats)
    peaks: dict[str, float | None] = {}
    if not options.no_peaks:
        flags = [*(["--tiny"] if options.tiny else []), "--remat", options.remat, "--rank", str(options.rank)]
        peaks = {side: peak_in_child(__file__, name, side, directory, *flags) for side in calls}
    told = {
        **shapes.as_json(),
        "padded_prefix": int(ours.batch.prefix_ids.shape[1]),
        "lora_rank": options.rank,
        "remat": options.remat,
        "reference": "computed" if computed else "recorded",
    }
    return [
        row(name, peer, told, times, peaks=peaks, compiled=compiled, checks=checks)
        for peer in calls
        if peer != "ours"
    ]


def report_peak(directory: Path, options: Any) -> None:
    """In a child process: the peak memory of one side, as a line of JSON."""
    name, side = options.peak_of.split(":")
    shapes = workload_shapes(name, tiny=options.tiny)
    if side == "ours":
        computed = name.endswith("_reference")
        run = Ours(directory, shapes, options.rank, options.remat, compute_reference=computed).step
    else:
        answer_head, checkpointing = PEERS[side]
        run = Theirs(
            load_peer(directory),
            directory,
            shapes,
            options.rank,
            answer_head=answer_head,
            checkpointing=checkpointing,
        ).step
    print(json.dumps({"peak_mb": peak_memory(run)}))


def main(argv: list[str]) -> None:
    parser = arguments(__doc__.splitlines()[0], WORKLOADS)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters on the decoder's linear layers")
    parser.add_argument("--remat", default="dots", choices=("none", "dots", "full"), help="as `model.remat`")
    options = parser.parse_args(argv)
    names = chosen_workloads(options.workloads, WORKLOADS, parser)
    pin(options.cpu)
    if options.directory is not None:
        use_compilation_cache(options.directory / "xla")
        return report_peak(options.directory, options)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        use_compilation_cache(directory / "xla")
        base = workload_shapes(WORKLOADS[0], tiny=options.tiny)
        save_checkpoint(base, directory)
        width, mlp = base.text[1], base.text[2]
        tokens = base.prompts * (base.prefix + 2 * base.new_tokens)
        gemm_shapes = {
            "layer_mlp_up": (tokens, width, mlp),
            "layer_mlp_down": (tokens, mlp, width),
            "adapter": (tokens, width, options.rank),
            "answer_head": (base.prompts * 2 * base.new_tokens, width, base.vocabulary),
        }
        measure_all(options, names, lambda name: run_workload(name, directory, options), gemm_shapes)


if __name__ == "__main__":
    main(sys.argv[1:])
