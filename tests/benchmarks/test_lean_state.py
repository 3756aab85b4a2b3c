"""The benchmark of what a lean optimizer state costs: its table."""

from benchmarks.lean_state import report


def test_differences_are_paired_by_seed():
    def runs(*after):
        return [{"losses": [2.0] * 20, "eval_before": 3.0, "eval_after": x} for x in after]

    curves = {"scratch": {"float32": runs(1.0, 2.0), "bfloat16 moments": runs(1.25, 2.75)}}
    rows = report(curves).splitlines()[-2:]
    assert rows[0] == "| float32 | 2.0000 | 3.0000 | 1.5000 | - |"
    assert rows[1] == "| bfloat16 moments | 2.0000 | 3.0000 | 2.0000 | +0.5000 ± 0.2500 |"
