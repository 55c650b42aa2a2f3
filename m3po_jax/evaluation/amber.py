"""AMBER: hallucination without a judge (Wang et al., arXiv:2311.07397), by the official rules.

Discriminative: a response must be ``Yes`` or ``No`` exactly, and the positive class is *No*. Percentages are rounded
to one decimal, and F1 is computed from the rounded precision and recall. Generative: the nouns of a description that
the association file knows are compared with the image's objects, words alike in meaning included; what "alike" means
is a function that is handed in, and its name belongs to the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from m3po_jax.config import BenchmarkConfig
from m3po_jax.data.schema import Prompt
from m3po_jax.data.tables import parse_json_object
from m3po_jax.errors import UserError, nearest
from m3po_jax.evaluation.metric import (
    Answers,
    Column,
    Item,
    Metric,
    Rates,
    Sums,
    as_label,
    needs_all,
    needs_reference,
    needs_texts,
    ratio,
    values,
)
from m3po_jax.evaluation.records import Record, by_id, join, read_text, text_field, yes_no_items
from m3po_jax.evaluation.words import BREAK, known_form, tokens

EXISTENCE = "discriminative-hallucination"
STATE, NUMBER, ACTION = (f"discriminative-attribute-{name}" for name in ("state", "number", "action"))
# Of the relation questions those with the answer yes and those with no have different types in the files.
GROUPS = {
    "existence": (EXISTENCE,),
    "attribute": (STATE, NUMBER, ACTION),
    "state": (STATE,),
    "number": (NUMBER,),
    "action": (ACTION,),
    "relation": ("discriminative-relation", "relation"),
}
EXACT = ("", "exact")  # settings of the similarity that need no model
NOUNS = ("vocabulary", "nltk")  # ways to find them
SIMILAR = 0.8  # strictly more is alike
_START = 0.001  # what the official denominators start at
Nouns = Callable[[str], Sequence[str]]
Similarity = Callable[[str, str], float]


def discriminative(answers: Iterable[Record], labels: Iterable[Record]) -> dict[str, Any]:
    """AMBER's yes/no questions.

    Args:
        answers: ``{"id", "text"}``; nothing is stripped or normalised.
        labels: ``{"id", "label", "category"}``: yes or no, and the type as the annotations spell it.

    Returns:
        ``summary``: n, accuracy, precision, recall, f1 (in percent, one decimal), ``unparsed`` (neither Yes nor No);
        ``categories``: the same for existence, attribute, its state, number and action, and relation; ``items``.

    Raises:
        UserError: ids that do not match, a label that is neither yes nor no, an unknown type.
    """
    exact = {"Yes": "yes", "No": "no"}
    types = {kind for kinds in GROUPS.values() for kind in kinds}
    items = yes_no_items(answers, labels, exact.get, lambda text: text not in exact, categories=types, kind="type")
    return {
        "summary": yes_no_scores(items),
        "categories": {
            name: yes_no_scores(
                of_group, epsilon=1e-3 if name == "existence" else 1e-4, parts=3 if name == "attribute" else 1
            )
            for name, kinds in GROUPS.items()
            if (of_group := [item for item in items if item["category"] in kinds])
        },
        "items": items,
    }


def yes_no_sums(item: Item) -> list[float]:
    """What an answer adds: right answers, answers, those that say No, labels that are no, and both at once."""
    said_no, true_no = item["parsed"] == "no", item["label"] == "no"
    return [bool(item["correct"]), 1, said_no, true_no, said_no and true_no]


def yes_no_rates(sums: Sums, *, epsilon: float = 1e-4, parts: int = 1) -> Rates:
    """Percentages from `yes_no_sums`, rounded as Python rounds, and F1 of what is rounded.

    Args:
        epsilon: In F1's denominator.
        parts: Official totals that are added up; each starts at 0.001.
    """
    correct, count, said_no, true_no, hits = np.moveaxis(sums, -1, 0)
    start = parts * _START
    accuracy, precision, recall = (
        _percent(a / (start + b)) for a, b in ((correct, count), (hits, said_no), (hits, true_no))
    )
    p, r = precision / 100, recall / 100
    f1 = _percent(2 * p * r / (p + r + epsilon))
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}


_percent = np.vectorize(lambda share: round(float(share) * 100, 1), otypes=[float])


def yes_no_scores(items: Sequence[Item], *, epsilon: float = 1e-4, parts: int = 1) -> dict[str, Any]:
    """Percentages with the positive class No, rounded to one decimal as officially.

    Args:
        epsilon: In F1's denominator.
        parts: Official totals that are added up; each starts at 0.001.
    """
    totals = np.sum([yes_no_sums(item) for item in items] or [[0, 0, 0, 0, 0]], axis=0)
    _, _, said_no, true_no, _ = totals
    reasons = [
        reason
        for reason, applies in (
            ("there are no questions", not items),
            ("no answer is No: precision and f1 are 0", items and not said_no),
            ("no label is no: recall and f1 are 0", items and not true_no),
        )
        if applies
    ]
    return {
        "n": len(items),
        **{key: float(value) for key, value in yes_no_rates(totals, epsilon=epsilon, parts=parts).items()},
        "unparsed": sum(item["unparsed"] for item in items),
        "degenerate": reasons,
    }


def generative(
    records: Iterable[Record],
    association: Mapping[str, Sequence[str]],
    safe_words: Iterable[str],
    *,
    nouns: Nouns,
    similarity: Similarity,
) -> dict[str, Any]:
    """AMBER's descriptions.

    A noun counts if the association file has it, as a key or in a list. A safe word is never flagged. A true object
    or a word associated with one covers that object. Any other noun names the hallucination-list object that it is,
    is associated with or resembles, and is flagged, unless it resembles a true object, which it then covers: this
    forgives words of the hallucination list too ("dog" where a "cat" is present).

    Args:
        records: ``{"id", "text", "truth", "hallu"}``: the objects of the image, and likely hallucinations.
        association: ``relation.json``: object -> words for it.
        safe_words: Lines of ``safe_words.txt``.
        nouns: The nouns of a text, singular.
        similarity: Of two words; more than 0.8 is alike.

    Returns:
        ``summary``: n, ``chair`` (flagged of kept nouns), ``cover`` (true objects named), ``hal`` (descriptions with
        a flag), ``cog`` (hallucination-list objects named), in percent with one decimal, mean_words; ``items``.

    Raises:
        UserError: a repeated id, or an object that the association file does not have.
    """
    vocabulary = set(association) | {word for words in association.values() for word in words}
    safe, alike = set(safe_words), _Alike(similarity)
    items = []
    for key, record in by_id(records, "description").items():
        where = f"id {key!r}"
        truth, hallu = (_objects(record, name, association, where) for name in ("truth", "hallu"))
        kept = [noun for noun in nouns(text_field(record)) if noun in vocabulary]
        covered: set[int] = set()
        named: set[int] = set()
        flagged: list[str] = []
        true_words, false_words = _words(truth, association), _words(hallu, association)
        for noun in kept:
            if noun in safe:
                continue
            place = _first(true_words, noun, _equal)
            if place is not None:
                covered.add(place)
                continue
            for test in (_equal, alike):
                place = _first(false_words, noun, test)
                if place is not None:
                    named.add(place)
            place = _first(true_words, noun, alike)
            if place is None:
                flagged.append(noun)
            else:
                covered.add(place)
        items.append(
            {
                "id": key,
                "image": record.get("image"),
                "text": record["text"],
                "mentions": kept,
                "hallucinated": flagged,
                "found": [truth[i] for i in sorted(covered)],
                "objects": truth,
                "named": [hallu[i] for i in sorted(named)],
                "hallu": hallu,
                "words": len(record["text"].split()),
            }
        )
    return {"summary": generative_scores(items), "items": items}


def generative_scores(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of `generative` from its items."""

    numbers = values(sums, rates, items)
    rounded = {key: round(value, 1) if value is not None else None for key, value in numbers.items()}
    return {
        "n": len(items),
        **{"chair": 0.0, "cover": 0.0, "hal": None, "cog": 0.0},
        **rounded,
        "mean_words": numbers.get("mean_words"),
        "degenerate": [] if any(item["mentions"] for item in items) else ["no description names a known object"],
    }


