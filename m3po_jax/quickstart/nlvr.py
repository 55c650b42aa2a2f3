"""NLVR v1 as rows of this package: true or false statements about a picture of three boxes (Suhr et al., ACL 2017).

The corpus does not ship with this package; it is read where it lies, and what is made of it stays beside the runs:

    python -m m3po_jax.quickstart.nlvr FOLDER OUT configs/quickstart/base

FOLDER has ``dev.jsonl`` and ``test.jsonl`` (one example a line: ``id``, ``image``, ``sentence``, ``label``, in
the former ``boxes`` and ``fold`` too) and the pictures. OUT gets ``sft.jsonl``, ``prompts.jsonl`` and ``test.jsonl``,
the boxes as pictures of their own, and ``model/``: the configuration of a tiny LLaVA and a tokenizer of the
sentences' words.

A picture is cut into its boxes, three images a prompt, because shapes of ten pixels vanish when the whole is shrunk.
The order of the boxes does not matter to a statement, as in the corpus, whose pictures come in six orders.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m3po_jax.data.tables import atomic_write, read_json_lines, write_json_lines
from m3po_jax.errors import UserError
from m3po_jax.quickstart.tokenizer import padded, save_tokenizer, splitter

Row = dict[str, Any]
SIDE, STEP = 100, 150  # pixels of a box, and from one box's left edge to the next one's
SFT_FOLDS = (0, 1, 2)  # of the development split, what base models learn from; the rest are prompts
TEMPLATES = 4  # made statements about each of those pictures
COLOURS, SHAPES = ("black", "blue", "yellow"), ("square", "circle", "triangle")
# What is read of an example; of the test split, whose statements stand as they are, neither boxes nor folds.
FIELDS = {"test": {"id", "image", "sentence", "label"}, "dev": {"id", "image", "sentence", "label", "boxes", "fold"}}
INSTRUCTION = "{} True or False ?"


def sentence(text: str) -> str:
    """Lower-case words without marks, so that "closely touching." and "Closely touching" are one statement."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def read_examples(folder: Path, split: str) -> list[Row]:
    """The lines of a split.

    Raises:
        UserError: no such file, or a line without the fields.
    """
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise UserError("no such file", where=str(path), remedy="name the folder that holds dev.jsonl and test.jsonl")
    rows = []
    for number, row in read_json_lines(path):
        missing = FIELDS[split] - row.keys()
        if missing:
            raise UserError(f"no field {min(missing)!r}", where=f"{path}:{number}")
        rows.append(row)
    return rows


def count(boxes: Sequence[Sequence[Mapping[str, Any]]], colour: str, shape: str) -> list[int]:
    """How many items of a colour and a shape each box has; "item" is any shape, an empty colour any colour."""
    return [
        sum((not colour or item["color"] == colour) and shape in ("item", item["shape"]) for item in box)
        for box in boxes
    ]


def statement(boxes: Sequence[Sequence[Mapping[str, Any]]], rng: np.random.Generator) -> tuple[str, bool]:
    """A made statement about a picture, in the corpus's words, and whether it is true."""
    colour = str(rng.choice(["", *COLOURS]))
    shape = str(rng.choice(["item", *SHAPES]))
    counts = count(boxes, colour, shape)
    number = max(1, sum(counts) + int(rng.integers(-2, 3)))
    thing = f"{colour} {shape}".strip()
    several = thing + ("s" if number != 1 else "")
    box = max(1, max(counts) + int(rng.integers(-1, 2)))
    inside = thing + ("s" if box != 1 else "")
    return [
        (f"there {'is' if number == 1 else 'are'} {number} {several}", sum(counts) == number),
        (f"there are at least {number} {several}", sum(counts) >= number),
        (f"each box has at least 1 {thing}", min(counts) >= 1),
        (f"there is 1 box with {box} {inside}", counts.count(box) == 1),
    ][int(rng.integers(4))]


