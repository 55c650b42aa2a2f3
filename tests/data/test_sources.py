"""Prompts from JSON lines, parquet and TFDS."""

import io
import json
import pickle
import sys
import textwrap

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
        ({"instruction": "q"}, "no id"),
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
        ('{"id": "x", "instruction": "q", "metadata": {"a": NaN}}', "cannot be written as JSON"),
        ({"id": "x", "instruction": "q", "history": [["q"]]}, "history is not a list"),
        ({"id": "x", "instruction": "q", "history": "abc"}, "history is not a list"),
        ({"id": "x", "conversations": []}, "the conversation is empty"),
        ({"id": "x", "conversations": "q"}, "the conversation is empty"),
        ({"id": "x", "conversations": [{"from": "gpt", "value": "q"}]}, "turn 1 of the conversation"),
        ({"id": "x", "conversations": [{"from": "human"}]}, "turn 1 of the conversation"),
        ({"id": "x", "conversations": [{"from": "human", "value": "q"}] * 2}, "turn 2 of the conversation"),
        ({"id": "r0", "instruction": "q"}, r"\(id 'r0'\): the id occurs before, at .*p\.jsonl:1"),
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
    got = prompt_from_row(llava | {"conversations": [human, gpt]}, "f:1")
    assert (got.instruction, got.reference, got.metadata) == ("What?", "A bus.", {})
    many = {"from": "human", "value": "<image> or <image>?"}
    got = prompt_from_row({"id": "l", "images": ["a", "b"], "conversations": [many]}, "f:1")
    assert got.instruction == "<image> or <image>?"
    pope = prompt_from_row({"question_id": 7, "image": "a.jpg", "text": "Is it?", "label": "no"}, "f:1")
    assert (pope.id, pope.instruction, pope.reference, pope.metadata) == (
        "7",
        "Is it?",
        None,
        {"label": "no"},
    )
    answer = prompt_from_row({"id": "a", "question": "q", "text": "t"}, "f:1")
    assert (answer.instruction, answer.reference) == ("q", "t")
    zero = prompt_from_row(
        {"id": 0, "instruction": "q", "metadata": {"a": 1}, "a": 2, "b": [None], "nan": float("nan")}, "f:1"
    )
    assert (zero.id, zero.metadata) == ("0", {"a": 1, "b": [None]})


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
    with pytest.raises(UserError, match=r"2\.parquet:row 0 \(id 'p0'\): the id occurs before, at .*0\.parquet:row 0"):
        read_prompts(DataConfig(source="parquet", path=str(tmp_path)))


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
