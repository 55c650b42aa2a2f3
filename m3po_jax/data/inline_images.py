"""Images that stand as text in a row: data URIs, and bare base64 of an encoded image."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse

from m3po_jax.errors import UserError

_DATA_URI = re.compile(r"data:(?P<kind>[^;,]*)(?:;[^;,]+)*?(?P<base64>;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_LEAST_LENGTH = 64  # no shorter text holds an image, and paths are short
# How the encoded bytes of the formats begin that `images` decodes.
_SIGNATURES = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",
    b"MM\x00*",
    b"BM",
)


def looks_encoded(data: bytes) -> bool:
    """Whether bytes begin as an image file of a common format does."""
    framed = (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or data[4:12] in (b"ftypavif", b"ftypavis")
    return framed or data.startswith(_SIGNATURES)


def inline_bytes(text: str, where: str) -> bytes | None:
    """The encoded image that a text holds; None for a text that is something else, such as a path.

    Bare base64 is taken for an image only where the whole text is base64 and its bytes begin as an image file does,
    which no path does by chance.

    Raises:
        UserError: a data URI that cannot be read.
    """
    if text[:5].lower() == "data:":
        return _from_uri(text, where)
    if len(text) < _LEAST_LENGTH or _BASE64.fullmatch(text) is None:
        return None
    try:
        if not looks_encoded(base64.b64decode("".join(text[:64].split())[:32])):
            return None
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _from_uri(text: str, where: str) -> bytes:
    head = _DATA_URI.match(text)
    if head is None:
        raise UserError("the data URI of an image is malformed", where=where, remedy="data:image/png;base64,...")
    body = text[head.end() :]
    if not head["base64"]:
        return urllib.parse.unquote_to_bytes(body)
    body = urllib.parse.unquote("".join(body.split())) if "%" in body else "".join(body.split())
    try:
        # Padding is left out by some writers.
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(
            "the data URI of an image is not valid base64", where=where, remedy="write it again or drop the row"
        ) from None
