"""The published scores of OLMoE-1B-7B-0125 after fine-tuning, in percent.

Source: the table "OLMoE" in the README of DenseMixer (yaof20/DenseMixer on GitHub; Yao et al. 2025,
https://fengyao.notion.site/moe-posttraining). The free texts (law, summary, translation) were
scored by the judge of its authors: the scores of another judge are not comparable.
"""

TASKS = ("gsm", "mbpp", "humaneval", "intent", "law", "summary", "translation")
METRICS = {
    "gsm": "exact_match",
    "mbpp": "pass@1",
    "humaneval": "pass@1",
    "intent": "exact_match",
    "law": "judge",
    "summary": "judge",
    "translation": "judge",
}
"""The metric of ours that a task's numbers are of."""

# fmt: off
_ROWS = {
    "base":              (15.85, 19.80, 10.97,  0.20,  5.70,  7.40, 11.09),
    "frozen":            (44.88, 17.80,  7.23, 72.80, 22.50, 36.05, 28.29),
    "conventional":      (45.94, 23.40, 18.92, 74.60, 22.35, 35.99, 26.89),
    "densemixer":        (49.00, 25.12, 20.73, 77.40, 23.02, 40.64, 32.55),
    "frozen_lora":       (45.03, 24.20, 17.07, 55.80, 21.30, 37.70, 28.19),
    "conventional_lora": (44.58, 24.20, 15.85, 60.20, 21.60, 37.30, 26.22),
    "densemixer_lora":   (45.38, 26.20, 16.48, 66.60, 24.70, 40.80, 29.43),
}
# fmt: on


def published(method: str, task: str, metric: str) -> float | None:
    """The published score of a method on a task; None where there is none in this metric."""
    if method not in _ROWS or METRICS.get(task) != metric:
        return None
    return _ROWS[method][TASKS.index(task)]
