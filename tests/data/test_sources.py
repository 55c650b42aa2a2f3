"""Prompts from JSON lines, parquet and TFDS."""

import base64
import datetime
import io
import json
import pickle
import sys
import textwrap
import urllib.parse

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage

from m3po_jax.config import DataConfig
from m3po_jax.data import schema, tables
from m3po_jax.data.rows import prompt_from_row
from m3po_jax.data.sources import PromptSource, fingerprint, read_prompts
from m3po_jax.errors import UserError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((4, 6, 3), value % 256, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def jsonl(path, **fields) -> DataConfig:
    return DataConfig(source="jsonl", path=str(path), **fields)


def raw(value: str, field: str = "z") -> str:
    """A line whose `field` is the JSON text `value`."""
    return f'{{"id": "x", "instruction": "q", "{field}": {value}}}'


ROWS = [{"id": f"r{i}", "image": f"{i}.png", "instruction": f"q{i}", "reference": f"a{i}"} for i in range(7)]


def test_json_lines(tmp_path):
    source = read_prompts(jsonl(write_lines(tmp_path / "p.jsonl", [*ROWS[:3], "", *ROWS[3:]])))
    assert isinstance(source, PromptSource) and len(source) == 7
    assert source[4] == schema.Prompt("r4", (schema.Image(path="4.png"),), "q4", "a4")
    assert source[4].where == f"{tmp_path}/p.jsonl:6 (id 'r4')"
    assert source.image_root == tmp_path
    with pytest.raises(IndexError):
        source[7]


def test_limit_stops_before_later_rows(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [*ROWS[:2], "{broken"])
    assert [row.id for row in read_prompts(jsonl(path, limit=2))] == ["r0", "r1"]
    with pytest.raises(UserError, match=r"data\.limit"):
        read_prompts(jsonl(path, limit=0))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "malformed JSON"),
        ("[]", "not a JSON object"),
        ({"id": True, "instruction": "q"}, "no id"),
        ({"id": {"a": 1}, "instruction": "q"}, "no id"),
        ({"id": "x"}, r"\(id 'x'\): the row has no instruction"),
        ({"id": "x", "instruction": " \n"}, "the instruction is empty"),
        ({"id": "x", "instruction": "<image>"}, "the instruction is empty"),
        ({"id": "x", "instruction": 3}, "not a text"),
        ({"id": "x", "instruction": "q", "reference": ["a"]}, "the reference is not a text"),
        ({"id": "x", "instruction": "q", "image": 3}, "neither a path nor encoded bytes"),
        ({"id": "x", "instruction": "q", "images": ["a.png", ""]}, "neither a path nor encoded bytes"),
        ({"id": "x", "instruction": "q", "images": [{"bytes": None, "path": None}]}, "neither a path"),
        ({"id": "x", "instruction": "q", "metadata": [1]}, "metadata is not an object"),
        ({"id": "x", "instruction": "q", "metadata": "{"}, "malformed JSON"),
        ('{"id": "x", "instruction": "q", "metadata": {"a": NaN}}', "the metadata is nan"),
        ({"id": "x", "instruction": "q", "history": [["q"]]}, "history is not a list"),
        ({"id": "x", "instruction": "q", "history": "abc"}, "history is not a list"),
        ({"id": "x", "instruction": "q", "metadata": {"history": ["ab", "cd"]}}, "history is not a list"),
        ({"id": "x", "instruction": "q", "metadata": {"system": [1]}}, "the system turn is not a text"),
        ({"id": "x", "conversations": []}, "the conversation is empty"),
        ({"id": "x", "conversations": "q"}, "the conversation is not a list"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "q"}]}, "the conversation is empty"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "turn 1 of the conversation"),
        ({"id": "x", "conversations": [{"from": "human", "value": "q"}] * 2}, "turn 2 of the conversation"),
        ({"id": "x", "instruction": "q", "z": float("inf")}, "the field 'z' is inf"),
        ({"id": "x", "instruction": "q", "z": [[1, {"a": float("nan")}]]}, "the field 'z' is nan"),
        ('{"id": "x", "instruction": "q", "z": 1e999}', "the field 'z' is inf"),
        (raw("1" + "0" * 5000), "malformed JSON"),
        (raw("[" * 100 + "]" * 100), "the field 'z' is nested more than 64 levels"),
        (raw('{"a":' * 450 + "1" + "}" * 450, "metadata"), "the metadata is nested more than 64 levels"),
        (raw("[" * 900 + "]" * 900), "nested"),
        (raw("[" * 9000 + "]" * 9000), "malformed JSON"),
        ({"id": "\ud83d", "instruction": "q"}, r"the id has half of a character"),
        ({"id": "a\0b", "instruction": "q"}, r"the id has a control character"),
        ({"id": "a\nb", "instruction": "q"}, r"the id has a control character"),
        ({"id": "x", "instruction": "q\ud83d"}, r"the instruction has half of a character .* at place 1"),
        ({"id": "x", "instruction": "q", "answer": "\udc00"}, r"the reference has half of a character"),
        ({"id": "x", "instruction": "q", "history": [["\udc00", "a"]]}, r"the history has half of a character"),
        ({"id": "x", "instruction": "q", "image": "\udc00.png"}, r"an image's path has half of a character"),
        ({"id": "x", "instruction": "q", "metadata": {"a": ["\udc00"]}}, r"the metadata has half of a character"),
        ({"id": "x", "instruction": "q", "metadata": {"\udc00": 1}}, r"a key of the metadata has half"),
        ({"id": "x", "instruction": "q", "image": "data:image/png;base64,%%%"}, "data URI .* not valid base64"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn 1 of the conversation"),
    ],
)
def test_bad_rows_name_file_row_and_id(tmp_path, row, message):
    path = write_lines(tmp_path / "p.jsonl", [ROWS[0], row, ROWS[1]])
    with pytest.raises(UserError, match=rf"p\.jsonl:2.*{message}"):
        read_prompts(jsonl(path))
    problems: list[UserError] = []
    assert [prompt.id for prompt in read_prompts(jsonl(path), problems=problems)] == ["r0", "r1"]
    assert len(problems) == 1


