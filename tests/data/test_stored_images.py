"""Images of tables stay on disk until one is asked for; files that unpack to too much are refused before."""

import base64
import gc
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from m3po_jax.config import BenchmarkConfig, DataConfig
from m3po_jax.data import parquet_bounds, parquet_source, schema, tables
from m3po_jax.data.images import decode
from m3po_jax.data.json_array import array_items
from m3po_jax.data.sources import fingerprint, read_prompts, source_kind
from m3po_jax.data.stored_pairs import StoredPairs
from m3po_jax.errors import UserError
from m3po_jax.pipeline import rounds
from m3po_jax.pipeline.evaluate import read_benchmark


def noise(seed: int, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def reachable_bytes(root) -> int:
    """Bytes of all `bytes` objects that can be reached from an object without leaving our own types."""
    seen, waiting, total = set(), [root], 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, type(os))) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, (bytes, bytearray)):
            total += len(item)
        waiting += gc.get_referents(item)
    return total


def rows(count: int) -> list[schema.Prompt]:
    images = [(schema.Image(noise(i)), schema.Image(noise(i + 100)))[: 1 + i % 2] for i in range(count)]
    return [schema.Prompt(f"r{i}", images[i], f"q{i}", "no", {"k": i}) for i in range(count)]


def test_rows_of_parquet_hold_no_bytes(tmp_path):
    wanted = rows(70)
    tables.write_table(tmp_path / "a.parquet", map(schema.prompt_to_row, wanted), schema.PROMPT)
    total = sum(len(image.bytes) for row in wanted for image in row.images)
    assert reachable_bytes(wanted) >= total  # the measure works
    source = read_prompts(DataConfig(source="parquet", path=str(tmp_path / "a.parquet")))
    by_id = {row.id: row for row in source}
    bench = BenchmarkConfig(
        metric="short_answer", data=DataConfig(source="parquet", path=str(tmp_path / "a.parquet"))
    )
    benchmark = read_benchmark("b", bench)
    for held in (source, by_id, benchmark):
        assert reachable_bytes(held) < 1000
    assert list(by_id.values()) == wanted and len({row.images for row in source} | {w.images for w in wanted}) == 70
    assert reachable_bytes(by_id) < 1000  # nor after they were read
    copy = pickle.loads(pickle.dumps(by_id["r3"]))
    assert copy == wanted[3] and len(pickle.dumps(by_id["r3"])) < 2000
    assert decode(copy.images[1], root=tmp_path, max_pixels=10**4, where="x").size == (64, 64)
    assert repr(copy.images[1]).startswith("Image(") and len(repr(copy.images[1])) < 200


def test_row_groups_in_memory_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    wanted = rows(40)
    monkeypatch.setattr(tables, "_ROW_GROUP_BYTES", 60_000)
    monkeypatch.setattr(parquet_source, "_KEPT_BYTES", 200_000)
    tables.write_table(tmp_path / "a.parquet", map(schema.prompt_to_row, wanted), schema.PROMPT)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.num_row_groups >= 10
    source = read_prompts(DataConfig(source="parquet", path=str(tmp_path / "a.parquet")))
    for index in np.random.default_rng(0).permutation(40):
        assert source[int(index)] == wanted[index]
        kept = source[0].images[0]._store._groups.values()
        assert sum(group.nbytes for group in kept) <= 200_000 + 80_000


def test_pairs_files_are_written_a_row_group_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROW_GROUP_BYTES", 60_000)
    alive, most = set(), 0

    class Row(dict):
        def __del__(self):
            alive.discard(id(self))

    def made():
        nonlocal most
        for row in rows(30):
            pair = Row(schema.prompt_to_row(row))
            alive.add(id(pair))
            most = max(most, len(alive))
            yield pair
            del pair

    tables.write_table(tmp_path / "a.parquet", made(), schema.PROMPT)
    assert [row["id"] for row in tables.read_rows(tmp_path / "a.parquet")] == [f"r{i}" for i in range(30)]
    assert most <= 8  # of some 10 kB each, in groups of 60 kB
    tables.write_table(tmp_path / "none.parquet", iter(()), schema.PROMPT)
    assert pq.read_schema(tmp_path / "none.parquet") == schema.PROMPT


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_of_text_files_hold_no_bytes_of_images_inside_them(tmp_path, kind):
    """Base64 and data URIs, as VLMEvalKit's tables have them."""
    encoded = [base64.b64encode(noise(i)).decode() for i in range(20)]
    encoded[1] = f"data:image/png;base64,{encoded[1]}"
    lines = [{"id": f"r{i}", "image": text, "question": "q"} for i, text in enumerate(encoded)]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("id,image,question\n" + "".join(f'{row["id"]},"{row["image"]}",q\n' for row in lines))
    else:
        path.write_text("\n".join(map(json.dumps, lines)) if kind == "jsonl" else json.dumps(lines))
    source = read_prompts(DataConfig(path=str(path), exif="ignore"))
    assert reachable_bytes(source) < 1000 and len(pickle.dumps([row.id for row in source])) < 1000
    texts, waiting = 0, [source]
    done = set()
    while waiting:
        item = waiting.pop()
        if id(item) not in done and not isinstance(item, (type, type(os))) and not callable(item):
            done.add(id(item))
            texts += len(item) if isinstance(item, str) else 0
            waiting += gc.get_referents(item)
    assert texts < 20_000, "nor the text that the bytes are made of"
    for i, row in enumerate(source):
        assert row.images == (schema.Image(noise(i), None, "ignore"),)
        assert decode(row.images[0], root=tmp_path, max_pixels=10**4, where="x").size == (64, 64)
    assert fingerprint(source) == fingerprint(read_prompts(DataConfig(path=str(path), exif="ignore")))