def sums(item: Item) -> list[float]:
    """What a description adds: flagged and kept nouns, objects covered and shown, whether it is clean, 1, objects of
    the hallucination list that it names and that there are, words."""
    pairs = (("hallucinated", "mentions"), ("found", "objects"), ("named", "hallu"))
    flagged, kept, covered, shown, named, listed = (len(item[name]) for pair in pairs for name in pair)
    return [flagged, kept, covered, shown, not flagged, 1, named, listed, item["words"]]


def rates(sums: Sums) -> Rates:
    """Percentages from `sums`, not rounded; officially denominators start at 0.001."""
    flagged, kept, covered, shown, clean, count, named, listed, words = np.moveaxis(sums, -1, 0)
    return {
        "chair": flagged / (_START + kept) * 100,
        "cover": covered / (_START + shown) * 100,
        "hal": 100 - clean / (_START + count) * 100,
        "cog": named / (_START + listed) * 100,
        "mean_words": ratio(words, count),
    }


class _Alike:
    """`similarity` above the threshold, asked once for each pair of words."""

    def __init__(self, similarity: Similarity):
        self.similarity = similarity
        self.decided: dict[tuple[str, str], bool] = {}

    def __call__(self, first: str, second: str) -> bool:
        if (first, second) not in self.decided:
            self.decided[first, second] = self.similarity(first, second) > SIMILAR
        return self.decided[first, second]


