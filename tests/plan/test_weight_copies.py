"""One H100 runs its kernels on the stacked weights of all layers: no layer is copied out first."""

import json

import pytest
from helpers import ROOT, run_command_line

pytestmark = [pytest.mark.compilers, pytest.mark.slow]


@pytest.mark.parametrize(
    ("method", "sums"),
    [
        (["name=conventional"], 3),
        (["name=densemixer", "router_gradient_experts=16"], 3),
        # Adapters are smaller than a layer's matrices, and so are four tuned experts.
        (["name=conventional", "lora_rank=64"], 0),
        (["name=esft_gate"], 0),
    ],
    ids=["full", "DenseMixer of 16", "LoRA", "ESFT"],
)
def test_no_copy_of_a_layers_experts(method, sums, monkeypatch):
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, out, error = run_command_line("tests/plan/weight_copies_worker.py", *method, timeout=900)
    if "is not installed" in error:
        pytest.skip(error.strip().splitlines()[-1])
    assert code == 0, error
    written = json.loads(out.splitlines()[-1])
    assert "copies" not in written
    # The sums of gradients are read a layer at a time, to add what the kernels for dW wrote.
    assert len(written.get("sums", [])) <= 2 * sums
    assert len(written.get("kernels", [])) == sums
