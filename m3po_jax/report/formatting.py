"""Numbers, durations and texts as the report prints them."""

from __future__ import annotations

import json
import math
import re
from datetime import datetime
from typing import Any

from markupsafe import Markup

from m3po_jax.workspace.files import as_number

DASH = "–"
MAX_TEXT = 2000  # characters of one model answer that are shown
# C0 and C1 controls have no meaning in HTML (NUL is a parse error); bidi controls may reorder what surrounds
# them, which `<bdi>` isolates, so they may stay.
_CONTROLS = dict.fromkeys((*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)), "\ufffd")


def format_number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """Fixed digits, a real minus sign and thousands separators; a dash for what is missing."""
    number = as_number(value)
    if number is None:
        return DASH
    text = f"{number:{'+' if sign else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("-+")
    return text.replace("-", "−")


def format_span(low: Any, high: Any, digits: int = 3) -> str:
    """An interval; empty where an end is missing."""
    if as_number(low) is None or as_number(high) is None:
        return ""
    return f"{format_number(low, digits)} – {format_number(high, digits)}"


def format_compact(value: Any) -> str:
    """Up to four significant digits, scientific where that is shorter: learning rates, odd metrics."""
    number = as_number(value)
    if number is None:
        return DASH
    if number == int(number) and abs(number) < 1e15:
        return format_number(number, 0)
    if 1e-3 <= abs(number) < 1e6:
        text = f"{number:,.4g}" if abs(number) < 1e4 else f"{number:,.0f}"
    else:
        text = f"{number:.3g}"
    return text.replace("-", "−")


def format_percent(value: Any, digits: int = 0) -> str:
    """A share in [0, 1] as a percentage."""
    number = as_number(value)
    return DASH if number is None else f"{format_number(100 * number, digits)}\u00a0%"


def format_duration(seconds: Any) -> str:
    """Seconds as ``0.4 s``, ``12 s``, ``3 min 05 s`` or ``2 h 14 min``."""
    number = as_number(seconds)
    if number is None or number < 0:
        return DASH
    if number < 10:
        return f"{number:.1f} s"
    whole = round(number)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def format_time(value: Any) -> str:
    """An ISO time as ``2026-11-23 08:32 UTC`` (its own zone kept), or the text itself where it is none."""
    if not isinstance(value, str):
        return DASH
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return value[:40]
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def clip(text: Any, limit: int = MAX_TEXT) -> str:
    """`text` cut to `limit` characters, saying how much was left out."""
    text = "" if text is None else str(text)
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def slug(text: str) -> str:
    """A name that is safe as an element id."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def embed_json(value: Any) -> Markup:
    """JSON that is inert inside a ``<script>`` element: no character can end the element or a line.

    NaN and infinities become null.
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def encode_page(html: str) -> bytes:
    """The page as UTF-8: control characters and lone surrogates (valid in JSON, not here) are replaced."""
    return html.translate(_CONTROLS).encode("utf-8", errors="replace")
