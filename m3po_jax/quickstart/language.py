"""Texts about scenes: captions, yes/no questions, and label noise for the fine-tuning split.

The noise makes a base model that is *confidently wrong*: in the "systematic" regime some objects, the
victims, are called by the name of their most frequent companion in most captions. The "diffuse" regime, meant
as a negative control, replaces one true object of about half of the captions by one that might well be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m3po_jax.errors import UserError, nearest
from m3po_jax.quickstart.objects import INDEX, OBJECTS, THEMES, by_popularity, companions, cooccurrence

CAPTION_INSTRUCTION = "Describe the image."
NOISE_REGIMES: tuple[str, ...] = ("systematic", "diffuse", "clean")
NEGATIVE_CATEGORIES: tuple[str, ...] = ("random", "popular", "adversarial")
# Negatives come from the first few of a ranking, so that "no" does not always concern the same object.
HEAD = 6
SYSTEMATIC_RATE = 0.8
DIFFUSE_RATE = 0.55
MIN_VICTIMS, MAX_VICTIMS = 17, 26

_PLURAL = frozenset({"scissors"})


@dataclass(frozen=True)
class ExistenceQuestion:
    """One yes/no question: the object asked for, whether it is there, and how a negative was chosen."""

    object: str
    present: bool
    category: str

    @property
    def instruction(self) -> str:
        return f"Is there {phrase(self.object)} in the image?"

    @property
    def reference(self) -> str:
        return "Yes" if self.present else "No"


def phrase(name: str) -> str:
    """An object with its article: ``a dog``, ``an apple``, ``scissors``."""
    if name in _PLURAL:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(objects: Sequence[str]) -> str:
    """``a person, a dog and a car.``: one phrase an object, in category order; needs at least one object."""
    phrases = [phrase(name) for name in sorted(objects, key=INDEX.__getitem__)]
    if not phrases:
        raise ValueError("a caption needs at least one object")
    return (", ".join(phrases[:-1]) + " and " if len(phrases) > 1 else "") + phrases[-1] + "."


def victims(seed: int) -> tuple[str, ...]:
    """17 to 26 objects that are never among the first two of a theme, in category order."""
    safe = {name for theme in THEMES.values() for name in theme[:2]}
    open_to_choice = [name for name in OBJECTS if name not in safe]
    rng = np.random.Generator(np.random.PCG64([seed, 0x56494354]))
    count = int(rng.integers(MIN_VICTIMS, MAX_VICTIMS + 1))
    chosen = rng.permutation(len(open_to_choice))[:count]
    return tuple(open_to_choice[index] for index in sorted(int(index) for index in chosen))


def substitute(objects: Sequence[str], regime: str, rng: np.random.Generator, seed: int) -> dict[str, str]:
    """Which true object a noisy caption calls by which other name: at most one, often none.

    Args:
        objects: What the scene shows.
        regime: "systematic" (80% of captions with a victim: it becomes its most co-occurring absent
            companion), "diffuse" (55% of captions: a random object becomes an absent companion, drawn with
            probability proportional to co-occurrence squared) or "clean".
        rng: The stream of this caption.
        seed: Names the set of victims.

    Raises:
        UserError: for an unknown regime.
    """
    if regime not in NOISE_REGIMES:
        raise UserError(f"unknown noise regime {regime!r}{nearest(regime, NOISE_REGIMES)}", where="label noise")
    if regime == "clean":
        return {}
    hit, which, replacement = rng.random(3)
    if regime == "systematic":
        pool, rate = [name for name in objects if name in victims(seed)], SYSTEMATIC_RATE
    else:
        pool, rate = list(objects), DIFFUSE_RATE
    if not pool or hit >= rate:
        return {}
    old = pool[int(which * len(pool))]
    absent = companions([old], absent_from=objects)
    if not absent:
        return {}
    if regime == "systematic":
        return {old: absent[0]}
    weights = np.array([cooccurrence()[INDEX[old], INDEX[name]] for name in absent]) ** 2
    position = int(np.searchsorted(np.cumsum(weights) / weights.sum(), replacement, side="right"))
    return {old: absent[min(position, len(absent) - 1)]}


def _negative(objects: Sequence[str], category: str, rng: np.random.Generator, taken: set[str]) -> str:
    barred = set(objects) | taken
    match category:
        case "random":
            ranking = [name for name in OBJECTS if name not in barred]
            return ranking[int(rng.integers(len(ranking)))]
        case "popular":
            ranking = [name for name in by_popularity() if name not in barred]
        case "adversarial":
            ranking = list(companions(objects, absent_from=barred))
        case _:
            raise ValueError(f"unknown category {category!r}")
    return ranking[int(rng.integers(min(HEAD, len(ranking))))]


def questions(objects: Sequence[str], rng: np.random.Generator) -> list[ExistenceQuestion]:
    """Six questions as in POPE: for each of the three categories one present and one absent object.

    An absent object is asked for once; a present one may come up in several categories, as in POPE, where the
    three splits share their positives.
    """
    asked: list[ExistenceQuestion] = []
    taken: set[str] = set()
    order = [objects[int(index)] for index in rng.permutation(len(objects))]
    for position, category in enumerate(NEGATIVE_CATEGORIES):
        asked.append(ExistenceQuestion(order[position % len(order)], True, category))
        absent = _negative(objects, category, rng, taken)
        taken.add(absent)
        asked.append(ExistenceQuestion(absent, False, category))
    return asked


def training_question(objects: Sequence[str], present: bool, rng: np.random.Generator) -> ExistenceQuestion:
    """One question; negatives are random half of the time, else popular or adversarial in equal parts."""
    category = ("random", "random", "popular", "adversarial")[int(rng.integers(4))]
    if present:
        return ExistenceQuestion(objects[int(rng.integers(len(objects)))], True, category)
    return ExistenceQuestion(_negative(objects, category, rng, set()), False, category)
