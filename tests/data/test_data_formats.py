import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors

from olmoe_jax.data import load_tokenizer
from olmoe_jax.data.chat import FormattedRow
from olmoe_jax.data.formats import encode_batch, format_row
from olmoe_jax.errors import UserError

EOS = "<|endoftext|>"


def encode(row, tokenizer, max_seq_length=10_000):
    formatted = format_row(row, tokenizer.eos_token)
    (example,) = encode_batch([formatted], tokenizer, max_seq_length)
    assert example.tokens.dtype == np.int32
    assert example.in_loss.dtype == bool
    return example


def trained_text(row, tokenizer, max_seq_length=10_000):
    example = encode(row, tokenizer, max_seq_length)
    return tokenizer.decode(example.tokens), tokenizer.decode(example.tokens[example.in_loss])


STRADDLING = json.loads(Path(__file__).with_name("straddling_tokens.json").read_text())
"""Rows whose border between prompt and answer lies inside a token, and the text that trains."""


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("case", STRADDLING, ids=lambda case: case["case"])
def test_a_token_that_straddles_prompt_and_answer(case, trims, tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_tokens(case["merged"])
    if trims:  # the spaces at both ends of a token are then not in its offsets
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    before = tokenizer.backend_tokenizer.to_str()
    text, trained = trained_text(case["row"], tokenizer)
    assert text == format_row(case["row"], EOS).text
    assert trained == case["trained"]
    assert encode(case["row"], tokenizer).prompt_length == case["prompt_tokens"]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_an_empty_answer_that_a_template_marks(tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.add_tokens(["i? "])
    row = FormattedRow("Hi? Yo", ((3, 3), (4, 6)), templated=True)
    (example,) = encode_batch([row], tokenizer, 16)
    assert tokenizer.decode(example.tokens[example.in_loss]) == "Yo"


TURNS = [("user", "Hi?"), ("assistant", "Yo"), ("user", "Ok!"), ("assistant", " Sure")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "completion": "Yo"},
        {"prompt": "Hi? ", "completion": "Yo"},
        {"prompt": "Hi?", "answer": "Yo"},
        {"prompt": "Hi?", "answers": ["Yo"]},
        {"question": "Hi?", "answer": "Yo"},
        {"question": "Hi?", "answers": [" Yo"]},
        {"question": "Hi?", "choices": ["Yo", "No"], "answer": 1},
        {"instruction": "Hi?", "output": "Yo"},
        {"instruction": "Hi?", "input": "x", "output": "Yo", "history": [["Ok!", "Sure"]]},
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
    ],
)
def test_a_token_that_straddles_trains_in_every_format(row, trims, tokenizer_dir):
    tokenizer = load_tokenizer(str(tokenizer_dir))
    if trims:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    formatted = format_row(row, EOS)
    # One character of the prompt and one of the answer.
    tokenizer.add_tokens([formatted.text[start - 1 : start + 1] for start, _ in formatted.spans])
    expected = "".join(formatted.text[start - 1 : end] for start, end in formatted.spans)
    assert trained_text(row, tokenizer) == (formatted.text, expected)
    assert encode(row, tokenizer).straddling.sum() == len(formatted.spans)


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


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("Yes or no: ", "yes", " yes"),  # " yes" is one token, and so are two spaces
        ("Yes or no:", "yes", " yes"),
        ("Yes or no: ", " yes", "  yes"),
        ("Yes or no:  ", "yes", "yes"),
        ("Yes or no:\n", "yes", "yes"),
        ("Yes or no:\n", "\nyes", "\nyes"),
        ("caf", "\u0301e", " \u0301e"),
        ("x", "\u4e0a\U0001d6fc", " \u4e0a\U0001d6fc"),  # several tokens for a character
        ("a\t", "", ""),
    ],
)
def test_what_an_answer_begins_with_trains(prompt, completion, trained, olmoe_tokenizer):
    row = {"prompt": prompt, "completion": completion}
    assert trained_text(row, olmoe_tokenizer)[1] == trained + EOS


def test_every_assistant_turn_of_a_conversation_trains(tokenizer):
    contents = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo")]
    contents += [("user", "Bye"), ("assistant", "Ciao")]
    row = {"messages": [{"role": role, "content": content} for role, content in contents]}
    text, trained = trained_text(row, tokenizer)
    assert text == f"Be brief.\nHi Yo{EOS} Bye Ciao{EOS}"
    assert trained == f" Yo{EOS} Ciao{EOS}"
    assert encode(row, tokenizer).prompt_length == len("Be brief.\nHi")


