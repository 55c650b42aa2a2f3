"""What a chat completions server sends back: an answer, a refusal, or an error in the shapes that servers use.

Servers differ in where they say that something is wrong: in the status, in a body of status 200, in a choice, in the
reason why an answer ended. All of it comes down to four outcomes: a `Reply`; `Unusable`, which concerns this request
alone; `Denied`, which concerns all requests; and `Passing`, which may be gone in a while.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from m3po_jax.scoring.reasons import MALFORMED, NO_GRADE, REFUSED

RETRIED = frozenset({408, 409, 425, 429})  # and all from 500
DENIED = frozenset({401, 402, 403, 404, 405, 410})  # no other request would fare better
CUT = frozenset({"length", "max_tokens", "max_length", "max_output_tokens", "model_length", "token_limit"})
FILTERED = frozenset(
    {"content_filter", "content_filtered", "safety", "prohibited_content", "blocklist", "recitation"}
)
BROKEN = frozenset({"error", "abort", "aborted", "cancelled", "canceled", "failed", "timeout"})
LONGEST_SENTENCE = 300

# What servers call their errors (`code`, `type` or `status`), by what it means.
_NO_ACCESS = re.compile(
    r"insufficient_quota|billing|invalid_api_key|authentication|unauthenticated|permission|payment|model_not_found"
)
_OF_CONTENT = re.compile(
    r"content.?filter|content.?policy|content_policy_violation|moderation|responsibleai|data_?inspection|safety|sensitive"
)
_OF_REQUEST = re.compile(r"context_length|invalid_request|invalid_argument|badrequest|bad_request|unsupported")
_OF_RATE = re.compile(r"rate.?limit|overloaded|resource_exhausted|too_many_requests")
_CONTENT_WORDS = re.compile(
    r"content management policy|moderation|flagged|content policy|safety (?:system|filter)", re.I
)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title>", re.IGNORECASE | re.DOTALL)
_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.IGNORECASE | re.DOTALL)


class Unusable(Exception):
    """This request has no usable answer; another one may have.

    Attributes:
        reason: Goes to the score row.
        detail: More of it, for people.
        reply: The answer that was paid for and cannot be used, if there was one.
        paid: Whether the server counted the request, as far as one can tell.
    """

    def __init__(self, reason: str, detail: str = "", *, reply: Reply | None = None, paid: bool = False):
        self.reason, self.detail, self.reply, self.paid = reason, detail, reply, paid or reply is not None
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Denied(Exception):
    """The server serves nobody like us: a wrong key, address or model, or no credit left."""


class Passing(Exception):
    """The server is unwell or asks for patience."""


@dataclass(frozen=True)
class Reply:
    """A chat completion.

    Attributes:
        content: The answer's text.
        tokens: Its tokens, each with the log-probs of the likeliest ones; empty where they were not asked for.
        cut: It ended because it was too long.
        prompt_tokens: As the server reports them; None where it does not.
        completion_tokens: Likewise.
    """

    content: str
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()
    cut: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    thought: bool = False


def read_response(status: int, data: bytes, clean: Callable[[str], str]) -> Reply:
    """The answer that a response holds.

    Args:
        clean: Takes secrets out of what the server says.

    Raises:
        Unusable: it holds none, and asking otherwise may help.
        Denied: no request would be answered.
        Passing: the same request may be answered later.
    """
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    sentence = brief(clean(_sentence(value, data)))
    if isinstance(value, list) and value:
        value = value[0]  # a list of one error, as Gemini's gateway has it
    body = value if isinstance(value, dict) else {}
    if not 200 <= status < 300:
        _raise_for(status, body, sentence)
    choices = body.get("choices")
    spelled = body.get("object") == "error" and (body.get("message") or body.get("code"))
    if (body.get("error") or spelled) and not choices:
        _raise_for(None, body, sentence)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        detail = "no choice" if body else "not a chat completion"
        raise Unusable(MALFORMED, _with(detail, sentence), reply=_counted(body))
    replies = [_read_choice(choice, body, clean) for choice in choices]
    if len({reply.content for reply in replies}) > 1:
        raise Unusable(NO_GRADE, f"{len(replies)} answers that differ", reply=replies[0])
    return replies[0]


def brief(text: str) -> str:
    """Text in one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_SENTENCE else line[: LONGEST_SENTENCE - 1] + "…"


def _with(what: str, sentence: str) -> str:
    return f"{what} ({sentence})" if any(letter.isalnum() for letter in sentence) else what


def _raise_for(status: int | None, body: Mapping[str, Any], sentence: str) -> None:
    """Raises what an error means: by its code where it came with status 200 (None)."""
    error = body.get("error")
    error = error if isinstance(error, dict) else body
    names = " ".join(str(error.get(key) or "") for key in ("code", "type", "status", "innererror")).lower()
    code = status if status is not None else _status_in(error)
    detail = _with(f"status {code or 200}", sentence)
    if code is not None and 300 <= code < 400:
        raise Denied(detail)
    if _NO_ACCESS.search(names):
        raise Denied(detail)
    of_content = _OF_CONTENT.search(names) or _CONTENT_WORDS.search(sentence)
    if code is not None and (code in RETRIED or code >= 500):
        raise Passing(detail)
    if code in DENIED and not (code == 403 and of_content):
        raise Denied(detail)
    if code is None and not of_content and not _OF_REQUEST.search(names):
        raise Passing(detail)
    raise Unusable(f"{REFUSED}_{code}" if code else REFUSED, detail)


