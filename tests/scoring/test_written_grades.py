"""Grades in what judges really write: the table of right values, any text, and log-probs however tokens are cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3po_jax.scoring.written_grades import expected_grade, is_grade_alone, parse_grade, stated_grade

FIVE, TEN = [1, 2, 3, 4, 5], list(range(11))

OF_FIVE = [
    ("4", 4),
    (" 4.\n", 4),
    ("**4**", 4),
    ("**Grade: 4**", 4),
    ("**Grade**: 4", 4),
    ("Grade: **4**/5", 4),
    ("4/5", 4),
    ("4 / 5", 4),
    ("4 out of 5", 4),
    ("4 of 5", 4),
    ("Rating: 4 out of 5", 4),
    ("Rating: 4 out of 5 stars.", 4),
    ("The grade is 4.", 4),
    ("The grade for this answer is 4.", 4),
    ("4 - because 2 cups are missing", 4),
    ("4 because the answer says 3 and there are 2.", 4),
    ("4\n\nThe answer names 3 of the 4 cups.", 4),
    ("4 (good)", 4),
    ("4: it is right", 4),
    ("4, as 2 of the cups are missing", 4),
    ("4 stars", 4),
    ("I would give it a 4.", 4),
    ("I'd rate this answer a 4.", 4),
    ("I would rate this a 4 out of 5.", 4),
    ("I rate it 4/5 because 2 dogs are missing.", 4),
    ("On a scale of 1 to 5, I would give this answer a 4.", 4),
    ("On a scale from 1 to 5, this answer deserves a 4.", 4),
    ("Grade (1-5): 4", 4),
    ("Score: 4", 4),
    ("score=4", 4),
    ("Final grade: 4", 4),
    ("My final grade is 4", 4),
    ("It's a 4.", 4),
    ("Answer: 4", 4),
    ("My answer is 4.", 4),
    ("The image shows 2 cups.\nGrade: 4", 4),
    ("The image shows a cat.\n\n4", 4),
    ("The answer names 1 of 4 things. Grade: 4", 4),
    ("The image shows 2. Grade: 4", 4),
    ("Accuracy: 5, completeness: 3, overall score: 4", 4),
    ("Accuracy score: 5\nCompleteness score: 3\nOverall score: 4", 4),
    ("The grade is 4 because the answer mentions 3 dogs, of which 2 are visible.", 4),
    ("1. The image shows a cat.\n2. The answer says so.\nGrade: 4", 4),
    ("Grade: 4\n\n1. It is right.\n2. It is short.", 4),
    ('{"grade": 4}', 4),
    ('{"grade": "4"}', 4),
    ('{"Grade": 4, "why": "9 windows"}', 4),
    ('```json\n{"rating": "4", "of": 9}\n```', 4),
    ('Here it is:\n```json\n{"score": 4}\n```\nIt names 3 cups.', 4),
    ('{"evaluation": {"score": 4, "why": "1 cup"}}', 4),
    ('{"grade": "4/5"}', 4),
    ('{"grade": 4.0}', 4),
    ("<think>3 things are there, a grade of 2?</think>\n\n4", 4),
    ("3 things are there.</think>4", 4),
    ("[THINK]hm 3[/THINK]4", 4),
    ("◁think▷3◁/think▷4", 4),
    ("<|channel|>analysis<|message|>I see 3<|end|><|start|>assistant<|channel|>final<|message|>4", 4),
    ("<answer>4</answer>", 4),
    ("I see 3 cups. <grade>4</grade>", 4),
    ("<|begin_of_box|>4<|end_of_box|>", 4),
    ("The final answer is $\\boxed{4}$", 4),
    ("$\\boxed{\\text{4}}$", 4),
    ("Rating: [[4]]", 4),
    ("[4]", 4),
    ('"4"', 4),
    ("'4'", 4),
    ("- 4", 4),
    ("> Grade: 4", 4),
    ("评分：4", 4),
    ("4分", 4),
    ("评分: 4分", 4),
    ("４", 4),
    ("Grade -> 4", 4),
    ("Grade - 4", 4),
    ("★★★★☆ (4/5)", 4),
    ("4 (80%)", 4),
    ("Score: 4/5 = 80%", 4),
    ("I'm 90% sure the grade is 4.", 4),
    ("4\n4", 4),
    ("I give it a 4, yes, 4.", 4),
    ("It is not perfect, so the grade is 4.", 4),
    ("## Grade\n\n4", 4),
    ("Grade:\n4", 4),
    ("4.0", 4),
    ("4.0/5.0", 4),
    ("4⭐", 4),
    ("4 stars out of 5", 4),
    ("Grade: 4 stars out of 5", 4),
    ("4 on a scale of 1 to 5", 4),
    ("4 (on a scale from 1 to 5)", 4),
    ("I'd give it 4/5 stars.", 4),
    ("a score of 4", 4),
    ("4 out of a possible 5", 4),
    ("Rating: 4 (good): the picture shows 5 cats.", 4),
    ("Grade: 4\nReason: The answer mentions 2 of the 3 objects.", 4),
    ("Grade: 4\nThe answer says 3 but the image shows 5.", 4),
    ("Grade: 4 Explanation: it is right.", 4),
    ("Score: 4 The answer correctly names the dog.", 4),
    ("4!", 4),
    ("**4** – The answer is right.", 4),
    ("Grade: 4.\n\nThe answer says that there are 3 dogs.", 4),
    ("Grade -> 4", 4),
    ("Grade => 4", 4),
    ("The correct grade for the response is: 4", 4),
    ("Overall, I would rate this response as a 4.", 4),
    ("The answer deserves a 4.", 4),
    ("Grade: **4** out of **5**", 4),
    ("3.5", 3.5),
    ("Grade: 3.5/5", 3.5),
    ("5/5", 5),
    ("1", 1),
    ("Grade: 1", 1),
    ("", None),
    ("good", None),
    ("6", None),
    ("0", None),
    ("-3", None),
    ("Grade: -3", None),
    ("−3", None),
    ("4 or 5", None),
    ("3 or 4", None),
    ("between 3 and 4", None),
    ("I would say between 3 and 4.", None),
    ("Grade: between 3 and 4", None),
    ("Grade: 3 or 4", None),
    ("Grade: 3-4", None),
    ("Grade: 3 to 4", None),
    ("3-4", None),
    ("3, 4", None),
    ("3/4", None),
    ("1-5", None),
    ("1 to 5", None),
    ("v4", None),
    ("4, no, 2", None),
    ("Grade: 4, no, 2", None),
    ("Grade: 4. Actually, I would say 3.", None),
    ("4. On reflection, the grade should be 3.", None),
    ("Grade: 3. Grade: 4", None),
    ("The image shows 2 cups. Grade: not applicable", None),
    ("Grade: N/A. The image shows 2.", None),
    ("Grade: none", None),
    ("Step 1: look. The", None),
    ("Step 1", None),
    ("I cannot grade images with 1 person.", None),
    ("I cannot give this a grade of 4.", None),
    ("I can't give it a 5.", None),
    ("The grade is not 4.", None),
    ("I can see 3 objects in the image, but the answer names only one of them.", None),
    ("I see 4.", None),
    ("There are 4.", None),
    ("2 cups are visible", None),
    ("3 objects", None),
    ("4 of 5 objects are named", None),
    ("4 out of 5 objects are named", None),
    ("1. Look at the image", None),
    ("1. The image shows a cat.\n2. The answer", None),
    ("80%", None),
    ("Grade: 80%", None),
    ("4%", None),
    ("4/10", None),
    ("Grade: 8/10", None),
    ("80/100", None),
    ("Grade: 4/10", None),
    ("at least 3", None),
    ("Grade: at least 3", None),
    ("less than 4", None),
    ("~4", None),
    (">3", None),
    ("4+", None),
    ("4½", None),
    ("4th", None),
    ("5.5", None),
    ("3,5", None),
    ("3,000", None),
    ("2024-05-01", None),
    ("Is the grade 4?", None),
    ("4?", None),
    ("Grade 5 means that all is right. Grade 1 means that it is wrong.", None),
    ("The highest grade is 5.", None),
    ("Grade this answer from 1 to 5.", None),
    ("Image 1: 4\nImage 2: 5", None),
    ("The answer is partly right and 2", None),
    ("<think>Okay, the image shows 3 round shapes on a plain", None),
    ("<think>4", None),
    ("<thinking>The grade is 4.", None),
    ("<think>a</think><think>4", None),
    ("[THINK]4", None),
    ("◁think▷The grade is 4", None),
    ("<|channel|>analysis<|message|>The grade is 4", None),
    ('{"grade": null}', None),
    ('{"grade": true}', None),
    ('{"verdict": 4}', None),
    ('{"grade": 4, "score": 2}', None),
    ('{"grade": 6}', None),
    ('{"grade": [4]}', None),
    ('{"grade": 1e999}', None),
    ('{"grade": 2} or {"grade": 4}', None),
    ('{"grade": "3 or 4"}', None),
    ("[3, 4]", None),
    ("<answer>3</answer><answer>4</answer>", None),
    ("I'm sorry, but I can't help with that.", None),
    ("The man is 4 years old.", None),
    ("2 + 2 = 4", None),
    ("0.8", None),
    ("I would give it a 4 if the 2 cups were red.", None),
    ("4 (maybe 5)", None),
    ("Grade: 4 or maybe 5", None),
    ("Grade: four", None),
    ("A lovely picture!", None),
    ("It is a picture.", None),
]

OF_TEN = [
    ("10", 10),
    ("10/10", 10),
    ("Grade: 10", 10),
    ("The answer names 1 of 4 things. Grade: 10/10", 10),
    ("7/10", 7),
    ("0", 0),
    ("0/10", 0),
    ("8.5", 8.5),
    ("0.8", None),
    ('{"score": 0.85}', None),
    ("Grade: 0.9", None),
    ("11", None),
    ("9 or 10", None),
]


@pytest.mark.parametrize(("text", "grade"), OF_FIVE)
def test_grades_from_one_to_five(text, grade):
    assert parse_grade(text, FIVE) == grade


@pytest.mark.parametrize(("text", "grade"), OF_TEN)
def test_grades_from_nought_to_ten(text, grade):
    assert parse_grade(text, TEN) == grade


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "4" * 5000, '{"grade":' * 5000, "<answer>" * 5000, "{" * 90_000, "4 " * 90_000]
)
def test_hostile_texts_end_in_no_grade_soon(text):
    assert parse_grade(text, FIVE) is None


TEXTS = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [
                "4",
                " ",
                "Grade",
                ":",
                "2 cups",
                "or",
                "{",
                "}",
                '"grade"',
                "/5",
                "<think>",
                "</think>",
                "\n",
                ".",
                "10",
                "-",
            ]
        )
    ).map("".join),
)


@given(TEXTS, st.sampled_from([FIVE, TEN, [0, 10], [-2, 2], [1, 3, 9]]))
def test_any_text_is_a_grade_in_range_or_none(text, grades):
    found = stated_grade(text, grades)
    assert found is None or grades[0] <= found.grade <= grades[-1]
    if found is not None and found.start >= 0:
        assert float(text[found.start : found.stop].replace("−", "-")) == found.grade, (
            "it stands where it is said to stand"
        )


@pytest.mark.parametrize(
    ("text", "grades", "alone"),
    [
        ("4", FIVE, True),
        (" **4**", FIVE, True),
        ("1", TEN, False),
        ("10", TEN, True),
        ("7", TEN, True),
        ("4.", FIVE, False),
        ("Grade: 4", FIVE, False),
        ("4 cups", FIVE, False),
        ("<think>4", FIVE, False),
        ("", FIVE, False),
    ],
)
def test_what_a_cut_text_may_be(text, grades, alone):
    assert is_grade_alone(text, grades) == alone


def tokens(*written):
    """Tokens with their rivals' probabilities: ("1", {"1": 0.9, "2": 0.1})."""
    return [(token, {rival: math.log(p) for rival, p in rivals.items()}) for token, rivals in written]