def test_rows_without_image_where_one_is_required(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"id": 1, "instruction": "q", "image": None}])
    assert read_prompts(jsonl(path))[0].images == ()
    with pytest.raises(UserError, match=r"p\.jsonl:1 \(id '1'\): the row has no image"):
        read_prompts(jsonl(path), require_image=True)


def test_bad_sources(tmp_path):
    for config, message in (
        (jsonl(tmp_path / "none.jsonl"), "no such file"),
        (jsonl(""), r"data\.path is empty"),
        (DataConfig(source="json", path="x"), "did you mean 'jsonl'"),
        (jsonl(write_lines(tmp_path / "empty.jsonl", [""])), "no rows"),
        (DataConfig(source="parquet", path=str(tmp_path / "none")), "no parquet file"),
        (DataConfig(source="parquet", path=str(write_lines(tmp_path / "a.parquet", ["x"]))), "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(config)


def test_formats_of_others():
    human, gpt = ({"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A bus."})
    llava = {"id": "l", "image": "a.jpg", "conversations": [human, gpt, {"from": "human", "value": "And?"}]}
    got = prompt_from_row(llava, "f:1")
    assert (got.instruction, got.reference) == ("And?", None)
    assert got.metadata == {"history": [["What?", "A bus."]]}  # the only image goes in front, as LLaVA trains
    # An image in a later turn goes to the front of that turn, as LLaVA's preprocess_multimodal has it.
    hello = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    got = prompt_from_row(llava | {"conversations": [*hello, human]}, "f:1")
    assert (got.instruction, got.metadata) == ("<image>\nWhat?", {"history": [["Hello", "Hi"]]})
    got = prompt_from_row(llava | {"conversations": [*hello, human, gpt, {"from": "human", "value": "And?"}]}, "f:1")
    assert (got.instruction, got.metadata["history"][1]) == ("And?", ["<image>\nWhat?", "A bus."])
    two = [{"from": "human", "value": "<image>\nOne."}, gpt, {"from": "human", "value": "Two. <image>"}]
    got = prompt_from_row({"id": "l", "images": ["a", "b"], "conversations": two}, "f:1")
    assert (got.instruction, got.metadata["history"]) == ("<image>\nTwo.", [["<image>\nOne.", "A bus."]])
    # LLaVA's train.py leaves an opening turn of the assistant out.
    assert prompt_from_row(llava | {"conversations": [gpt, human, gpt]}, "f:1").instruction == "What?"
    got = prompt_from_row(llava | {"conversations": [human, gpt]}, "f:1")
    assert (got.instruction, got.reference, got.metadata) == ("What?", "A bus.", {})
    many = {"from": "human", "value": "<image> or <image>?"}
    got = prompt_from_row({"id": "l", "images": ["a", "b"], "conversations": [many]}, "f:1")
    assert got.instruction == "<image> or <image>?"
    pope = prompt_from_row({"question_id": 7, "image": "a.jpg", "text": "Is it?", "label": "no"}, "f:1")
    assert (pope.id, pope.instruction, pope.reference, pope.metadata) == (
        "7",
        "Is it?",
        "no",
        {"label": "no"},
    )
    answer = prompt_from_row({"id": "a", "question": "q", "text": "t"}, "f:1")
    assert (answer.instruction, answer.reference) == ("q", "t")
    zero = prompt_from_row(
        {"id": 0, "instruction": "q", "metadata": {"a": 1}, "a": 2, "b": [None], "day": datetime.date(2024, 5, 6)},
        "f:1",
    )
    assert (zero.id, zero.metadata) == ("0", {"a": 1, "b": [None], "day": "2024-05-06"})
    large = prompt_from_row({"id": 10**400, "instruction": "q", "n": 2**70}, "f:1")
    assert (large.id, large.metadata) == (str(10**400), {"n": 2**70})


IMAGE_PART = {"type": "image"}


@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_chats(column):
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "A bus."}
    later = {"role": "user", "content": [{"type": "text", "text": "And "}, IMAGE_PART]}
    got = prompt_from_row({"id": "c", "image": "a.jpg", column: [system, user, answer]}, "f:1")
    assert (got.instruction, got.reference, got.metadata) == ("What?", "A bus.", {"system": "Be brief."})
    got = prompt_from_row({"id": "c", "images": ["a", "b"], column: [user, answer, later]}, "f:1")
    assert (got.instruction, got.metadata) == ("<image>\nAnd", {"history": [["<image>\nWhat?", "A bus."]]})
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"}}
    got = prompt_from_row({"id": "c", column: [{"role": "user", "content": [url, user["content"][1]]}]}, "f:1")
    assert (got.instruction, got.images) == ("What?", (schema.Image(png(1)),))
    assert prompt_from_row({"id": "c", "prompt": "What?", "chosen": "x"}, "f:1").metadata == {"chosen": "x"}
    both = prompt_from_row({"id": "c", "question": "What?", "prompt": "p", "messages": [1], "index": 4}, "f:1")
    assert (both.instruction, both.metadata) == ("What?", {"prompt": "p", "messages": [1], "index": 4})


def test_images_as_text(tmp_path):
    """Data URIs and bare base64 are images; anything else in their place is a path."""
    text = base64.b64encode(png(3)).decode()
    for value in (
        text,
        "\n".join(textwrap.wrap(text, 40)),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;charset=utf-8;base64,{text.rstrip('=')}",
        "data:image/png," + urllib.parse.quote(png(3)),
        {"bytes": text, "path": None},
        {"url": f"data:image/png;base64,{text}"},
    ):
        assert prompt_from_row({"id": 1, "question": "q", "image": value}, "f:1").images == (schema.Image(png(3)),)
    for path in ("a/b.png", "iVBORw0KGgo", "a" * 80, "/9j/" + "b" * 100 + ".png", "x.tif"):
        assert prompt_from_row({"id": 1, "question": "q", "image": path}, "f:1").images == (schema.Image(path=path),)


def llava(identifier, *turns, **fields):
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": identifier, "conversations": said, **fields}


def test_repeated_ids_are_numbered_by_place(tmp_path):
    rows = [llava("33", f"<image>\n{i}?", "a", image="x.png") for i in range(3)]
    rows += [llava("33#2", "q", "a"), llava("34", "Tell me a joke", "ha"), llava("33", "q", "a")]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    source = read_prompts(jsonl(path))
    assert [row.id for row in source] == ["33", "33#2", "33#3", "33#2#2", "34", "33#4"]
    assert source[1].where == f"{path}[1] (id '33#2')" and source[4].images == ()
    assert source.notes == [f"{path}: 4 rows have the id of an earlier row and are called ID#2, ID#3, ..."]
    assert [row.id for row in read_prompts(jsonl(path, limit=2))] == ["33", "33#2"]


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path):
    (tmp_path / "good.png").write_bytes(png(1))
    (tmp_path / "bad.png").write_bytes(b"no image")
    PILImage.new("1", (11, 10)).save(tmp_path / "large.png")
    images = ["good.png", "none.png", "bad.png", "large.png", "gone.png", None, "good.png"]
    rows = [{"id": i, "image": image, "question": "q"} for i, image in enumerate(images)]
    path = write_lines(tmp_path / "p.jsonl", [*rows, "{", {"id": "x"}])
    source = read_prompts(jsonl(path, on_bad_row="skip", max_image_pixels=100), require_image=True)
    assert [row.id for row in source] == ["0", "6"]
    (note,) = source.notes
    assert note.startswith(
        f"{path}: 7 bad rows left out (2 x no image file … under …; 2 x the row has no image; 1 x "
    )
    assert "; 1 x the image has … x … pixels, more than data.max_image_pixels = …; 1 x malformed JSON" in note
    problems: list[UserError] = []
    assert len(read_prompts(jsonl(path, on_bad_row="skip"), require_image=True, problems=problems)) == 3
    assert not problems
    with pytest.raises(UserError, match=r"no rows; .* 1 bad rows left out"):
        read_prompts(jsonl(write_lines(tmp_path / "q.jsonl", ["{"]), on_bad_row="skip"))
    with pytest.raises(UserError, match=r"data\.on_bad_row: unknown value 'skp' \(did you mean 'skip'"):
        read_prompts(jsonl(path, on_bad_row="skp"))
    with pytest.raises(UserError, match=r"data\.exif: unknown value 'no'"):
        read_prompts(jsonl(path, exif="no"))


