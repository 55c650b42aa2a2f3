"""CHAIR: which objects does a caption mention that the image does not show? (Rohrbach et al., 2018)

Two rules. ``official`` is that of the released script, for COCO: its synonyms (a file of its authors, which does not
ship here), its terms of two words, its treatment of seats and of "bus". ``vocabulary`` is for any objects: their
names and the other words that the recipe lists, so its numbers are not comparable with published ones. In both, words
are lower-cased and made singular, terms of several words are merged, synonyms are mapped to their object, and
repeated mentions count. All rates are fractions. Short captions lower CHAIR_i and CHAIR_s alike, so recall and length
always stand beside them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.errors import UserError
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Frontier,
    Item,
    Metric,
    Rates,
    Sums,
    needs_texts,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, by_id, join, read_text, text_field
from m3po_jax.evaluation.words import BREAK, known_form, nltk_tokens, singular, tokens

# What the official script merges into one word. "Stove top oven" is in its list and never found: it merges pairs.
_MERGED = """
    motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light, fire hydrant,
    stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket, wine glass,
    hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate,
    train track"""
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
DOUBLE_WORDS = {
    **{term.strip(): term.strip() for term in _MERGED.split(",")},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"},
}
"""Two words -> the word or term that they are to the official script; qualifiers of animals and vehicles go."""
# What the official lemmatiser makes of these, so that they never count ("buses" and "tie" do).
_CUT = {"bus": "bu", "minibus": "minibu", "airbus": "airbu", "ties": "ty"}


@dataclass(frozen=True)
class Vocabulary:
    """Terms that name objects.

    Attributes:
        terms: Words of a term, singular and lower-case, -> its object; a term may map to None, which keeps
            its words from counting ("home plate" is no plate).
        suppressed: word -> another word whose presence in the text keeps the first from counting (a "seat" in
            a text about a "toilet" is not a chair).
        lemmas: word -> what it becomes instead of its singular.
        official: Words are NLTK's tokens; a hyphenated word is never a term of several words.
    """

    terms: Mapping[tuple[str, ...], str | None]
    suppressed: Mapping[str, str] = field(default_factory=dict)
    lemmas: Mapping[str, str] = field(default_factory=dict)
    official: bool = False

    @functools.cached_property
    def longest(self) -> int:
        return max((len(term) for term in self.terms), default=0)

    @functools.cached_property
    def objects(self) -> frozenset[str]:
        return frozenset(name for name in self.terms.values() if name is not None)

    def object_of(self, name: str) -> str:
        """What a category of this name is called here."""
        return self.terms.get(tuple(name.split(" "))) or name

    def words(self, text: str) -> list[str]:
        """Lower-case words in the form that the vocabulary has ("scissors"), else singular; marks between them."""
        cut = nltk_tokens if self.official else tokens
        words = [word for token in cut(text) for word in self._parts(token)]
        return [self.lemmas.get(word) or known_form(word, self._words_of_terms) for word in words]

    def _parts(self, token: str) -> list[str]:
        """A token, or the words of a hyphenated one that are a term together ("hot-dogs")."""
        parts = token.split("-")
        if self.official or len(parts) == 1 or (token,) in self.terms:
            return [token]
        return parts if tuple(known_form(part, self._words_of_terms) for part in parts) in self.terms else [token]

    @functools.cached_property
    def _words_of_terms(self) -> frozenset[str]:
        return frozenset(word for term in self.terms for word in term)

    def mentions(self, text: str) -> list[str]:
        """The objects a text names, in order, repeats included."""
        words = self.words(text)
        barred = {word for word, rival in self.suppressed.items() if rival in words}
        mentioned: list[str] = []
        position = 0
        while position < len(words):
            for length in range(min(self.longest, len(words) - position), 0, -1):
                term = tuple(words[position : position + length])
                if term in self.terms:
                    name = self.terms[term]
                    if name is not None and not (length == 1 and term[0] in barred):
                        mentioned.append(name)
                    position += length
                    break
            else:
                position += 1
        return mentioned


def vocabulary(synonyms: Mapping[str, Iterable[str]]) -> Vocabulary:
    """A vocabulary of objects and other words for them; an object's name is always one of its terms.

    Raises:
        UserError: when a term stands for two objects, or has no words.
    """
    terms: dict[tuple[str, ...], str | None] = {}
    for name, others in synonyms.items():
        for term in (name, *others):
            words = tuple(word for word in tokens(term) if word != BREAK)
            if not words:
                raise UserError(f"the term {term!r} of {name!r} has no words", where="CHAIR vocabulary")
            if terms.setdefault(words, name) != name:
                raise UserError(f"{term!r} stands for {terms[words]!r} and {name!r}", where="CHAIR vocabulary")
    for words, owner in list(terms.items()):
        terms.setdefault((*words[:-1], singular(words[-1])), owner)  # "dogs" names a dog too
    return Vocabulary(terms)


@functools.lru_cache(maxsize=1)
def _coco_objects() -> tuple[str, ...]:
    """The 80 objects with the words that the official script can find for each, as its synonyms.txt lists them."""
    file = resources.files("m3po_jax.evaluation") / "coco_objects.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


def coco_vocabulary(synonym_lines: Iterable[str] | None = None) -> Vocabulary:
    """The official COCO vocabulary, with its oddity that "bus" (but not "buses") is never counted.

    Args:
        synonym_lines: Lines like those of the authors' synonyms.txt, an object and its synonyms, split at a comma and
            one space; a name that keeps a leading space never matches, as in the official script. None: theirs.
    """
    synonym_lines = _coco_objects() if synonym_lines is None else synonym_lines
    single: dict[str, str] = {}
    for line in synonym_lines:
        names = line.strip().split(", ")
        single |= {name: names[0] for name in names if name and name == name.strip()}
    terms: dict[tuple[str, ...], str | None] = {(name,): target for name, target in single.items() if " " not in name}
    for term, merged in DOUBLE_WORDS.items():
        terms[tuple(term.split(" "))] = single.get(merged)
    return Vocabulary(terms, suppressed={"seat": "toilet"}, lemmas=_CUT, official=True)


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
    items: list[dict[str, Any]] = []
    for key, record in by_id(records, "caption").items():
        text = text_field(record)
        truth = record.get("objects")
        if not isinstance(truth, list) or not all(isinstance(name, str) for name in truth):
            raise UserError("'objects' must be a list of object names", where=f"id {key!r}")
        unknown = sorted(set(truth) - words.objects)
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


def sums(item: Item) -> list[float]:
    """What a caption adds: false mentions, mentions, whether one is false, 1, objects named, objects, words, tokens.

    NaN tokens where their number is not known.
    """
    wrong, tokens = len(item["hallucinated"]), item.get("tokens")
    counts = [wrong, len(item["mentions"]), bool(wrong), 1, len(item["found"]), len(item["objects"]), item["words"]]
    return [*counts, np.nan if tokens is None else tokens]


def rates(sums: Sums) -> Rates:
    """CHAIR's rates from `sums`; those of tokens only where every caption has their number."""
    wrong, mentions, with_wrong, count, named, truth, words, tokens = np.moveaxis(sums, -1, 0)
    chair_i, recall = ratio(wrong, mentions), ratio(named, truth)
    return {
        "chair_i": chair_i,
        "chair_s": ratio(with_wrong, count),
        "recall": recall,
        # Where every mention is false, F1 is 0; where a rate is undefined, so is F1.
        "f1": ratio(2 * (1 - chair_i) * recall, 1 - chair_i + recall, undefined=0.0),
        "mean_words": ratio(words, count),
        "mean_tokens": ratio(tokens, count),
        "mean_objects": ratio(mentions, count),
    }


