"""CHAIR: which objects does a caption mention that the image does not show? (Rohrbach et al., 2018)

The rule is the official one for any vocabulary: words are lower-cased and made singular, terms of several
words are merged longest first, synonyms are mapped to their object, and repeated mentions count. All rates
are fractions. Short captions lower CHAIR_i and CHAIR_s alike, so recall and length always stand beside them.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.evaluation.records import Record, by_id, mean, ratio, text_field

# A hyphenated word is one word, as in NLTK's tokenizer.
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$")
_IRREGULAR = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"},
    **{"knives": "knife", "wolves": "wolf", "shelves": "shelf", "loaves": "loaf", "calves": "calf"},
    **{"halves": "half", "lives": "life", "wives": "wife", "leaves": "leaf", "scarves": "scarf"},
    **{"teeth": "tooth", "feet": "foot", "geese": "goose", "oxen": "ox", "buses": "bus", "dice": "die"},
    **{"shoes": "shoe", "ties": "tie", "pies": "pie", "lies": "lie", "movies": "movie", "cookies": "cookie"},
    **{
        "brownies": "brownie",
        "birdies": "birdie",
        "selfies": "selfie",
        "hoodies": "hoodie",
        "canoes": "canoe",
    },
}


@functools.lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """The singular of a lower-case English noun, by suffix; a word that is no plural stays as it is."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for compound in ("men", "women"):
        if word.endswith(compound) and len(word) > len(compound) + 2:
            return word[: -len(compound)] + _IRREGULAR[compound]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    return word[:-1]


@dataclass(frozen=True)
class Vocabulary:
    """Terms that name objects.

    Attributes:
        terms: Words of a term, singular and lower-case, -> its object; a term may map to None, which keeps
            its words from counting ("home plate" is no plate).
        suppressed: word -> another word whose presence in the text keeps the first from counting (a "seat" in
            a text about a "toilet" is not a chair).
        lemmas: word -> what it becomes instead of its singular.
    """

    terms: Mapping[tuple[str, ...], str | None]
    suppressed: Mapping[str, str]
    lemmas: Mapping[str, str]

    @functools.cached_property
    def longest(self) -> int:
        return max((len(term) for term in self.terms), default=0)

    @property
    def objects(self) -> frozenset[str]:
        return frozenset(name for name in self.terms.values() if name is not None)

    def words(self, text: str) -> list[str]:
        """Lower-case words, singular unless the vocabulary knows the word as it stands ("scissors")."""
        found = (_POSSESSIVE.sub("", word) for word in _WORD.findall(text.lower()))
        return [self.lemmas.get(word) or (word if word in self._known else singular(word)) for word in found]

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(word for term in self.terms for word in term)

    def mentions(self, text: str) -> list[str]:
        """The objects a text names, in order, repeats included."""
        words = self.words(text)
        barred = {word for word, rival in self.suppressed.items() if rival in words}
        found: list[str] = []
        position = 0
        while position < len(words):
            for length in range(min(self.longest, len(words) - position), 0, -1):
                term = tuple(words[position : position + length])
                if term in self.terms:
                    name = self.terms[term]
                    if name is not None and not (length == 1 and term[0] in barred):
                        found.append(name)
                    position += length
                    break
            else:
                position += 1
        return found


def vocabulary(synonyms: Mapping[str, Iterable[str]]) -> Vocabulary:
    """A vocabulary of objects and other words for them; an object's name is always one of its terms.

    Raises:
        UserError: when a term stands for two objects, or has no words.
    """
    terms: dict[tuple[str, ...], str | None] = {}
    for name, others in synonyms.items():
        for term in (name, *others):
            words = tuple(_WORD.findall(term.lower()))
            if not words:
                raise UserError(f"the term {term!r} of {name!r} has no words", where="CHAIR vocabulary")
            if terms.setdefault(words, name) != name:
                raise UserError(f"{term!r} stands for {terms[words]!r} and {name!r}", where="CHAIR vocabulary")
    return Vocabulary(terms, suppressed={}, lemmas={})


