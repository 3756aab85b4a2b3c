"""The tasks as the published evaluation has them (--protocol reference).

The rules are those of the experiments of DenseMixer (yaof20/DenseMixer on GitHub), which take
gsm's from open-instruct, and humaneval's and mbpp's from lm-evaluation-harness.
docs/differences.md sets them beside ours.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from eval.tasks.code import HumanEval, Mbpp, Problem
from eval.tasks.esft import EsftTask, Query
from eval.tasks.gsm import Gsm
from eval.tasks.intent import Intent
from eval.tasks.judged import JudgedTask, Law, Summary, Translation
from eval.tasks.task import Example, Prediction, Scores, Task, Tools, exact_match

_COMMA = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FENCE = "```"
_SECONDS = {"program_seconds": 3.0}


class ReferenceGsm(Gsm):
    """gsm by open-instruct's rule: the last number, whole numbers without their sign."""

    protocol = "reference"
    dtype = "float16"
    stop = ("Answer the following question", "Question:", "Comment:")

    def answer(self, output: str) -> str:
        """Returns the last number of the text, without thousands commas, or else the text."""
        text = _COMMA.sub(r"\1\2", output)
        return (_NUMBER.findall(text) or [text])[-1]

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        return exact_match(
            (_plain(p.answer) == _plain(p.example.reference) for p in predictions),
            no_number=sum(not _NUMBER.search(p.answer) for p in predictions),
        )


def _plain(text: str) -> str:
    """Returns the text in lower case without punctuation, signs and decimal points included."""
    return text.lower().translate(_NO_PUNCTUATION)


class _Sampled(EsftTask):
    """The decoding of the four tasks of ESFT, and their answers as the rows have them."""

    protocol = "reference"
    dtype = "float32"
    max_new_tokens = 512
    temperature = 0.7
    top_p = 0.9
    stop = ("</s>",)

    def examples_of(self, rows: Sequence[Query]) -> list[Example]:
        examples = super().examples_of(rows)
        return [
            Example(example.id, example.prompt, row.answers[0])
            for example, row in zip(examples, rows, strict=True)
        ]


class ReferenceIntent(_Sampled, Intent):
    """intent by exact match; spaces in the slots of the prediction do not count."""

    def answer(self, output: str) -> str:
        """Returns the first line, of the code in a JSON fence if there is one."""
        text = output.strip().strip(".。")
        if (before := text.find(f"{_FENCE}json")) >= 0:
            code, fence, _ = text[before + len(f"{_FENCE}json") :].partition(_FENCE)
            text = code if fence else "{}"
        return next(filter(None, text.split("\n")), "").strip(".。")

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        answers = [_json(p.answer) for p in predictions]
        expected = [_json(p.example.reference.strip().strip(".。")) for p in predictions]
        return exact_match(
            map(_intents_match, answers, expected),
            not_json=sum(not isinstance(answer, Mapping) for answer in answers),
        )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _intents_match(answer: Any, expected: Any) -> bool:
    """Returns whether intent and slots are equal: lists as sorted texts, other values as text."""
    try:
        found = {(name, _slot(value)) for name, value in answer.get("slots", {}).items()}
        wanted = {(name, _listed(value)) for name, value in expected.get("slots", {}).items()}
        return answer.get("intent", "") == expected.get("intent", "") and found == wanted
    except (AttributeError, TypeError):  # a value of another type, in the answer or the data
        return False


def _slot(value: Any) -> Any:
    """Returns a predicted slot without spaces; a number, or another value, is no slot."""
    if isinstance(value, list):
        return _listed([str(item).replace(" ", "") for item in value])
    return value.replace(" ", "")


def _listed(value: Any) -> Any:
    return str(tuple(sorted(str(item) for item in value))) if isinstance(value, list) else value


class _Whole(_Sampled, JudgedTask):
    """The whole text is judged."""

    def answer(self, output: str) -> str:
        """Returns the text without the full stops around it; "None" stands for no text."""
        return (output.strip() or "None").strip(".。")


class ReferenceLaw(_Whole, Law):
    """law, the whole text."""


class ReferenceSummary(_Whole, Summary):
    """summary, the whole text."""


class ReferenceTranslation(_Sampled, Translation):
    """translation, the first paragraph."""

    def answer(self, output: str) -> str:
        """Returns the first paragraph; "None" stands for no text."""
        return output.strip().split("\n\n")[0] or "None"


class ReferenceHumanEval(HumanEval):
    """humaneval as lm_eval has it."""

    protocol = "reference"
    dtype = "bfloat16"
    max_new_tokens = 1024
    limits = _SECONDS


class ReferenceMbpp(Mbpp):
    """mbpp as lm_eval has it: the solved problems keep their line ends, three tests count."""

    protocol = "reference"
    dtype = "bfloat16"
    max_new_tokens = 256
    limits = _SECONDS

    def solution(self, row: Problem) -> str:
        return row.code

    def tests(self, row: Problem) -> list[str]:
        return row.test_list[:3]

    def reference(self, row: Problem) -> str:
        return "\n".join(self.tests(row))


REFERENCE: dict[str, Task] = {
    task.name: task
    for task in (
        ReferenceGsm(),
        ReferenceMbpp(),
        ReferenceHumanEval(),
        ReferenceIntent(),
        ReferenceLaw(),
        ReferenceSummary(),
        ReferenceTranslation(),
    )
}
