"""Writes the tables in docs/models.md from m3po_jax/models/registry.py.

python docs/make_models.py
"""

from __future__ import annotations

from pathlib import Path

from m3po_jax.models.registry import FAMILIES, Family
from m3po_jax.models.text_decoders import TEXT_DECODERS

OUTPUT = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- families, made by docs/make_models.py -->\n", "<!-- /families -->\n"


def yes(condition: bool) -> str:
    """A cell of the table."""
    return "yes" if condition else ""


def row(family: Family) -> list[str]:
    """What a family can be used as, and what is done to its models."""
    about_images = family.images is not None
    dual_encoder = not family.has_decoder
    images = "one size" if dual_encoder else ""
    if family.images is not None:
        images = family.images.sizes
    return [
        f"`{family.name}`",
        ", ".join(f"`{kind}`" for kind in family.model_types),
        images,
        *(yes(about_images),) * 2,
        yes(dual_encoder),
        *(yes(about_images),) * 2,  # LoRA and a quantised base: of language models that are trained
        yes(family.tower is not None),
        *(yes(about_images),) * 2,
    ]


def render() -> str:
    """The table of families and the list of decoders."""
    head = [
        *("family", "`model_type`", "images", "policy", "judge (`claims`, `judge`)", "`similarity`"),
        *("LoRA", "int8, nf4 base", "borrowed tower", "export: huggingface, peft", "`m3po plan`"),
    ]
    lines = [head, ["---"] * len(head), *(row(family) for family in FAMILIES)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    decoders = ", ".join(f"`{name}`" for name in TEXT_DECODERS)
    return f"{table}\n\nText decoders: {decoders}.\n"


def page() -> str:
    """The whole page with the table in its place."""
    text = OUTPUT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + render() + END + rest.partition(END)[2]


if __name__ == "__main__":
    OUTPUT.write_text(page(), encoding="utf-8")