def test_pairs_of_a_run_hold_no_bytes(tmp_path, monkeypatch):
    """What training reads, in every order, and the pairs of several rounds mixed."""
    monkeypatch.setattr(tables, "_ROW_GROUP_BYTES", 60_000)
    monkeypatch.setattr(parquet_source, "_KEPT_BYTES", 200_000)
    wanted = [
        {"id": row.id, "images": schema.prompt_to_row(row)["images"], "prompt": schema.message("user", "q", 1)}
        | {"chosen": schema.message("assistant", f"a{k}"), "rejected": schema.message("assistant", "b")}
        for k, row in enumerate(rows(40))
    ]
    for number, part in enumerate((wanted[:25], wanted[25:])):
        tables.write_table(tmp_path / f"{number}.parquet", part, schema.PAIR)
    pairs = StoredPairs.open(tables.shards(tmp_path))
    mixed = rounds._Mixed([pairs, pairs.take(range(30, 40))], [(1, 3), (0, 2), (1, 0)])
    for held in (pairs, mixed):
        assert reachable_bytes(held) < 1000
    for index in np.random.default_rng(0).permutation(40):
        assert {name: pairs[int(index)][name] for name in wanted[0]} == wanted[index]
    kept = pairs._columns["images"]._groups.values()
    assert len(kept) > 1 and sum(group.nbytes for group in kept) <= 200_000 + 80_000
    assert [row["id"] for row in mixed] == mixed.ids() == ["r33", "r2", "r30"]
    assert [row["id"] for row in mixed.without_images()] == mixed.ids() and "images" not in next(
        mixed.without_images()
    )
    assert mixed.take([2])[0]["images"] == wanted[30]["images"]
    again = pickle.loads(pickle.dumps(pairs))
    assert again[7]["images"] == wanted[7]["images"] and len(pickle.dumps(pairs)) < 30_000


def bomb(path: Path, kind: str) -> Path:
    """A file of at most some megabytes that unpacks to more than a gigabyte."""
    count = 300
    ids = pa.array([f"r{i}" for i in range(count)])
    long = "a" * 4_000_000
    if kind == "rows":
        writer = pq.ParquetWriter(path, pa.schema([("id", pa.int64()), ("question", pa.string())]))
        writer.write_table(
            pa.table({"id": pa.nulls(9_000_000, pa.int64()), "question": pa.nulls(9_000_000, pa.string())})
        )
        writer.close()
        return path
    with_dictionary = kind.startswith("dictionary")
    if kind.endswith("text"):
        value = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([long]))
        data = {"id": ids, "question": value}
    else:
        indices = pa.array([0] * count, pa.int32())
        value = pa.DictionaryArray.from_arrays(indices, pa.array([long.encode()]))
        data = {"id": ids, "question": ids, "image": value}
    table = pa.table(data)
    if not with_dictionary:
        table = table.set_column(
            table.num_columns - 1,
            table.column_names[-1],
            table.column(table.num_columns - 1).cast(value.type.value_type),
        )
    pq.write_table(
        table,
        path,
        compression="none" if with_dictionary else "zstd",
        use_dictionary=with_dictionary,
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("compressed text", r"column 'question' unpacks from 0\.\d+ MB to 1,200 MB or more"),
        ("compressed image", r"column 'image' unpacks from 0\.\d+ MB to 1,200 MB or more"),
        ("dictionary text", r"the file unpacks from 4\.\d+ MB to \d+ MB or more"),
        ("dictionary image", r"the file unpacks from 4\.\d+ MB to \d+ MB or more"),
        ("rows", r"the file tells of 9000000 rows in 0\.\d+ MB"),
    ],
)
def test_small_parquet_files_that_unpack_to_a_gigabyte_are_refused(tmp_path, kind, message):
    path = bomb(tmp_path / "a.parquet", kind)
    assert path.stat().st_size < 5_000_000
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    with pytest.raises(UserError, match=rf"a\.parquet: {message}"):
        for row in read_prompts(DataConfig(path=str(path))):
            _ = row.images[0].bytes
    assert pa.total_allocated_bytes() - before < 100_000_000 and pool is not None


