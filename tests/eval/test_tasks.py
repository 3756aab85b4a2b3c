"""Prompts, post-processing and scores of the tasks, on predictions made by hand."""

import ast
import json
import random

import pytest
from helpers import message_of

from eval.tasks import TASKS, tasks_of
from eval.tasks.esft import query_of
from eval.tasks.task import Example, Prediction, Tools, local_path, read_examples
from olmoe_jax.errors import UserError
from olmoe_jax.generation.answers import intents_match, parse_intent
from olmoe_jax.generation.stop_strings import cut_at

GSM, INTENT, LAW = TASKS["gsm"], TASKS["intent"], TASKS["law"]
HUMANEVAL, MBPP = TASKS["humaneval"], TASKS["mbpp"]


def predictions(task, outputs_and_references) -> list[Prediction]:
    return [
        Prediction(Example(str(i), "", reference), output, task.answer(output))
        for i, (output, reference) in enumerate(outputs_and_references)
    ]


def test_gsm_prompt():
    (example,) = GSM.examples([("", {"question": "2 + 3?", "answer": "<<2+3=5>>5\n#### 2,125"})])
    assert example.prompt == "Answer the following question.\n\nQuestion: 2 + 3?\nAnswer:"
    assert example.reference == "2125"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (" He has 2+3=5.\n#### 5", "5"),
        ("It costs $1,450,000.", "1450000"),
        ("#### -10", "-10"),
        ("20-5", "5"),
        ("(4)-3", "3"),
        ("from 8 to -3 degrees.", "-3"),
        ("$.50", ".50"),
        ("3.75 dollars", "3.75"),
        ("1,2,3", "123"),
        ("7 apples, 8 pears", "8"),
        ("no idea", None),
        ("", None),
        ("####", None),
    ],
)
def test_gsm_answer(output, answer):
    assert GSM.answer(output) == answer


def test_gsm_scores():
    outputs = [" so 5.\n#### 5", "#### 6", "", "#### 5\n\nQuestion: 1 + 1?\nAnswer: 2"]
    made = predictions(GSM, [(cut_at(output, GSM.stop), "5") for output in outputs])
    scores = GSM.score(made, Tools())
    assert [row["exact_match"] for row in scores.rows] == [1, 0, 0, 1]
    assert scores.metrics["exact_match"].value == 50
    assert scores.counts == {"no_number": 1}


GOOD = {"intent": "Alarm-Update", "slots": {"datetime_date": ["17号", "18号"], "notes": "追剧"}}
GOOD_TEXT = json.dumps(GOOD, ensure_ascii=False)


@pytest.mark.parametrize(
    "output",
    [
        GOOD_TEXT,
        f" {GOOD_TEXT}。\n\n",
        f"{GOOD_TEXT}。。\n\n请分析下面这句话的意图",
        f"```json\n{GOOD_TEXT}\n```",
        f"```\n{GOOD_TEXT}。\n```",
        GOOD_TEXT.replace('["17号", "18号"]', '["18号", "17号", "18号"]'),
    ],
)
def test_intent_right(output):
    assert intents_match(INTENT.answer(output), GOOD)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "。",
        "null",
        "[1]",
        '"text"',
        GOOD_TEXT[:-1],
        "答案： " + GOOD_TEXT,
        json.dumps(GOOD, ensure_ascii=False, indent=1),
        GOOD_TEXT.replace("Alarm-Update", "Alarm"),
        GOOD_TEXT.replace("追剧", "追"),
        GOOD_TEXT.replace(', "notes": "追剧"', ""),
        GOOD_TEXT.replace('"追剧"', '"追剧", "name": "x"'),
        GOOD_TEXT.replace('["17号", "18号"]', '"17号"'),
        GOOD_TEXT.replace('["17号", "18号"]', '[["17号"], {"a": 1}]'),
        '{"intent": "Alarm-Update"}',
        '{"slots": {}}',
        '{"intent": "Alarm-Update", "slots": []}',
        "[" * 100_000,
    ],
)
def test_intent_wrong(output):
    assert not intents_match(INTENT.answer(output), GOOD)


def test_intent_scores():
    made = predictions(INTENT, [(GOOD_TEXT, GOOD_TEXT), ("?", GOOD_TEXT)])
    scores = INTENT.score(made, Tools())
    assert scores.metrics["exact_match"].value == 50
    assert scores.counts == {"not_json": 1}
    assert parse_intent(GOOD_TEXT) == GOOD
    row = {"prompt": "", "answers": ["no JSON"]}
    assert "row 0 is not JSON" in message_of(INTENT.examples, [("", row)])


