import json

import numpy as np
import pytest

from olmoe_jax.data.formats import encode, format_row
from olmoe_jax.errors import UserError

EOS = "<|endoftext|>"


def trained_text(row, tokenizer, max_seq_length=10_000):
    tokens, trained = encode(row, tokenizer, max_seq_length)
    assert tokens.dtype == np.int32
    assert trained.dtype == bool
    return tokenizer.decode(tokens), tokenizer.decode(tokens[trained])


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("2+3=", "5", "2+3= 5"),
        ("2+3= ", "5", "2+3= 5"),
        ("2+3=", "\n5", "2+3=\n5"),
        ("2+3=\t", " 5", "2+3=\t 5"),
        ("a\r", "b", "a\r b"),  # only space, newline and tab count
        ("", "b", " b"),
    ],
)
def test_prompt_and_completion_are_joined_as_in_the_reference(prompt, completion, text, tokenizer):
    row = {"prompt": prompt, "completion": completion}
    assert trained_text(row, tokenizer) == (text + EOS, text[len(prompt) :] + EOS)
    assert trained_text({"prompt": prompt, "answers": [completion, "no"]}, tokenizer)[0] == (
        text + EOS
    )
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    assert format_row({"messages": turns}, EOS) == format_row(row, EOS)


def test_question_formats(tokenizer):
    expected = ("Question: Why?\nAnswer:So." + EOS, "So." + EOS)
    assert trained_text({"question": "Why?", "answer": "So."}, tokenizer) == expected
    assert trained_text({"question": "Why?", "answers": ["So.", "No."]}, tokenizer) == expected
    row = {"question": "Why?", "answer": None, "answers": ["So."], "prompt": None}
    assert trained_text(row, tokenizer) == expected


@pytest.mark.parametrize("answer", [1, "1"])
def test_choices(answer, tokenizer):
    row = {"question": " Which? ", "choices": ["x", "y", "z"], "answer": answer}
    text = "Question: Which?\nA. x\nB. y\nC. z \nAnswer:"
    assert trained_text(row, tokenizer) == (text + "B. y" + EOS, "B. y" + EOS)


def test_instruction(tokenizer):
    plain = {"instruction": "Print {x}.", "input": "", "output": "print(x)"}
    text, trained = trained_text(plain, tokenizer)
    assert trained == "print(x)" + EOS
    assert text.endswith("\n        Print {x}.\n\n        ### Response:\n    print(x)" + EOS)
    assert "### Input" not in text
    assert trained_text({**plain, "input": None}, tokenizer)[0] == text
    with_input, _ = trained_text({**plain, "input": "x = 1"}, tokenizer)
    assert "\n\n        ### Input:\n        x = 1\n\n        ### Response:\n    " in with_input


def test_every_assistant_turn_of_a_conversation_trains(tokenizer):
    contents = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")]
    contents += [("user", "Bye"), ("assistant", "Ciao")]
    row = {"messages": [{"role": role, "content": content} for role, content in contents]}
    text, trained = trained_text(row, tokenizer)
    assert text == f"Be brief.\nHi Yo{EOS} Bye Ciao{EOS}"
    assert trained == f" Yo{EOS} Ciao{EOS}"


def test_truncation_cuts_the_end(tokenizer):
    row = {"prompt": "abcd", "completion": "efgh"}
    assert trained_text(row, tokenizer, 7) == ("abcd ef", " ef")
    assert trained_text(row, tokenizer, 4) == ("abcd", "")
    assert trained_text(row, tokenizer, 3) == ("abc", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"found: text.*prompt \+ completion.*messages"),
        ({"prompt": "x", "completion": None}, "found: prompt"),
        ({}, "found: none"),
        ({"prompt": 5, "completion": "x"}, "prompt must be text, not int"),
        ({"question": "x", "answer": 5}, "answer must be text, not int"),
        ({"question": "x", "answers": []}, "answers must be a list"),
        ({"question": "x", "answers": "y"}, "answers must be a list"),
        ({"question": "x", "choices": "ab", "answer": 0}, "choices must be a list"),
        ({"question": "x", "choices": ["a", "b"], "answer": 2}, "0 to 1"),
        ({"question": "x", "choices": ["a", "b"], "answer": True}, "0 to 1"),
        ({"prompt": "\ud800", "completion": "x"}, "not valid Unicode"),
        ({"messages": "hello"}, "list of objects"),
        ({"messages": []}, "alternate"),
        ({"messages": [{"role": "user", "content": "x"}]}, "alternate"),
        ({"messages": [{"role": "user", "content": 1}]}, "content must be text"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, message):
    with pytest.raises(UserError, match=message):
        format_row(row, EOS)


def test_golden_cases_of_the_reference(shared, olmoe_tokenizer):
    for case in json.loads((shared / "reference/data/cases.json").read_text())["cases"]:
        tokens, trained = encode(case["example"], olmoe_tokenizer, case["max_seq_length"])
        assert trained.any() == case["kept"], case["name"]
        assert tokens.tolist() == case["expected"]["input_ids"], case["name"]
        labels = np.where(trained, tokens, -100).tolist()
        assert labels == case["expected"]["labels"], case["name"]
