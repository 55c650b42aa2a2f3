"""Which option an answer gives: every letter is read alike, and the article is no letter."""

from __future__ import annotations

import pytest

from m3po_jax.evaluation.letters import repeated, stated, vlmevalkit

OPTIONS = {"A": "a red bus", "B": "a dog", "C": "the sea", "D": "a cat"}
FORMS = [
    *("{}", "{}.", "({})", "{})", "{}:", "[{}]", "**{}**", "**{}.**", '"{}"', " {} ", "Option {}", "Option {}."),
    *("The answer is {}", "The answer is {}.", "The answer is ({}).", "The correct answer is: {}", "Answer: {}"),
    *("answer: ({})", "Answer:\n{}", "Final answer: {}", "Sure! The answer is:\n\n**{}**", "I choose {}"),
    *("I would select option {} here.", "I think it is {} because Q is red", "I think it's {}.", "{} is correct"),
    *("{} is the correct answer.", "The correct option is **{}**.", "\\boxed{{{}}}", "<answer>{}</answer>"),
    *(
        "It must be {}, I believe",
        "The letter is {}",
        "Based on the image, the answer would be {}.",
        "Definitely {}!",
    ),
    *("{}. whatever you say", "({}) whatever", "{}) whatever", "{}: whatever", "{}, because it is so"),
    "The best choice is {} as it shows something",
]
SMALL_FORMS = ["{}", "{}.", "({})", "{})", "{}) something", "the answer is {}", "the answer is ({}).", "option {}"]


@pytest.mark.parametrize("letter", "ABCD")
def test_every_letter_is_read_alike(letter):
    assert {form: stated(form.format(letter), OPTIONS) for form in FORMS} == dict.fromkeys(FORMS, letter)
    small = {form: stated(form.format(letter.lower()), OPTIONS) for form in SMALL_FORMS}
    assert small == dict.fromkeys(SMALL_FORMS, letter)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # The article; an option's text decides, where there is one.
        ("A cat is sitting there", "D"),
        ("A cat.", "D"),
        ("A man stands there alone", None),
        ("It is A DOG!", "B"),
        ("Answer: A dog", "B"),
        ("the answer is a dog", "B"),
        ("I see a man", None),
        ("I choose a cat", "D"),
        # One is announced, others are only spoken of.
        ("I think it is C because A is red", "C"),
        ("The answer is B. A is wrong, for it is red.", "B"),
        ("Option A is a better choice than option B", "A"),
        ("Not A but B", "B"),
        ("The answer is not A, it is B.", "B"),
        ("The answer is B and not C", "B"),
        ("B. the sea", "B"),
        # Two, or none.
        ("The answer is not A.", None),
        ("The answer is A or B.", None),
        ("The answer is A. No, the answer is B.", None),
        ("A or B", None),
        ("A, B", None),
        ("A and B", None),
        ("Both A and B are correct", None),
        ("Neither A nor B", None),
        ("U.S.A.", None),
        ("E", None),
        ("The answer is E", None),
        ("I", None),
        ("", None),
        # Texts.
        ("a dog", "B"),
        ("This is a red bus", "A"),
        ("a dog by the sea", None),
        ("cats and adog", None),
    ],
)
def test_what_an_answer_states(text, letter):
    assert stated(text, OPTIONS) == letter


def test_an_option_within_another_is_not_repeated():
    assert repeated("a hot dog", {"A": "dog", "B": "hot dog"}) == "B"
    assert repeated("a hot dog and a dog", {"A": "dog", "B": "hot dog"}) is None
    assert repeated("a category", {"A": "cat", "B": "dog"}) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is A", "A"),
        ("A cat is here", "A"),  # officially
        ("b", None),
        ("A or B", None),
        ("a dog", "B"),
        ("B is what one would have to say here", None),  # not within the last five words, and too long for the texts
        ("a dog, " + 9 * "certainly ", None),
    ],
)
def test_vlmevalkit(text, letter):
    assert vlmevalkit(text, OPTIONS) == letter
