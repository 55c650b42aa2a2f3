"""A model directory's tokenizer: text that stays text, and the ids that mean something else."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class PlainText:
    """A tokenizer for text that must stay text.

    Special tokens have no effect here, whatever the text says, and none of `forbidden` can come out.

    Args:
        serialized: A `tokenizers` tokenizer as JSON.
        forbidden: Ids that text must never give: BOS, EOS, PAD, the image token.
        unknown: What stands for a word that is spelt like one of them in a vocabulary of whole words.
    """

    def __init__(self, serialized: str, forbidden: frozenset[int], unknown: int | None):
        from tokenizers import Tokenizer

        # Only tokens marked special can be switched off, and llava-hf's <image> is not marked so.
        content = json.loads(serialized)
        for token in content.get("added_tokens", ()):
            token["special"] = token["special"] or token["id"] in forbidden
        self._arguments = (serialized, forbidden, unknown)
        self._forbidden, self._unknown = forbidden, unknown
        self._tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.encode_special_tokens = True
        self._whole_words = content.get("model", {}).get("type") == "WordLevel"
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __reduce__(self) -> tuple[type[PlainText], tuple[str, frozenset[int], int | None]]:
        # The tokenizer's own pickling loses `encode_special_tokens`.
        return PlainText, self._arguments

    @cached_property
    def identity(self) -> str:
        """A hash of all that ids of texts depend on."""
        serialized, forbidden, unknown = self._arguments
        return content_hash(serialized, sorted(forbidden), unknown)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without BOS.

        Raises:
            UserError: the text cannot be told from a special token (whole-word vocabularies without <unk>).
        """
        # Lone surrogates (broken JSON escapes) cannot be encoded at all.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._forbidden.isdisjoint(ids):
            return ids
        if self._unknown is None:
            raise UserError(f"the text {text[:80]!r} contains the spelling of a special token")
        return [self._unknown if token in self._forbidden else token for token in ids]

    def encode_with_tokens(self, text: str) -> list[int]:
        """Ids of a rendered conversation, in which special tokens act where they are spelt; without BOS."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def token_id(self, token: str) -> int | None:
        """The id of a token as it is spelt in the vocabulary; None: there is none."""
        return self._tokenizer.token_to_id(token)

    @property
    def size(self) -> int:
        """One more than the largest id; a model's vocabulary may be padded beyond it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def convert_ids_to_tokens(self, token: int) -> str:
        """The piece of one id, with ``▁`` where a space precedes it (as transformers names and writes it)."""
        piece = self._tokenizer.id_to_token(token) or f"<{token}>"
        # A vocabulary of whole words keeps no spaces: every word but punctuation follows one.
        return f"▁{piece}" if self._whole_words and any(letter.isalnum() for letter in piece) else piece

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens and outer white space."""
        return self._tokenizer.decode(
            [token for token in ids if token not in self._forbidden], skip_special_tokens=True
        ).strip()


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a model directory.

    Attributes:
        tokenizer: As transformers loads it, for its special ids.
        serialized: As `tokenizers` JSON. It comes from tokenizer.json where there is one: transformers 5 rebuilds
            LLaMA tokenizers with other rules for leading spaces, and the split rule's ids would differ.
        settings: ``tokenizer_config.json``.
    """

    tokenizer: Any
    serialized: str
    settings: Mapping[str, Any]
    folder: Path

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def added(self) -> dict[int, str]:
        """Tokens that are no part of the text's own vocabulary, special or not, by id."""
        return {token_id: token.content for token_id, token in self.tokenizer.added_tokens_decoder.items()}

    @property
    def bos_token_id(self) -> int | None:
        """What stands in front of every prompt; None where the tokenizer has none, or says that it adds none."""
        return None if self.settings.get("add_bos_token") is False else self.tokenizer.bos_token_id

    def check_rows(self, rows: int, never_embedded: frozenset[int] = frozenset()) -> None:
        """
        Args:
            rows: Of the embeddings that are stored.
            never_embedded: Ids that need no row of their own.

        Raises:
            UserError: an id has no row among the model's embeddings.
        """
        last = max(
            (token for token in self.tokenizer.get_vocab().values() if token not in never_embedded), default=-1
        )
        if last >= rows:
            raise UserError(
                f"the tokenizer has ids up to {last}, the model has {rows} rows of embeddings",
                where=str(self.folder),
                remedy="resize the model's embeddings (transformers: resize_token_embeddings), or take the tokenizer "
                "that belongs to it",
            )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory, or nothing where the file is absent.

    Raises:
        UserError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path))
    return content


