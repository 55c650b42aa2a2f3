"""The README.md of an export: what the model is, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from m3po_jax.config import Recipe
from m3po_jax.models.hub import HUB_ID
from m3po_jax.models.registry import Family
from m3po_jax.objectives.registry import objective_of
from m3po_jax.version import __version__
from m3po_jax.workspace.cell import Cell


def _facts(recipe: Recipe, cell: Cell, steps: int, dtypes: str) -> dict[str, Any]:
    train, model = recipe.train, recipe.model
    rank = train.lora.lora_rank
    adapter = {
        "LoRA rank": rank,
        "LoRA alpha": f"{train.lora.lora_alpha:g}",
        "LoRA targets": ", ".join(train.lora.target_modules),
        "projector": "trained" if train.lora.train_projector else "frozen",
    }
    return {
        "run": recipe.name,
        **({"system": cell.arm} if cell.arm is not None else {}),
        "round": cell.round,
        **(adapter if rank else {"parameters": "full fine-tuning"}),
        **objective_of(train).facts(),
        "learning rate": f"{train.learning_rate:g}",
        "batch size": train.batch_size,
        "steps": steps,
        "weights": train.weights,
        "seed": recipe.seed,
        "prompt template": model.template,
        "image fit": model.image_fit,
        **({"pan and scan": "yes"} if model.pan_and_scan else {}),
        "data type": dtypes,
        "made by": f"m3po_jax {__version__}",
    }


def model_card(
    recipe: Recipe,
    family: Family,
    *,
    cell: Cell,
    steps: int,
    dtypes: str,
    adapter: bool,
) -> str:
    """Markdown with the hub's YAML header.

    Args:
        recipe: Of the exported system; an arm's with the arm's settings.
        dtypes: The written data types, in words.
        adapter: A PEFT adapter, not a whole model.
    """
    base, local = recipe.model.path, Path(recipe.model.path).expanduser().is_dir()
    named = None if local else HUB_ID.fullmatch(base)
    on_hub, base = named is not None, base if named is None else named["name"]
    method, tags = objective_of(recipe.train).description(recipe.select.rule, recipe.score.backend)
    header: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": family.task,
        # A path of this machine is no model that the hub could link to.
        **({"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if on_hub else {}),
        "tags": ["m3po_jax", *tags, *(["lora"] if recipe.train.lora.lora_rank else [])],
    }
    name = base if on_hub or not local else Path(base).expanduser().resolve().name
    kind = "A PEFT adapter of" if adapter else "A fine-tuned copy of"
    title = recipe.name if cell.arm is None else f"{recipe.name}, {cell.arm}"
    rows = [f"| {key} | {value} |" for key, value in _facts(recipe, cell, steps, dtypes).items()]
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
            f"# {title}\n",
            f"{kind} `{name}`, made by {method}. The base model's licence and limits apply.\n",
            "| | |\n|---|---|",
            *rows,
            "",
            "Prompt it as it was trained: with the prompt template and the image fit above.\n",
        ]
    )
