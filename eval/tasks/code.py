"""The tasks humaneval and mbpp: programs, scored by the data set's tests in the sandbox."""

import dataclasses
from collections.abc import Sequence

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

    def answer(self, output: str) -> str:
        """Returns the output, which was cut at the stop strings."""
        return output

    def program(self, prediction: Prediction) -> tuple[str, str]:
        """Returns the solution and the tests that the solution must pass."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction], tools: Tools) -> Scores:
        """Returns pass@k; a row says why the program failed."""
        assert tools.run_programs, "the command checks this before it starts"
        failures = tools.run_programs([self.program(p) for p in predictions])
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
        solved = "".join(
            f"{_question(by_id[id_])}{_unix(by_id[id_].code)}\n[DONE]\n\n" for id_ in (2, 3, 4)
        )
        return [
            Example(str(id_), solved + _question(by_id[id_]), _tests(by_id[id_]))
            for id_ in range(11, 511)
            if id_ in by_id
        ]

    def program(self, prediction: Prediction) -> tuple[str, str]:
        return prediction.answer, prediction.example.reference


def _question(row: Problem) -> str:
    tests = "\n".join(row.test_list)
    return (
        f"You are an expert Python programmer, and here is your task: {row.text} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _tests(row: Problem) -> str:
    return _unix("\n".join([row.test_setup_code, *row.test_list])) + "\n"


def _unix(text: str) -> str:
    """Returns the text with "\\n" for line ends: the data has "\\r\\n"."""
    return text.replace("\r\n", "\n")
