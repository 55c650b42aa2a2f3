"""Published shapes of preference rows, each a small function from a row to its prompt and two answers.

A shape is told by the fields that a row has (null is absent), and a row must have the fields of exactly one. Sources:
TRL 1.16 `data_utils` and `DataCollatorForVisionPreference`; the data sets' cards for RLAIF-V, RLHF-V, VLFeedback and
LLaVA-RLHF; "Custom dataset" of ms-swift; `data/README.md` of LLaMA-Factory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m3po_jax.data.preference_messages import (
    Turn,
    answer_text,
    check_prompt,
    checked_text,
    parse_turns,
    shared_prompt,
    user,
    with_system,
)
from m3po_jax.data.rows import parse_images
from m3po_jax.data.templates import IMAGE_PLACEHOLDER, Marker
from m3po_jax.errors import UserError

Row = Mapping[str, Any]

# Fields of images, the first with a value counts: the file's own name of an image comes after the image itself.
IMAGE_KEYS = ("images", "image", "img_path", "image_path")
_UNREAD = ("videos", "video", "audios", "audio", "tools")


@dataclass(frozen=True)
class PreferenceRow:
    """What one row says: a prompt (checked by `check_prompt`) and two answers to it."""

    prompt: list[Turn]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Shape:
    """A published shape of rows.

    Attributes:
        name: Whose it is.
        fields: Its fields, as messages and docs list them.
        fits: Whether a row has them; no two shapes fit one row.
        read: A row to its preference; None where the row prefers nothing.
        needs_image: Every row has an image.
    """

    name: str
    fields: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], PreferenceRow | None]
    needs_image: bool = False


def has(row: Row, *names: str) -> bool:
    """Whether a row has values for all of these fields."""
    return all(row.get(name) is not None for name in names)


def _lacks(row: Row, *names: str) -> bool:
    return all(row.get(name) is None for name in names)


def _preference(row: Row, turns: list[Turn], chosen: Any, rejected: Any) -> PreferenceRow:
    """A prompt and two answers, checked, with the system turn of the row's own column."""
    prompt = with_system(turns, row.get("system"))
    check_prompt(prompt)
    texts = answer_text(chosen, "chosen", prompt), answer_text(rejected, "rejected", prompt)
    if texts[0].strip() == texts[1].strip():
        raise UserError("`chosen` and `rejected` are the same", remedy="drop the row: it prefers nothing")
    return PreferenceRow(prompt, *texts)


def _pair(row: Row) -> bool:
    return has(row, "chosen", "rejected")


def _spoken(value: Any) -> bool:
    """Whether an answer is a conversation of several turns."""
    return isinstance(value, (list, tuple)) and len(value) > 1


# TRL: conversational or plain strings, with a prompt or with one that both answers repeat.


def _trl(row: Row) -> PreferenceRow:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        return _preference(row, parse_turns(prompt, "prompt"), row["chosen"], row["rejected"])
    if not _spoken(row["chosen"]) or not _spoken(row["rejected"]):
        return _preference(row, [user(checked_text(prompt, "`prompt`"))], row["chosen"], row["rejected"])
    # As in ultrafeedback_binarized: the conversation is in the answers, and the prompt is what the user says in it.
    turns = shared_prompt(row["chosen"], row["rejected"])
    if not any(turn.same_words(user(prompt)) for turn in turns):
        raise UserError(
            "`prompt` is none of the turns that `chosen` and `rejected` repeat",
            remedy="drop it: the conversation is theirs",
        )
    return _preference(row, turns, row["chosen"], row["rejected"])


def _trl_implicit(row: Row) -> PreferenceRow:
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if any(row.get(key) for key in IMAGE_KEYS):
            raise UserError("the row has images and no prompt", remedy="add `prompt`")
        prompt = _common_words(checked_text(chosen, "`chosen`"), checked_text(rejected, "`rejected`"))
        return _preference(row, [user(prompt)], chosen[len(prompt) :], rejected[len(prompt) :])
    return _preference(row, shared_prompt(chosen, rejected), chosen, rejected)


def _common_words(chosen: str, rejected: str) -> str:
    """The text that two answers share, up to the space before they differ, as TRL's `extract_prompt` has it."""
    length = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if length is None:
        length = min(len(chosen), len(rejected))
    elif length and chosen[length - 1] == " ":
        length -= 1
    rest = chosen[length : length + 1], rejected[length : length + 1]
    if not chosen[:length].strip() or not all(letter.isspace() for letter in rest):
        raise UserError(
            "no prompt: `chosen` and `rejected` share no text that ends with a word", remedy="add `prompt`"
        )
    return chosen[:length]