SURE = {"x": 0.99}


@pytest.mark.parametrize(
    ("text", "written", "grades", "expected"),
    [
        # A digit a token, as Qwen2-VL, Gemma and Llama 2 write numbers: P(10) = P(1) P(0 | 1).
        (
            "10",
            [("1", {"1": 0.9, "9": 0.1}), ("0", {"0": 0.8, "\n": 0.2})],
            TEN,
            0.9 * (0.8 * 10 + 0.2 * 1) + 0.1 * 9,
        ),
        ("10", [("1", {"1": 0.99}), ("0", {"0": 0.99})], TEN, (0.99**2 * 10 + 0.99 * 0.01 * 1) / 0.99),
        # The number ends, and so might have been 10.
        ("1 of them", [("1", {"1": 0.9, "9": 0.1}), (" of", {" of": 0.7, "0": 0.3}), (" them", SURE)], TEN, None),
        ("1\n", [("1", {"1": 0.9, "9": 0.1}), ("\n", {"\n": 0.7, "0": 0.3})], TEN, 0.9 * (0.7 + 0.3 * 10) + 0.1 * 9),
        # A rival that begins another grade tells neither: the text speaks.
        ("9", [("9", {"9": 0.8, "1": 0.2})], TEN, None),
        ("9", [("9", {"9": 0.8, "1": 0.001, "8": 0.1})], TEN, (0.8 * 9 + 0.001 + 0.1 * 8) / 0.901),
        # A tokenizer that writes 10 as one token shows it among the rivals.
        ("10", [("10", {"10": 0.6, "9": 0.2, "1": 0.2})], TEN, 0.6 * 10 + 0.2 * 9 + 0.2 * 1),
        ("9", [("9", {"9": 0.8, "10": 0.1, "1": 0.1})], TEN, 0.8 * 9 + 0.1 * 10 + 0.1),
        # Not the first digit of a reason, nor one of the thinking that a server counts in.
        (
            "It names 1 of 4 things. Grade: 5",
            [
                ("It names ", SURE),
                ("1", {"1": 1.0}),
                (" of 4 things.", SURE),
                (" Grade", SURE),
                (":", SURE),
                (" 5", {" 5": 0.5, "4": 0.5}),
            ],
            FIVE,
            4.5,
        ),
        ("5", [("Hm,", SURE), (" 2", {" 2": 1.0}), ("</think>", SURE), ("5", {"5": 0.5, "3": 0.5})], FIVE, 4.0),
        (
            "<think>2</think>5",
            [("<think>", SURE), ("2", {"2": 1.0}), ("</think>", SURE), ("5", {"5": 1.0})],
            FIVE,
            5.0,
        ),
        (
            '{"grade": 4}',
            [('{"', SURE), ("grade", SURE), ('":', SURE), (" ", SURE), ("4", {"4": 0.75, "2": 0.25}), ("}", SURE)],
            FIVE,
            3.5,
        ),
        ("4/5", [("4", {"4": 0.5, "3": 0.5}), ("/", SURE), ("5", {"5": 1.0})], FIVE, 3.5),
        ("4.5", [("4", {"4": 1.0}), (".", SURE), ("5", {"5": 1.0})], FIVE, None),
        ("4.", [("4.", {"4.": 1.0})], FIVE, None),
        ("4", [("▁4", {"▁4": 1.0})], FIVE, None),
        ("4", [("token_id:29946", {"token_id:29946": 1.0})], FIVE, None),
        ("no", [("no", SURE)], FIVE, None),
        ("4", [], FIVE, None),
        ("", [("", SURE)], FIVE, None),
    ],
)
def test_the_expected_grade_is_that_of_the_stated_number(text, written, grades, expected):
    found = expected_grade(text, tokens(*written), grades)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-9))