def last_number_by_hand(text: str) -> str:
    """Returns the last number, character by character and without a sign."""
    numbers, current = [], ""
    for before, letter, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if letter.isdigit():
            current += letter
        elif letter == "." and after.isdigit():
            current += "."
        elif letter == "," and before.isdigit() and after.isdigit():
            continue
        else:
            numbers.append(current)
            current = ""
    return [number for number in [*numbers, current] if number][-1]


def test_gsm_agrees_with_another_check_on_200_outputs():
    draw = random.Random(0)
    outputs, references = [], []
    for _ in range(200):
        number = draw.choice([draw.randrange(10), draw.randrange(10**7), draw.randrange(999) / 4])
        text = draw.choice(["{}", "{:,}"]).format(number)
        before = draw.choice(["", "so ", "It is $", "3 apples, 4 pears.\n#### ", "x=12.5*"])
        after = draw.choice(["", ".", " eggs", ",", "%", "\n\nQuestion: 1 + 1?\nAnswer: 2"])
        outputs.append(before + text + after)
        references.append(draw.choice([str(number), str(number + 1)]))
    made = predictions(
        GSM, [(cut_at(o, GSM.stop), r) for o, r in zip(outputs, references, strict=True)]
    )
    scores = [row["exact_match"] for row in GSM.score(made, Tools()).rows]
    expected = [
        float(last_number_by_hand(output.split("Question:")[0]) == reference)
        for output, reference in zip(outputs, references, strict=True)
    ]
    assert scores == expected
    assert 60 < sum(scores) < 140


def test_intent_agrees_with_another_check_on_200_outputs():
    """The other check reads Python literals and compares what is in one and not in the other."""

    def items(value):
        slots = value["slots"].items()
        pairs = {(k, x) for k, v in slots for x in ([*v, "a list"] if isinstance(v, list) else [v])}
        return pairs | {("intent", value["intent"])}

    draw = random.Random(0)
    outputs, expected = [], []
    for _ in range(200):
        slots = {"name": draw.choice("ab"), "days": draw.choices("xy", k=draw.randint(1, 3))}
        slots = dict(draw.sample(sorted(slots.items()), k=draw.randint(1, 2)))
        wanted = {"intent": "A", "slots": {"name": "a", "days": ["x", "y"]}}
        given = {"intent": draw.choice("AAAB"), "slots": draw.choice([slots, wanted["slots"]])}
        text = json.dumps(given)
        torn = draw.random() < 0.2
        text = draw.choice(["{}", " {}。\n\n下", "```json\n{}\n```"]).replace("{}", text[torn:])
        outputs.append((text, json.dumps(wanted)))
        literal = ast.literal_eval(json.dumps(given))
        expected.append(float(not torn and items(literal) == items(wanted)))
    scores = INTENT.score(predictions(INTENT, outputs), Tools()).rows
    assert [row["exact_match"] for row in scores] == expected
    assert 40 < sum(expected) < 160


def test_shortening_drops_the_oldest_example():
    prompt = "User: a\n答案：1\n\nb\n答案：2\n\nc\n答案：\n\nAssistant:"
    shorter = INTENT.shorten(prompt)
    assert shorter == "User: b\n答案：2\n\nc\n答案：\n\nAssistant:"
    shortest = INTENT.shorten(shorter)
    assert shortest == "User: c\n答案：\n\nAssistant:"
    assert INTENT.shorten(shortest) is None
    assert GSM.shorten("Answer the following question.\n\nQuestion: 1?\nAnswer:") is None


def test_esft_rows_with_the_same_number():
    """Files one after the other begin at 0 again; a sample of a row has the row's number."""
    row = {"prompt": "p", "answers": ["a"]}
    rows = [("", row | {"idx": number}) for number in (7, 3)]
    assert [example.id for example in LAW.examples(rows)] == ["7", "3"]
    assert [example.id for example in LAW.examples([*rows, rows[0]])] == ["0", "1", "2"]


