"""The words of an English text and their singular, for scorers that look for named objects."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator

BREAK = ""
"""Stands between words that punctuation separates, so that no term is found across it."""

# A dotted abbreviation ("T.V.") or a word; a hyphenated word is one word, as in NLTK's tokenizer.
_WORD = re.compile(r"(?<![^\W_])(?:[^\W\d_]\.){2,}|[^\W_]+(?:['’-][^\W_]+)*(?:(?<=s)['’])?")
_POSSESSIVE = re.compile(r"['’]s?$")
# White space and marks of emphasis join what stands beside them.
_JOINS = re.compile(r"\s+|[^\S\n]*[*_]*[^\S\n]*[*_]*")
_IRREGULAR = {
    **{"lice": "louse", "dice": "die", "oxen": "ox", "cacti": "cactus", "octopi": "octopus", "fungi": "fungus"},
    **{"quizzes": "quiz", "gases": "gas", "lenses": "lens", "irises": "iris", "atlases": "atlas", "axes": "axe"},
    **{"canvases": "canvas", "headaches": "headache", "caches": "cache", "series": "series", "species": "species"},
    **{"moustaches": "moustache", "mustaches": "mustache", "avalanches": "avalanche", "lives": "life"},
    **{"elves": "elf", "toes": "toe", "hoes": "hoe", "foes": "foe", "oboes": "oboe", "fuses": "fuse"},
    **{"muses": "muse", "excuses": "excuse", "uses": "use"},
}
# Endings of words and of their compounds ("grandchildren", "bookshelves"); the longer stands before the shorter.
_COMPOUNDS = {
    **{"children": "child", "people": "person", "women": "woman", "men": "man", "teeth": "tooth", "feet": "foot"},
    **{"geese": "goose", "mice": "mouse", "knives": "knife", "wives": "wife", "wolves": "wolf", "shelves": "shelf"},
    **{"halves": "half", "calves": "calf", "loaves": "loaf", "leaves": "leaf", "scarves": "scarf"},
    **{"dwarves": "dwarf", "hooves": "hoof", "thieves": "thief", "shoes": "shoe", "canoes": "canoe"},
}
# Nouns in -ie: of others that end in -ies the singular ends in -y.
_IE = frozenset(
    (
        *("beanie", "birdie", "brownie", "budgie", "calorie", "collie", "cookie", "cutie", "doggie", "foodie"),
        *("genie", "goalie", "hippie", "hoodie", "junkie", "magpie", "movie", "necktie", "newbie", "pixie"),
        *("prairie", "rookie", "selfie", "smoothie", "talkie", "veggie", "walkie", "zombie"),
    )
)


@functools.lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """The singular of a lower-case English noun, by its ending; a word that is no plural stays as it is."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for plural, ending in _COMPOUNDS.items():
        if word == plural or (word.endswith(plural) and len(word) > len(plural) + 2):
            return word[: -len(plural)] + ending
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if len(word) < 4:
        return word[:-1] if len(word) == 3 and word[1] not in "aeiouy" else word  # tvs, pcs; not gas
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 or word[:-1] in _IE else word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    if word.endswith("uses") and word[-5] not in "aeiou":  # buses, cactuses; not houses
        return word[:-2]
    return word[:-1]


def known_form(word: str, vocabulary: Collection[str]) -> str:
    """The form of a lower-case word that `vocabulary` has: itself, its singular, or what a plural's ending leaves.

    Of a word that it has in no form, the singular.
    """
    if word in vocabulary:
        return word
    best = singular(word)
    if best in vocabulary:
        return best
    return next((form for form in _forms(word) if form in vocabulary), best)


def _forms(word: str) -> Iterator[str]:
    """Every singular that a plural's ending allows."""
    for plural, ending in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", "")):
        stem = word.removesuffix(plural)
        # "Skies" are no "ski".
        if stem != word and len(stem) > 1 and not word.endswith("ss") and not (plural == "es" and stem[-1] == "i"):
            yield stem + ending


def tokens(text: str) -> list[str]:
    """Lower-case words in order, without a possessive's ``'s``, with `BREAK` where punctuation stands between two.

    A dotted abbreviation loses its full stops: "T.V." is the word "tv".
    """
    words: list[str] = []
    end = None
    for match in _WORD.finditer(text.lower()):
        if end is not None and not _JOINS.fullmatch(text, end, match.start()):
            words.append(BREAK)
        word = match.group()
        words.append(word.replace(".", "") if word.endswith(".") else _POSSESSIVE.sub("", word))
        end = match.end()
    return words


# What NLTK's word tokenizer cuts off or apart; a mark inside a word ("dog/cat", "t.v", "**dog**") stays in it.
_NLTK_APART = re.compile(r"\.\.\.|--|[;@#$%&?!\[\](){}<>\"“”‘’«»`]|[:,](?!\d)")
_NLTK_CLITIC = re.compile(r"(n't|'(?:s|m|d|ll|re|ve)|')$")


def nltk_tokens(text: str) -> list[str]:
    """Tokens as NLTK's `word_tokenize` gives them for what object names are made of, lower-case.

    Its Treebank rules: marks stand alone, but full stops only at a word's end, slashes, hyphens and asterisks never.
    """
    pieces: list[str] = []
    for chunk in _NLTK_APART.sub(lambda mark: f" {mark.group()} ", text.lower()).split():
        word = chunk.rstrip(".") or chunk
        clitic = _NLTK_CLITIC.search(word)
        head = word[: clitic.start()] if clitic and clitic.start() else word
        pieces.append(head)
        if clitic and clitic.start():
            pieces.append(clitic.group())
        if word != chunk:
            pieces.append(".")
    return pieces