def summarize(items: Sequence[Item]) -> dict[str, Any]:
    """The summary of `chair` from its items, so that a table can be recomputed or restricted to a subset."""
    numbers = values(sums, rates, items)
    mentions = sum(len(item["mentions"]) for item in items)
    reasons = [
        reason
        for reason, applies in (
            ("there are no captions", not items),
            ("no caption mentions an object: chair_i and f1 are undefined", items and not mentions),
            ("no image shows an object: recall and f1 are undefined", items and not any(i["objects"] for i in items)),
            ("every mention is hallucinated: f1 is 0", numbers.get("chair_i") == 1 and numbers["recall"] == 0),
        )
        if applies
    ]
    wrong = Counter(name for item in items for name in item["hallucinated"])
    return {
        "n": len(items),
        **dict.fromkeys(("chair_i", "chair_s", "recall", "f1", "mean_words", "mean_tokens", "mean_objects")),
        **numbers,
        "mentions": mentions,
        "hallucinated_mentions": wrong.total(),
        "captions_with_hallucination": sum(bool(item["hallucinated"]) for item in items),
        "captions_without_objects": sum(not item["mentions"] for item in items),
        "top_hallucinated": [list(pair) for pair in sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))[:10]],
        "degenerate": reasons,
    }


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    labels = [{"id": prompt.id, "objects": prompt.metadata["objects"]} for prompt in prompts]
    records = [dict(answer) | {"objects": label["objects"]} for answer, label in join(answers, labels)]
    if rule == "official":
        return chair(records, coco_vocabulary(read_text(config.synonyms).splitlines() if config.synonyms else None))
    entries = [[part.strip() for part in entry.split(",")] for entry in config.vocabulary]
    words = {name: others for name, *others in entries}
    named = {name for record in records for name in record["objects"]}
    scored = chair(records, vocabulary(words or dict.fromkeys(sorted(named), ())))
    if not any(words.values()):
        scored["note"] = (
            "objects are found by their own names, without synonyms: not comparable with published CHAIR, which is "
            "of rule: official"
        )
    return scored


def _check(config: BenchmarkConfig) -> None:
    if config.rule == "vocabulary" and config.synonyms:
        raise UserError(
            "rule: vocabulary reads no synonyms file",
            where="synonyms",
            remedy="list other words behind a name in vocabulary ('person, man, woman'), or rule: official",
        )
    if config.synonyms:
        read_text(config.synonyms)


METRIC = Metric(
    rules={
        "vocabulary": "the official counting with the words that `vocabulary` lists; no published numbers are of it",
        "official": "utils/chair.py of LisaAnne/Hallucination (2018), with the words of its synonyms.txt",
    },
    needs="`metadata.objects`, a list",
    missing=needs_texts("objects"),
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("chair_i", "CHAIR_i", "lower", "share of the named objects that the image lacks (%)"),
        Column(
            "delta_chair_i",
            "ΔC",
            "lower",
            "CHAIR_i minus that of the base stopped earlier or later to the same recall",
        ),
        Column("chair_s", "CHAIR_s", "lower", "share of the captions that name at least one such object (%)"),
        Column("recall", "Recall", "higher", "share of the image's objects that the caption names (%)"),
        Column("f1", "F1", "higher", "harmonic mean of precision and recall (%)"),
        Column("mean_objects", "Objects", None, "named objects a caption", 2, False),
        Column("mean_tokens", "Tokens", None, "tokens an answer", 1, False),
    ),
    deciding=("delta_chair_i", "f1"),
    settings=("vocabulary", "synonyms"),
    default_rule=lambda config: "official" if config.synonyms else "vocabulary",
    frontier=Frontier(gain="recall", cost="chair_i", delta="delta_chair_i"),
    check=_check,
)
