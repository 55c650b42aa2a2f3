"""MME: two yes/no questions about each image, in fourteen tasks (Fu et al., arXiv:2306.13394).

The official rule: the answer is lower-cased and not stripped; "yes" in its first four characters is yes, else "no"
there is no, else the answer is other, which is wrong. A task's score is 100·accuracy + 100·accuracy⁺, where accuracy⁺
is the share of images with both questions right; perception (ten tasks, at most 2,000) and cognition (four, at most
800) are sums of scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_reference,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, yes_no_items

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = (*PERCEPTION, *COGNITION)
OTHER = "other"


def parse(text: str) -> str:
    """``yes``, ``no`` or ``other`` by the official rule."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else OTHER


def mme(answers: Iterable[Record], labels: Iterable[Record]) -> dict[str, Any]:
    """MME scores.

    Args:
        answers: ``{"id", "text"}``.
        labels: ``{"id", "label", "category", "image"}``: yes or no, the task, and the image, which two questions of a
            task share.

    Returns:
        ``summary``: n, ``perception`` and ``cognition`` (sums over the tasks that are there), ``accuracy``,
        ``other``, ``tasks`` (how many are there) and ``degenerate``; ``categories``: n, accuracy, accuracy_plus,
        score (at most 200) and other of each task; ``items``.

    Raises:
        UserError: ids that do not match, an unknown task, a label that is neither yes nor no, or an image without
            exactly two questions.
    """
    items = yes_no_items(answers, labels, parse, lambda text: parse(text) == OTHER, categories=TASKS, kind="task")
    present = [task for task in TASKS if any(item["category"] == task for item in items)]
    for task in present:
        _pair([item for item in items if item["category"] == task])
    found = values(sums, rates, items)
    return {
        "summary": {
            "n": len(items),
            "perception": found.get("perception", 0),
            "cognition": found.get("cognition", 0),
            "accuracy": found.get("accuracy"),
            "other": sum(item["unparsed"] for item in items),
            "tasks": len(present),
            "degenerate": [f"no question of {task}" for task in TASKS if task not in present],
        },
        "categories": {task: task_scores([item for item in items if item["category"] == task]) for task in present},
        "items": items,
    }


def _pair(items: Sequence[dict[str, Any]]) -> None:
    """Notes in each item of a task whether ``both`` questions of its image are right.

    Raises:
        UserError: an image does not have two questions.
    """
    pairs: dict[str, list[bool]] = {}
    for item in items:
        pairs.setdefault(str(item["image"]), []).append(bool(item["correct"]))
    uneven = sorted(image for image, right in pairs.items() if len(right) != 2)
    if uneven:
        raise UserError(
            f"{len(pairs[uneven[0]])} questions about image {uneven[0]!r}, not two",
            where=f"MME task {items[0]['category']}",
            remedy="accuracy+ needs both questions of every image",
        )
    for item in items:
        item["both"] = all(pairs[str(item["image"])])


def sums(item: Item) -> list[float]:
    """What an answer adds to its task: right answers, images with both right (half of one each), questions."""
    added = np.zeros((len(TASKS), 3))
    added[TASKS.index(item["category"])] = bool(item["correct"]), 0.5 * bool(item["both"]), 1
    return added.ravel().tolist()


def rates(sums: Sums) -> Rates:
    """The two sums over tasks of 100·accuracy + 100·accuracy⁺, where absent ones add nothing, and all accuracy."""
    correct, plus, questions = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    # An image is half of its two questions' sum.
    scores = 100 * ratio(correct, questions, undefined=0.0) + 100 * ratio(plus, questions / 2, undefined=0.0)
    perception = len(PERCEPTION)
    return {
        "perception": scores[..., :perception].sum(axis=-1),
        "cognition": scores[..., perception:].sum(axis=-1),
        "accuracy": ratio(correct.sum(axis=-1), questions.sum(axis=-1)),
    }


def task_scores(items: Sequence[Item]) -> dict[str, Any]:
    """Scores of one task's items: accuracy, accuracy⁺ (images with both questions right) and their sum in percent."""
    totals = np.sum([sums(item) for item in items], axis=0)
    place = 3 * TASKS.index(items[0]["category"])
    correct, plus, questions = totals[place : place + 3].tolist()
    accuracy, accuracy_plus = correct / questions, plus / (questions / 2)
    return {
        "n": len(items),
        "accuracy": accuracy,
        "accuracy_plus": accuracy_plus,
        "score": 100 * accuracy + 100 * accuracy_plus,
        "other": sum(item["parsed"] == OTHER for item in items),
    }