def _objects(record: Record, name: str, association: Mapping[str, Any], where: str) -> list[str]:
    listed = record.get(name)
    if not isinstance(listed, list):
        raise UserError(f"{name!r} must be a list of objects", where=where)
    unknown = [word for word in listed if word not in association]
    if unknown:
        raise UserError(f"the association file does not have {unknown[0]!r}", where=where)
    return [str(word) for word in listed]


def _words(objects: Sequence[str], association: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """(word, place of its object): first what is associated with each object, then the objects themselves."""
    related = [(word, place) for place, name in enumerate(objects) for word in association[name]]
    return related + [(name, place) for place, name in enumerate(objects)]


def _first(words: Sequence[tuple[str, int]], noun: str, test: Callable[[str, str], bool]) -> int | None:
    """The place of the first word that passes ``test(noun, word)``."""
    return next((place for word, place in words if test(noun, word)), None)


def _equal(first: str, second: str) -> bool:
    return first == second


def vocabulary_nouns(association: Mapping[str, Sequence[str]]) -> Nouns:
    """Without a tagger: every word of a text that the association file has, singular. Not the official extraction."""
    vocabulary = set(association) | {word for words in association.values() for word in words}

    return lambda text: [known_form(word, vocabulary) for word in tokens(text) if word != BREAK]


def nltk_nouns(text: str) -> list[str]:
    """The official extraction: nltk's tokens tagged as nouns, as WordNet lemmatises them.

    Raises:
        UserError: nltk or its data are not installed.
    """
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer

        lemmatizer = WordNetLemmatizer()
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]
    except (ImportError, LookupError) as error:
        raise UserError(
            f"nltk cannot tag words ({str(error).strip().splitlines()[0]})",
            where="nouns=nltk",
            remedy="pip install 'm3po-jax[amber]', with nltk's punkt, tagger and wordnet data; or nouns=vocabulary",
        ) from None


def exact_similarity(first: str, second: str) -> float:
    """1 for equal words, 0 otherwise: forgives nothing that the association file does not list."""
    return float(first == second)


@functools.cache
def spacy_similarity(model: str) -> Similarity:
    """The official similarity where `model` is ``en_core_web_lg``; other models give other scores.

    Raises:
        UserError: spaCy or the model are not installed.
    """
    try:
        import spacy

        language = spacy.load(model)
    except (ImportError, OSError) as error:
        raise UserError(
            f"spaCy's {model!r} cannot be loaded ({str(error).splitlines()[0]})",
            where="similarity",
            remedy=f"pip install 'm3po-jax[amber]' and python -m spacy download {model}; or similarity=exact",
        ) from None
    return lambda first, second: float(language(first).similarity(language(second)))


