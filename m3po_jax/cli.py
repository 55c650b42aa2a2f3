"""The `m3po` command: one verb per stage, each a thin shell over a documented function."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from m3po_jax.errors import (
    EXIT_GATE_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    GateFailed,
    Interrupted,
    UserError,
    system_failure,
)
from m3po_jax.hosts import supervisor
from m3po_jax.version import __version__

# Verbs that look for a signal at every step of theirs and save before they stop; any other ends at once.
RESUMABLE = frozenset({"run", "generate", "score", "select", "train", "evaluate", "compare"})

VERBS: dict[str, tuple[str, str]] = {
    "run": (
        "the whole loop, then evaluation and the report",
        "Generates candidates, scores and pairs them, trains on the pairs, `rounds` times, then evaluates every arm "
        "and writes report.html. Whatever is finished is skipped, so the same command continues a stopped run.",
    ),
    "generate": (
        "candidates with token ids and raw log-probs",
        "Samples `generate.num_candidates` answers for every prompt of `data` into round-R/candidates/.",
    ),
    "score": (
        "alignment scores (MAS) and confidence for candidates",
        "Scores round-R/candidates/ into round-R/scores/: one MAS per candidate and backend, and the confidence "
        "variants of `score.confidence`.",
    ),
    "select": (
        "preference pairs, and the reason for every dropped prompt",
        "Pairs a good answer with a confidently wrong one into round-R/pairs/. With --input and --output it works on "
        "JSON lines of scored candidates alone.",
    ),
    "train": (
        "a checkpoint from pairs, references or image-claim lists",
        "objective: preference trains on round-R/pairs/; sft and contrastive train on `train.data`.",
    ),
    "evaluate": (
        "answers and metrics of the benchmarks",
        "Answers every benchmark of `evaluate.benchmarks` with the model (or its trained checkpoint) into "
        "round-R/evaluation/. With --answers FILE it scores saved answers instead.",
    ),
    "compare": (
        "systems × seeds on shared candidates, and one table with intervals",
        "Trains and evaluates every system of `compare.arms` with every seed of `compare.seeds` under "
        "NAME/compare/, and writes results.json, results.md and report.html there. Whatever is finished is skipped.",
    ),
    "export": (
        "a Hugging Face directory or a PEFT adapter",
        "Writes what was trained so that transformers, PEFT and vLLM load it. What was trained, and from which base, "
        "is read from the run's own recipe; a key that says otherwise is refused.",
    ),
    "merge": (
        "a model with a PEFT adapter merged into it",
        "Writes a Hugging Face directory of `model.path` (default: the base that the adapter names) with a plain "
        "LoRA adapter merged into it, whoever wrote it: a model that a run can start from, or judge with.",
    ),
    "plan": (
        "memory and least time on TPU chips that need not be there",
        "Compiles the recipe's generation, judging and training for a TPU topology with the TPU's own compiler (the "
        "plan extra) and prints what each program takes of a chip's memory, beside its roofline. No TPU and no "
        "weights are needed: a model directory with config.json is enough. Exit status 2 if something does not fit.",
    ),
    "validate": (
        "every problem of a recipe and its data, before anything runs",
        "Checks settings, the models' files, every row with its images, and every benchmark; prints one line a "
        "problem. No weights are loaded.",
    ),
    "recipes": (
        "the recipes that ship, by the names that --config takes",
        "Prints the name and the first line of every recipe of configs/, which come with the package.",
    ),
    "report": (
        "one self-contained report.html",
        "Writes report.html from whatever the run directory holds.",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of every verb and its options."""
    parser = argparse.ArgumentParser(
        prog="m3po",
        description="Multimodal-model-guided preference optimization for large vision-language models, in JAX.",
        epilog="m3po VERB --help tells what a verb reads and writes; m3po recipes lists the recipes that ship.",
    )
    parser.add_argument("--version", action="version", version=f"m3po_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (summary, description) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=summary,
            description=description,
            epilog=None
            if name == "recipes"
            else "Any key of the recipe can be replaced: dotted.key=value, e.g. train.beta=0.2 name=trial.",
        )
        if name == "recipes":
            continue
        verb.add_argument(
            "--config",
            metavar="RECIPE.yaml",
            help="the recipe: a file, or the name of one that ships (help: lists them); without one, all defaults",
        )
        verb.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the recipe")
        if name != "report":
            verb.add_argument(
                "--mock", action="store_true", help="shrink the recipe to a tiny model and a handful of rows"
            )
        if name == "run":
            verb.add_argument(
                "--dry-run",
                action="store_true",
                help="only list every stage as done, to do or out of date, with the key that made it so",
            )
        if name in RESUMABLE - {"compare"}:
            verb.add_argument(
                "--force",
                action="store_true",
                help="go on in a run directory of another seed, model or data, without its saved recipe, or over an "
                "unfinished training of something else: what is there is set aside, never deleted",
            )
        if name in ("generate", "score", "select", "train", "evaluate", "export"):
            verb.add_argument("--round", type=int, default=1, metavar="R", help="which round's folder (default 1)")
            verb.add_argument("--arm", default=None, help="a comparison arm of the recipe (default: the main one)")
        if name == "select":
            verb.add_argument("--input", metavar="FILE.jsonl", help="scored candidates as JSON lines")
            verb.add_argument("--output", metavar="FILE.jsonl", help="where the pairs go, as JSON lines")
        if name == "evaluate":
            verb.add_argument(
                "--answers", metavar="FILE.jsonl", help='saved answers: {"id": ..., "text": ...} a line'
            )
            verb.add_argument("--benchmark", help="the benchmark that --answers belongs to")
            verb.add_argument(
                "--references",
                metavar="PATH",
                nargs="+",
                help="a published benchmark's own files: scores --answers without a recipe (--list says which)",
            )
            verb.add_argument("--rule", help="with --references: whose rule reads the answers (--list)")
            verb.add_argument("--output", metavar="DIR", help="with --references: where the results go")
            verb.add_argument(
                "--list", action="store_true", help="published benchmarks: their files, where from, and rules"
            )
        if name == "plan":
            verb.add_argument(
                "--topology", metavar="NAME", required=True, help="v5e-8, v5litepod-8, v5e:2x4, v5p-8, ..."
            )
            verb.add_argument(
                "--prompt-tokens", type=int, metavar="N", help="of the longest prompt (default: one image and 64)"
            )
            verb.add_argument("--json", metavar="FILE", help="also writes the figures there")
        if name == "export":
            verb.add_argument("--format", choices=("huggingface", "peft"), default="huggingface")
            verb.add_argument(
                "--output", metavar="DIR", help="default: export-[ARM-]round-R-FORMAT/ in the run directory"
            )
        if name == "merge":
            verb.add_argument(
                "--adapter", metavar="DIR", required=True, help="adapter_config.json and its safetensors"
            )
            verb.add_argument("--output", metavar="DIR", required=True, help="where the merged model goes")
        if name in ("export", "merge"):
            verb.add_argument(
                "--dtype",
                default="auto",
                choices=("auto", "float16", "bfloat16", "float32"),
                help="of what is written (default auto: as the base stores each tensor, an adapter in float32)",
            )
            verb.add_argument(
                "--overwrite", action="store_true", help="replace another export; the same one is always replaced"
            )
    return parser