@pytest.mark.parametrize(
    ("contents", "max_seq_length", "expected"),
    [
        (["ab", "cd"], 100, ("ab", " cd")),
        (["ab", "cd"], 6, ("ab", " cd")),
        (["ab", "cd"], 5, None),  # the answer's end is cut
        (["ab", "cd", "ef", "gh"], 100, ("ab", " cd")),
        (["ab", "cd", "ef", "gh"], 6, ("ab", " cd")),
        (["", " cd"], 100, ("", " cd")),
        (["ab ", ""], 100, ("ab ", "")),
    ],
)
def test_prompt_and_first_answer(contents, max_seq_length, expected, tokenizer):
    roles = ["user", "assistant"] * 2
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    example = encode({"messages": turns}, tokenizer, max_seq_length)
    found = example.prompt_and_answer([tokenizer.eos_token_id])
    assert (found and tuple(tokenizer.decode(part) for part in found)) == expected


def test_truncation_cuts_the_end(tokenizer):
    row = {"prompt": "abcd", "completion": "efgh"}
    assert trained_text(row, tokenizer, 7) == ("abcd ef", " ef")
    assert trained_text(row, tokenizer, 4) == ("abcd", "")
    assert trained_text(row, tokenizer, 3) == ("abc", "")
    assert [encode(row, tokenizer, n).prompt_length for n in (7, 4, 3)] == [4, 4, 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": "x"}, r"found: txt.*prompt \+ completion.*messages"),
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


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
ASKED = [{"role": "user", "content": "Hi"}]
ANSWERED = [{"role": "assistant", "content": "Yo"}]
CHAT = ("Hi Yo" + EOS, " Yo" + EOS)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, CHAT),
        ({"conversations": ASKED + ANSWERED, "id": "x", "source": "y"}, CHAT),
        ({"conversations": SHAREGPT, "system": "Be."}, ("Be.\n" + CHAT[0], CHAT[1])),
        ({"messages": ASKED + ANSWERED, "tools": []}, CHAT),
        ({"prompt": ASKED, "completion": ANSWERED}, CHAT),
        ({"prompt": "Hi", "completion": ANSWERED}, CHAT),
        (
            {"prompt": [*ASKED, *ANSWERED, *ASKED], "completion": ANSWERED},
            (f"Hi Yo{EOS} Hi Yo{EOS}", " Yo" + EOS),
        ),
        ({"text": "Hi Yo"}, ("Hi Yo" + EOS, "Hi Yo" + EOS)),
    ],
)
def test_conversations_and_texts(row, expected, tokenizer):
    assert trained_text(row, tokenizer) == expected


def test_alpaca_with_system_and_history(tokenizer):
    plain = {"instruction": "Add.", "input": "", "output": "3"}
    (text, _), earlier = trained_text(plain, tokenizer), [["Say hi.", "hi"]]
    row = {**plain, "system": "Be.", "history": earlier}
    before = trained_text({"instruction": "Say hi.", "output": "hi"}, tokenizer)[0]
    assert trained_text(row, tokenizer) == (f"Be.\n{before}{text}", f"hi{EOS}3{EOS}")
    assert trained_text({**plain, "system": "", "history": []}, tokenizer)[0] == text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "this is supervised training"),
        ({"prompt": "x", "completion": "y", "note": "z"}, "field note is not used by rows of pro"),
        ({"prompt": "x", "completion": "y", "score": 0.5}, "ignore_fields=dataset,.*score,sou"),
        ({"conversations": [{"from": "human", "role": "gpt"}]}, r"\[0\] has both from and role"),
        ({"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "both value and con"),
        ({"prompt": "x", "completion": "y", "system": "z"}, "field system is not used by texts"),
        ({"text": "x", "label": False}, "field label is not used"),
        ({"text": "x", "b": 1, "a": 2}, "fields b, a are not used .*_fields=a,b,dataset,"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, r"\[0\].from must be one of"),
        ({"conversations": [{"from": {"a": 1}, "value": "x"}]}, r"\[0\].from must be one of"),
        ({"conversations": [{"from": "gpt"}]}, "alternate|must be text"),
        ({"conversations": "x"}, "list of objects with from and value"),
        ({"instruction": "x", "output": "y", "history": 5}, "list of pairs"),
        ({"messages": ASKED + ANSWERED, "tools": "\ud800"}, "not valid Unicode"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "list of pairs"),
        ({"messages": ASKED + ANSWERED, "tools": "{"}, "field tools: not JSON"),
        ({"messages": ASKED + ANSWERED, "tools": [1]}, "list of JSON schemas"),
    ],
)
def test_what_a_format_does_not_use_is_refused(row, message):
    with pytest.raises(UserError, match=message):
        format_row(row, EOS)


def test_golden_cases_of_the_reference(shared, olmoe_tokenizer):
    for case in json.loads((shared / "reference/data/cases.json").read_text())["cases"]:
        example = encode(case["example"], olmoe_tokenizer, case["max_seq_length"])
        assert example.in_loss.any() == case["kept"], case["name"]
        assert example.tokens.tolist() == case["expected"]["input_ids"], case["name"]
        as_reference = example.in_loss & ~example.straddling
        labels = np.where(as_reference, example.tokens, -100).tolist()
        assert labels == case["expected"]["labels"], case["name"]
