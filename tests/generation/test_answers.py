"""What counts as an exact match."""

import pytest

from olmoe_jax.generation.answers import exact_match, scorer_for

INTENT = '{"intent": "A", "slots": {"x": ["1", "2"]}}。'


@pytest.mark.parametrize(
    ("scorer", "output", "expected", "right"),
    [
        ("gsm", " 3 + 4 = 7\n#### 1,007\nQuestion: 5", " so 1007 #### 1,007", True),
        ("gsm", " 7 apples", "#### 8", False),
        ("gsm", "", "#### 8", False),
        ("intent", '```json\n{"intent": "A", "slots": {"x": ["2", "1"]}}\n', INTENT, True),
        ("intent", '{"intent": "B", "slots": {"x": ["2", "1"]}}', INTENT, False),
        ("intent", INTENT, "no intent", False),
        ("text", " yes\n", "yes", True),
        ("text", "Yes", "yes", False),
    ],
)
def test_exact_match(scorer, output, expected, right):
    assert exact_match(scorer, output, expected) is right


def test_scorer_is_told_from_the_answers():
    assert scorer_for(["a #### 1", "#### 2"]) == "gsm"
    assert scorer_for([INTENT, INTENT]) == "intent"
    assert scorer_for(["#### 2", INTENT]) == scorer_for(["{}"]) == "text"
