"""Atomic files, shard names and content hashes."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.data import schema, tables
from m3po_jax.errors import UserError

ROWS = [{"id": str(i), "candidate": i, "text": "t", "token_logprobs": [-0.5, -1.0]} for i in range(150)]


def test_round_trip_in_order_of_shard_names(tmp_path):
    for index in (2, 0, 1):
        name = tables.shard_name(index, tables.content_hash(index))
        tables.write_table(tmp_path / "deep" / name, ROWS[index * 50 : index * 50 + 50], schema.CANDIDATE)
    got = list(tables.read_rows(tmp_path / "deep"))
    assert [row["id"] for row in got] == [row["id"] for row in ROWS]
    assert got[3] == dict.fromkeys(schema.CANDIDATE.names) | ROWS[3]
    assert list(tables.read_rows(tmp_path / "deep", ["id"]))[7] == {"id": "7"}
    assert list(tables.read_rows(tmp_path / "none")) == []
    assert pq.read_schema(tables.shards(tmp_path / "deep")[0]).equals(schema.CANDIDATE)


def test_columns_and_tables_are_taken_too(tmp_path):
    small = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int32())])
    tables.write_table(tmp_path / "a.parquet", {"id": ["x", "y"], "n": [1, 2]}, small)
    tables.write_table(tmp_path / "b.parquet", pa.table({"id": ["x", "y"], "n": [1, 2]}), small)
    tables.write_table(tmp_path / "c.parquet", [], small)
    rows = [{"id": "x", "n": 1}, {"id": "y", "n": 2}]
    assert list(tables.read_rows(tmp_path / "a.parquet")) == list(tables.read_rows(tmp_path / "b.parquet")) == rows
    assert list(tables.read_rows(tmp_path)) == rows * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "x", "candidate": 1, "text": "t", "extra": 1}], "extra"),
        ([{"id": None, "candidate": 1, "text": "t"}], "'id' must not be null"),
        ([{"id": "x", "text": "t"}], "'candidate' must not be null"),
        ([{"id": "x", "candidate": "one", "text": "t"}], "'candidate' is not int32"),
        ({"id": ["x"], "unknown": [1]}, "unknown"),
    ],
)
def test_rows_that_do_not_fit_leave_nothing_behind(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        tables.write_table(tmp_path / "a.parquet", rows, schema.CANDIDATE)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.jsonl"
    tables.write_json_lines(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tables.write_json_lines(path, rows())
    assert [row for _, row in tables.read_json_lines(path)] == [{"a": 1}]
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_visible_before_the_end_and_readers_skip_temporaries(tmp_path):
    path = tmp_path / "00000-a.parquet"
    with tables.atomic_write(path) as file:
        file.write(b"half a file")
        assert tables.shards(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
        (left_over,) = (path.read_bytes() for path in tmp_path.iterdir())
        assert left_over == b""  # still in the buffer, under another name
    assert tables.shards(tmp_path) == [path]
    path.unlink()
    (tmp_path / ".00000-a.parquet.x.tmp").write_bytes(b"killed")
    (tmp_path / ".00001-b.parquet").write_bytes(b"hidden")
    (tmp_path / "00002-c.parquet").mkdir()
    assert list(tables.read_rows(tmp_path)) == []


def test_files_are_readable_by_others(tmp_path):
    old = os.umask(0o022)
    try:
        tables.write_json_lines(tmp_path / "a.jsonl", [{}])
    finally:
        os.umask(old)
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o777 == 0o644


def test_damaged_shards_are_named(tmp_path):
    tables.write_table(tmp_path / "a.parquet", ROWS, schema.CANDIDATE)
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UserError, match="no column 'mas'"):
        list(tables.read_rows(tmp_path, ["mas"]))
    (tmp_path / "a.parquet").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"a\.parquet: cannot read"):
        list(tables.read_rows(tmp_path))
    (tmp_path / "a.parquet").write_bytes(whole[:4] + b"\0" * 60 + whole[64:])
    with pytest.raises(UserError, match=r"a\.parquet: damaged shard"):
        list(tables.read_rows(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        tables.open_parquet(tmp_path / "none.parquet")


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "Käse\n\u2028", "n": 1.5}, {"text": "猫"}]
    tables.write_json_lines(path, rows)
    assert [row for _, row in tables.read_json_lines(path)] == rows
    assert next(tables.read_json_lines(path))[0] == f"{path}:1"
    with pytest.raises(ValueError, match="JSON compliant"):
        tables.write_json_lines(path, [{"n": float("nan")}])
    for line, message in (
        (b"{", "malformed"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "UTF-8"),
        (b"[" * 10**5, ""),
    ):
        path.write_bytes(b'{"a": 1}\n\n' + line)
        with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{message}"):
            list(tables.read_json_lines(path))
    with pytest.raises(UserError, match="no such file"):
        list(tables.read_json_lines(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="directory"):
        list(tables.read_json_lines(tmp_path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_hash_ignores_the_order_of_keys(value):
    def turned(item):
        if isinstance(item, dict):
            return {key: turned(item[key]) for key in reversed(item)}
        return [turned(each) for each in item] if isinstance(item, list) else item

    assert tables.content_hash(value) == tables.content_hash(turned(value))
    assert tables.content_hash(value) == tables.content_hash(json.loads(json.dumps(value)))


@given(
    st.lists(st.binary(max_size=3) | st.text(max_size=3)),
    st.lists(st.binary(max_size=3) | st.text(max_size=3)),
)
def test_hash_tells_parts_apart(left, right):
    assert (tables.content_hash(*left) == tables.content_hash(*right)) == (left == right)


def test_hash_is_the_same_in_another_process(tmp_path):
    code = "from m3po_jax.data.tables import content_hash; print(content_hash({'b': 1, 'a': [2.5, 'ä']}, b'x'))"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == tables.content_hash({"a": [2.5, "ä"], "b": 1}, b"x")
    with pytest.raises(TypeError):
        tables.content_hash({1, 2})


def test_file_hash_and_shard_name(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert tables.file_hash(tmp_path / "a").startswith("ba7816bf8f01cfea")
    names = [tables.shard_name(index, "f" * 64) for index in (0, 9, 10, 99999)]
    assert names == sorted(names) and names[0] == "00000-ffffffffffffffff.parquet"
    assert tables.shard_name(0, "e" * 64) != names[0]