def test_a_bound_does_not_stop_ordinary_data(tmp_path, monkeypatch):
    """The same question a thousand times, and images of noise, with the bound at a hundredth."""
    monkeypatch.setattr(parquet_bounds, "SUSPECT_BYTES", 10_000)
    wanted = [schema.Prompt(f"r{i}", (schema.Image(noise(i, 16)),), "Describe the image.") for i in range(1000)]
    tables.write_table(tmp_path / "a.parquet", map(schema.prompt_to_row, wanted), schema.PROMPT)
    assert list(read_prompts(DataConfig(path=str(tmp_path / "a.parquet")))) == wanted


def test_columns_that_cannot_be_kept_are_named(tmp_path):
    table = pa.table(
        {
            "id": ["a", "b"],
            "question": ["q", "q"],
            "mask": [b"1", b"2"],
            "seen": pa.array([0, 1], pa.timestamp("s")),
            "score": [0.5, None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = read_prompts(DataConfig(path=str(tmp_path / "a.parquet")))
    assert source[0].metadata == {"seen": "1970-01-01T00:00:00", "score": 0.5}
    assert source.notes == [f"{tmp_path}/a.parquet: not kept, because they hold bytes: columns mask"]


def test_texts_that_are_not_utf8_are_named(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"q\xff")]
    )
    pq.write_table(pa.table({"id": ["a", "b"], "question": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:row 1: a text is not UTF-8"):
        read_prompts(DataConfig(path=str(tmp_path / "a.parquet")))
    source = read_prompts(DataConfig(path=str(tmp_path / "a.parquet"), on_bad_row="skip"))
    assert [row.id for row in source] == ["a"] and "1 x a text is not UTF-8" in source.notes[0]


def test_an_image_replaced_by_one_of_the_same_size_is_noticed(tmp_path):
    image = tmp_path / "x.png"
    line = json.dumps({"id": "x", "image": "x.png", "question": "q"})
    (tmp_path / "p.jsonl").write_text(line)
    pq.write_table(pa.table({"id": ["x"], "question": ["q"], "image": ["x.png"]}), tmp_path / "p.parquet")
    tables.write_table(
        tmp_path / "s.parquet",
        [{"id": "x", "instruction": "q", "images": [{"bytes": None, "path": "x.png"}]}],
        schema.PROMPT,
    )
    for name in ("p.jsonl", "p.parquet", "s.parquet"):
        config = DataConfig(path=str(tmp_path / name))
        data = noise(1)
        image.write_bytes(data)
        stamp = image.stat()
        before = fingerprint(read_prompts(config))
        assert before == fingerprint(read_prompts(config))
        image.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
        os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert fingerprint(read_prompts(config)) != before, name
        image.write_bytes(data)
        assert fingerprint(read_prompts(config)) == before
        assert fingerprint(read_prompts(DataConfig(path=str(tmp_path / name), exif="ignore"))) != before


def test_the_path_shows_the_kind_where_source_is_the_default(tmp_path):
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds" / "dataset_info.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.parquet").write_bytes(b"")
    (tmp_path / "images").mkdir()
    kinds = {
        "tfds": "tfds",
        "shards": "parquet",
        "images": "images",
        "a.CSV": "csv",
        "a.tsv": "csv",
        "a.json": "jsonl",
    }
    assert {name: source_kind(DataConfig(path=str(tmp_path / name))) for name in kinds} == kinds
    assert source_kind(DataConfig(source="array_record", path=str(tmp_path / "shards"))) == "array_record"


VALUES = [{"a": [1, {"b": "]},["}]}, 12.5, 'text " with \\ and ä', None, True, [], -3e5, {"long": "x" * 300}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_items_are_those_of_json(chunk, indent, monkeypatch):
    monkeypatch.setattr("m3po_jax.data.json_array._CHUNK", chunk)
    for values in (VALUES, VALUES[:1], []):
        for ascii_only in (True, False):
            text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
            assert list(array_items(io.StringIO(f" {text}\n "), "f")) == values


@pytest.mark.parametrize(
    "text", ["[1 2]", "[1,]", "[,1]", "[1", "[", "[1]]", '["a', '[{"a" 1}]', "[tru]", "[1]x", "[" * 90_000]
)
def test_malformed_arrays_are_refused_where_json_refuses_them(text):
    with pytest.raises((ValueError, RecursionError)):
        json.loads(text)
    with pytest.raises(UserError, match=r"f: malformed JSON: .* at character \d+"):
        list(array_items(io.StringIO(text), "f"))