def _quiet_libraries() -> None:
    """Keeps libraries' chatter off the screen; M3PO_VERBOSE=1 leaves it on."""
    if os.environ.get("M3PO_VERBOSE") == "1":
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for name in ("absl", "jax", "orbax", "etils", "tensorflow_datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status (0, 2 for a user's error, 3 where all is done and a number dropped by
    more than `evaluate.gate` allows, 75 when stopped and resumable)."""
    parser = make_parser()
    # Overrides may stand anywhere, also behind options, which argparse leaves over.
    options, left = parser.parse_known_args(arguments)
    takes_recipe = hasattr(options, "overrides")
    if unknown := [word for word in left if word.startswith("-") or "=" not in word or not takes_recipe]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_recipe:
        options.overrides += left
        if options.config == "help":
            options.verb = "recipes"
    _quiet_libraries()
    several = options.verb in RESUMABLE and supervisor.runs_on_several_hosts()
    if several and (status := supervisor.stay_behind()) is not None:
        return status
    try:
        from m3po_jax.hosts.signals import noted
        from m3po_jax.pipeline import verbs

        verb: Callable[[argparse.Namespace], None] = getattr(verbs, options.verb)
        with noted() if options.verb in RESUMABLE else nullcontext():
            verb(options)
    except UserError as error:
        print(f"m3po: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except GateFailed as failed:
        for line in failed.lines:
            print(f"m3po: gate: {line}", file=sys.stderr)
        return EXIT_GATE_FAILED
    except (Interrupted, KeyboardInterrupt) as stopped:
        reason = str(stopped) or "interrupted; what is finished is saved"
        print(f"m3po: {reason}; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if several and supervisor.is_lost_host(error):
            supervisor.leave_after(error)
        explained = system_failure(error)
        if explained is None:
            raise
        print(f"m3po: {explained}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