def test_law_without_and_with_a_judge():
    made = predictions(LAW, [(" 判决离婚。\n\n请预测", "判决离婚"), ("", "驳回"), ("驳回", "驳回")])
    assert made[0].answer == "判决离婚。"
    scores = LAW.score(made, Tools())
    assert list(scores.metrics) == ["rouge_l"]
    assert [row["rouge_l"] for row in scores.rows] == [1, 0, 1]
    assert scores.counts == {"empty": 1}

    def judge(task, given):
        assert (task, given) == ("law", made)
        return [0.4, None, 0.8], {"judge_unparsable": 1}

    scores = LAW.score(made, Tools(judge=judge))
    assert list(scores.metrics) == ["judge", "rouge_l"]
    assert scores.metrics["judge"].value == pytest.approx(60)
    assert scores.metrics["judge"].rows == 2
    assert scores.rows[1] == {"judge": None, "rouge_l": 0}
    assert scores.counts == {"empty": 1, "judge_unparsable": 1}
    nothing = LAW.score(made, Tools(judge=lambda task, given: ([None] * 3, {})))
    assert list(nothing.metrics) == ["rouge_l"]


def test_translation_scores():
    made = predictions(TASKS["translation"], [("a door", "a door"), ("", "the house")])
    scores = TASKS["translation"].score(made, Tools())
    assert list(scores.metrics) == ["chrf", "bleu"]
    assert [row["chrf"] for row in scores.rows] == [pytest.approx(1), 0]


def test_pass_at_k_over_samples():
    def run_programs(programs):
        return [None if "right" in program else "AssertionError" for program, _ in programs]

    example, other = Example("a", "", "tests"), Example("b", "", "tests")
    outputs = ["right", "wrong", "wrong", "wrong", "right"]
    made = [Prediction(e, output, output) for e in (example, other) for output in outputs]
    scores = MBPP.score(made, Tools(run_programs=run_programs))
    assert list(scores.metrics) == ["pass@1", "pass@5"]
    assert scores.metrics["pass@1"].value == pytest.approx(40)
    assert scores.metrics["pass@5"].value == 100
    assert scores.metrics["pass@1"].rows == 2
    assert scores.rows[1] == {"passed": 0.0, "failure": "AssertionError"}


def test_humaneval_program():
    row = {"task_id": "HumanEval/0", "prompt": 'def f(x):\n    """doc"""\n', "entry_point": "f"}
    row["test"] = "def check(candidate):\n    assert candidate(1) == 2\n"
    (example,) = HUMANEVAL.examples([("", row)])
    assert (example.id, example.prompt) == ("HumanEval/0", row["prompt"])
    output = cut_at("    return x + 1\n\ndef g():\n    pass", HUMANEVAL.stop)
    assert output == "    return x + 1\n"
    program = "\n\n".join(HUMANEVAL.program(Prediction(example, output, HUMANEVAL.answer(output))))
    exec(program, {})
    with pytest.raises(AssertionError):
        exec(program.replace("x + 1", "x"), {})


def mbpp_row(id_: int) -> dict:
    return {
        "task_id": id_,
        "text": f"Write f{id_}.",
        "code": f"def f{id_}():\r\n  return {id_}",
        "test_list": [f"assert f{id_}() == {id_}", f"assert f{id_}()"],
        "test_setup_code": "",
    }


def test_mbpp_prompt_and_program():
    (example,) = MBPP.examples([("", mbpp_row(id_)) for id_ in (1, 2, 3, 4, 5, 11, 511, 974)])
    assert example.id == "11"
    question = (
        "You are an expert Python programmer, and here is your task: Write f2. Your code should "
        "pass these tests:\n\nassert f2() == 2\nassert f2()\n[BEGIN]\n"
    )
    assert example.prompt.startswith(question + "def f2():\n  return 2\n[DONE]\n\nYou are")
    assert example.prompt.endswith("assert f11() == 11\nassert f11()\n[BEGIN]\n")
    assert example.prompt.count("[DONE]") == 3
    output = cut_at("def f11():\n  return 11\n[DONE]\n\nYou are", MBPP.stop)
    program = MBPP.program(Prediction(example, output, MBPP.answer(output)))
    exec("\n".join(program), {})
    assert "2, 3 and 4 are missing" in message_of(MBPP.examples, [("", mbpp_row(11))])
    shown = [("", mbpp_row(id_)) for id_ in (2, 3, 4, 511)]
    assert "none of the problems 11 to 510" in message_of(MBPP.examples, shown)