def _status_in(error: Mapping[str, Any]) -> int | None:
    """The status that an error's code or name stands for."""
    for key in ("code", "status", "status_code"):
        try:
            code = int(str(error.get(key)))
        except ValueError:
            continue
        if 400 <= code < 600:
            return code
    names = " ".join(str(error.get(key) or "") for key in ("code", "type", "status")).lower()
    return 429 if _OF_RATE.search(names) else None


def _sentence(value: Any, data: bytes) -> str:
    """What a server says about a failure, wherever it puts it."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        for key in ("error", "errors", "message", "detail", "msg", "error_message", "error_description", "title"):
            if value.get(key):
                return _error_text(value[key])
        return ""
    text = data[:20_000].decode("utf-8", "replace")
    if "<" in text and ">" in text:
        title = _TITLE.search(text)
        text = html.unescape(_HIDDEN.sub(" ", title.group(1) if title and title.group(1).strip() else text))
    return text


def _error_text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_error_text(part) for part in value[:3])
    if not isinstance(value, dict):
        return str(value)
    message = next((str(value[key]) for key in ("message", "msg", "detail", "type", "code") if value.get(key)), "")
    metadata = value.get("metadata")
    raw = metadata.get("raw") if isinstance(metadata, dict) else None  # a gateway quotes its provider
    return f"{message}: {raw}" if isinstance(raw, str) and raw not in message else message


def _counted(body: Mapping[str, Any]) -> Reply | None:
    """An empty answer with the tokens that the server counted; None where it counted nothing."""
    prompt, completion = _usage(body)
    return None if prompt is None and completion is None else Reply("", (), False, prompt, completion)


def _read_choice(choice: Mapping[str, Any], body: Mapping[str, Any], clean: Callable[[str], str]) -> Reply:
    finish = str(choice.get("finish_reason") or "").lower()
    prompt, completion = _usage(body)
    counted = Reply("", (), finish in CUT, prompt, completion)
    if choice.get("error"):
        error = choice["error"]
        _raise_for(None, {"error": error}, brief(clean(_error_text(error))))
    message = choice.get("message")
    if finish in BROKEN or not isinstance(message, dict):
        raise Unusable(
            MALFORMED, f"finish_reason {finish}" if finish else "a choice without a message", reply=counted
        )
    content, refusal = _text_of(message.get("content"))
    refusal = message.get("refusal") or refusal
    if isinstance(refusal, str) and refusal.strip():
        raise Unusable(REFUSED, brief(clean(refusal)), reply=counted)
    if finish in FILTERED:
        raise Unusable(REFUSED, f"finish_reason {finish}", reply=counted)
    if content is None:
        raise Unusable(MALFORMED, "a content that is no text", reply=counted)
    if not content.strip() and message.get("tool_calls"):
        raise Unusable(NO_GRADE, "a call of a tool", reply=counted)
    thought = any(message.get(key) for key in ("reasoning_content", "reasoning", "thinking", "reasoning_details"))
    try:
        tokens = _tokens(choice.get("logprobs"))
    except (AttributeError, KeyError, TypeError, ValueError):
        tokens = ()  # of another shape: the text speaks alone
    return Reply(clean(content), tokens, finish in CUT, prompt, completion, thought)


def _text_of(content: Any) -> tuple[str | None, str]:
    """(text, refusal) of a message's content: a string, nothing, or parts; None where it is none of them.

    Parts of thinking are no answer.
    """
    if content is None:  # a refusal, or all tokens went into reasoning
        return "", ""
    if isinstance(content, str):
        return content, ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return None, ""
    texts, refusals = [], []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in ("text", "output_text", None):
            text = part.get("text")
            if not isinstance(text, str):
                return None, ""
            texts.append(text)
        elif isinstance(part, dict) and part.get("type") == "refusal":
            refusals.append(str(part.get("refusal") or part.get("text") or "refused"))
        elif not isinstance(part, dict):
            return None, ""
    return "".join(texts), " ".join(refusals)


def _usage(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Tokens of prompt and completion; None where the server does not say, or says what cannot be."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None, None

    def count(*names: str, least: int) -> int | None:
        value = next((usage[name] for name in names if usage.get(name) is not None), None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        return int(value) if least <= value <= 1e9 else None

    return count("prompt_tokens", "input_tokens", least=1), count("completion_tokens", "output_tokens", least=0)


def _tokens(logprobs: Any) -> tuple[tuple[str, dict[str, float]], ...]:
    """Tokens and the log-probs of what could have stood there, as the chat completions interface gives them."""
    if not isinstance(logprobs, dict) or not logprobs.get("content"):
        return ()
    tokens = []
    for entry in logprobs["content"]:
        rivals = {
            str(top["token"]): float(top["logprob"]) for top in entry.get("top_logprobs") or () if _has_log_prob(top)
        }
        if _has_log_prob(entry):
            rivals.setdefault(str(entry["token"]), float(entry["logprob"]))
        tokens.append((str(entry["token"]), rivals))
    return tuple(tokens)


def _has_log_prob(entry: Mapping[str, Any]) -> bool:
    return entry.get("logprob") is not None