def prompt(example: Mapping[str, Any], key: str, text: str, truth: bool, order: Sequence[int] = (0, 1, 2)) -> Row:
    """A row: three images, a statement, and True or False."""
    stem = Path(example["image"]).with_suffix("").as_posix()
    return {
        "id": key,
        "images": [f"{stem}-{box}.png" for box in order],
        "instruction": INSTRUCTION.format(text),
        "reference": str(truth),
        "metadata": {"category": str(truth), "scene": stem},
    }


def cut(folder: Path, out: Path, examples: Sequence[Mapping[str, Any]]) -> None:
    """Writes every box of the examples' pictures as a picture of its own, unless it is there."""
    for name in sorted({example["image"] for example in examples}):
        stem = out / Path(name).with_suffix("")
        if Path(f"{stem}-2.png").exists():
            continue
        picture = Image.open(folder / name).convert("RGB")
        if picture.size != (2 * STEP + SIDE, SIDE):
            raise UserError(f"{picture.size} pixels, not {2 * STEP + SIDE} × {SIDE}", where=str(folder / name))
        for box in range(3):
            with atomic_write(Path(f"{stem}-{box}.png")) as file:
                picture.crop((STEP * box, 0, STEP * box + SIDE, SIDE)).save(file, format="PNG")


def rows(dev: Sequence[Row], test: Sequence[Row]) -> dict[str, list[Row]]:
    """``sft``, ``prompts`` and ``test``; what shares a statement or a picture with the test split is left out.

    A base model learns every statement of its folds in all six orders of the boxes, and made ones about the same
    pictures, as true as false.
    """
    said, images = {sentence(row["sentence"]) for row in test}, {row["image"] for row in test}
    unshared = [row for row in dev if sentence(row["sentence"]) not in said and row["image"] not in images]
    orders = list(itertools.permutations(range(3)))
    learned: list[Row] = []
    for row in (row for row in unshared if row["fold"] in SFT_FOLDS):
        text = sentence(row["sentence"])
        learned += [prompt(row, f"{row['id']}-o{n}", text, row["label"], o) for n, o in enumerate(orders)]
        rng = np.random.default_rng([len(learned), 0x4E4C5652])
        for number in range(TEMPLATES):
            text, truth = next(pair for pair in _statements(row["boxes"], rng) if pair[1] == (number % 2 == 0))
            learned.append(prompt(row, f"{row['id']}-t{number}", text, truth, orders[int(rng.integers(6))]))
    return {
        "sft": learned,
        "prompts": [
            prompt(row, row["id"], sentence(row["sentence"]), row["label"])
            for row in unshared
            if row["fold"] not in SFT_FOLDS
        ],
        "test": [prompt(row, row["id"], sentence(row["sentence"]), row["label"]) for row in test],
    }


def _statements(boxes: Any, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    while True:
        yield statement(boxes, rng)


def write(folder: Path, out: Path, base: Path) -> dict[str, int]:
    """Everything that a base model and a comparison need; how many rows each file has.

    Args:
        base: A folder with the configuration of a tiny LLaVA, whose vocabulary is replaced.
    """
    dev, test = (read_examples(folder, split) for split in ("dev", "test"))
    cut(folder, out, [*dev, *test])
    tables = rows(dev, test)
    for name, table in tables.items():
        write_json_lines(out / f"{name}.jsonl", table)
    words = {"True", "False"}
    words |= {word for row in tables["sft"] for word, _ in splitter().pre_tokenize_str(row["instruction"])}
    model = save_tokenizer(out / "model", words)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = len(padded(words))
    (model / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).write_bytes((base / name).read_bytes())
    return {name: len(table) for name, table in tables.items()}


def main(arguments: Sequence[str]) -> int:
    """``FOLDER OUT BASE`` on the command line; returns the exit status."""
    if len(arguments) != 3:
        print(f"usage: python -m {__spec__.name} FOLDER OUT BASE", file=sys.stderr)
        return 2
    try:
        counts = write(*map(Path, arguments))
    except UserError as error:
        print(f"nlvr: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{count} rows in {name}.jsonl" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