# Sets of preferences for vision-language models.


def _rlaif_v(row: Row) -> PreferenceRow:
    return _preference(row, [user(checked_text(row["question"], "`question`"))], row["chosen"], row["rejected"])


def _has_object(row: Row) -> bool:
    text = row.get("text")
    return isinstance(text, Mapping) or (isinstance(text, str) and text.lstrip().startswith("{"))


def _rlhf_v(row: Row) -> PreferenceRow:
    text = row["text"]
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"`text` is not a JSON object ({error})") from None
    for name in ("question", "chosen", "rejected"):
        if not isinstance(text.get(name), str):
            raise UserError(f"`text` has no {name!r}", remedy="an object of question, chosen and rejected")
    question = user(checked_text(text["question"], "`question`"))
    return _preference(row, [question], text["chosen"], text["rejected"])


def _vlfeedback(row: Row) -> PreferenceRow | None:
    """The completion of the highest mean rating over the one of the lowest; the first of equals."""
    completions = row["completions"]
    if isinstance(completions, Mapping):  # as `datasets` stores a list of objects: an object of lists
        names = list(completions)
        columns = list(completions.values())
        if not all(isinstance(column, (list, tuple)) and len(column) == len(columns[0]) for column in columns):
            raise UserError("`completions` is neither a list of objects nor an object of lists of one length")
        completions = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    if not isinstance(completions, (list, tuple)):
        raise UserError("`completions` is not a list")
    rated = []
    for number, completion in enumerate(completions, 1):
        if not isinstance(completion, Mapping):
            raise UserError(f"completion {number} is not an object with `response` and `annotations`")
        rating, response = _mean_rating(completion.get("annotations")), completion.get("response")
        if rating is not None and isinstance(response, str) and response.strip():
            rated.append((rating, response))
    if len(rated) < 2:
        return None
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0] or best[1].strip() == worst[1].strip():
        return None
    return _preference(row, [user(checked_text(row["prompt"], "`prompt`"))], best[1], worst[1])


def _mean_rating(annotations: Any) -> float | None:
    """Mean of `Rating` over the aspects; None where one of them is no number ("N/A")."""
    if not isinstance(annotations, Mapping) or not annotations:
        return None
    ratings = [aspect.get("Rating") if isinstance(aspect, Mapping) else None for aspect in annotations.values()]
    try:
        mean = sum(float(rating) for rating in ratings) / len(ratings)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return mean if math.isfinite(mean) else None


def _llava_rlhf(row: Row) -> PreferenceRow:
    preferred = row["preference"]
    if preferred not in (1, 2) or isinstance(preferred, bool):
        raise UserError(f"`preference` is {str(preferred)[:40]!r}", remedy="it is 1 or 2: the number of an output")
    outputs = {}
    for number in (1, 2):
        output = row[f"output_{number}"]
        outputs[number] = output.get("value") if isinstance(output, Mapping) else output
        checked_text(outputs[number], f"`output_{number}`")
    turns = [_image_in_front(turn) for turn in parse_turns(row["conversations"], "conversations")]
    return _preference(row, turns, outputs[preferred], outputs[3 - preferred])


def _image_in_front(turn: Turn) -> Turn:
    """A turn of LLaVA's files, whose training code moves the only image in front (`preprocess_multimodal`)."""
    if turn.role != "user" or turn.text.count(IMAGE_PLACEHOLDER) != 1:
        return turn
    return Turn("user", (Marker.IMAGE, turn.text.replace(IMAGE_PLACEHOLDER, "").strip()), plain=False)


# Files of other trainers.


def _instructed(row: Row) -> list[Turn]:
    """Alpaca's `instruction` and `input`, or ms-swift's `query`, behind the turns of `history`."""
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError("`history` is not a list of [user, assistant] texts")
    for number, (asked, answered) in enumerate(history, 1):
        name = f"turn {number} of `history`"
        turns += [user(checked_text(asked, name)), Turn("assistant", (checked_text(answered, name),))]
    key = "instruction" if has(row, "instruction") else "query"
    said = [checked_text(row[name], f"`{name}`") for name in (key, "input") if row.get(name)]
    return [*turns, user("\n".join(said))]


