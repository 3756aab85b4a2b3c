"""The benchmark of what a lean optimizer state costs: its runs and its table."""

import json

import pytest
from helpers import run_module

from benchmarks.lean_state import VARIANTS, report


def test_differences_are_paired_by_seed():
    def runs(*after):
        return [{"losses": [2.0] * 20, "eval_before": 3.0, "eval_after": x} for x in after]

    curves = {"scratch": {"float32": runs(1.0, 2.0), "bfloat16 moments": runs(1.25, 2.75)}}
    rows = report(curves).splitlines()[-2:]
    assert rows[0] == "| float32 | 2.0000 | 3.0000 | 1.5000 | - |"
    assert rows[1] == "| bfloat16 moments | 2.0000 | 3.0000 | 2.0000 | +0.5000 ± 0.2500 |"


@pytest.mark.slow
def test_every_variant_learns():
    command = ("benchmarks.lean_state", "--steps", 8, "--seeds", 0, "--batch_size", 16, "--json")
    code, out, error = run_module(*command, timeout=1800)
    assert code == 0, error
    curves = json.loads(out)
    assert [list(variants) for variants in curves.values()] == 2 * [list(VARIANTS)]
    for (run,) in curves["scratch"].values():
        assert len(run["losses"]) == 8
        assert run["eval_after"] < run["eval_before"] - 0.5
    exact, *others = (run["eval_after"] for (run,) in curves["scratch"].values())
    # What differs is the rounding alone.
    assert all(0 < abs(other - exact) < 0.05 for other in others)