def test_ids_are_made_of_the_image_or_the_place(tmp_path):
    rows = [{"image": "a/x.png", "question": "q"}, {"question": "q"}, {"images": ["a", "b"], "question": "q"}]
    path = write_lines(tmp_path / "p.jsonl", [*rows, rows[0]])
    assert [row.id for row in read_prompts(jsonl(path))] == ["a/x.png", "row-2", "row-3", "a/x.png#2"]


def test_tables_of_text(tmp_path):
    text = base64.b64encode(png(5)).decode()
    for name, comma in (("p.csv", ","), ("p.tsv", "\t")):
        path = tmp_path / name
        lines = [
            ["\ufeffindex", "image", "question", "answer", "A"],
            ["7", text, '"What, or\n""who""?"'.replace(",", comma), "a bus", ""],
            ["8", "x.png", "q", "", "one"],
            ["9", '"[""a.png"", ""b.png""]"', "q", "", ""],
        ]
        path.write_text("\n".join(comma.join(cells) for cells in lines), encoding="utf-8")
        for source in (read_prompts(jsonl(path)), read_prompts(DataConfig(source="csv", path=str(path)))):
            assert [row.id for row in source] == ["7", "8", "9"]
            assert source[0].images == (schema.Image(png(5)),) and source[0].reference == "a bus"
            assert source[0].instruction == f'What{comma} or\n"who"?' and source[0].metadata == {}
            assert source[1].metadata == {"A": "one"} and source[1].images == (schema.Image(path="x.png"),)
            assert len(source[2].images) == 2
    for text, message in (
        ("id,id\n1,2\n", "two columns have the same name"),
        ("id,question\n1,2,3\n", r"p\.csv:2: the row has more cells"),
        ("id,question\n1,\n", "no instruction; add 'instruction', or set data.instruction"),
        ("id,question\n1,a\0b\n", None),
    ):
        (tmp_path / "p.csv").write_text(text)
        if message is None:  # Python 3.11 and later read it
            assert read_prompts(jsonl(tmp_path / "p.csv"))[0].instruction == "a\0b"
            continue
        with pytest.raises(UserError, match=message):
            read_prompts(jsonl(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_bytes(b"id,question\n1,\xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(jsonl(tmp_path / "p.csv"))
    assert read_prompts(jsonl(write_lines(tmp_path / "p.jsonl", [{"id": 1}]), instruction="Describe."))[0] == (
        schema.Prompt("1", (), "Describe.")
    )


def test_a_folder_of_images(tmp_path):
    for name in ("b.PNG", "a/x.jpeg", ".hidden/y.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    source = read_prompts(jsonl(tmp_path, instruction="Describe the image."), require_image=True)
    assert [(row.id, row.images[0].path, row.instruction) for row in source] == [
        ("a/x.jpeg", "a/x.jpeg", "Describe the image."),
        ("b.PNG", "b.PNG", "Describe the image."),
    ]
    assert source.image_root == tmp_path and source.notes == []
    (tmp_path / "c.png").mkdir()  # a folder of that name is none
    (tmp_path / "c.png" / "d.heic").write_bytes(b"")
    source = read_prompts(jsonl(tmp_path, instruction="Describe the image."))
    assert len(source) == 2 and source.notes[0].endswith(
        ": pictures of kinds that are not read are left out (1 x .heic): save them as JPEG"
    )
    with pytest.raises(UserError, match=r"a folder of images has no instructions; say in data\.instruction"):
        read_prompts(jsonl(tmp_path))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x1f\x8b\x08", "a gzip archive; unpack it"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1", "data.source=parquet"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, start, message):
    (tmp_path / "p.jsonl").write_bytes(start + b"\0" * 90)
    with pytest.raises(UserError, match=message):
        read_prompts(jsonl(tmp_path / "p.jsonl"))


def test_json_array(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text("\ufeff" + json.dumps([*ROWS[:2], 5]), encoding="utf-8")
    with pytest.raises(UserError, match=r"llava\.json\[2\]: not a JSON object"):
        read_prompts(jsonl(path))
    assert [row.id for row in read_prompts(jsonl(path, limit=2))] == ["r0", "r1"]
    path.write_text("[{")
    with pytest.raises(UserError, match="malformed JSON"):
        read_prompts(jsonl(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["from", "value", "path"]), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["id", "images", "image", "instruction", "text", "conversations", "history", "metadata", "z"]
        ),
        VALUES,
    )
)
def test_any_object_gives_a_prompt_or_a_clear_error(row):
    try:
        prompt = prompt_from_row(row, "f:1")
    except UserError as error:
        assert str(error).startswith("f:1")
    else:
        assert prompt.id and prompt.instruction.strip()
        schema.prompt_to_row(prompt)


def prompts(count=10):
    return [
        schema.Prompt(
            f"p{i}",
            tuple(schema.Image(bytes=png(i * 3 + k)) for k in range(i % 3)),
            f"q{i}",
            None if i % 2 else f"a{i}",
            {"k": i, "list": [1, {"a": None}]},
        )
        for i in range(count)
    ]


def test_parquet_folder_of_our_schema(tmp_path):
    rows = prompts(200)
    for shard in (1, 0):
        tables.write_table(
            tmp_path / f"{shard}.parquet",
            map(schema.prompt_to_row, rows[shard * 100 : shard * 100 + 100]),
            schema.PROMPT,
        )
    source = read_prompts(DataConfig(source="parquet", path=str(tmp_path)))
    assert [source[i] for i in range(200)] == rows
    assert source[3:5] == rows[3:5] and source[-1] == rows[-1]
    assert source[130].where == f"{tmp_path}/1.parquet:row 30 (id 'p130')"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[150] == rows[150] and b"PNG" not in pickle.dumps(source)
    for index in np.random.default_rng(0).permutation(200):
        assert source[int(index)] == rows[index]
    with pytest.raises(UserError, match="the row has no image"):
        read_prompts(DataConfig(source="parquet", path=str(tmp_path)), require_image=True)
    assert len(read_prompts(DataConfig(source="parquet", path=str(tmp_path), limit=130))) == 130
    (tmp_path / "2.parquet").write_bytes((tmp_path / "0.parquet").read_bytes())
    again = read_prompts(DataConfig(source="parquet", path=str(tmp_path)))
    assert (again[200].id, again[200].where) == ("p0#2", f"{tmp_path}/2.parquet:row 0 (id 'p0#2')")


def test_parquet_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "idx": [1, 2],
        "question": ["q1", "q2"],
        "image": [{"bytes": png(i), "path": None} for i in (1, 2)],
    }
    features = datasets.Features(
        {"idx": datasets.Value("int64"), "question": datasets.Value("string"), "image": datasets.Image()}
    )
    for split in ("train", "test"):
        ids = {"idx": [10, 20]} if split == "test" else {}
        datasets.Dataset.from_dict(columns | ids, features=features).to_parquet(
            str(tmp_path / f"{split}-00000-of-00001.parquet")
        )
    source = read_prompts(DataConfig(source="parquet", path=str(tmp_path), split="test"), require_image=True)
    assert [row.id for row in source] == ["10", "20"]
    assert source[1].images == (schema.Image(bytes=png(2)),) and source[1].instruction == "q2"
    with pytest.raises(UserError, match="no parquet file"):
        read_prompts(DataConfig(source="parquet", path=str(tmp_path), split="dev"))


def test_parquet_with_paths_or_bare_bytes_and_unequal_shards(tmp_path):
    pq.write_table(
        pa.table({"id": ["a", "b"], "question": ["q", "q"], "image": ["x.png", None]}), tmp_path / "a.parquet"
    )
    source = read_prompts(DataConfig(source="parquet", path=str(tmp_path / "a.parquet"), image_root="pictures"))
    assert [row.images for row in source] == [(schema.Image(path="x.png"),), ()]
    assert str(source.image_root) == "pictures"
    pq.write_table(pa.table({"id": ["c"], "question": ["q"], "image": [png(1)]}), tmp_path / "b.parquet")
    assert read_prompts(DataConfig(source="parquet", path=str(tmp_path / "b.parquet")))[0].images[0].bytes == png(1)
    pq.write_table(pa.table({"id": ["d"], "question": ["q"]}), tmp_path / "c.parquet")
    assert read_prompts(DataConfig(source="parquet", path=str(tmp_path / "c.parquet")))[0].images == ()
    with pytest.raises(UserError, match=r"c\.parquet: its columns differ"):
        read_prompts(DataConfig(source="parquet", path=str(tmp_path)))


BUILDER = """
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

class {name}(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(encoding_format="png")
        features = {{"id": tfds.features.Text(), {image}, "instruction": tfds.features.Text(),
                    "reference": tfds.features.Text(), "metadata": tfds.features.Text(), "level": np.int32}}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, manager):
        return {{"train": self._generate_examples(5), "test": self._generate_examples(2)}}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {{"id": f"k{{i}}", {value}, "instruction": f"qä{{i}}",
                      "reference": "", "metadata": '{{"objects": ["cat"]}}', "level": i}}
"""


@pytest.fixture
def builders(tmp_path, monkeypatch):
    """A module with two TFDS builders; its data go to a folder of the test."""
    one = BUILDER.format(name="OneImage", image='"image": image', value='"image": png(i)')
    several = BUILDER.format(
        name="SeveralImages",
        image='"images": tfds.features.Sequence(image)',
        value='"images": [png(i + k) for k in range(i)]',
    )
    (tmp_path / "m3po_test_builders.py").write_text(textwrap.dedent(one) + textwrap.dedent(several))
    monkeypatch.syspath_prepend(str(tmp_path))
    constants = pytest.importorskip("tensorflow_datasets.core.constants")
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_tfds_by_name_and_by_folder_without_tensorflow(builders):
    config = DataConfig(source="tfds", path="m3po_test_builders:one_image")
    source = read_prompts(config, require_image=True)
    want = schema.Prompt("k3", (schema.Image(bytes=png(3)),), "qä3", "", {"objects": ["cat"], "level": 3})
    assert len(source) == 5 and source[3] == want and source[-2:] == [source[3], source[4]]
    assert source[3].where.endswith("one_image/1.0.0/train:row 3 (id 'k3')")
    assert pickle.loads(pickle.dumps(source))[3] == want
    folder = str(builders / "one_image" / "1.0.0")
    for kind in ("tfds", "array_record"):
        again = read_prompts(DataConfig(source=kind, path=folder, split="train[1:3]", limit=9))
        assert [row.id for row in again] == ["k1", "k2"]
    assert len(read_prompts(DataConfig(source="tfds", path=folder, limit=2))) == 2
    several = read_prompts(DataConfig(source="tfds", path="m3po_test_builders:several_images"))
    assert [len(row.images) for row in several] == [0, 1, 2, 3, 4]
    assert several[2].images[1].bytes == png(3)
    assert "tensorflow" not in sys.modules
    for bad, message in (
        (DataConfig(source="tfds", path=folder, split="dev"), "cannot read split 'dev'"),
        (DataConfig(source="tfds", path=str(builders / "one_image")), r"no dataset_info\.json"),
        (DataConfig(source="tfds", path="m3po_no_such_set"), "cannot open the TFDS data set"),
        (DataConfig(source="tfds", path="m3po_no_such_module:x"), "cannot open the TFDS data set"),
        (DataConfig(source="array_record", path="m3po_no_such_folder"), "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(bad)


def test_sources_feed_grain(tmp_path):
    rows = prompts(9)
    tables.write_table(tmp_path / "a.parquet", map(schema.prompt_to_row, rows), schema.PROMPT)
    write_lines(tmp_path / "a.jsonl", [{"id": p.id, "instruction": p.instruction} for p in rows])
    for config in (
        DataConfig(source="parquet", path=str(tmp_path / "a.parquet")),
        jsonl(tmp_path / "a.jsonl"),
    ):
        dataset = grain.MapDataset.source(read_prompts(config)).shuffle(seed=3).map(lambda prompt: prompt.id)
        order = list(dataset)
        assert sorted(order) == sorted(p.id for p in rows) and order != [p.id for p in rows]
        assert list(dataset.to_iter_dataset()) == order


def test_fingerprint_follows_the_content(tmp_path):
    rows = prompts(4)

    def of(name, rows, **fields):
        path = tmp_path / name / "a.parquet"
        tables.write_table(path, map(schema.prompt_to_row, rows), schema.PROMPT)
        return fingerprint(read_prompts(DataConfig(source="parquet", path=str(path), **fields)))

    base = of("one", rows)
    assert len(base) == 64 and base == of("two", rows)
    assert base != of("three", rows[::-1])
    assert base != of("four", rows, limit=3)
    changed = [*rows[:3], schema.Prompt("p3", (schema.Image(bytes=png(99)),), "q3", None, rows[3].metadata)]
    assert base != of("five", changed)


def test_fingerprint_of_json_lines_sees_rows_and_image_files(tmp_path):
    seen = set()
    for folder, instruction, image in (
        ("a", "q", b"1"),
        ("b", "q", b"1"),
        ("c", "p", b"1"),
        ("d", "q", b"12"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(image)
        row = {"id": "x", "image": "x.png", "instruction": instruction}
        seen.add(fingerprint(read_prompts(jsonl(write_lines(tmp_path / folder / "p.jsonl", [row])))))
        (tmp_path / folder / "x.png").unlink()
        seen.add(fingerprint(read_prompts(jsonl(tmp_path / folder / "p.jsonl"))))
    assert len(seen) == 5  # a = b; c; d; and each instruction without its image


def test_fingerprint_of_tfds(builders):
    one = fingerprint(read_prompts(DataConfig(source="tfds", path="m3po_test_builders:one_image")))
    part = fingerprint(read_prompts(DataConfig(source="tfds", path="m3po_test_builders:one_image", limit=4)))
    assert one == fingerprint(read_prompts(DataConfig(source="tfds", path="m3po_test_builders:one_image"))) != part
