"""Token ids that travel with prompts: made once, and taken where they are still what they would be now."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from m3po_jax.data import spool, tables
from m3po_jax.data.batches import pair_batches, sft_batches
from m3po_jax.data.pair_rows import pair_prompt, prompt_messages
from m3po_jax.data.preference_files import read_preferences
from m3po_jax.data.schema import CANDIDATE, PAIR, Image, Prompt, PromptTokens, message
from m3po_jax.data.stored_pairs import StoredPairs
from m3po_jax.data.tokenised import TokenisedPrompts
from m3po_jax.errors import UserError
from m3po_jax.models.processor import Processor
from m3po_jax.models.registry import resolve_directory


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    PILImage.new("RGB", (64, 64)).save(path)
    return path


@pytest.fixture
def processor(image: Path) -> Processor:
    folder = resolve_directory("builtin:quickstart-base")
    return Processor.from_pretrained(folder, "plain", "stretch", image_root=image.parent)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of prompts in the order in which they are tokenised."""
    calls: list[str] = []
    render = Processor.render

    def rendered(processor: Processor, prompt: Prompt) -> Any:
        calls.append(prompt.id)
        return render(processor, prompt)

    monkeypatch.setattr(Processor, "render", rendered)
    return calls


def prompt(name: str = "a", instruction: str = "Describe the image.", images: int = 1, **metadata: Any) -> Prompt:
    return Prompt(name, (Image(path="a.png"),) * images, instruction, "A bus.", metadata)


