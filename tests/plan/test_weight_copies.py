"""One H100 runs its kernels on the stacked weights of all layers: no layer is copied out first."""

import functools
import json

import pytest
from helpers import ROOT, run_command_line

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.slow,
    pytest.mark.xdist_group("weight copies"),
]


@functools.cache
def compiled(layers, *method):
    """Returns what weight_copies_worker.py prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        worker = "tests/plan/weight_copies_worker.py"
        code, out, error = run_command_line(worker, layers, *method, timeout=900)
    if "is not installed" in error:
        pytest.skip(error.strip().splitlines()[-1])
    assert code == 0, error
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("method", "sums"),
    [
        (["name=conventional"], 3),
        (["name=densemixer"], 3),
        (["name=densemixer", "router_gradient_experts=16"], 3),
        # Adapters are smaller than a layer's matrices, and so are four tuned experts.
        (["name=conventional", "lora_rank=64"], 0),
        (["name=densemixer", "lora_rank=64"], 0),
        (["name=esft_gate"], 0),
    ],
    ids=["full", "DenseMixer", "DenseMixer of 16", "LoRA", "LoRA with DenseMixer", "ESFT"],
)
def test_no_copy_of_a_layers_experts(method, sums):
    written = compiled(4, *method)
    assert "copies" not in written
    # The sums of gradients are read a layer at a time, to add what the kernels for dW wrote.
    assert len(written.get("sums", [])) <= 2 * sums
    assert len(written.get("kernels", [])) == sums


def test_compile_time_does_not_grow_with_depth():
    method = "name=conventional"
    assert compiled(16, method)["seconds"] < 1.5 * compiled(4, method)["seconds"]
