"""Readers of rows against anything: what they do not read is one line with the file, and never another exception."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from m3po_jax.config import BenchmarkConfig, DataConfig
from m3po_jax.data.images import decode
from m3po_jax.data.pair_rows import pair_prompt
from m3po_jax.data.preference_files import read_preferences
from m3po_jax.data.sources import fingerprint, read_prompts
from m3po_jax.data.templates import get_template
from m3po_jax.errors import UserError
from m3po_jax.evaluation.registry import METRICS
from m3po_jax.pipeline.evaluate import check_scoring, read_benchmark

PROMPT = {
    "id": "x",
    "images": ["a.png"],
    "instruction": "Is it red?",
    "reference": "yes",
    "metadata": {"objects": ["cat"], "kind": "yesno", "category": "random"},
}
RATED = [{"response": "r", "annotations": {"h": {"Rating": "5"}}}, {"response": "s", "annotations": {}}]
PAIRS = [
    {"prompt": "q", "images": ["a.png"], "chosen": "a", "rejected": "b"},
    {"image": "a.png", "question": "q", "chosen": "a", "rejected": "b"},
    {"image": "a.png", "text": {"question": "q", "chosen": "a", "rejected": "b"}},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected_response": "b"},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "image": "a.png", "completions": RATED},
    {"image": "a.png", "conversations": [{"from": "human", "value": "q"}], "preference": 1}
    | {"output_1": {"value": "a"}, "output_2": {"value": "b"}},
]
KEYS = [
    "id",
    "question_id",
    "idx",
    "image",
    "img_path",
    "instruction",
    "question",
    "prompt",
    "reference",
    "answer",
    "text",
    "conversations",
    "messages",
    "history",
    "system",
    "metadata",
    "chosen",
    "rejected",
    "completions",
    "rejected_response",
    "rejected_images",
    "query",
    "response",
    "output",
    "chosen_token_ids",
    "reference_chosen_logprobs",
    "kind",
    "category",
    "objects",
    "A",
    "B",
    "hint",
    "index",
    "videos",
]


def deep(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


STRANGE = st.sampled_from(
    [
        *(
            None,
            True,
            0,
            -1,
            2**31,
            2**64,
            10**400,
            1.5,
            float("nan"),
            float("-inf"),
            "",
            " ",
            "\n",
            "a\0b",
            "\ud800",
        ),
        *("a.png", "../a.png", "/etc/passwd", "loop/a.png", "pipe.png", "folder.jpg", "empty.jpg", "half.jpg"),
        *(
            "http://x/y.png",
            "data:image/png;base64,QUJD",
            "data:,",
            "data:image/svg+xml,<svg/>",
            "\x1b[31m",
            "[1",
            "{}",
        ),
        *("<image>", "<image><image>", "yes", "A", [], {}, [None], [[]], ["a.png"], ["a.png", 3], {"path": "a.png"}),
        *({"bytes": "x"}, {"bytes": None, "path": None}, {"role": "user"}, [["q", "a"]], [["q"]], [["q", None]]),
        *([{"from": "human", "value": "<image>\nhi"}, {"from": "gpt", "value": "yes"}], ["cat", "dog"], {"cat": 1}),
        *([{"role": "assistant", "content": "x"}], [{"role": "tool", "content": "x"}], [{"name": "cat"}], deep(70)),
        *({"history": "ab", "system": 3, "objects": 1}, [{"response": 3}], {"response": "ab", "annotations": [1]}),
    ]
)


@st.composite
def hostile(draw: st.DrawFn, bases: list[dict[str, Any]]) -> dict[str, Any]:
    """A good row with some fields replaced, added or left out."""
    row = dict(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*row, *KEYS]))
        if draw(st.booleans()) and key in row and draw(st.booleans()):
            del row[key]
        else:
            row[key] = draw(STRANGE)
    return row


def spoilt(draw: st.DrawFn, data: bytes) -> bytes:
    body = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.sampled_from([len(body), len(body), len(body) // 2]))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are images, and things of such names that are none: none of them may stop a reader."""
    path = tmp_path_factory.mktemp("hostile")
    buffer = io.BytesIO()
    PILImage.new("RGB", (40, 40), (200, 10, 10)).save(buffer, "JPEG")
    (path / "a.png").write_bytes(buffer.getvalue())
    (path / "half.jpg").write_bytes(buffer.getvalue()[:300])
    (path / "empty.jpg").touch()
    (path / "folder.jpg").mkdir()
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "pipe.png")
    return path


