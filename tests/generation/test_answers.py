"""What counts as an exact match."""

import pytest

from olmoe_jax.generation.answers import (
    exact_match,
    parse_intent,
    reference_number,
    scorer_for,
)

INTENT = '{"intent": "A", "slots": {"x": ["1", "2"]}}。'


@pytest.mark.parametrize(
    ("scorer", "output", "expected", "right"),
    [
        ("gsm", " 3 + 4 = 7\n#### 1,007\nQuestion: 5", " so 1007 #### 1,007", True),
        ("gsm", " 7 apples", "#### 8", False),
        ("gsm", "", "#### 8", False),
        ("gsm", "It is 18.", "#### $18", True),
        ("gsm", "It is 18.", "#### 18.", True),
        ("gsm", "It is 18.", "#### 18 dollars", True),
        ("gsm", "It is $1,800", "#### 1800", True),
        ("gsm", "It is -5", "#### -$5", True),
        ("intent", '```json\n{"intent": "A", "slots": {"x": ["2", "1"]}}\n', INTENT, True),
        ("intent", '{"intent": "B", "slots": {"x": ["2", "1"]}}', INTENT, False),
        ("intent", INTENT, "no intent", False),
        ("text", " yes\n", "yes", True),
        ("text", "Yes", "yes", False),
    ],
)
def test_exact_match(scorer, output, expected, right):
    assert exact_match(scorer, output, expected) is right


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (18, "18"),
        (18.0, "18"),
        (1800.0, "1800"),
        (18.5, "18.5"),
        (1e-7, "0.0000001"),
        (10**40, "1" + "0" * 40),
        ("18%", "18"),
        ("1,800", "1800"),
        ("1,234,567.50 €", "1234567.50"),
        ("#### \u22125", "-5"),
        ("3 and 4\n####\n18\r\n5", "18"),
    ],
)
def test_what_a_reference_means(answer, number):
    assert reference_number(answer) == number


@pytest.mark.parametrize(
    "answer", ["", "####", "none", "1/2", "18 or 20", "18,5", "1e3", "10:30", "\uff11", "3 #### x"]
)
def test_a_reference_that_is_not_one_number(answer):
    with pytest.raises(ValueError, match="is not one number"):
        reference_number(answer)


def test_an_intent_with_a_line_separator_in_a_slot():
    assert parse_intent('{"intent": "a", "slots": {"x": "1\u20282"}}\nmore') is not None


def test_scorer_is_told_from_the_answers():
    assert scorer_for(["a #### 1", "#### 2"]) == scorer_for(["#### 1", "#### x", "2"]) == "gsm"
    assert scorer_for([INTENT, INTENT]) == "intent"
    assert scorer_for(["#### 2", INTENT]) == scorer_for(["{}"]) == "text"