def _ms_swift(row: Row) -> PreferenceRow:
    """The last answer of `messages` (or `response`, `output`) over `rejected_response` or `rejected_messages`."""
    if has(row, "rejected_response", "rejected_messages"):
        raise UserError("the row has both `rejected_response` and `rejected_messages`", remedy="keep one")
    rejected_images = row.get("rejected_images")
    if rejected_images and parse_images(rejected_images, "rejected_images") != images_of(row):
        raise UserError("`rejected_images` are not `images`", remedy="both answers of a pair see the same images")
    if has(row, "messages"):
        turns = parse_turns(row["messages"], "messages")
        if turns[-1].role != "assistant":
            raise UserError("`messages` does not end with the assistant's answer", remedy="it is what is chosen")
        chosen: Any = turns.pop().text
    else:
        turns = _instructed(row)
        chosen = row.get("response") if has(row, "query") else row.get("output")
    rejected = row.get("rejected_response")
    return _preference(row, turns, chosen, row["rejected_messages"] if rejected is None else rejected)


def _llama_factory(row: Row) -> PreferenceRow:
    name = "conversations" if has(row, "conversations") else "messages"
    return _preference(row, parse_turns(row[name], name), row["chosen"], row["rejected"])


def _llama_factory_alpaca(row: Row) -> PreferenceRow:
    return _preference(row, _instructed(row), row["chosen"], row["rejected"])


def _openai(row: Row) -> bool:
    """LLaMA-Factory's `messages` are the prompt; beside TRL's conversations they are a copy of the chosen one."""
    return has(row, "messages") and _lacks(row, "prompt") and not _spoken(row["chosen"])


SHAPES = (
    Shape(
        "TRL",
        "prompt, chosen, rejected: strings or messages; images or image",
        lambda row: _pair(row) and has(row, "prompt"),
        _trl,
    ),
    Shape(
        "TRL, implicit prompt",
        "chosen, rejected: conversations that share all but their last turn",
        lambda row: (
            _pair(row) and _lacks(row, "prompt", "question", "instruction", "conversations") and not _openai(row)
        ),
        _trl_implicit,
    ),
    Shape(
        "RLAIF-V",
        "image, question, chosen, rejected",
        lambda row: _pair(row) and has(row, "question"),
        _rlaif_v,
        needs_image=True,
    ),
    Shape(
        "RLHF-V",
        "image, text: an object of question, chosen and rejected, or its JSON",
        lambda row: _lacks(row, "chosen", "rejected") and _has_object(row),
        _rlhf_v,
        needs_image=True,
    ),
    Shape(
        "VLFeedback",
        "prompt, completions: of response and annotations.ASPECT.Rating; image or img_path",
        lambda row: _lacks(row, "chosen", "rejected") and has(row, "prompt", "completions"),
        _vlfeedback,
        needs_image=True,
    ),
    Shape(
        "LLaVA-RLHF",
        "image, conversations, output_1, output_2, preference",
        lambda row: has(row, "conversations", "output_1", "output_2", "preference"),
        _llava_rlhf,
        needs_image=True,
    ),
    Shape(
        "ms-swift",
        "messages, rejected_response or rejected_messages; images",
        lambda row: (
            _lacks(row, "chosen", "rejected")
            and (has(row, "rejected_response") or has(row, "rejected_messages"))
            and (has(row, "messages") or has(row, "query") or has(row, "instruction"))
        ),
        _ms_swift,
    ),
    Shape(
        "LLaMA-Factory, sharegpt",
        "conversations or messages, chosen, rejected; images",
        lambda row: _pair(row) and (has(row, "conversations") or _openai(row)),
        _llama_factory,
    ),
    Shape(
        "LLaMA-Factory, alpaca",
        "instruction, input, chosen, rejected; images",
        lambda row: _pair(row) and has(row, "instruction"),
        _llama_factory_alpaca,
    ),
)


def images_of(row: Row) -> tuple[Any, ...]:
    """The images of a row, as `rows.parse_images` reads them.

    Raises:
        UserError: a value that is no image.
    """
    value = next((row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "", [])), None)
    return parse_images(value, "images")


def shape_of(row: Row) -> Shape:
    """The shape that a row has.

    Raises:
        UserError: none or several of them, or fields that no model here can be shown.
    """
    fitting = [shape for shape in SHAPES if shape.fits(row)]
    for name in _UNREAD:
        if row.get(name) not in (None, "", [], "[]", {}):
            raise UserError(f"the row has `{name}`, which is not read", remedy="drop the field or the row")
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"the row fits {' and '.join(shape.name for shape in fitting)}", remedy="drop the fields of all but one"
        )
    given = ", ".join(sorted(str(name)[:40] for name, value in row.items() if value is not None)[:20]) or "nothing"
    accepted = "; ".join(f"{shape.name} ({shape.fields})" for shape in SHAPES)
    raise UserError(f"the row is no preference pair (it has {given})", remedy=f"accepted are: {accepted}")
