"""The items of a JSON array, one after another, without the whole array in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from m3po_jax.errors import UserError

MAX_ITEM_CHARACTERS = 1 << 28
_CHUNK = 1 << 16
_NEAR_END = 16  # an error so close to what is read so far may be its end


def array_items(file: IO[str], where: str) -> Iterator[Any]:
    """Items of the array that `file` holds; LLaVA's files are arrays of gigabytes.

    Raises:
        UserError: malformed JSON, an item of more than `MAX_ITEM_CHARACTERS`, or text that is not UTF-8; after the
            items before it.
    """
    decoder = json.JSONDecoder()
    buffer, start, passed, ended = "", 0, 0, False

    def more() -> None:
        """Reads on; what is done with is let go."""
        nonlocal buffer, start, passed, ended
        passed, buffer, start = passed + start, buffer[start:], 0
        try:
            piece = file.read(max(_CHUNK, len(buffer)))
        except UnicodeDecodeError:
            raise UserError("not UTF-8", where=where, remedy="save the file as UTF-8") from None
        ended = not piece
        buffer += piece

    def malformed(reason: str, place: int) -> UserError:
        return UserError(f"malformed JSON: {reason} at character {passed + place}", where=where)

    def symbol() -> str:
        """The next character that is not white space; empty at the end."""
        nonlocal start
        while True:
            while start < len(buffer) and buffer[start].isspace():
                start += 1
            if start < len(buffer):
                return buffer[start]
            if ended:
                return ""
            more()

    if symbol() != "[":
        raise malformed("expecting '['", start)
    start += 1
    if symbol() == "]":
        start += 1
    else:
        while True:
            symbol()
            while True:
                try:
                    item, stop = decoder.raw_decode(buffer, start)
                except json.JSONDecodeError as error:
                    whole = error.pos < len(buffer) - _NEAR_END and not error.msg.startswith("Unterminated string")
                    if ended or whole:
                        raise malformed(error.msg, error.pos) from None
                except (RecursionError, ValueError) as error:  # too deep; a number of thousands of digits
                    raise malformed(str(error), start) from None
                else:
                    # A number may go on behind what is read ("12." is one, and so is "12").
                    if ended or buffer[stop : stop + 1] in (*",] \t\r\n",) or stop < len(buffer) - _NEAR_END:
                        break
                if len(buffer) - start > MAX_ITEM_CHARACTERS:
                    raise UserError(
                        f"an item of more than {MAX_ITEM_CHARACTERS} characters", where=where, remedy="drop it"
                    )
                more()
            start = stop
            yield item
            after = symbol()
            if after not in (",", "]"):
                raise malformed("expecting ',' or ']'", start)
            start += 1
            if after == "]":
                break
    if symbol():
        raise malformed("extra data", start)
