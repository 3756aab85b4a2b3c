"""The step as XLA compiles it: no dense expansion in the MoE block, no growth with depth."""

import json
import os
import subprocess
import sys

import pytest
from helpers import AS_USERS_COMPILE, ROOT

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def compiled():
    environment = {**os.environ, **AS_USERS_COMPILE, "PYTHONPATH": str(ROOT)}
    environment["JAX_PLATFORMS"] = "cpu"
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    worker = ROOT / "tests" / "training" / "compiled_step_worker.py"
    result = subprocess.run(
        [sys.executable, str(worker)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["conventional", "densemixer", "densemixer, remat"])
def test_the_moe_block_never_holds_all_experts_of_all_tokens(compiled, case):
    assert 0 < compiled[case]["largest"] <= compiled[case]["allowed"]


def test_a_dense_expansion_would_be_found(compiled):
    assert compiled["dense expansion"]["largest"] > compiled["dense expansion"]["allowed"]


def test_compile_time_does_not_grow_with_depth(compiled):
    seconds = compiled["compile_seconds"]
    assert min(seconds["16"]) <= 1.3 * min(seconds["2"]), seconds
