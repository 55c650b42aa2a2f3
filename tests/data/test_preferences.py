"""Preference pairs of every published shape: the prompt, the answers and the images that each of them means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3po_jax.data.pair_rows import message_text, pair_prompt
from m3po_jax.data.preference_files import FilePairs, read_preferences
from m3po_jax.data.templates import get_template, to_text
from m3po_jax.errors import UserError

IMAGE = {"type": "image", "text": None}
# As llava-hf/llava-1.5-7b-hf publishes it, without its marks of what is generated.
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def said(words: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": words}


def write(folder: Path, *rows: Any, name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def seen(pairs: FilePairs, number: int = 0) -> tuple[str, list[str | None], str, str]:
    """(prompt as template `hf` writes it, image paths, chosen, rejected) of a row."""
    row = pairs[number]
    prompt = pair_prompt(row)
    history, system = prompt.metadata.get("history", ()), prompt.metadata.get("system")
    pieces = get_template("hf").render(prompt.instruction, len(prompt.images), history, system=system)
    answers = [message_text(row[side]) for side in ("chosen", "rejected")]
    return to_text(pieces), [image.path for image in prompt.images], *answers


PLAIN = ("USER: <image>\nWhat is it? ASSISTANT:", ["a.png"], "A cat.", "A dog.")
TALK = "Be brief. USER: <image>\nHello. ASSISTANT: Hi. USER: What is it? ASSISTANT:"
ASKED = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
TURNS = [said("Hello.", "user"), said("Hi."), said("What is it?", "user")]
SHAREGPT = [{"from": "human", "value": "<image>\nHello."}, {"from": "gpt", "value": "Hi."}]
SHAREGPT.append({"from": "human", "value": "What is it?"})


def completion(words: str, *ratings: Any) -> dict[str, Any]:
    aspects = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
    annotations = {name: {"Rating": r, "Rationale": "-"} for name, r in zip(aspects, ratings, strict=True)}
    return {"model": "m", "response": words, "annotations": annotations}


COMPLETIONS = [
    completion("Nothing.", "1", "5", "2"),
    completion("A dog.", "1", "5", "1"),
    completion("A cat.", "5", "5", "4"),
    completion("Best, but one aspect is not rated.", "5", "5", "N/A"),
]
SHAPES = [
    ("TRL", {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"}, PLAIN),
    (
        "RLAIF-V",
        {
            "ds_name": "d",
            "image": {"path": "a.png"},
            **ASKED,
            "origin_dataset": "o",
            "idx": "7",
            "image_path": "z.png",
        },
        PLAIN,
    ),
    ("RLHF-V", {"ds_name": "d", "image": "a.png", "text": json.dumps(ASKED), "idx": 7}, PLAIN),
    ("RLHF-V", {"text": ASKED, "image_path": "a.png", "idx": 7}, PLAIN),
    ("VLFeedback", {"id": "v", "prompt": "What is it?", "img_path": "a.png", "completions": COMPLETIONS}, PLAIN),
    (
        "LLaVA-RLHF",
        {
            "id": "r",
            "image": "a.png",
            "conversations": [{"from": "human", "value": "Hello.\n<image>"}, *SHAREGPT[1:]],
            "output_1": {"from": "llava", "value": "A dog."},
            "output_2": {"from": "llava", "value": "A cat."},
            "preference": 2,
        },
        (TALK.removeprefix("Be brief. "), *PLAIN[1:]),
    ),
    (
        "ms-swift",
        {
            "messages": [said("Be brief.", "system"), *TURNS, said("A cat.")],
            "rejected_response": "A dog.",
            "images": ["a.png"],
        },
        (TALK, *PLAIN[1:]),
    ),
    (
        "ms-swift",
        {
            "messages": [said("<image>What is it?", "user"), said("A cat.")],
            "rejected_messages": [said("<image>What is it?", "user"), said("A dog.")],
            "images": ["a.png"],
            "rejected_images": ["a.png"],
        },
        ("USER: <image>What is it? ASSISTANT:", *PLAIN[1:]),
    ),
    (
        "ms-swift",
        {
            "system": "Be brief.",
            "history": [["Hello.", "Hi."]],
            "query": "What is it?",
            "response": "A cat.",
            "rejected_response": "A dog.",
            "images": ["a.png"],
        },
        (TALK, *PLAIN[1:]),
    ),
    (
        "LLaMA-Factory, sharegpt",
        {
            "conversations": SHAREGPT,
            "system": "Be brief.",
            "chosen": {"from": "gpt", "value": "A cat."},
            "rejected": {"from": "gpt", "value": "A dog."},
            "images": ["a.png"],
        },
        (TALK, *PLAIN[1:]),
    ),
    (
        "LLaMA-Factory, sharegpt",
        {"messages": TURNS, "chosen": said("A cat."), "rejected": said("A dog."), "images": ["a.png"], "tools": "[]"},
        (TALK.removeprefix("Be brief. "), *PLAIN[1:]),
    ),
    (
        "LLaMA-Factory, alpaca",
        {"instruction": "What", "input": "is it?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
        ("USER: <image>\nWhat\nis it? ASSISTANT:", *PLAIN[1:]),
    ),
]


@pytest.mark.parametrize(("shape", "row", "expected"), SHAPES, ids=[f"{i}-{s[0]}" for i, s in enumerate(SHAPES)])
def test_published_shapes(tmp_path: Path, shape: str, row: dict[str, Any], expected: Any) -> None:
    """From JSON lines, a JSON array and parquet alike."""
    lines = read_preferences(write(tmp_path, row, row))
    assert seen(lines, 1) == expected and lines.shapes == {shape: 2}
    assert lines.ids() == [str(row.get("id", row.get("idx", f"pair-{i}"))) for i in range(2)]
    assert lines[1]["where"] == f"{lines.path}:2" and f"2 of the shape {shape}" in lines.summary_line()
    (tmp_path / "array.json").write_text(json.dumps([row, row], indent=1), encoding="utf-8")
    array = read_preferences(str(tmp_path / "array.json"))
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "table.parquet")
    table = read_preferences(str(tmp_path / "table.parquet"))
    assert seen(array) == seen(table) == expected
    assert array[1]["where"].endswith("array.json[1]") and table[1]["where"].endswith("table.parquet:row 1")


CONVERSATIONS = [
    {"prompt": [user(IMAGE, text("What?"))], "chosen": [said("A cat.")], "rejected": [said("A dog.")]},
    {"prompt": [said("What?", "user")], "chosen": [said("A cat.")], "rejected": [said("A dog.")]},
    {"prompt": [user(text("What?"), IMAGE)], "chosen": [said("A cat.")], "rejected": [said("A dog.")]},
    {
        "prompt": [said("Be brief.", "system"), said("Hello.", "user"), said("Hi."), said("What?", "user")],
        "chosen": [said("A cat.")],
        "rejected": [said("A dog.")],
    },
    {
        "prompt": [user(text("Hello.")), said("Hi."), user(IMAGE, text("What?"))],
        "chosen": [said("A cat.")],
        "rejected": [said("A dog.")],
    },
    {
        "chosen": [said("Hello.", "user"), said("Hi."), said("What?", "user"), said("A cat.")],
        "rejected": [said("Hello.", "user"), said("Hi."), said("What?", "user"), said("A dog.")],
    },
    {
        "prompt": "What?",
        "chosen": [said("What?", "user"), said("A cat.")],
        "rejected": [said("What?", "user"), said("A dog.")],
    },
]


@pytest.mark.parametrize("row", CONVERSATIONS)
@pytest.mark.parametrize("column", ["images", "image"])
def test_conversations_are_those_of_trl(tmp_path: Path, row: dict[str, Any], column: str) -> None:
    """TRL's own functions on the same row, with llava-hf's chat template."""
    data_utils = pytest.importorskip("trl.data_utils")
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).resolve().parents[2] / "m3po_jax/quickstart/checkpoints/quickstart-base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = LLAVA_HF
    theirs = dict(data_utils.maybe_extract_prompt(row))
    theirs["prompt"] = data_utils.prepare_multimodal_messages(theirs["prompt"], images=["a.png"])
    for side in ("chosen", "rejected"):
        theirs[side] = data_utils.prepare_multimodal_messages(theirs[side])
    written = data_utils.apply_chat_template(theirs, tokenizer)
    file = write(tmp_path, {**row, column: ["a.png"] if column == "images" else "a.png"})
    prompt, images, chosen, rejected = seen(read_preferences(file))
    assert prompt == written["prompt"].rstrip(" ") and images == ["a.png"]
    assert (chosen, rejected) == (written["chosen"].strip(), written["rejected"].strip())


def test_plain_strings_share_their_prompt_as_in_trl(tmp_path: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    theirs = data_utils.extract_prompt(row)
    prompt, _, *answers = seen(read_preferences(write(tmp_path, row)))
    assert prompt == f"USER: {theirs['prompt']} ASSISTANT:" and answers == [theirs["chosen"], theirs["rejected"]]


def test_images_of_every_kind(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image = pytest.importorskip("PIL.Image")
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    base = {"prompt": ["What?"], "chosen": ["A cat."], "rejected": ["A dog."]}
    lone = datasets.Features(
        {name: datasets.Value("string") for name in base} | {"image": datasets.Image(decode=False)}
    )
    several = datasets.Features(
        {name: datasets.Value("string") for name in base}
        | {"images": datasets.Sequence(datasets.Image(decode=False))}
    )
    one = {"bytes": encoded, "path": None}
    datasets.Dataset.from_dict(base | {"image": [one]}, features=lone).to_parquet(tmp_path / "lone.parquet")
    datasets.Dataset.from_dict(base | {"images": [[one, one]]}, features=several).to_parquet(tmp_path / "two.parquet")
    pq.write_table(
        pa.Table.from_pylist([{**{k: v[0] for k, v in base.items()}, "image": encoded}]), tmp_path / "b.parquet"
    )
    for name, count in (("lone", 1), ("two", 2), ("b", 1)):
        row = read_preferences(str(tmp_path / f"{name}.parquet"))[0]
        assert row["images"] == [{"bytes": encoded, "path": None}] * count
        assert len(pair_prompt(row).images) == count


def test_paths_that_climb_stay_under_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "image": "../img/a.png"}
    path = write(tmp_path / "sets", row)
    assert seen(read_preferences(path))[1] == ["../img/a.png"]  # outside: refused when it is read
    pairs = read_preferences(path, image_root=str(tmp_path))
    assert seen(pairs)[1] == ["img/a.png"] and pairs.image_root == tmp_path
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(b"x")
    assert pairs.fingerprint
    with pytest.raises(UserError, match="leads outside"):
        _ = read_preferences(path).fingerprint


def test_what_vlfeedback_does_not_decide_is_left_out_and_told(tmp_path: Path) -> None:
    """Ties, one rated completion; and lists of objects as `datasets` stores them: as an object of lists."""
    row = {"id": "v", "prompt": "What is it?", "image": "a.png", "completions": COMPLETIONS}
    tied = row | {"completions": [completion("A cat.", 1, 2, 3), completion("A dog.", "3", "2", "1")]}
    lists = {key: [one[key] for one in COMPLETIONS] for key in COMPLETIONS[0]}
    pairs = read_preferences(
        write(tmp_path, row, tied, row | {"completions": COMPLETIONS[:1]}, row | {"completions": lists})
    )
    assert len(pairs) == 2 and seen(pairs, 0) == seen(pairs, 1) == PLAIN
    assert pairs.undecided == 2 and "2 rows without a preference left out" in pairs.summary_line()


def test_recorded_tokens_stay_and_subsets_keep_their_images(tmp_path: Path) -> None:
    row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}
    recorded = {"chosen_token_ids": [5, 2], "reference_chosen_logprobs": [-1, -0.5]}
    pairs = read_preferences(write(tmp_path, row | {"image": "a.png"}, row | {"image": "b.png"} | recorded))
    subset = pairs.take([1])
    assert subset[0] == pairs[1] and subset[0]["images"] == [{"bytes": None, "path": "b.png"}]
    assert subset[0]["chosen_token_ids"] == [5, 2] and subset[0]["reference_chosen_logprobs"] == [-1, -0.5]
    assert subset[0]["rejected_token_ids"] is None and pairs[0]["chosen_token_ids"] is None


def test_the_fingerprint_is_that_of_texts_and_images(tmp_path: Path) -> None:
    def fingerprint(folder: str, image: bytes = b"one", **changes: Any) -> str:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(image)
        row = {"prompt": "What?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"} | changes
        return read_preferences(write(tmp_path / folder, row)).fingerprint

    assert fingerprint("a") == fingerprint("b")
    different = {fingerprint("c", b"two"), fingerprint("d", rejected="A cow."), fingerprint("e", system="Be brief.")}
    assert len(different - {fingerprint("f")}) == 3


def test_a_folder_gives_its_training_split(tmp_path: Path) -> None:
    for name, words in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("test-00000-of-00001", "c")):
        row = {"prompt": words, "chosen": "A cat.", "rejected": "A dog."}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    pairs = read_preferences(str(tmp_path))
    assert [pair_prompt(row).instruction for row in pairs] == ["a", "b"] and pairs.ids() == ["pair-0", "pair-1"]
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / f"{name.replace('train', 'dev')}.parquet")
    with pytest.raises(UserError, match="several splits"):
        read_preferences(str(tmp_path))


GOOD = {
    "prompt": [user(IMAGE, text("What?"))],
    "chosen": [said("A cat.")],
    "rejected": [said("A dog.")],
    "image": "a",
}
REPEATED = [user(IMAGE, text("What?")), said("A dog.")]
FAULTS = [
    ({"image": None}, "1 image parts for 0 images"),
    ({"image": None, "images": []}, "1 image parts for 0 images"),
    ({"images": ["a", "b"]}, "1 image parts for 2 images"),
    ({"prompt": [user(text("What?"))]}, "0 image parts for 1 images"),
    ({"prompt": "<image> and <image>?"}, "2 <image> tags for 1 images"),
    ({"prompt": [user(IMAGE, text("<image>\nWhat?"))]}, "1 image parts and 1 <image> tags for 1 images"),
    ({"prompt": [user({**IMAGE, "image": "b"}, text("What?"))]}, "holds an image itself"),
    ({"prompt": [user({"type": "image_url"}, text("What?"))]}, "a part of type 'image_url'"),
    ({"prompt": [user(IMAGE, {"type": "text", "text": None})]}, "a text part without text"),
    ({"prompt": [user(IMAGE)]}, "the instruction is empty"),
    ({"prompt": [*GOOD["prompt"], said("It is")]}, "ends with the assistant's turn"),
    ({"prompt": [*GOOD["prompt"], *GOOD["prompt"]]}, "the turns of the prompt are user, user"),
    ({"prompt": [*GOOD["prompt"], said("x", "system")]}, "a system turn that is not the first"),
    ({"prompt": [said("x", "tool"), *GOOD["prompt"]]}, "message 1 of `prompt` has the role 'tool'"),
    ({"prompt": [said("x", "system"), *GOOD["prompt"]], "system": "y"}, "two system turns"),
    ({"prompt": []}, "`prompt` is not a list of messages"),
    ({"chosen": [said(None)]}, "message 1 of `chosen` has no content"),
    ({"chosen": None}, "the row is no preference pair"),
    ({"chosen": [said(" ")]}, "`chosen` is empty"),
    ({"rejected": ""}, "`rejected` is empty"),
    ({"chosen": "A cat.", "rejected": " A cat. "}, "`chosen` and `rejected` are the same"),
    ({"chosen": [said("A cat.", "user")]}, "`chosen` repeats another conversation"),
    ({"rejected": [user(IMAGE, text("Where?")), said("A dog.")]}, "`rejected` repeats another conversation"),
    ({"rejected": [*REPEATED, said("Sure?", "user"), said("Yes.")]}, "`rejected` is not one answer"),
    ({"rejected": REPEATED[:1]}, "no message after the prompt"),
    ({"rejected": [user(IMAGE, text("x")), *REPEATED]}, "`rejected` repeats another"),
    ({"prompt": None, "rejected": REPEATED}, "the answers alone"),
    (
        {"prompt": None, "chosen": [user(IMAGE, text("Which?")), said("A cat.")], "rejected": REPEATED},
        "differ before their last turn",
    ),
    ({"prompt": "Which?", "chosen": [REPEATED[0], said("A cat.")], "rejected": REPEATED}, "none of the turns"),
    ({"prompt": None, "chosen": "It is a cat.", "rejected": "It is a dog."}, "images and no prompt"),
    ({"prompt": None, "image": None, "chosen": "A cat.", "rejected": "It is."}, "share no text"),
    ({"question": "What?"}, "the row fits TRL and RLAIF-V"),
    ({"videos": ["v.mp4"]}, "`videos`, which is not read"),
    ({"image": {"bytes": None, "path": None}}, "neither a path nor encoded bytes"),
    ({"prompt": "half \ud83d"}, "a lone surrogate"),
    ({"chosen_token_ids": "12"}, "`chosen_token_ids` is not a list of numbers"),
    ({"prompt": None, "image": None, "question": "What?"}, "the row has no image"),
    ({"prompt": None, "chosen": None, "rejected": None, "text": '{"question": 1}'}, "`text` has no 'question'"),
    ({"prompt": None, "chosen": None, "rejected": None, "text": '{"question'}, "`text` is not a JSON object"),
    (
        {"prompt": None, "chosen": None, "rejected": None, "messages": TURNS, "rejected_response": "x"},
        "does not end with",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_faults_are_named_with_file_and_row(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, GOOD, {"id": "cat-3"} | GOOD | changes)
    with pytest.raises(UserError) as raised:
        read_preferences(path)
    assert str(raised.value).startswith(f"{path}:2 (id 'cat-3'): ") and message in str(raised.value)
    problems: list[UserError] = []
    assert len(read_preferences(path, problems=problems)) == 1 and [str(p) for p in problems] == [str(raised.value)]


def test_a_row_of_no_shape_hears_of_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        read_preferences(write(tmp_path, {"instruction": "What?", "output": "x"}))
    for name in ("instruction, output", "TRL", "RLAIF-V", "RLHF-V", "VLFeedback", "ms-swift", "LLaMA-Factory"):
        assert name in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "no pair"),
        ("bad.jsonl", b"{", ":1: malformed JSON"),
        ("bad.json", b"[{", "malformed JSON"),
        ("number.json", b"[1]", "not a JSON object"),
        ("deep.json", b"[" * 100_000, "malformed JSON"),
        ("latin.jsonl", b'{"prompt": "\xe9"}', "not UTF-8"),
        ("bad.parquet", b"PAR1 and no more", "cannot read the parquet file"),
        ("text.parquet", b"no parquet", "cannot read the parquet file"),
        ("folder", None, "no such file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_preferences(str(tmp_path / name))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no parquet file in the folder"):
        read_preferences(str(tmp_path))