def test_cut_at_the_first_stop_string():
    assert cut_at("a\nclass B\ndef c", ("\ndef", "\nclass")) == "a"
    assert cut_at("abc", ("x",)) == "abc"
    assert cut_at("abc", ()) == "abc"


def test_tasks_of():
    assert [task.name for task in tasks_of("law, gsm,law")] == ["law", "gsm"]
    assert "did you mean humaneval?" in message_of(tasks_of, "gsm,human_eval")
    assert "there is no task ''" in message_of(tasks_of, "gsm,")


def test_data_that_is_missing(tmp_path):
    assert "no gsm8k/test.jsonl there" in message_of(read_examples, GSM, str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_text('{"question": "1?", "answer": "1"}\n{"x": 1}\n')
    assert "line 2: field question is missing" in message_of(read_examples, GSM, str(tmp_path))


def test_rows_as_on_the_hub(tmp_path):
    """A completion stands for answers; the files may lie where a download leaves them."""
    answer = '{"intent": "A", "slots": {}}'
    rows = [
        {"prompt": "甲\n\n乙\n答案：", "completion": f"{answer}。\n\n", "answers": None},
        {"prompt": "丙", "completion": [answer]},
    ]
    for folder in ("esft/eval/intent.jsonl", "ESFT-intent/test.jsonl"):
        file = tmp_path / folder.partition("/")[0] / folder
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in ("esft", "ESFT-intent"):
        first, second = read_examples(INTENT, str(tmp_path / data))
        assert (first.id, first.reference, second.reference) == ("0", f"{answer}。", answer)
        assert first.prompt == query_of(first.prompt) == rows[0]["prompt"]
        assert INTENT.score([Prediction(first, "", INTENT.answer(answer))], Tools()).rows == [
            {"exact_match": 1}
        ]
    hub = tmp_path / "RoxanneWsyw/ESFT-law/test.jsonl"
    hub.parent.mkdir(parents=True)
    hub.write_text('{"prompt": "甲", "completion": 5}\n')
    assert local_path(tmp_path, "x", "RoxanneWsyw/ESFT-law:test.jsonl") == hub
    assert "test.jsonl: line 1: answers is 5; it must" in message_of(
        read_examples, LAW, str(tmp_path)
    )


@pytest.mark.slow
def test_real_data_and_its_own_answers(shared):
    """The references score 100% as predictions; gsm agrees with a check written another way."""
    sizes = {"gsm": 1319, "mbpp": 500, "humaneval": 164, "intent": 500}
    for name, task in TASKS.items():
        examples = read_examples(task, str(shared / "data"))
        assert len(examples) == sizes.get(name, 100)
        assert len({example.id for example in examples}) == len(examples)
        if task.runs_code:
            continue
        outputs = [f" {e.reference}。\n\nQuestion" for e in examples]
        made = [
            Prediction(e, o, task.answer(cut_at(o, task.stop)))
            for e, o in zip(examples, outputs, strict=True)
        ]
        metrics = list(task.score(made, Tools()).metrics.values())
        assert metrics[0].value > 99 if name == "translation" else metrics[0].value == 100


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (GSM, {"question": None, "answer": "#### 1"}, "question is null; it must be text"),
        (GSM, {"question": "a", "answer": "#### none"}, "answer.*: 'none' is not one number"),
        (GSM, {"question": "a", "answer": True}, "answer"),
        (GSM, {"question": "a", "answer": float("nan")}, "answer"),
        (HUMANEVAL, {"task_id": 5, "prompt": "", "entry_point": "", "test": ""}, "task_id is 5"),
        (MBPP, mbpp_row(1) | {"test_list": "x"}, 'test_list is "x"; it must be a list'),
        (INTENT, {"prompt": "a", "answers": []}, "answers is "),
        (INTENT, {"prompt": "a", "answers": [None]}, r"answers\.0 is null"),
    ],
)
def test_a_row_of_other_types_is_refused_by_place(task, row, message):
    with pytest.raises(UserError, match=f"^file: line 3: .*{message}"):
        task.examples([("file: line 3", row)])


@pytest.mark.parametrize("answer", [18, 18.0, "18.", "#### $18", "#### 18 dollars"])
def test_gsm_answers_mean_what_they_say(answer):
    (example,) = GSM.examples([("", {"question": "9 + 9?", "answer": answer})])
    assert example.reference == "18"
