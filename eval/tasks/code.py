"""The tasks humaneval and mbpp: programs, scored by the data set's tests in the sandbox."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pydantic

from eval.statistics import mean_metric, pass_at_k
from eval.tasks.task import Example, Prediction, Scores, Task, Tools
from olmoe_jax.errors import UserError
from olmoe_jax.files import STRICT

PASS_AT = (1, 5, 10, 100)
"""The k of the reported pass@k, as far as there are samples."""


class CodeTask(Task):
    """Base of both: pass@k over samples."""

    sampled = True
    runs_code = True
    limits: ClassVar[Mapping[str, float]] = {}
    """The limits of a program that differ from the sandbox's own."""

    def answer(self, output: str) -> str:
        """Returns the output, which was cut at the stop strings."""
        return output

    def program(self, prediction: Prediction) -> tuple[str, str]:
        """Returns the solution and the tests that the solution must pass."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        """Returns pass@k; a row says why the program failed."""
        assert tools.run_programs, "the command checks this before it starts"
        failures = tools.run_programs([self.program(p) for p in predictions], **self.limits)
        passed: dict[str, list[bool]] = {}
        for prediction, failure in zip(predictions, failures, strict=True):
            passed.setdefault(prediction.example.id, []).append(failure is None)
        samples = min(map(len, passed.values()))
        metrics = {
            f"pass@{k}": mean_metric([pass_at_k(len(p), sum(p), k) for p in passed.values()])
            for k in PASS_AT
            if k <= samples
        }
        rows = [{"passed": float(failure is None), "failure": failure} for failure in failures]
        return Scores(metrics, rows, {"samples": samples})


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Function:
    """A row of HumanEval."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


@pydantic.with_config(STRICT)
@dataclasses.dataclass(frozen=True)
class Problem:
    """A row of MBPP."""

    task_id: int
    text: str
    code: str
    test_list: list[str]
    test_setup_code: str


class HumanEval(CodeTask):
    """HumanEval (Chen et al. 2021): the model continues a function from its docstring."""

    name = "humaneval"
    local_file = "humaneval/HumanEval.jsonl"
    hub = (("openai/openai_humaneval", "test"),)
    row = Function
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def examples_of(self, rows: Sequence[Function]) -> list[Example]:
        return [
            Example(row.task_id, row.prompt, f"{row.test}\ncheck({row.entry_point})\n")
            for row in rows
        ]

    def program(self, prediction: Prediction) -> tuple[str, str]:
        return prediction.example.prompt + prediction.answer, prediction.example.reference


class Mbpp(CodeTask):
    """MBPP (Austin et al. 2021), with the paper's prompt and three solved problems."""

    name = "mbpp"
    local_file = "mbpp/mbpp.jsonl"
    hub = (
        ("google-research-datasets/mbpp", "prompt"),
        ("google-research-datasets/mbpp", "test"),
    )
    row = Problem
    stop = ("[DONE]",)

    def examples_of(self, rows: Sequence[Problem]) -> list[Example]:
        """Returns the problems 11 to 510, the test set."""
        by_id = {row.task_id: row for row in rows}
        if not {2, 3, 4} <= by_id.keys():
            raise UserError(
                "mbpp: the problems 2, 3 and 4 are missing; the prompt shows their solutions"
            )
        if by_id.keys().isdisjoint(range(11, 511)):
            raise UserError(
                "mbpp: none of the problems 11 to 510 is there, and only they are evaluated; add "
                "them, or take all of the published mbpp.jsonl"
            )
        solved = "".join(
            f"{self.question(by_id[id_])}{self.solution(by_id[id_])}\n[DONE]\n\n"
            for id_ in (2, 3, 4)
        )
        return [
            Example(str(id_), solved + self.question(by_id[id_]), self.reference(by_id[id_]))
            for id_ in range(11, 511)
            if id_ in by_id
        ]

    def question(self, row: Problem) -> str:
        """Returns the prompt's part for a problem, without its solution."""
        tests = "\n".join(self.tests(row))
        return (
            f"You are an expert Python programmer, and here is your task: {row.text} "
            f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
        )

    def tests(self, row: Problem) -> list[str]:
        """Returns the tests that the prompt shows."""
        return row.test_list

    def solution(self, row: Problem) -> str:
        """Returns the solution that the prompt shows."""
        return _unix(row.code)

    def reference(self, row: Problem) -> str:
        """Returns the tests that a program must pass."""
        return _unix("\n".join([row.test_setup_code, *row.test_list])) + "\n"

    def program(self, prediction: Prediction) -> tuple[str, str]:
        return prediction.answer, prediction.example.reference


def _unix(text: str) -> str:
    """Returns the text with "\\n" for line ends: the data has "\\r\\n"."""
    return text.replace("\r\n", "\n")