def file_of(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path | None:
    """Rows as a file; None where its format cannot hold them."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
            writer = csv.writer(file)
            names = list({name: None for row in rows for name in row})
            writer.writerow(names)
            for row in rows:
                values = [row.get(name) for name in names]
                writer.writerow([value if isinstance(value, str) else json.dumps(value) for value in values])
    else:
        try:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        except (pa.ArrowException, OverflowError, ValueError):
            return None
    return path


@contextlib.contextmanager
def one_line(path: Path):
    try:
        yield
    except UserError as error:
        line = str(error)
        line.encode("utf-8")
        assert error.where is not None and (str(path) in line or "evaluate.benchmarks.b" in line), line
        assert line.isprintable() and len(line) < 3000


def show(prompt: Any, root: Path) -> None:
    """What every model does with a prompt."""
    history = [tuple(turn) for turn in prompt.metadata.get("history") or []]
    system = prompt.metadata.get("system")
    get_template("vicuna_v1").render(
        prompt.instruction, len(prompt.images), history, system=system, where=prompt.where
    )
    for image in prompt.images:
        decode(image, root=root, max_pixels=10**6, where=prompt.where)


QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_prompts(folder: Path, kind: str, data: st.DataObject) -> None:
    path = file_of(folder, kind, data.draw(st.lists(hostile([PROMPT]), min_size=1, max_size=3)))
    if path is None:
        return
    if data.draw(st.booleans()):
        path.write_bytes(spoilt(data.draw, path.read_bytes()))
    config = {"path": str(path), "source": "parquet" if kind == "parquet" else "jsonl"}
    problems: list[UserError] = []
    with one_line(path):
        read_prompts(DataConfig(**config), problems=problems)
    assert all(str(path) in str(problem) for problem in problems)
    for policy in ("stop", "skip"):
        with one_line(path):
            source = read_prompts(DataConfig(**config, on_bad_row=policy))
            for prompt in source:
                show(prompt, source.image_root)
            fingerprint(source)


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs(folder: Path, kind: str, data: st.DataObject) -> None:
    path = file_of(folder, kind, data.draw(st.lists(hostile(PAIRS), min_size=1, max_size=3)))
    if path is None:
        return
    if data.draw(st.booleans()):
        path.write_bytes(spoilt(data.draw, path.read_bytes()))
    with one_line(path):
        pairs = read_preferences(str(path))
        pairs.fingerprint  # noqa: B018 - reads every image
        for row in pairs:
            show(pair_prompt(row, row["where"]), pairs.image_root)


@QUICK
@given(data=st.data())
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_questions(folder: Path, metric: str, data: st.DataObject) -> None:
    path = file_of(folder, "jsonl", data.draw(st.lists(hostile([PROMPT]), min_size=1, max_size=3)))
    assert path is not None
    with one_line(path):
        check_scoring(read_benchmark("b", BenchmarkConfig(metric=metric, data=DataConfig(path=str(path)))))


def test_texts_of_pairs_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    good, bad = b"What?", b"\xff\xfe"
    table = pa.table({"prompt": pa.array([good, bad, good]), "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    table = table.set_column(0, "prompt", table.column(0).cast(pa.string(), safe=False).combine_chunks())
    pq.write_table(table, tmp_path / "a.parquet")
    problems: list[UserError] = []
    pairs = read_preferences(str(tmp_path / "a.parquet"), problems=problems)
    assert len(pairs) == 2 and [str(p) for p in problems] == [
        f"{tmp_path}/a.parquet:row 1: a text is not UTF-8; mend the row"
    ]


def test_a_damaged_footer_is_one_line(tmp_path: Path) -> None:
    """Whichever of its bytes: names of columns that are no text, schemas that are none."""
    pq.write_table(pa.table({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    path = tmp_path / "b.parquet"
    for place in range(len(whole) - 400, len(whole)):
        path.write_bytes(whole[:place] + b"\xde" + whole[place + 1 :])
        with one_line(path):
            read_preferences(str(path))
        with one_line(path):
            read_prompts(DataConfig(path=str(path), source="parquet"), problems=[])