def load_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a model directory.

    Raises:
        UserError: files that are missing or malformed, in one line.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork
    from transformers import AutoTokenizer

    only_model = not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file()
    if only_model and importlib.util.find_spec("sentencepiece") is None:  # transformers would ask for another one
        raise UserError(
            "tokenizer.model needs a package that is not installed",
            where=str(folder),
            remedy="pip install sentencepiece, or add the tokenizer.json of the same model",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        path = folder / "tokenizer.json"
        serialized = path.read_text(encoding="utf-8") if path.is_file() else backend and backend.to_str()
        if serialized is not None:
            PlainText(serialized, frozenset(), None).encode("a")
    except BaseException as error:  # transformers raises many types on malformed folders, and tokenizers panics
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"cannot load the tokenizer ({reason[:200]})",
            where=str(folder),
            remedy="tokenizer.json and tokenizer_config.json must be there",
        ) from None
    if serialized is None:
        raise UserError("the tokenizer has no fast version", where=str(folder), remedy="add its tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token", where=str(folder), remedy="set eos_token")
    return TokenizerFiles(tokenizer, serialized, read_object(folder / "tokenizer_config.json"), folder)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Ids of all tokens of a model directory's tokenizer; nothing where it has no tokenizer.

    Raises:
        UserError: as `load_tokenizer`.
    """
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return load_tokenizer(folder).tokenizer.get_vocab() if any((folder / name).is_file() for name in files) else {}


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end an answer.

    Attributes:
        ids: Any of them ends one that is generated; the first ends one that is learned.
        note: What a user should know; empty: nothing.
    """

    ids: tuple[int, ...]
    note: str = ""


def end_tokens(files: TokenizerFiles, raw_config: Mapping[str, Any], rows: int) -> EndTokens:
    """The end tokens of a model: those of ``generation_config.json``, or of ``config.json`` without one, as
    transformers generates, and the tokenizer's.

    An answer to be learned ends with the tokenizer's, unless ``generation_config.json`` (or a list elsewhere, which
    is no default that was written out) leaves it out: then with the first that is stated.

    Args:
        raw_config: ``config.json``; a `text_config` in it counts too.
        rows: Of the model's embeddings.

    Raises:
        UserError: an end token that the model cannot draw, or no token's id at all.
    """
    generation = read_object(files.folder / "generation_config.json")
    text = raw_config.get("text_config")
    stated, where = generation.get("eos_token_id"), "generation_config.json"
    written_out = bool(generation.get("_from_model_config"))
    if not generation:
        where, written_out = "config.json", True
        stated = raw_config.get("eos_token_id")
        if stated is None and isinstance(text, dict):
            stated = text.get("eos_token_id")
    values = stated if isinstance(stated, list) else [stated]
    if not all(value is None or (isinstance(value, int) and not isinstance(value, bool)) for value in values):
        raise UserError(f"eos_token_id is {stated!r}, and must be a token's id or a list of them", where=where)
    ids = tuple(dict.fromkeys(value for value in values if value is not None and value >= 0))
    tokenizer_end = files.tokenizer.eos_token_id
    beyond = [token for token in ids if token >= rows]
    if beyond:
        raise UserError(
            f"eos_token_id {beyond[0]} in {where} is beyond the model's {rows} rows of embeddings",
            where=str(files.folder),
            remedy="correct it, or take the files of one model",
        )
    if not ids or tokenizer_end in ids:
        return EndTokens(tuple(dict.fromkeys((tokenizer_end, *ids))))
    learned = tokenizer_end if written_out and not isinstance(stated, list) else ids[0]
    note = (
        f"{files.folder}: {where} ends answers with {', '.join(map(str, ids))}, the tokenizer with {tokenizer_end}; "
        f"any of them ends one, and answers are learned with {learned}"
    )
    return EndTokens(tuple(dict.fromkeys((learned, *ids, tokenizer_end))), note)