def _score_yes_no(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    return discriminative(answers, [as_label(prompt, label=prompt.reference) for prompt in prompts])


def _score(prompts: Sequence[Prompt], answers: Answers, config: BenchmarkConfig, rule: str) -> dict[str, Any]:
    association = parse_json_object(read_text(config.association), config.association)
    safe = read_text(config.safe_words).splitlines() if config.safe_words else []
    labels = [as_label(prompt, **{key: prompt.metadata[key] for key in ("truth", "hallu")}) for prompt in prompts]
    records = [{**label, "text": text_field(answer)} for answer, label in join(answers, labels)]
    nouns = nltk_nouns if config.nouns == "nltk" else vocabulary_nouns(association)
    exact = config.similarity in EXACT
    similarity = exact_similarity if exact else spacy_similarity(config.similarity)
    scored = generative(records, association, safe, nouns=nouns, similarity=similarity)
    # The rule belongs to the numbers: with other nouns or another model they are not the published ones.
    scored["summary"] |= {"nouns": config.nouns, "similarity": "exact" if exact else config.similarity}
    return scored


def _check(config: BenchmarkConfig) -> None:
    if not config.association:
        raise UserError("AMBER needs its relation.json", where="association", remedy="name the file in the benchmark")
    if config.nouns not in NOUNS:
        raise UserError(f"unknown way {config.nouns!r} to find nouns{nearest(config.nouns, NOUNS)}", where="nouns")
    official = config.nouns == "nltk" and config.similarity == "en_core_web_lg"
    if config.rule == "official" and not official:
        raise UserError(
            "the official rule finds nouns by nltk and compares them by en_core_web_lg",
            where="rule",
            remedy="nouns: nltk and similarity: en_core_web_lg, or rule: approximate",
        )
    for path in filter(None, (config.association, config.safe_words)):
        read_text(path)
    if config.nouns == "nltk":
        nltk_nouns("a dog")
    if config.similarity not in EXACT:
        spacy_similarity(config.similarity)


METRIC = Metric(
    rules={
        "approximate": "inference.py of junyangwang0410/AMBER, with the nouns and similarity that the summary names",
        "official": "inference.py of junyangwang0410/AMBER: nouns by nltk, similarity by spaCy's en_core_web_lg",
    },
    needs="`metadata.truth`, `metadata.hallu` (lists)",
    missing=needs_all(needs_texts("truth"), needs_texts("hallu")),
    score=_score,
    sums=sums,
    rates=rates,
    columns=(
        Column("chair", "CHAIR", "lower", "share of the nouns that are flagged (%)", 1, False),
        Column("cover", "Cover", "higher", "share of the image's objects that are named (%)", 1, False),
        Column("hal", "Hal", "lower", "share of the descriptions with a flag (%)", 1, False),
        Column("cog", "Cog", "lower", "share of the likely hallucinations that are named (%)", 1, False),
        Column("mean_words", "Words", None, "words an answer", 1, False),
    ),
    deciding=("chair",),
    settings=("association", "safe_words", "nouns", "similarity"),
    default_rule=lambda config: (
        "official" if (config.nouns, config.similarity) == ("nltk", "en_core_web_lg") else "approximate"
    ),
    check=_check,
)
YES_NO = Metric(
    rules={"official": "inference.py of junyangwang0410/AMBER: exactly Yes or No; the positive class is No"},
    needs="`reference` yes or no, `metadata.category` (the annotation's `type`)",
    missing=needs_reference,
    score=_score_yes_no,
    sums=yes_no_sums,
    rates=yes_no_rates,
    columns=(
        Column("accuracy", "Acc", "higher", "share of right answers (%)", 1, False),
        Column("f1", "F1", "higher", "harmonic mean of precision and recall (%)", 1, False),
    ),
    deciding=("accuracy",),
)
