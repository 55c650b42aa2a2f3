"""Published benchmarks from their own files: questions, annotations and answers as their authors release them.

Each benchmark reads its references and any framework's answers into the rows and records that its metric scores. What
does not fit (an unknown id, a missing answer, another question) is an error with file and row: scores of a partial
join look plausible and are wrong.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import json_lines, parse_json_object
from m3po_jax.errors import UserError
from m3po_jax.evaluation.chair import coco_vocabulary
from m3po_jax.evaluation.mme import TASKS
from m3po_jax.evaluation.records import id_text

_ID_KEYS, _TEXT_KEYS = ("question_id", "id", "index"), ("answer", "text", "response", "caption", "prediction")


@dataclass(frozen=True)
class Scorable:
    """What a benchmark's files hold.

    Attributes:
        prompts: The questions that are scored.
        answers: ``{"id", "text"}`` for each.
        settings: Of `BenchmarkConfig`, that the files stand for.
        notes: What a reader of the numbers must know.
    """

    prompts: list[Prompt]
    answers: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """A benchmark whose files are read as they are.

    Attributes:
        metric: Whose rules score it.
        references: What --references takes.
        answers: What --answers takes.
        source: Where the references come from.
        read: ``(references, answers, the rule's name or "") -> Scorable``; raises UserError.
        needs_references: False where the answers bring the right ones along.
    """

    metric: str
    references: str
    answers: str
    source: str
    read: Callable[[Sequence[Path], Path, str], Scorable]
    needs_references: bool = True


def _objects(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of an array, each with its place."""
    if not isinstance(value, list):
        raise UserError("not an array of objects", where=where)
    for place, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise UserError("not a JSON object", where=f"{where}[{place}]")
        yield f"{where}[{place}]", entry


def _content(path: Path) -> Any:
    """What a JSON file holds (compressed where it ends in .gz)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return json.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"malformed JSON: {error}", where=str(path)) from None
    except (OSError, EOFError) as error:
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=str(path)) from None


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of a file of JSON lines or of one array, whatever its name ends in.

    Raises:
        UserError: no such file, or neither.
    """
    first = next((line for _, line in json_lines(path)), b"").lstrip(b"\xef\xbb\xbf \t")
    if first.startswith(b"["):
        records = list(_objects(_content(path), str(path)))
    else:
        records = [(where, parse_json_object(line, where)) for where, line in json_lines(path)]
    if not records:
        raise UserError("holds no record", where=str(path))
    return records


def _field(record: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The first of several fields that a record has.

    Raises:
        UserError: it has none of them.
    """
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise UserError(f"a record needs {' or '.join(map(repr, names))}", where=where)


def _text(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    value = _field(record, names, where)
    if not isinstance(value, str):
        raise UserError(f"the answer must be text, not {type(value).__name__}", where=where)
    return value


def _one_file(paths: Sequence[Path], what: str) -> Path:
    if len(paths) != 1 or paths[0].is_dir():
        raise UserError(f"takes one file, {what}", where="--references")
    return paths[0]


def _files_in(paths: Sequence[Path], pattern: str) -> list[Path]:
    """The files named, and those of this pattern in the folders named, whatever folder below holds them."""
    listed: list[Path] = []
    for path in paths:
        if path.is_dir():
            listed += sorted(path.rglob(pattern))
        elif path.exists():
            listed.append(path)
        else:
            raise UserError("no such file", where=str(path), remedy="check --references")
    return listed


def _by_id(records: Iterable[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Answers with ids: LLaVA's answer files, results and our own."""
    return [
        {"id": id_text(_field(record, _ID_KEYS, where), where), "text": _text(record, _TEXT_KEYS, where)}
        for where, record in records
    ]


def _read_pope(references: Sequence[Path], answers: Path, rule: str) -> Scorable:
    """POPE's questions, and answers by `question_id`, or in the questions' order as POPE's own answer files."""
    file = _one_file(references, "POPE's questions: coco_pope_random.json")
    named = re.search(r"(random|popular|adversarial)", file.stem)
    prompts = []
    for where, row in read_records(file):
        prompts.append(
            Prompt(
                id=id_text(_field(row, _ID_KEYS, where), where),
                images=(),
                instruction=_text(row, ("text", "question"), where),
                reference=_text(row, ("label", "answer"), where),
                metadata={
                    "image": str(row.get("image") or row.get("image_source") or ""),
                    "category": str(row.get("category") or (named[1] if named else "all")),
                },
                where=where,
            )
        )
    records = read_records(answers)
    if all("label" in record and str(record.get("text", "")).strip().endswith("?") for _, record in records):
        raise UserError("holds questions with their labels, not answers", where=str(answers))
    with_ids = [any(record.get(name) is not None for name in _ID_KEYS) for _, record in records]
    if all(with_ids):
        return Scorable(prompts, _by_id(records))
    if any(with_ids):
        raise UserError("some answers have an id and others have none", where=records[with_ids.index(False)][0])
    if len(records) != len(prompts):
        raise UserError(
            f"{len(records)} answers without ids to {len(prompts)} questions",
            where=str(answers),
            remedy="answers without ids stand in the order of the questions, one for each",
        )
    texts = []
    for prompt, (where, record) in zip(prompts, records, strict=True):
        asked = record.get("question")
        if isinstance(asked, str) and asked.strip() != prompt.instruction.strip():
            raise UserError(
                f"answers {asked.strip()!r}, and the question in its place is {prompt.instruction!r}",
                where=where,
                remedy="give the questions that these answers were made from",
            )
        texts.append({"id": prompt.id, "text": _text(record, _TEXT_KEYS, where)})
    return Scorable(prompts, texts)


def _image_number(value: Any, where: str) -> str:
    """COCO's number of an image, also from a file name (``COCO_val2014_000000000042.jpg``)."""
    digits = re.findall(r"\d+", Path(str(value)).stem) if isinstance(value, str) else []
    return str(int(digits[-1])) if digits else id_text(value, where)


def _read_chair(references: Sequence[Path], answers: Path, rule: str) -> Scorable:
    """Captions by `image_id`; objects of COCO's instances, of the reference captions, or listed for each image."""
    content = _content(answers) if answers.suffix == ".json" else None
    captions = content.get("sentences", content.get("annotations")) if isinstance(content, dict) else None
    records = read_records(answers) if captions is None else list(_objects(captions, str(answers)))
    texts = [
        {
            "id": _image_number(_field(record, ("image_id", "image", "file_name", *_ID_KEYS), where), where),
            "text": _text(record, ("caption", *_TEXT_KEYS), where),
        }
        for where, record in records
    ]
    wanted = {text["id"] for text in texts}
    objects: dict[str, set[str]] = {}
    kinds: set[str] = set()
    for path in _files_in(references, "*_*20*.json"):
        kinds.add(_add_objects(path, _content(path), wanted, objects))
    kinds.discard("")
    if not kinds:
        raise UserError("neither instances nor captions of COCO", where=str(references[0]), remedy=_COCO_FILES)
    missing = [record for record, text in zip(records, texts, strict=True) if text["id"] not in objects]
    if missing:
        raise UserError(f"{len(missing)} captions are of images that the references lack", where=missing[0][0])
    notes = []
    if kinds == {"instances"}:
        notes.append(
            "objects are those of the instances alone; published CHAIR adds those that the reference captions name"
        )
    if rule == "vocabulary":
        notes.append("objects are found by their own names, without synonyms: not comparable with published CHAIR")
    prompts = [
        Prompt(key, (), "Describe the image.", metadata={"image": key, "objects": sorted(objects[key])})
        for key in dict.fromkeys(text["id"] for text in texts)
    ]
    settings: dict[str, Any] = {}
    if rule == "vocabulary":
        settings["vocabulary"] = sorted(coco_vocabulary().objects)
    return Scorable(prompts, texts, settings, tuple(notes))


_COCO_FILES = "give instances_*.json and captions_*.json of COCO (or their folder), or a file {image id: [objects]}"


def _add_objects(path: Path, content: Any, wanted: set[str], objects: dict[str, set[str]]) -> str:
    """Adds a file's objects of the wanted images; returns what the file is, empty for none that is known."""
    words = coco_vocabulary()
    if not isinstance(content, dict):
        return ""
    annotations = content.get("annotations")
    if annotations is None:
        if not all(isinstance(names, list) for names in content.values()):
            return ""
        for key, names in content.items():
            number = _image_number(key, str(path))
            if number in wanted:
                objects.setdefault(number, set()).update(map(str, names))
        return "objects"
    # An image without objects is there all the same.
    for where, image in _objects(content.get("images", []), f"{path} images"):
        number = id_text(_field(image, ("id",), where), where)
        if number in wanted:
            objects.setdefault(number, set())
    names = {
        id_text(_field(entry, ("id",), where), where): str(_field(entry, ("name",), where))
        for where, entry in _objects(content.get("categories", []), f"{path} categories")
    }
    kind = "instances" if names else "captions"
    for where, entry in _objects(annotations, f"{path} annotations"):
        number = id_text(_field(entry, ("image_id",), where), where)
        if number not in wanted:
            continue
        if kind == "instances":
            key = id_text(_field(entry, ("category_id",), where), where)
            if key not in names:
                raise UserError(f"no category has the id {key}", where=where)
            objects.setdefault(number, set()).add(words.object_of(names[key]))
        else:
            objects.setdefault(number, set()).update(words.mentions(_text(entry, ("caption",), where)))
    return kind


def _read_vqa(references: Sequence[Path], answers: Path, rule: str) -> Scorable:
    """VQA's annotations (and questions, where given) and its result file."""
    questions: dict[str, str] = {}
    annotations: list[tuple[str, dict[str, Any]]] = []
    for path in _files_in(references, "*.json"):
        content = _content(path)
        if not isinstance(content, dict):
            continue
        for where, entry in _objects(content.get("questions", []), f"{path} questions"):
            questions[id_text(entry.get("question_id"), where)] = _text(entry, ("question",), where)
        annotations += _objects(content.get("annotations", []), f"{path} annotations")
    if not annotations:
        raise UserError(
            "no annotations of VQA",
            where=str(references[0]),
            remedy="give v2_mscoco_val2014_annotations.json, and the questions beside it if you like",
        )
    prompts = []
    for where, entry in annotations:
        key = id_text(_field(entry, ("question_id",), where), where)
        if questions and key not in questions:
            raise UserError(
                f"no question has the id {key}", where=where, remedy="give the questions of these answers"
            )
        prompts.append(
            Prompt(
                id=key,
                images=(),
                instruction=questions.get(key, ""),
                metadata={
                    "answers": _field(entry, ("answers",), where),
                    "question_type": entry.get("question_type"),
                    "category": entry.get("answer_type") or "all",
                    "image": str(entry.get("image_id", "")),
                },
                where=where,
            )
        )
    return Scorable(prompts, _by_id(read_records(answers)))


def _table_lines(path: Path, columns: int) -> Iterator[tuple[str, list[str]]]:
    """(where, cells) of a file's lines that are not blank, divided at tabs.

    Raises:
        UserError: it cannot be read, or a line has another number of cells.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({type(error).__name__})", where=str(path)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            cells = line.split("\t")
            if len(cells) != columns:
                raise UserError(f"{len(cells)} columns between tabs, not {columns}", where=f"{path}:{number}")
            yield f"{path}:{number}", cells


def _read_mme(references: Sequence[Path], answers: Path, rule: str) -> Scorable:
    """MME's result folder (TASK.txt: image, question, right answer, answer), held against the released folder."""
    if not answers.is_dir():
        raise UserError("takes MME's result folder, with a file TASK.txt for each task", where=str(answers))
    files = sorted(answers.glob("*.txt"))
    if unknown := [path for path in files if path.stem not in TASKS]:
        raise UserError(f"no task of MME; tasks are {', '.join(TASKS)}", where=str(unknown[0]))
    if not files:
        raise UserError("holds no TASK.txt", where=str(answers))
    prompts, texts = [], []
    for path in files:
        for where, (image, question, right, text) in _table_lines(path, 4):
            key = f"{path.stem}/{image}/{question}"
            metadata = {"category": path.stem, "image": image}
            prompts.append(Prompt(key, (), question, right.strip(), metadata, where))
            texts.append({"id": key, "text": text})
    if references:
        _check_mme(references, prompts)
    return Scorable(prompts, texts)


def _check_mme(references: Sequence[Path], prompts: Sequence[Prompt]) -> None:
    """Holds the results' own right answers against the released ones."""
    released: dict[tuple[str, str, str], str] = {}
    tasks = {prompt.metadata["category"] for prompt in prompts}
    for path in _files_in(references, "*.txt"):
        task = next((part for part in reversed(path.parts[:-1]) if part in TASKS), None)
        if task is not None and task in tasks:
            for _, (question, right) in _table_lines(path, 2):
                released[task, path.stem, question.strip()] = right.strip().lower()
    if not released:
        raise UserError(
            "holds no question of these tasks", where=str(references[0]), remedy="give MME's released folder"
        )
    for prompt in prompts:
        key = (prompt.metadata["category"], Path(prompt.metadata["image"]).stem, prompt.instruction.strip())
        right = released.pop(key, "")
        if not right:
            raise UserError("the released folder has no such question, or this one twice", where=prompt.where)
        if right != str(prompt.reference).lower():
            raise UserError(f"says that {prompt.reference} is right, and MME that {right} is", where=prompt.where)
    if released:
        task, image, question = next(iter(released))
        raise UserError(
            f"{len(released)} questions have no answer, first {question!r} about {image}", where=f"MME task {task}"
        )


def _read_amber(references: Sequence[Path], answers: Path, rule: str, *, yes_no: bool) -> Scorable:
    """AMBER's data folder and a file of responses; of one that answers all tasks, the ones that are scored."""
    files = {path.name: path for path in _files_in(references, "*.*")}
    if "annotations.json" not in files:
        raise UserError("holds no annotations.json", where=str(references[0]), remedy="give AMBER's data folder")
    queries = {}
    if "query_all.json" in files:
        for where, entry in read_records(files["query_all.json"]):
            queries[id_text(entry.get("id"), where)] = entry
    prompts, others = [], set()
    for where, entry in read_records(files["annotations.json"]):
        key, kind = id_text(_field(entry, ("id",), where), where), _text(entry, ("type",), where)
        if (kind == "generative") == yes_no:
            others.add(key)
            continue
        query = queries.get(key, {})
        metadata = {"image": str(query.get("image", key))}
        if yes_no:
            metadata["category"] = kind
        else:
            metadata |= {name: _field(entry, (name,), where) for name in ("truth", "hallu")}
        right = str(_field(entry, ("truth",), where)) if yes_no else None
        prompts.append(Prompt(key, (), str(query.get("query", "")), right, metadata, where))
    texts = [text for text in _by_id(read_records(answers)) if text["id"] not in others]
    if yes_no:
        return Scorable(prompts, texts)
    if "relation.json" not in files:
        raise UserError("holds no relation.json", where=str(references[0]), remedy="give AMBER's data folder")
    settings: dict[str, Any] = {"association": str(files["relation.json"])}
    if "safe_words.txt" in files:
        settings["safe_words"] = str(files["safe_words.txt"])
    if rule == "official":
        settings |= {"nouns": "nltk", "similarity": "en_core_web_lg"}
    return Scorable(prompts, texts, settings)


def _tsv(path: Path) -> list[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images lie in it as text
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [
                (f"{path} row {number}", row) for number, row in enumerate(csv.DictReader(file, delimiter="\t"), 1)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from None


def _read_mmbench(references: Sequence[Path], answers: Path, rule: str) -> Scorable:
    """MMBench's TSV, and predictions by `index` as TSV or JSON lines."""
    prompts = []
    for where, row in _tsv(_one_file(references, "MMBench's TSV")):
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter) not in (None, "", "nan")}
        key = id_text(_field(row, ("index",), where), where)
        hint = row.get("hint") if row.get("hint") not in (None, "nan") else ""
        prompts.append(
            Prompt(
                id=key,
                images=(),
                instruction="\n".join(filter(None, (hint, _text(row, ("question",), where)))),
                reference=_text(row, ("answer",), where),
                metadata={"options": options, "index": int(key), "category": row.get("category") or "all"},
                where=where,
            )
        )
    records = _tsv(answers) if answers.suffix == ".tsv" else read_records(answers)
    return Scorable(prompts, _by_id(records))


PUBLISHED: dict[str, Published] = {
    "pope": Published(
        "pope",
        "the questions, JSON lines or an array: coco_pope_random.json, llava_pope_test.jsonl, ...",
        'answers by question_id (LLaVA\'s), or POPE\'s own {"question", "answer"} in the order of the questions',
        "github.com/RUCAIBox/POPE, output/coco; output/seem for GQA and A-OKVQA",
        _read_pope,
    ),
    "chair": Published(
        "chair",
        "instances_*.json and captions_*.json of COCO, or their folder; or {image id: [objects]}",
        '{"image_id", "caption"}, JSON lines or an array',
        "cocodataset.org, annotations_trainval2014",
        _read_chair,
    ),
    "vqav2": Published(
        "vqa",
        "annotations, and questions beside them: v2_mscoco_val2014_annotations.json",
        'the result file, [{"question_id", "answer"}]',
        "visualqa.org/download.html",
        _read_vqa,
    ),
    "mme": Published(
        "mme",
        "the released folder (optional: results bring the right answers along, and are held against it)",
        "the result folder: TASK.txt with image, question, right answer and answer between tabs",
        "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, MME",
        _read_mme,
        needs_references=False,
    ),
    "amber": Published(
        "amber",
        "the data folder: annotations.json, relation.json, safe_words.txt, query_all.json",
        '[{"id", "response"}]; of a file for all tasks the descriptions are scored',
        "github.com/junyangwang0410/AMBER, data",
        lambda references, answers, rule: _read_amber(references, answers, rule, yes_no=False),
    ),
    "amber_yes_no": Published(
        "amber_yes_no",
        "the data folder: annotations.json, query_all.json",
        '[{"id", "response"}]; of a file for all tasks the yes/no questions are scored',
        "github.com/junyangwang0410/AMBER, data",
        lambda references, answers, rule: _read_amber(references, answers, rule, yes_no=True),
    ),
    "mmbench": Published(
        "mmbench",
        "the TSV, images included: MMBench_DEV_EN.tsv",
        "predictions by index: TSV or JSON lines",
        "github.com/open-compass/MMBench",
        _read_mmbench,
    ),
}
