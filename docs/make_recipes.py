"""Writes docs/recipes.md from the dataclasses, annotations and comments of m3po_jax/config.py.

    python docs/make_recipes.py

A comment behind or above a field is its meaning; the others are told in `MEANINGS`. A key with neither is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import tokenize
from pathlib import Path
from typing import Any

from m3po_jax import config
from m3po_jax.fields import fields_of

OUTPUT = Path(__file__).with_name("recipes.md")

INTRODUCTION = """\
# Recipes

<!-- Made by docs/make_recipes.py from m3po_jax/config.py. Do not edit. -->

A recipe is a YAML file; it states only what it changes. Every key can be replaced on the command line, which wins:

```bash
m3po run --config configs/llava15_7b_m3po.yaml name=trial train.beta=0.2 'select.length_ratio=[0.5, 3.0]'
```

`m3po recipes` lists those that ship; `--config quickstart` and `--config configs/quickstart.yaml` find one anywhere,
with or without a clone of the repository.

Unknown keys are errors that name the nearest known one, and so are values that a key does not take; both are told
before anything runs. What stands in a file is read by the key's type: `off` is the word where the key takes text,
and the words that YAML would take for true, false or nothing are refused there unless they stand in quotes. Numbers
are decimal. A section (`train={beta: 0.2}`) changes the keys that it names; a list or a mapping of names (`arms={}`)
replaces the one before it. Paths are local: a URL is refused. There are no interpolations (`${...}`) and no tags.
Quote a value that holds spaces, brackets or braces. The
resolved recipe is saved as `config.yaml` in the run directory, and a run directory takes one recipe only: another
value needs another `name` (limits and prices of `score.endpoint` excepted, which change no score). `--mock` runs any
recipe with a tiny model and a handful of rows, to try its settings.
"""

SECTIONS = {
    "": "The run",
    "round": "round: from one round to the next",
    "mesh": "mesh: devices",
    "model": "model: the policy",
    "data": "data: prompts",
    "generate": "generate: candidates",
    "score": "score: MAS and confidence",
    "score.ensemble": "score.ensemble: when members disagree",
    "score.endpoint": "score.endpoint: a server as judge",
    "select": "select: pairs",
    "train": "train: learning",
    "train.lora": "train.lora: adapters",
    "train.rl": "train.rl: reinforcement learning",
    "reward": "reward: the reward model",
    "cache": "cache: what is computed once",
    "evaluate": "evaluate: benchmarks",
    "evaluate.benchmarks.NAME": "evaluate.benchmarks.NAME: one benchmark",
    "evaluate.gate.BENCHMARK.NUMBER": "evaluate.gate.BENCHMARK.NUMBER: how far it may drop",
    "compare": "compare: systems × seeds",
}

# Keys whose comment in config.py would repeat their name.
MEANINGS = {
    "name": "the run's folder under `output_dir`",
    "output_dir": "where run directories are made",
    "seed": "of sampling, of fresh adapters and of the order of rows",
    "rounds": "how often candidates, scores, pairs and training follow one another; arms join the first round only",
    "mesh.data": "replicas; −1: all devices that the other two leave",
    "mesh.fsdp": "parts that weights are split into by rows, and batches too",
    "mesh.tensor": "parts that heads, MLP width and vocabulary are split into",
    "generate.num_candidates": "answers sampled for each prompt (K)",
    "generate.temperature": "of sampling; 0 is greedy. Recorded log-probs are at temperature 1 whatever it is",
    "generate.top_p": "1: off",
    "generate.max_new_tokens": "longest answer; one that is cut has `finish_reason: length`",
    "data.path": "a file, a folder or a builder, see data.md",
    "data.split": "split of a TFDS data set, or of parquet files named as on the Hugging Face hub",
    "data.limit": "only the first rows",
    "arms": "comparison systems trained on the same candidates: name → dotted overrides of this recipe. A name of "
    "compare.md starts from that system's own overrides",
    "select.rule": "how pairs are made, see method.md",
    "select.lambda_preferred": "λ₊: weight of confidence for the chosen answer",
    "select.lambda_dispreferred": "λ₋: weight of confidence for the rejected answer",
    "select.lexicographic": "τ₊, τ₋ of that rule: least MAS of a chosen answer, and what a rejected one stays below",
    "select.seed": "of the rules `random` and `vanilla`, and of `budget_by: random`",
    "compare.arms": "systems that ship (compare.md) or of `arms`; base and its stop-bias frontier are always there",
    "compare.per_seed": "dotted key → text with `{seed}`, e.g. `model.path`; in `arms`, `{seed}` is replaced too",
    "compare.seeds": "each draws its own candidates, order of rows and adapters",
    "train.beta": "inverse temperature of the implicit reward",
    "train.label_smoothing": "assumed share of flipped labels; the losses that read it are in training.md",
    "train.learning_rate": "of AdamW, at its peak",
    "train.warmup_ratio": "share of the steps in which the rate rises",
    "train.weight_decay": "on matrices, not on norms and biases",
    "train.max_grad_norm": "gradients are clipped to this global norm; 0: off",
    "train.gradient_accumulation_steps": "parts of a batch that pass one after another, with the same result",
    "train.epochs": "passes over the rows of a round",
    "train.max_answer_tokens": "longer answers are refused, never truncated",
    "train.save_steps": "steps between checkpoints",
    "train.keep_checkpoints": "how many of the latest are kept",
    "train.log_steps": "steps between lines of metrics.jsonl",
    "train.lora.lora_alpha": "adapters are scaled by lora_alpha / lora_rank",
    "train.lora.target_modules": "the decoder's linear layers that get an adapter",
    "train.lora.train_projector": "the projector learns too, as a whole",
    "train.lora.lora_rank": "0: full fine-tuning of decoder and projector",
    "evaluate.benchmarks": "benchmarks by name",
    "evaluate.max_new_tokens": "longest answer; decoding is greedy",
    "evaluate.batch_size": "questions in flight",
    "evaluate.bootstrap_samples": "resamples of the intervals, over images",
    "evaluate.benchmarks.NAME.data": "the questions; keys as under data",
}


def comments() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind the field, or the one in the lines above it."""
    source = Path(config.__file__).read_text(encoding="utf-8")
    behind: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            behind[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        used = {item.end_lineno for item in fields}
        for item in fields:
            text = behind.get(item.end_lineno or 0) or behind.get(item.lineno)
            if text is None and item.lineno - 1 not in used:
                text = behind.get(item.lineno - 1)
            if text is not None:
                found[node.name, item.target.id] = text  # type: ignore[attr-defined]  # a name, see above
    return found


def written(value: Any) -> str:
    """A default as YAML's flow style writes it."""
    if dataclasses.is_dataclass(value):
        return "data's"
    if isinstance(value, str):
        return value or '""'
    return json.dumps(value)


def sections() -> dict[str, list[tuple[str, str, str, str]]]:
    """Section -> (key, default, what it takes, meaning) of each key, in the order of config.py.

    Raises:
        SystemExit: a key has no meaning.
    """
    known = comments()
    found: dict[str, list[tuple[str, str, str, str]]] = {}

    def visit(cls: type, prefix: str) -> None:
        rows = found.setdefault(prefix, [])
        defaults = cls()
        for name, kind in fields_of(cls).items():
            key = f"{prefix}.{name}" if prefix else name
            default = getattr(defaults, name)
            if kind.section and key in SECTIONS:
                visit(kind.base, key)
                continue
            meaning = MEANINGS.get(key) or known.get((cls.__name__, name))
            if meaning is None:
                raise SystemExit(f"{key} has no meaning: add a comment in config.py, or tell it in MEANINGS")
            rows.append((key, written(default), kind.words(), meaning))
            if key == "evaluate.benchmarks":
                visit(config.BenchmarkConfig, f"{key}.NAME")
            if key == "evaluate.gate":
                visit(config.GateConfig, f"{key}.BENCHMARK.NUMBER")

    visit(config.Recipe, "")
    return found


def render() -> str:
    """The page."""
    parts = [INTRODUCTION]
    found = sections()
    for name, title in SECTIONS.items():
        parts.append(f"\n## {title}\n\n| key | default | takes | meaning |\n|---|---|---|---|\n")
        for key, default, takes, meaning in found[name]:
            cells = " | ".join(text.replace("|", "\\|") for text in (takes, meaning))
            parts.append(f"| `{key}` | `{default}` | {cells} |\n")
    return "".join(parts)


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
