from __future__ import annotations

import pytest

from fedlora.tasks.answers import Extraction, extract

GSM8K = "She has 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 1,018"
META = "We know 3 + 4 = 7.\nThe answer is: 7"
MATH = r"Thus $x = \frac{1}{2}$, so the answer is $\boxed{\dfrac{1}{2}}$."


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        (GSM8K, "final", "1018"),
        (GSM8K, "number", "1018"),
        (META, "final", "7"),
        (META, "number", "7"),
        ("The answer is $42.50.", "final", "42.5"),
        ("the answer is 42. I hope this helps.", "final", "42"),
        ("#### 42\nNext question: 7", "final", "42"),
        ("#### 5 and then #### 6", "final", "6"),
        ("the correct answer is solution2", "final", "solution2"),
        ("the correct answer is true", "final", "true"),
        ("The answer is: The Eiffel Tower!", "final", "eiffel tower"),
        (MATH, "final", r"\frac{1}{2}"),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", "final", r"(3,\frac{\pi}{2})"),
        (r"\boxed{3} or rather \boxed{x^{2}}", "final", "x^{2}"),
        (r"\boxed{12\text{ cm}}", "final", "12cm"),
        ("####", "final", ""),
        ("the answer is: Route 66!", "final", "route 66"),
        ("Paris, of course.", "final", "paris of course"),
        ("about 3 or 4", "number", "4"),
        ("the answer is about 3, not 4", "number", "3"),
        ("it costs 1,250.00 dollars", "number", "1250"),
        ("-5", "number", "-5"),
        ("0.0", "number", "0"),
        ("100", "number", "100"),
        ("no idea", "number", None),
        ("B", "letter", "B"),
        ("b", "letter", "B"),
        ("(C) because", "letter", "C"),
        ("D. the fourth", "letter", "D"),
        ("The answer is (E).", "letter", "E"),
        ("Answer: **A**", "letter", "A"),
        ("I think it is B", "letter", "B"),
        ("my answer is a dog", "letter", None),
        ("my answer is d)", "letter", "D"),
        ("A film is a film", "letter", None),
        ("perhaps", "letter", None),
        ("The  Cat, sat!", "none", "cat sat"),
        (META, "none", "we know 3 4 7 answer is 7"),
    ],
)
def test_the_answer_in_a_text(text: str, how: Extraction, expected: str | None):
    assert extract(text, how) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("#### 18", "So she makes $18. The answer is $18.00."),
        ("#### 1000", "The answer is: 1,000"),
        (r"The answer is: \frac{1}{2}", r"so $\boxed{ \tfrac{1}{2} }$"),
        ("the correct answer is answer1", "The correct answer is answer1."),
        ("the answer is 50", r"\boxed{50\%}"),
    ],
)
def test_equal_answers_are_equal(one: str, other: str):
    assert extract(one, "final") == extract(other, "final")


@pytest.mark.parametrize(("one", "other"), [("#### 1", "#### -1"), ("#### 1/2", "#### 12"), ("#### (1,2)", "#### 12")])
def test_different_answers_differ(one: str, other: str):
    assert extract(one, "final") != extract(other, "final")