PROMPTS = {
    "plain": prompt(),
    "without an image": prompt(images=0),
    "two images": prompt(images=2),
    "placeholder in front": prompt(instruction="<image>\nDescribe the image."),
    "placeholder inside": prompt(instruction="Describe the image <image> here."),
    "history and system": prompt(history=[["Is there a dog?", "No"]], system="You are brief."),
    "an image in a later turn": prompt(instruction="<image>\nAnd here?", history=[["Is there a dog?", "No"]]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_travel_through_the_files_of_a_run(
    name: str, processor: Processor, tokenised: list[str], tmp_path: Path
) -> None:
    asked = PROMPTS[name]
    ids = processor.encode_prompt(asked)
    assert np.sum(ids == processor.image_token_id) == 16 * len(asked.images)
    kept = processor.tokenise(asked).value()
    row = {"id": "a", "candidate": 0, "text": "A bus.", "token_ids": [5], "prompt_tokens": kept}
    tables.write_table(tmp_path / "candidates.parquet", [row], CANDIDATE)
    (stored,) = tables.read_rows(tmp_path / "candidates.parquet")
    pair = {
        "id": "a",
        "images": [{"bytes": None, "path": "a.png"}] * len(asked.images),
        "prompt": prompt_messages(asked),
        "chosen": message("assistant", "A bus."),
        "rejected": message("assistant", "A dog."),
        "prompt_tokens": stored["prompt_tokens"],
    }
    tables.write_table(tmp_path / "pairs" / "0.parquet", [pair], PAIR)
    pairs = StoredPairs.open([tmp_path / "pairs" / "0.parquet"])
    assert not {"images", "prompt_tokens"} & set(pairs.table.column_names), "they stay on disk"
    tokenised.clear()
    for given in (dataclasses.replace(asked, tokens=PromptTokens.of_row(stored)), pair_prompt(pairs[0])):
        np.testing.assert_array_equal(processor.encode_prompt(given), ids)
    batch = next(iter(pair_batches(pairs, processor, batch_size=1, seed=0)))
    np.testing.assert_array_equal(batch.prefix_ids[0][batch.prefix_mask[0]], ids)
    assert tokenised == []


def test_ids_of_something_else_are_made_anew(processor: Processor, image: Path, tokenised: list[str]) -> None:
    given = dataclasses.replace(prompt(), tokens=processor.tokenise(prompt()))
    folder = resolve_directory("builtin:quickstart-base")
    others = {
        "template": Processor.from_pretrained(folder, "vicuna_v1", "stretch", image_root=image.parent),
        "bos": dataclasses.replace(processor, bos_token_id=None),
        "image token": dataclasses.replace(processor, image_token_id=processor.image_token_id - 1),
    }
    for name, other in others.items():
        tokenised.clear()
        expected = other.encode_prompt(prompt())
        np.testing.assert_array_equal(other.encode_prompt(given), expected, err_msg=name)
        assert len(tokenised) == 2 and not np.array_equal(expected, processor.encode_prompt(given))
    for change in (
        {"instruction": "Is there a dog?"},
        {"metadata": {"system": "Be brief."}},
        {"images": (Image(path="a.png"),) * 2},
    ):
        said = dataclasses.replace(given, **change)
        fresh = dataclasses.replace(said, tokens=None)
        np.testing.assert_array_equal(processor.encode_prompt(said), processor.encode_prompt(fresh))
    tokenised.clear()
    moved = dataclasses.replace(processor, image_root=Path("/elsewhere"), max_image_pixels=1, require_image=True)
    np.testing.assert_array_equal(moved.encode_prompt(given), processor.encode_prompt(given))
    assert tokenised == [], "what changes no id makes none anew"
    short = dataclasses.replace(processor, max_prompt_tokens=10)
    with pytest.raises(UserError, match=r"more than model\.max_prompt_tokens = 10"):
        short.encode_prompt(given)


def test_pairs_of_an_earlier_version_are_tokenised_once(
    processor: Processor, tokenised: list[str], tmp_path: Path
) -> None:
    rows = [
        {"id": str(number), "images": [{"bytes": None, "path": "a.png"}], "prompt": message("user", "Look!", 1)}
        | {side: message("assistant", f"{side} {number}") for side in ("chosen", "rejected")}
        for number in range(3)
    ]
    schema = PAIR.remove(PAIR.get_field_index("prompt_tokens"))
    tables.write_table(tmp_path / "0.parquet", rows, schema)
    source = pair_batches(StoredPairs.open([tmp_path / "0.parquet"]), processor, batch_size=2, seed=0)
    batches = iter(source)
    expected = processor.encode_prompt(prompt(instruction="Look!"))
    tokenised.remove("a")
    for _ in range(6):
        batch = next(batches)
        np.testing.assert_array_equal(batch.prefix_ids[1][batch.prefix_mask[1]], expected)
    assert source.row_key is not None
    for row in range(3):
        source.row_key(row)
    assert sorted(tokenised) == ["0", "1", "2"]


def test_a_file_of_pairs_is_tokenised_once_for_all_arms(
    processor: Processor, tokenised: list[str], tmp_path: Path
) -> None:
    lines = [
        {"id": str(number), "image": "a.png", "prompt": "Look!", "chosen": "A bus.", "rejected": "A dog."}
        for number in range(3)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    pairs = read_preferences(str(tmp_path / "pairs.jsonl"), image_root=str(processor.image_root))
    for seed in range(2):
        batches = iter(pair_batches(pairs, processor, batch_size=2, seed=seed))
        for _ in range(3):
            next(batches)
    assert sorted(tokenised) == ["0", "1", "2"]


def test_rows_with_references_are_tokenised_once(processor: Processor, tokenised: list[str]) -> None:
    batches = iter(sft_batches([prompt(str(number)) for number in range(5)], processor, batch_size=2, seed=0))
    for _ in range(6):
        next(batches)
    assert sorted(tokenised) == [str(number) for number in range(5)]


def test_threads_share_what_one_has_made(processor: Processor, tokenised: list[str]) -> None:
    prompts = [prompt(str(number), f"What is number {number}?") for number in range(20)]
    prompts[3] = dataclasses.replace(prompts[3], tokens=processor.tokenise(prompts[3]))
    tokenised.clear()
    shared = TokenisedPrompts(prompts, processor.tokenise)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: shared[number % 20], range(200)))
    for number, one in enumerate(found):
        expected = processor.tokenise(prompts[number % 20])
        assert one == prompts[number % 20] and one.tokens.made_from == expected.made_from
        np.testing.assert_array_equal(one.tokens.ids, expected.ids)
    assert sorted(tokenised[:19], key=int) == [str(number) for number in range(20) if number != 3]
    assert [one.id for one in shared[-2:]] == ["18", "19"] and len(shared) == 20
    with pytest.raises(IndexError):
        shared[20]


def test_a_full_disk_is_one_line(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(UserError, match="no room for a copy of the prompts' token ids"):
        TokenisedPrompts([prompt()], processor.tokenise)[0]
