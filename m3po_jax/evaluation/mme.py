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

from m3po_jax.errors import UserError
from m3po_jax.evaluation.records import Record, ratio, yes_no_items

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
    categories = {task: task_scores([item for item in items if item["category"] == task]) for task in present}
    reasons = [f"no question of {task}" for task in TASKS if task not in present]
    return {
        "summary": {
            "n": len(items),
            "perception": sum(categories[task]["score"] for task in PERCEPTION if task in categories),
            "cognition": sum(categories[task]["score"] for task in COGNITION if task in categories),
            "accuracy": ratio(sum(item["correct"] for item in items), len(items)),
            "other": sum(item["unparsed"] for item in items),
            "tasks": len(present),
            "degenerate": reasons,
        },
        "categories": categories,
        "items": items,
    }


def task_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of one task's items, which come in pairs about one image.

    Raises:
        UserError: an image does not have two questions.
    """
    right: dict[str, list[bool]] = {}
    for item in items:
        right.setdefault(str(item["image"]), []).append(bool(item["correct"]))
    uneven = sorted(image for image, own in right.items() if len(own) != 2)
    if uneven:
        raise UserError(
            f"{len(right[uneven[0]])} questions about image {uneven[0]!r}, not two",
            where=f"MME task {items[0]['category']}",
            remedy="accuracy+ needs both questions of every image",
        )
    accuracy = ratio(sum(bool(item["correct"]) for item in items), len(items)) or 0.0
    plus = ratio(sum(all(own) for own in right.values()), len(right)) or 0.0
    return {
        "n": len(items),
        "accuracy": accuracy,
        "accuracy_plus": plus,
        "score": 100 * accuracy + 100 * plus,
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
