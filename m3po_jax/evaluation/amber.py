"""AMBER: hallucination without a judge (Wang et al., arXiv:2311.07397), by the official rules.

Discriminative: a response must be ``Yes`` or ``No`` exactly, and the positive class is *No*. Percentages are rounded
to one decimal, and F1 is computed from the rounded precision and recall. Generative: the nouns of a description that
the association file knows are compared with the image's objects, words alike in meaning included; what "alike" means
is a function that is handed in, and its name belongs to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from m3po_jax.errors import UserError
from m3po_jax.evaluation.chair import singular
from m3po_jax.evaluation.records import Record, text_field, yes_no_items

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
    known = {kind for kinds in GROUPS.values() for kind in kinds}
    items = yes_no_items(answers, labels, exact.get, lambda text: text not in exact, categories=known, kind="type")
    return {
        "summary": yes_no_scores(items),
        "categories": {
            name: yes_no_scores(
                own, epsilon=1e-3 if name == "existence" else 1e-4, parts=3 if name == "attribute" else 1
            )
            for name, kinds in GROUPS.items()
            if (own := [item for item in items if item["category"] in kinds])
        },
        "items": items,
    }


def yes_no_scores(items: Sequence[Mapping[str, Any]], *, epsilon: float = 1e-4, parts: int = 1) -> dict[str, Any]:
    """Percentages with the positive class No, rounded to one decimal as officially.

    Args:
        epsilon: In F1's denominator.
        parts: Official totals that are added up; each starts at 0.001.
    """
    start = parts * _START
    said_no = [item for item in items if item["parsed"] == "no"]
    true_no = [item for item in items if item["label"] == "no"]
    hits = sum(item["label"] == "no" for item in said_no)
    accuracy = round(sum(item["correct"] for item in items) / (start + len(items)) * 100, 1)
    precision = round(hits / (start + len(said_no)) * 100, 1)
    recall = round(hits / (start + len(true_no)) * 100, 1)
    p, r = precision / 100, recall / 100
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
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": round(2 * p * r / (p + r + epsilon) * 100, 1),
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
    for record in records:
        where = f"id {record.get('id')!r}"
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
                "id": str(record["id"]),
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

    def share(part: str, whole: str) -> float:
        return sum(len(i[part]) for i in items) / (_START + sum(len(i[whole]) for i in items)) * 100

    clean = sum(not item["hallucinated"] for item in items)
    return {
        "n": len(items),
        "chair": round(share("hallucinated", "mentions"), 1),
        "cover": round(share("found", "objects"), 1),
        "hal": round(100 - clean / (_START + len(items)) * 100, 1) if items else None,
        "cog": round(share("named", "hallu"), 1),
        "mean_words": sum(item["words"] for item in items) / len(items) if items else None,
        "degenerate": [] if any(item["mentions"] for item in items) else ["no description names a known object"],
    }


class _Alike:
    """`similarity` above the threshold, asked once for each pair of words."""

    def __init__(self, similarity: Similarity):
        self.similarity = similarity
        self.known: dict[tuple[str, str], bool] = {}

    def __call__(self, first: str, second: str) -> bool:
        if (first, second) not in self.known:
            self.known[first, second] = self.similarity(first, second) > SIMILAR
        return self.known[first, second]


def _objects(record: Record, name: str, association: Mapping[str, Any], where: str) -> list[str]:
    found = record.get(name)
    if not isinstance(found, list):
        raise UserError(f"{name!r} must be a list of objects", where=where)
    unknown = [word for word in found if word not in association]
    if unknown:
        raise UserError(f"the association file does not have {unknown[0]!r}", where=where)
    return [str(word) for word in found]


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
    known = set(association) | {word for words in association.values() for word in words}

    def find(text: str) -> list[str]:
        words = [word.strip(".,;:!?\"'()").lower() for word in text.split()]
        return [word if word in known else singular(word) for word in words]

    return find


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