def coco_vocabulary(synonym_lines: Iterable[str], merged_terms: Mapping[str, str]) -> Vocabulary:
    """The official COCO vocabulary, with its oddity that "bus" (but not "buses") is never counted.

    Args:
        synonym_lines: Lines of synonyms.txt, an object and its synonyms, split at a comma and one space;
            where a word stands in two lines, the first counts.
        merged_terms: Terms of several words -> the word or term they are merged to (27 of them, "baby X" and
            others). One that names no object keeps its words from counting.
    """
    single: dict[str, str] = {}
    for line in synonym_lines:
        names = line.strip("\n").split(", ")
        for name in names:
            # Official behaviour: a name that keeps a leading space never matches.
            if name and name == name.strip():
                single.setdefault(name, names[0])
    terms: dict[tuple[str, ...], str | None] = {(name,): target for name, target in single.items() if " " not in name}
    for term, merged in merged_terms.items():
        terms[tuple(term.split(" "))] = single.get(merged)
    return Vocabulary(terms, suppressed={"seat": "toilet"}, lemmas={"bus": "bu", "buses": "bus"})


def chair(records: Sequence[Record], words: Vocabulary) -> dict[str, Any]:
    """CHAIR of captions.

    Args:
        records: ``{"id", "text", "objects"}``, where objects are those the image shows; ``tokens``, the
            number of generated tokens, may be added to every record.
        words: Terms that count as mentions.

    Returns:
        ``summary``: n; chair_i = hallucinated mentions / mentions; chair_s = captions with one / captions;
        recall = Σ distinct true objects mentioned / Σ true objects; f1 of 1 − chair_i and recall; mean_words,
        mean_tokens (None unless every record has tokens), mean_objects (mentions a caption); the counts
        behind them; top_hallucinated; degenerate, the reasons why a rate is None or forced to 0.
        ``items``: one record a caption with its mentions and hallucinated mentions.

    Raises:
        UserError: for a missing or repeated id, a text that is no text, or objects outside the vocabulary.
    """
    known = words.objects
    items: list[dict[str, Any]] = []
    for key, record in by_id(records, "caption").items():
        text = text_field(record)
        truth = record.get("objects")
        if truth is None or isinstance(truth, str):
            raise UserError("'objects' must be a list of object names", where=f"id {key!r}")
        unknown = sorted(set(truth) - known)
        if unknown:
            raise UserError(f"the vocabulary does not know {', '.join(unknown)}", where=f"id {key!r}")
        mentioned = words.mentions(text)
        items.append(
            {
                "id": key,
                "text": text,
                "objects": sorted(set(truth)),
                "mentions": mentioned,
                "hallucinated": [name for name in mentioned if name not in truth],
                "found": sorted(set(mentioned) & set(truth)),
                "words": len(text.split()),
                "tokens": record.get("tokens"),
            }
        )
    return {"summary": summarize(items), "items": items}


def summarize(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of `chair` from its items, so that a table can be recomputed or restricted to a subset."""
    mentions = sum(len(item["mentions"]) for item in items)
    hallucinated = sum(len(item["hallucinated"]) for item in items)
    found, truth = sum(len(item["found"]) for item in items), sum(len(item["objects"]) for item in items)
    with_one = sum(bool(item["hallucinated"]) for item in items)
    chair_i, recall = ratio(hallucinated, mentions), ratio(found, truth)
    reasons = [
        reason
        for reason, applies in (
            ("there are no captions", not items),
            ("no caption mentions an object: chair_i and f1 are undefined", items and not mentions),
            ("no image shows an object: recall and f1 are undefined", items and not truth),
        )
        if applies
    ]
    f1 = None
    if chair_i is not None and recall is not None:
        total = 1 - chair_i + recall
        f1 = 2 * (1 - chair_i) * recall / total if total else 0.0
        if not total:
            reasons.append("every mention is hallucinated: f1 is 0")
    tokens = [item.get("tokens") for item in items]
    wrong = Counter(name for item in items for name in item["hallucinated"])
    return {
        "n": len(items),
        "chair_i": chair_i,
        "chair_s": ratio(with_one, len(items)),
        "recall": recall,
        "f1": f1,
        "mean_words": mean(item["words"] for item in items),
        "mean_tokens": None if None in tokens else mean(count for count in tokens if count is not None),
        "mean_objects": ratio(mentions, len(items)),
        "mentions": mentions,
        "hallucinated_mentions": hallucinated,
        "captions_with_hallucination": with_one,
        "captions_without_objects": sum(not item["mentions"] for item in items),
        "top_hallucinated": [list(pair) for pair in sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:10]],
        "degenerate": reasons,
    }
