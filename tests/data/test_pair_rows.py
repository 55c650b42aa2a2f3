"""Prompts to messages of pairs and back: what a template writes stays the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.data.pair_rows import pair_prompt, prompt_messages
from m3po_jax.data.schema import Image, Prompt, message
from m3po_jax.data.templates import TEMPLATES
from m3po_jax.errors import UserError

TEXTS = st.lists(st.sampled_from(["<image>\n", "<image>", "What", " is", "\n", "it?"]), max_size=4).map("".join)


def rendered(prompt: Prompt, template: str) -> object:
    return TEMPLATES[template].render(
        prompt.instruction,
        len(prompt.images),
        prompt.metadata.get("history", ()),
        system=prompt.metadata.get("system"),
    )


@given(TEXTS, st.lists(st.tuples(TEXTS, TEXTS), max_size=2), st.integers(0, 3), st.sampled_from(["", "Be brief."]))
def test_a_prompt_is_written_the_same_from_its_messages(instruction, history, images, system) -> None:
    metadata = ({"history": [list(turn) for turn in history]} if history else {}) | (
        {"system": system} if system else {}
    )
    prompt = Prompt("p", (Image(path="x.png"),) * images, instruction, metadata=metadata)
    row = {"id": "p", "images": [{"bytes": None, "path": "x.png"}] * images, "prompt": prompt_messages(prompt)}
    for template in TEMPLATES:
        try:
            expected = rendered(prompt, template)
        except UserError:
            return
        assert rendered(pair_prompt(row), template) == expected
    parts = [part["type"] for turn in row["prompt"] if turn["role"] == "user" for part in turn["content"]]
    tags = sum(text.count("<image>") for text in [instruction, *(asked for asked, _ in history)])
    assert parts.count("image") <= images and (tags or parts.count("image") == images)


def test_images_stay_in_their_turn_and_the_system_turn_is_read() -> None:
    turns = message("system", "Be brief.") + message("user", "Hello.") + message("assistant", "Hi.")
    turns += [{"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image", "text": None}]}]
    prompt = pair_prompt({"id": "p", "images": [{"path": "x.png"}], "prompt": turns})
    assert prompt.instruction == "<image>\nAnd this?"
    assert prompt.metadata == {"history": [["Hello.", "Hi."]], "system": "Be brief."}


@pytest.mark.parametrize("roles", [("user", "user"), ("assistant", "user"), ("user", "assistant"), ("system",), ()])
def test_turns_that_no_prompt_has(roles) -> None:
    turns = [part for role in roles for part in message(role, "x")]
    with pytest.raises(UserError, match=r"^pairs:3: the turns of the prompt are"):
        pair_prompt({"id": "p", "prompt": turns}, "pairs:3")
