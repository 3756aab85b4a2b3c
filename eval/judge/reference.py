"""The judge of the published evaluation (--protocol reference), whose words the user gives.

The wording is not part of this project; docs/evaluation.md says where it is published.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.judge.prompts import FULL_MARKS
from eval.tasks.task import Prediction
from olmoe_jax.errors import UserError
from olmoe_jax.files import read_text

MODEL = "gpt-4o-mini-2024-07-18"
SYSTEM = "system.txt"
MAX_TOKENS = 80

_CHINESE = re.compile(r"总分是：(\d++(?:\.\d++)?+)分")
_VERDICTS = {
    "law": _CHINESE,
    "summary": _CHINESE,
    "translation": re.compile(r"score: *+(\d++(?:\.\d++)?+) *+point"),
}
_PLACEHOLDER = re.compile(r"\{(prediction|ground_truth|reference)\}")


class ReferenceQuestions:
    """Questions in two messages, system and user, at the judge's default temperature.

    Args:
      directory: has system.txt and TASK.txt for each task. A task's file has the placeholders
        {prediction} and {ground_truth} (or {reference}). The files are sent as they are, with
        every space and newline.
      tasks: the tasks that are judged.

    Raises:
      UserError: a file is missing, or has not both placeholders.
    """

    def __init__(self, directory: Path, tasks: Sequence[str]):
        self._system = read_text(directory / SYSTEM)
        self._templates = {task: read_text(directory / f"{task}.txt") for task in tasks}
        for task, template in self._templates.items():
            found = set(_PLACEHOLDER.findall(template))
            if "prediction" not in found or len(found) < 2:
                raise UserError(
                    f"{directory / task}.txt: needs {{prediction}} and {{ground_truth}}, where the "
                    "model's text and the right one are put; add what is missing"
                )
        content = repr((self._system, sorted(self._templates.items())))
        self.facts = {"judge_prompts": hashlib.sha256(content.encode()).hexdigest()[:16]}

    def body(self, model: str, question: str) -> dict[str, Any]:
        """Returns a request to the judge `model`."""
        messages = [
            {"role": "system", "content": self._system},
            {"role": "user", "content": question},
        ]
        return {"model": model, "messages": messages, "max_tokens": MAX_TOKENS}

    def question(self, task: str, prediction: Prediction) -> str:
        """Returns the question about one prediction."""
        texts = {"prediction": prediction.answer}
        texts["ground_truth"] = texts["reference"] = prediction.example.reference
        # In one pass: a placeholder in the model's text is text.
        return _PLACEHOLDER.sub(lambda found: texts[found[1]], self._templates[task])

    def score(self, task: str, answer: str) -> float | None:
        """Returns the first total in a judge's answer, 0 to 1, or None; above 10 counts as 10."""
        found = _VERDICTS[task].search(answer)
        return min(float(found[1]), FULL_MARKS) / FULL_MARKS if found else None
