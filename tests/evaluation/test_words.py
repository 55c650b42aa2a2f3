"""Words of a text and their singular."""

from __future__ import annotations

import pytest

from m3po_jax.evaluation.words import BREAK, known_form, nltk_tokens, singular, tokens

SINGULARS = """
    dogs/dog buses/bus glasses/glass benches/bench knives/knife puppies/puppy policemen/policeman
    people/person ties/tie bus/bus grass/grass is/is boxes/box potatoes/potato houses/house tvs/tv suvs/suv
    gas/gas was/was his/his yes/yes toes/toe magpies/magpie collies/collie pocketknives/pocketknife
    bookshelves/bookshelf minibuses/minibus shoes/shoe grandchildren/grandchild horseshoes/horseshoe
    vases/vase horses/horse women/woman lives/life elves/elf cherries/cherry quizzes/quiz lenses/lens
    cactuses/cactus mice/mouse geese/goose feet/foot leaves/leaf wolves/wolf canoes/canoe omen/omen
    specimens/specimen tennis/tennis dress/dress pies/pie cookies/cookie mangoes/mango snowmen/snowman
"""


@pytest.mark.parametrize("pair", SINGULARS.split())
def test_singular(pair):
    word, expected = pair.split("/")
    assert singular(word) == expected


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("scissors", "scissors"),
        ("skis", "skis"),
        ("taxis", "taxi"),
        ("skies", "sky"),
        ("boots", "boot"),
        ("cherries", "cherry"),
    ],
)
def test_the_form_that_is_known(word, form):
    assert known_form(word, {"scissors", "skis", "ski", "taxi"}) == form


def test_tokens():
    text = "The dog's bowl, dogs' T.V. (two TVs). A **red**  bus;\nhot-dog/cat"
    words = ["the", "dog", "bowl", BREAK, "dogs", "tv", BREAK, "two", "tvs", BREAK, "a", BREAK, "red", "bus"]
    assert [word for word in tokens(text) if word != BREAK] == [
        *(word for word in words if word != BREAK),
        *("hot-dog", "cat"),
    ]
    assert tokens("a, b") == ["a", BREAK, "b"] and tokens("a *b* c") == ["a", "b", "c"] and tokens("") == []


def test_nltk_tokens():
    assert nltk_tokens("A hot, dog. The dog's T.V., (3,000 men) can't!") == [
        *("a", "hot", ",", "dog", ".", "the", "dog", "'s", "t.v", ".", ",", "(", "3,000", "men", ")"),
        *("ca", "n't", "!"),
    ]
