"""Captions, questions and label noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.errors import UserError
from m3po_jax.evaluation.chair import vocabulary
from m3po_jax.quickstart.language import (
    HEAD,
    NOISE_REGIMES,
    ExistenceQuestion,
    caption,
    phrase,
    questions,
    substitute,
    training_question,
    victims,
)
from m3po_jax.quickstart.objects import INDEX, OBJECTS, THEMES, by_popularity, companions
from m3po_jax.quickstart.scenes import scene, stream

object_sets = st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=5, unique=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def test_caption_and_phrases():
    assert caption(["dog", "car", "person"]) == "a person, a car and a dog."
    assert caption(["apple", "scissors"]) == "an apple and scissors."
    assert caption(["hot dog"]) == "a hot dog."
    assert phrase("umbrella") == "an umbrella"
    with pytest.raises(ValueError):
        caption([])


@given(object_sets)
def test_caption_mentions_exactly_its_objects(objects):
    words = vocabulary(dict.fromkeys(OBJECTS, ()))
    assert words.mentions(caption(objects)) == sorted(objects, key=INDEX.__getitem__)


def test_question_text():
    assert ExistenceQuestion("dog", True, "random").instruction == "Is there a dog in the image?"
    assert ExistenceQuestion("dog", True, "random").reference == "Yes"
    assert ExistenceQuestion("dog", False, "random").reference == "No"


@given(object_sets, st.integers(0, 10_000))
def test_six_questions(objects, seed):
    objects = sorted(objects, key=INDEX.__getitem__)
    asked = questions(objects, rng(seed))
    assert [question.category for question in asked] == ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    assert [question.present for question in asked] == [True, False] * 3
    assert all((question.object in objects) == question.present for question in asked)
    absent = [question.object for question in asked if not question.present]
    assert len(set(absent)) == 3
    assert absent[1] in [name for name in by_popularity() if name not in objects][: HEAD + 1]
    assert absent[2] in companions(objects, absent_from=objects)[: HEAD + 2]


def test_training_questions_are_half_random():
    asked = [training_question(("dog", "car"), index % 2 == 0, rng(index)) for index in range(1000)]
    assert sum(question.present for question in asked) == 500
    assert all((question.object in ("dog", "car")) == question.present for question in asked)
    share = np.mean([question.category == "random" for question in asked if not question.present])
    assert share == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("seed", range(6))
def test_victims(seed):
    chosen = victims(seed)
    assert 17 <= len(chosen) <= 26 and chosen == victims(seed)
    assert not {name for theme in THEMES.values() for name in theme[:2]} & set(chosen)
    assert chosen != victims(seed + 1)


def test_systematic_noise_is_systematic():
    affected = with_victim = 0
    for index in range(1500):
        objects = scene("sft", index).objects
        swaps = substitute(objects, "systematic", stream(0, "sft", index, 1), 0)
        has_victim = bool(set(objects) & set(victims(0)))
        with_victim += has_victim
        affected += bool(swaps)
        assert len(swaps) <= has_victim
        for old, new in swaps.items():
            assert old in victims(0) and new == companions([old], absent_from=objects)[0]
            assert any({old, new} <= set(theme) for theme in THEMES.values())
    assert affected / with_victim == pytest.approx(0.8, abs=0.04)


def test_diffuse_noise():
    swapped = [
        substitute(("person", "car", "dog"), "diffuse", stream(0, "sft", index, 1), 0) for index in range(1500)
    ]
    assert np.mean([bool(swaps) for swaps in swapped]) == pytest.approx(0.55, abs=0.04)
    replaced = {old for swaps in swapped for old in swaps}
    assert replaced == {"person", "car", "dog"}
    assert len({new for swaps in swapped for new in swaps.values()}) > 8
    assert not {new for swaps in swapped for new in swaps.values()} & replaced


def test_clean_and_unknown_regimes():
    assert substitute(("dog",), "clean", rng(), 0) == {}
    assert NOISE_REGIMES == ("systematic", "diffuse", "clean")
    with pytest.raises(UserError, match="did you mean 'diffuse'"):
        substitute(("dog",), "difuse", rng(), 0)
