"""The pair browser: which prompts are shown, and all that a reader needs to judge each choice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from m3po_jax.report.formatting import clip, format_number
from m3po_jax.report.images import thumbnails
from m3po_jax.workspace.contents import Pairs, Reader, Round
from m3po_jax.workspace.files import as_number

TokenText = Callable[[int], str]
TOKEN_BUDGET = 1_600_000  # characters of coloured tokens in one page; the other answers are plain text
IMAGES_SHOWN = 3
# Probabilities at which a token's colour deepens.
LEVELS = (0.9, 0.5, 0.2, 0.05)


@dataclass(frozen=True)
class Token:
    """A token of an answer, with its log-probability (nats) and level of colour."""

    text: str
    level: int  # 0: likely … 4: unlikely; see LEVELS
    log_prob: float | None


@dataclass
class ShownAnswer:
    """One candidate as the browser shows it."""

    index: int
    role: str  # chosen | rejected | ""
    text: str
    tokens: list[Token] = field(default_factory=list)
    length: float | None = None
    truncated: bool = False
    mean_log_prob: float | None = None
    mas: float | None = None
    confidence: float | None = None
    preferred: float | None = None
    dispreferred: float | None = None
    other: list[tuple[str, float]] = field(default_factory=list)  # further backends and variants

    @property
    def details(self) -> str:
        """Length, mean log-probability and further scores in one line."""
        parts = [] if self.length is None else [f"{format_number(self.length, 0)} tokens"]
        if self.mean_log_prob is not None:
            parts.append(f"mean log-prob {format_number(self.mean_log_prob, 2)}")
        parts += [f"{name} {format_number(value, 2)}" for name, value in self.other]
        return " · ".join(parts)


@dataclass
class Item:
    """One prompt: a pair, or a dropped prompt with the reason."""

    id: str
    round: int
    reason: str  # empty for pairs
    instruction: str = ""
    images: list[str | None] = field(default_factory=list)  # data URIs; None: unreadable or left out
    more_images: int = 0
    answers: list[ShownAnswer] = field(default_factory=list)
    value: float | None = None
    rank: int | None = None
    of: int | None = None

    def role(self, role: str) -> ShownAnswer | None:
        return next((answer for answer in self.answers if answer.role == role), None)


def spread(values: np.ndarray, ids: Sequence[str], count: int) -> list[int]:
    """Rows evenly spread over the ranking by value (best first, ties by id), best and worst included."""
    ranking = sorted(range(len(ids)), key=lambda row: (-_or_low(float(values[row])), ids[row], row))
    if len(ranking) <= count:
        return ranking
    places = np.unique(np.linspace(0, len(ranking) - 1, count).round().astype(int))
    return [ranking[place] for place in places]


def _or_low(value: float) -> float:
    return float(value) if math.isfinite(value) else -math.inf


def sample_drops(drops: Iterable[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """About `count` dropped prompts, the same number for each reason, by the hash of the prompt's id."""
    by_reason: dict[str, list[str]] = {}
    for prompt_id, reason in drops:
        by_reason.setdefault(reason, []).append(prompt_id)
    if not by_reason or count <= 0:
        return []
    each = max(1, count // len(by_reason))
    shown = []
    for reason in sorted(by_reason, key=lambda name: (-len(by_reason[name]), name))[:count]:
        ids = sorted(
            set(by_reason[reason]),
            key=lambda text: (hashlib.sha256(text.encode("utf-8", "replace")).digest(), text),
        )
        shown += [(prompt_id, reason) for prompt_id in ids[:each]]
    return shown


def colour_tokens(ids: Any, log_probs: Any, token_text: TokenText) -> list[Token]:
    """Tokens with the level of their probability; a token that cannot be named shows its number."""
    tokens = []
    for position, token in enumerate(ids or []):
        log_prob = as_number(log_probs[position]) if log_probs and position < len(log_probs) else None
        try:
            text = str(token_text(int(token)))
        except Exception:  # an id that this tokenizer does not have
            text = f"⟨{token}⟩"
        if position == 0:
            text = text.lstrip(" ")
        level = 0 if log_prob is None else sum(math.exp(min(log_prob, 0.0)) < level for level in LEVELS)
        tokens.append(Token(text, level, log_prob))
    return tokens


def instruction_of(messages: Any) -> str:
    """The text of the last user message (or of the last message) of a TRL vision prompt."""
    if not isinstance(messages, list):
        return ""
    texts = [(m.get("role"), _content(m.get("content"))) for m in messages if isinstance(m, dict)]
    users = [text for role, text in texts if role == "user"] or [text for _, text in texts]
    return users[-1] if users else ""


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content or [] if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str))


def _by_id(table: pa.Table | None) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist() if table is not None else []:
        rows.setdefault(str(row.get("id")), []).append(row)
    return rows


