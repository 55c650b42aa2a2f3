"""Templates against the strings of LLaVA-1.5 (original and llava-hf)."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.data.templates import TEMPLATES, Marker, get_template, to_text
from m3po_jax.errors import UserError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def shared(name: str) -> Path:
    folder = os.environ.get("M3PO_SHARED") or Path(__file__).resolve().parents[2] / ".." / "shared"
    path = Path(folder) / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


def goldens() -> dict:
    return json.loads(shared("llava15/token_goldens.json").read_text())


def turns_of(messages: list[dict]) -> tuple[str, int, list[tuple[str, str]]]:
    """(instruction, images, history) of chat messages behind their system message."""
    texts = ["".join(part.get("text", "") for part in message["content"]) for message in messages]
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return texts[-1], images, list(zip(texts[:-1:2], texts[1::2], strict=True))


def test_llava_strings():
    vicuna = get_template("vicuna_v1")
    assert to_text(vicuna.render("What?", 1)) == SYSTEM + "USER: <image>\nWhat? ASSISTANT:"
    assert to_text(vicuna.render("And?", 1, [("What?", "A bus.")])) == (
        SYSTEM + "USER: <image>\nWhat? ASSISTANT: A bus.</s>USER: And? ASSISTANT:"
    )
    plain = get_template("plain")
    assert to_text(plain.render("What?", 1)) == "USER: <image>\nWhat? ASSISTANT:"


def test_golden_prompts_of_the_original():
    template = get_template("vicuna_v1")
    cases = {case["id"]: case["text"] for case in goldens()["computed_prompts"]}
    for name in ("pope_short_answer", "describe_detail", "describe_short", "multiple_choice", "unicode"):
        instruction = cases[name].split("<image>\n")[1].removesuffix(" ASSISTANT:")
        assert to_text(template.render(instruction, 1)) == cases[name]
        assert to_text(template.render("<image>\n" + instruction, 1)) == cases[name]
    assert to_text(template.render("Hello!", 0)) == cases["text_only"]
    assert to_text(template.render("What differs?", 2)) == cases["two_images"]
    assert to_text(template.render("What is shown here? <image>", 1)) == cases["image_last"]
    turn = [("What is this?", "A red bus.")]
    assert to_text(template.render("What colour is it?", 1, turn)) == cases["multi_turn"]
    assert to_text(get_template("hf").render("What are these?", 1)) == cases["hf_template_style"]


def test_golden_chat_template_of_llava_hf():
    seen = 0
    for case in goldens()["computed_chat_template"]["cases"]:
        messages = case["messages"]
        if not case["add_generation_prompt"]:
            continue
        system = None
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"][0]["text"], messages[1:]
            # It is the original's own, which our template of the original writes.
            assert to_text(get_template("vicuna_v1").render(*turns_of(messages))) == case["rendered"]
        assert to_text(get_template("hf").render(*turns_of(messages), system=system)) == case["rendered"]
        seen += 1
    assert seen == 6


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_conversation_s_own_system_turn_replaces_the_template_s(name):
    template = get_template(name)
    own = template.render("What?", 1, [("Hi", "Yes")], system="An <image> of you:")
    usual = template.render("What?", 1, [("Hi", "Yes")])
    assert to_text(own) == "An <image> of you: " + to_text(usual).removeprefix(template.system)
    assert own.count(Marker.IMAGE) == 1
    assert template.render("What?", 1, [("Hi", "Yes")], system="") == usual


@pytest.mark.parametrize("instruction", ["", "  \n", "<image>", " <image>\n"])
def test_an_empty_instruction_is_refused(instruction):
    with pytest.raises(UserError, match=r"^a\.jsonl:1: the instruction is empty"):
        get_template("plain").render(instruction, 1, where="a.jsonl:1")


@pytest.mark.parametrize(("instruction", "images"), [("<image> x", 0), ("<image><image> x", 1), ("<image> x", 2)])
def test_placeholders_must_match_the_images(instruction, images):
    with pytest.raises(UserError, match="placeholders for"):
        get_template("plain").render(instruction, images)


def test_placeholders_in_the_history_count_and_answers_do_not():
    render = get_template("plain").render
    pieces = render("And <image>?", 2, [("See <image>.", "An <image> tag.</s>")])
    assert pieces.count(Marker.IMAGE) == 2 and pieces.count(Marker.EOS) == 1
    assert " ASSISTANT: An <image> tag.</s>" in pieces[2]
    with pytest.raises(UserError, match="1 <image> placeholders for 2 images"):
        render("And?", 2, [("See <image>.", "Yes.")])


def test_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'vicuna_v1'"):
        get_template("vicuna")


@given(
    st.text(),
    st.integers(0, 3),
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.tuples(st.text(), st.text())),
)
def test_pieces_are_joined_and_images_counted(instruction, images, name, history):
    try:
        pieces = TEMPLATES[name].render(instruction, images, history)
    except UserError:
        assert not instruction.replace("<image>", "").strip() or "<image>" in instruction + str(history)
        return
    assert pieces.count(Marker.IMAGE) == images
    assert all(piece != "" for piece in pieces)
    texts = [isinstance(piece, str) for piece in pieces]
    assert not any(a and b for a, b in pairwise(texts))
    assert to_text(pieces).endswith(" ASSISTANT:")


def test_pieces_lie_where_the_golden_ids_have_their_markers():
    """Ids of the original between BOS, -200 and </s>: one run per text piece, markers in the same places."""
    template = get_template("vicuna_v1")
    rows = {
        "describe_short": ("Describe this image.", 1, []),
        "two_images": ("What differs?", 2, []),
        "image_last": ("What is shown here? <image>", 1, []),
        "text_only": ("Hello!", 0, []),
        "multi_turn": ("What colour is it?", 1, [("What is this?", "A red bus.")]),
    }
    cases = {case["id"]: case["split_rule_ids"] for case in goldens()["computed_prompts"]}
    for name, row in rows.items():
        shape: list[object] = []
        for token in cases[name][1:]:
            marker = {-200: Marker.IMAGE, 2: Marker.EOS}.get(token)
            if marker or not shape or shape[-1] is not str:
                shape.append(marker or str)
        assert cases[name][0] == 1
        assert [piece if isinstance(piece, Marker) else str for piece in template.render(*row)] == shape
