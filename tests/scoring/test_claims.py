"""Answers to claims: sentences, objects, yes/no answers and short answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.scoring.claims import Claim, object_vocabulary, polarity, sentences, split_claims

OBJECTS = object_vocabulary(["dog", "cat", "traffic light"])


def texts(claims):
    return [claim.text for claim in claims]


def test_objects_are_named_once_in_order():
    found = split_claims("Describe the image.", "Two cats, a dog and another cat near traffic lights.", OBJECTS)
    assert found == [Claim("cat"), Claim("dog"), Claim("traffic light")]
    assert split_claims("Describe the image.", "A zebra.", OBJECTS) == []


def test_yes_and_no_assert_and_deny_what_the_question_names():
    asked = "Is there a dog in the image?"
    assert split_claims(asked, "Yes", OBJECTS) == [Claim("dog", False, True)]
    assert split_claims(asked, "no, there is a cat", OBJECTS) == [Claim("dog", True, True)]
    assert split_claims(asked, "No.", None) == [Claim(asked, True, True, True)]
    assert split_claims(f"{asked} Please answer yes or no.", "Yes.", None) == [Claim(asked, False, True, True)]
    more = split_claims(asked, "Yes. It sleeps on a red sofa.", None)
    assert more == [Claim(asked, question=True), Claim("It sleeps on a red sofa.")]


@pytest.mark.parametrize(
    ("instruction", "answer", "said"),
    [
        ("Is there a dog?", "Yes, there is.", "yes"),
        ("Is there a dog?", "No there is not", "no"),
        ("Is there a dog?", " **No**", "no"),
        ("Is there a dog?", "There is none.", None),
        ("Is there a dog?", "Nothing like it.", None),
        ("Describe the image.", "No people are to be seen.", None),
        ("Who is in the picture?", "No people are to be seen.", None),
        ("Who is in the picture? Anyone?", "No.", "no"),
        ("Does it show a dog, yes or no", "yes", "yes"),
        ("Is there a dog?", "", None),
    ],
)
def test_polarity(instruction, answer, said):
    assert polarity(instruction, answer) == said


def test_sentences_and_lists():
    assert sentences("A dog. A cat!  Is it red?") == ["A dog.", "A cat!", "Is it red?"]
    assert sentences("The image shows:\n1. A dog\n2) a cat\n- 3 birds\n* …\n") == [
        "The image shows:",
        "A dog",
        "a cat",
        "3 birds",
    ]
    assert sentences("一只狗。一只猫！") == ["一只狗。", "一只猫！"]
    assert sentences("The 1.5 m sign costs 3.20 euros") == ["The 1.5 m sign costs 3.20 euros"]
    assert sentences(" \n ...") == []


def test_short_answers_are_joined_to_their_question():
    instruction = "What color is the car?\nAnswer the question using a single word or phrase."
    assert split_claims(instruction, "Red", None) == [Claim("What color is the car? Red", short=True)]
    assert split_claims("How many dogs are there?", "3", None) == [Claim("How many dogs are there? 3", short=True)]
    long = "The car in the picture is red."
    assert split_claims(instruction, long, None) == [Claim(long)]
    assert split_claims("Describe the image.", "A dog.", None) == [Claim("A dog.")]
    assert split_claims(instruction, "", None) == []


@given(st.text(max_size=80), st.text(max_size=200))
def test_any_text_gives_claims_with_words(instruction, answer):
    for vocabulary in (None, OBJECTS):
        for claim in split_claims(instruction, answer, vocabulary):
            assert claim.text.strip()
            assert not claim.negated or polarity(instruction, answer) == "no"


@given(st.lists(st.sampled_from(["dog", "cat", "traffic light"]), max_size=5))
def test_no_object_is_lost_or_added(names):
    answer = "I see " + " and ".join(f"a {name}" for name in names)
    assert texts(split_claims("Describe the image.", answer, OBJECTS)) == list(dict.fromkeys(names))


def test_object_vocabulary_of_nothing():
    assert object_vocabulary([]) is None