def read_results(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(answers, labels) from result files of the official tool: ``<task>.txt`` with image, question, truth, response.

    Two lines that follow each other are about one image, whatever its name, as in the official scorer. A task without
    a file is left out.

    Raises:
        UserError: no file at all, a line without four columns, or an odd number of lines.
    """
    answers, labels = [], []
    for task in TASKS:
        path = folder / f"{task}.txt"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # responses may hold other separators
        if len(lines) % 2:
            raise UserError(f"{len(lines)} lines, which are not pairs", where=str(path))
        for number, line in enumerate(lines):
            columns = line.split("\t")
            if len(columns) != 4:
                raise UserError(
                    f"{len(columns)} columns, not 4",
                    where=f"{path}:{number + 1}",
                    remedy="image, question, Yes or No, and the response; a response has no tab or line break",
                )
            key = f"{task}/{number}"
            labels.append({"id": key, "label": columns[2], "category": task, "image": f"{task}/{number // 2}"})
            answers.append({"id": key, "text": columns[3]})
    if not answers:
        raise UserError("no result file", where=str(folder), remedy=f"such as {TASKS[0]}.txt")
    return answers, labels


def write_results(items: Sequence[Mapping[str, Any]], questions: Mapping[str, str], folder: Path) -> None:
    """Result files that the official tool reads; a tab or line break in a response becomes a space.

    Args:
        items: Of `mme`.
        questions: id -> question.
    """
    from m3po_jax.data.tables import atomic_write

    for task in sorted({item["category"] for item in items}):
        # Both questions of an image stand together.
        own = [item for item in items if item["category"] == task]
        order = {image: number for number, image in enumerate(dict.fromkeys(item["image"] for item in own))}
        with atomic_write(folder / f"{task}.txt") as file:
            for item in sorted(own, key=lambda item: order[item["image"]]):
                columns = (item["image"], questions[item["id"]], item["label"].capitalize(), item["text"])
                line = "\t".join(" ".join(str(column).splitlines()).replace("\t", " ") for column in columns)
                file.write((line + "\n").encode("utf-8", "replace"))


def read_questions(folder: Path, suffix: str | None = None) -> list[dict[str, Any]]:
    """Prompt rows (``id``, ``images``, ``instruction``, ``reference``, ``metadata``) of the released benchmark.

    Args:
        folder: ``MME_Benchmark_release_version``: a folder for each task with images and a text file for each image
            (``question<tab>answer`` lines), together or in ``images/`` and ``questions_answers_YN/``. Image paths are
            relative to it.
        suffix: Replaces the questions' own "Please answer yes or no.", for example LLaVA's ``\\nAnswer the question
            using a single word or phrase.``; None: they stay as they are.

    Raises:
        UserError: a text file without its image, or without two questions.
    """
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        home = folder / task
        texts, images = home / "questions_answers_YN", home / "images"
        texts, images = (texts, images) if texts.is_dir() else (home, home)
        for path in sorted(texts.glob("*.txt")):
            found = sorted(p for p in images.glob(f"{path.stem}.*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
            if not found:
                raise UserError("no image of this name", where=str(path))
            lines = [line.rstrip("\r\n") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if len(lines) != 2 or any(line.count("\t") != 1 for line in lines):
                raise UserError("not two lines of question, tab and answer", where=str(path))
            for number, line in enumerate(lines):
                question, answer = line.split("\t")
                if suffix is not None:
                    question = question.replace("Please answer yes or no.", "").rstrip() + suffix
                image = found[0].relative_to(folder).as_posix()
                rows.append(
                    {
                        "id": f"{task}/{path.stem}/{number}",
                        "images": [image],
                        "instruction": question,
                        "reference": answer.strip(),
                        "metadata": {"category": task, "image": image},
                    }
                )
    if not rows:
        raise UserError("no question of any task", where=str(folder), remedy="name MME_Benchmark_release_version")
    return rows


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    return mme(answers, [as_label(prompt, label=prompt.reference) for prompt in prompts])


METRIC = Metric(
    rules={"official": "eval_tool/calculation.py of MME: yes or no within the first four characters, in lower case"},
    needs="`reference` Yes or No, `metadata.category` (the task), `metadata.image`, which two rows share",
    missing=needs_reference,
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("perception", "Perception", "higher", "sum of ten tasks' scores, at most 2,000", 1, False),
        Column("cognition", "Cognition", "higher", "sum of four tasks' scores, at most 800", 1, False),
    ),
    deciding=("perception",),
)
