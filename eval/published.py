"""Published scores of OLMoE-1B-7B-0125 after fine-tuning, in percent.

Source: the table "OLMoE" in the README of DenseMixer (yaof20/DenseMixer on GitHub; Yao et al. 2025,
https://fengyao.notion.site/moe-posttraining). The free texts (law, summary, translation) were
scored by the judge of its authors: the scores of another judge are not comparable.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from configs.table import FULL, LORA


class Published(NamedTuple):
    """The published evaluation of a task, in the terms of eval.run's results."""

    metric: str
    rows: int
    data: str  # the hash of all rows
    source: str  # on the hub


# The hashes of ESFT's tasks are those of deepseek-ai/ESFT's files, from which the hub's were made.
# fmt: off
EVALUATIONS = {task: Published(*row) for task, *row in (
    ("gsm",         "exact_match", 1319, "b0e7a137785c48fb", "RoxanneWsyw/gsm:test.jsonl"),
    ("mbpp",        "pass@1", 500, "260f0fbbce921f8f", "google-research-datasets/mbpp"),
    ("humaneval",   "pass@1", 164, "6321965c49af7c68", "openai/openai_humaneval"),
    ("intent",      "exact_match", 500, "570f71f5e30db637", "RoxanneWsyw/ESFT-intent:test.jsonl"),
    ("law",         "judge", 100, "633605a267213e7e", "RoxanneWsyw/ESFT-law:test.jsonl"),
    ("summary",     "judge", 100, "82e815bacd6d1bf1", "RoxanneWsyw/ESFT-summary:test.jsonl"),
    ("translation", "judge", 100, "7161bb561aa0369a", "RoxanneWsyw/ESFT-translation:test.jsonl"),
)}
# The columns are the tasks above.
_ROWS = (
    (15.85, 19.80, 10.97,  0.20,  5.70,  7.40, 11.09),  # base
    (44.88, 17.80,  7.23, 72.80, 22.50, 36.05, 28.29),  # frozen
    (45.94, 23.40, 18.92, 74.60, 22.35, 35.99, 26.89),  # conventional
    (49.00, 25.12, 20.73, 77.40, 23.02, 40.64, 32.55),  # densemixer
    (45.03, 24.20, 17.07, 55.80, 21.30, 37.70, 28.19),  # frozen_lora
    (44.58, 24.20, 15.85, 60.20, 21.60, 37.30, 26.22),  # conventional_lora
    (45.38, 26.20, 16.48, 66.60, 24.70, 40.80, 29.43),  # densemixer_lora
)
# fmt: on
_SCORES = dict(zip(("base", *FULL, *LORA), _ROWS, strict=True))


def published(method: str, task: str, metric: str) -> float | None:
    """Returns the published score of a method on a task; None if none is in this metric."""
    if method not in _SCORES or task not in EVALUATIONS or EVALUATIONS[task].metric != metric:
        return None
    return _SCORES[method][list(EVALUATIONS).index(task)]


def is_published_data(task: str, settings: Mapping[str, Any]) -> bool:
    """Returns whether a result of eval.run is on all rows of the published evaluation."""
    of = EVALUATIONS[task]
    whole = (settings.get("source"), settings.get("examples")) == (of.source, of.rows)
    return whole or settings.get("data") == of.data