def browse_round(
    reader: Reader, contents: Round, *, pairs: int, drops: int, token_text: TokenText | None
) -> tuple[list[Item], list[list[bytes | None]]]:
    """Items of one round, and the encoded images of each (read here, made small by `finish`)."""
    items: list[Item] = []
    roles: list[tuple[int, int]] = []
    if contents.pairs is not None and len(contents.pairs):
        for row in spread(contents.pairs.numbers["value"], contents.pairs.ids, pairs):
            items.append(_pair_item(contents, contents.pairs, row))
            roles.append((int(contents.pairs.chosen[row]), int(contents.pairs.rejected[row])))
    for prompt_id, reason in sample_drops(contents.drops, drops):
        items.append(Item(prompt_id, contents.number, reason))
        roles.append((-1, -1))
    ids = {item.id for item in items}
    if not ids:
        return [], []
    pair_rows = _by_id(
        reader.table(contents.cell.selection.folder, ["id", "images", "prompt", "chosen", "rejected"], ids)
    )
    prompts = _by_id(reader.prompts(contents.cell, ["id", "images", "instruction"], ids))
    columns = ["id", "candidate", "text", "token_ids", "token_logprobs", "finish_reason"]
    candidates = _by_id(reader.table(contents.cell.candidates.folder, columns, ids))
    scores = _by_id(reader.table(contents.cell.scores.folder, None, ids))
    images = []
    for item, (chosen, rejected) in zip(items, roles, strict=True):
        prompt = (prompts.get(item.id) or [{}])[0]
        pair = (pair_rows.get(item.id) or [{}])[0]
        item.instruction = clip(prompt.get("instruction") or instruction_of(pair.get("prompt")))
        structs = pair.get("images") or prompt.get("images") or []
        structs = [struct for struct in structs if isinstance(struct, dict)]
        item.more_images = max(0, len(structs) - IMAGES_SHOWN)
        images.append([struct.get("bytes") for struct in structs[:IMAGES_SHOWN]])
        score_of: dict[Any, dict[str, Any]] = {row.get("candidate"): row for row in scores.get(item.id, [])}
        for candidate in candidates.get(item.id, []):
            index = candidate.get("candidate")
            role = "" if item.reason else ("chosen" if index == chosen else "rejected" if index == rejected else "")
            item.answers.append(_answer(candidate, score_of.get(index, {}), role, token_text))
        if not item.answers and not item.reason:  # pairs that came from elsewhere have no candidates
            for role in ("chosen", "rejected"):
                text = instruction_of(pair.get(role))
                item.answers.append(ShownAnswer(-1, role, clip(text), **_pair_numbers(contents.pairs, item.id, role)))
        order = {"chosen": 0, "rejected": 1, "": 2}
        item.answers.sort(key=lambda a: (order[a.role], -_or_low(math.nan if a.mas is None else a.mas), a.index))
    return items, images


def _pair_item(contents: Round, pairs: Pairs, row: int) -> Item:
    value = as_number(pairs.numbers["value"][row])
    rank = None if value is None else 1 + int(np.sum(pairs.numbers["value"] > value))
    return Item(pairs.ids[row], contents.number, "", value=value, rank=rank, of=len(pairs))


def _pair_numbers(pairs: Pairs | None, prompt_id: str, role: str) -> dict[str, Any]:
    if pairs is None or prompt_id not in pairs.ids:
        return {}
    row = pairs.ids.index(prompt_id)
    return {name: as_number(pairs.numbers[f"{role}_{name}"][row]) for name in ("mas", "confidence")}


def _answer(row: dict[str, Any], score: dict[str, Any], role: str, token_text: TokenText | None) -> ShownAnswer:
    log_probs = [value for value in row.get("token_logprobs") or [] if as_number(value) is not None]
    shown = ("id", "candidate", "mas", "confidence", "m3p_preferred", "m3p_dispreferred")
    other = [(name, number) for name in score if name not in shown and (number := as_number(score[name])) is not None]
    ids = row.get("token_ids")
    return ShownAnswer(
        index=int(row.get("candidate") or 0),
        role=role,
        text=clip(row.get("text")),
        tokens=colour_tokens(ids, row.get("token_logprobs"), token_text) if token_text else [],
        length=None if ids is None else float(len(ids)),
        truncated=row.get("finish_reason") == "length",
        mean_log_prob=sum(log_probs) / len(log_probs) if log_probs else None,
        mas=as_number(score.get("mas")),
        confidence=as_number(score.get("confidence")),
        preferred=as_number(score.get("m3p_preferred")),
        dispreferred=as_number(score.get("m3p_dispreferred")),
        other=other,
    )


def finish(items: Sequence[Item], images: Sequence[Sequence[bytes | None]], token_budget: int = TOKEN_BUDGET) -> None:
    """Adds thumbnails within their budget, and drops coloured tokens beyond theirs.

    Chosen and rejected answers keep their colours first.
    """
    uris = iter(thumbnails(data for group in images for data in group))
    for item, group in zip(items, images, strict=True):
        item.images = [next(uris) for _ in group]
    answers = [answer for item in items for answer in item.answers]
    used = 0
    for answer in [*(a for a in answers if a.role), *(a for a in answers if not a.role)]:
        cost = sum(38 + len(token.text) for token in answer.tokens)
        if used + cost > token_budget:
            answer.tokens = []
        else:
            used += cost


def tokenizer_text(tokenizer: Any) -> TokenText:
    """`token_text` for `build_report` from a transformers tokenizer: pieces with their leading spaces."""

    def text(token: int) -> str:
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # SentencePiece's byte tokens
            byte = int(piece[3:5], 16)
            return chr(byte) if byte < 0x80 else f"⟨{piece[3:5]}⟩"
        return piece.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")

    return text
