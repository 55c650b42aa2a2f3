"""A word-level tokenizer for the quickstart: a few hundred words in the Hugging Face format.

White space (the line feed after ``<image>`` included) only separates words, and every punctuation mark is a
word, so ``car.</s>`` is three tokens and decoding gives back captions exactly. The first special tokens are
numbered as in LLaMA.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from m3po_jax.quickstart.language import CAPTION_INSTRUCTION, ExistenceQuestion, caption
from m3po_jax.quickstart.objects import OBJECTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SPECIAL_TOKENS: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
# Matrix sides that are multiples of this suit every accelerator.
VOCABULARY_MULTIPLE = 64
MODEL_MAX_LENGTH = 512

# Everything easy-VQA asks and answers, so that the tokenizer does not need that package.
_EASY_VQA = (
    "a black blue brown circle color contain does gray green image in is no not of present rectangle red "
    "shape teal the there triangle what yellow yes ?"
)
# The vicuna_v1 conversation and LLaVA's short-answer suffix.
_CONVERSATION = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: ASSISTANT: "
    "Answer the question using a single word or phrase."
)
# A few words that people try first, so that a demonstration does not meet <unk> at once.
_EXTRA = "Are Does Do How What Which Who are describe briefly objects many see you picture scene with ;!-()"


def splitter() -> PreTokenizer:
    """What parts a text into words: white space, and every punctuation mark by itself."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """All tokens, special ones first, then words sorted, then unused ones up to a multiple of 64."""
    texts = [
        *(caption([first, second]) for first, second in pairwise(OBJECTS)),
        caption(OBJECTS),
        CAPTION_INSTRUCTION,
        *(ExistenceQuestion(name, present, "random").instruction for name in OBJECTS for present in (True, False)),
        *(ExistenceQuestion(OBJECTS[0], present, "random").reference for present in (True, False)),
        *(_EASY_VQA, _CONVERSATION, _EXTRA),
    ]
    parts = splitter()
    return padded({word for text in texts for word, _ in parts.pre_tokenize_str(text)})


def padded(words: Iterable[str]) -> tuple[str, ...]:
    """Special tokens, sorted words, unused ones."""
    tokens = [*SPECIAL_TOKENS, *sorted(set(words))]
    tokens += [f"<unused{number}>" for number in range(-len(tokens) % VOCABULARY_MULTIPLE)]
    return tuple(tokens)


def build_tokenizer(words: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer as a `tokenizers` object; encoding puts ``<s>`` in front, as LLaMA's does.

    Args:
        words: All that it knows; None: those of the quickstart.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    tokenizer = Tokenizer(
        models.WordLevel(
            {word: index for index, word in enumerate(vocabulary() if words is None else padded(words))},
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = splitter()
    # Joins with spaces, then draws punctuation to the word before it; no word starts with "##".
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(directory: str | Path, words: Iterable[str] | None = None) -> Path:
    """Write tokenizer.json and tokenizer_config.json; `transformers.AutoTokenizer` loads the folder.

    The configuration is written here rather than by transformers 5, whose class names version 4 does not
    know.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer(words).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_max_length": MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return directory
