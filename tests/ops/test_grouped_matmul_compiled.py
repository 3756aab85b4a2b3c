"""The grouped matmul compiled for an H100, which need not be there; nothing is executed."""

import functools
import json
import os

import pytest
from helpers import ROOT, run_command_line, run_module
from ops.kernels_worker import CANDIDATES, MATRICES, TUNED


@pytest.mark.compilers
@pytest.mark.slow
def test_no_backend_copies_the_weights_of_all_layers():
    flags = ["--topology", "h100:1", "--layers", "16", "--hidden", "512", "--intermediate", "256"]
    code, out, error = run_module("benchmarks.grouped_matmul", *flags, "--json", timeout=600)
    if "is not installed" in error:
        pytest.skip(error.strip())
    assert code == 0, error
    found = json.loads(out)
    assert {"blocked", "mosaic", "pallas_triton"} <= set(found)
    # ragged_dot has a dense expansion there: it is of TPUs.
    assert "ragged_dot" not in found
    rows = 32_768 * 512 * 2 / 2**30
    for backend, gib in found.items():
        # The layers' inputs, one layer's rows, and one layer's weights and their gradients.
        limit = 16 * rows + 8 * rows + 4 * gib["weights of a layer, GiB"]
        assert gib["temporaries, GiB"] < limit, (backend, gib)


@functools.cache
def compiled(backend):
    """By case: GiB of temporaries, or an error (see kernels_worker.py)."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        code, out, error = run_command_line("tests/ops/kernels_worker.py", backend, timeout=1800)
    if "is not installed" in error:
        pytest.skip(error.strip().splitlines()[-1])
    assert code == 0, error
    return dict(map(json.loads, out.splitlines()))


@pytest.mark.compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.xdist_group(name))
        for name in ("mosaic", "pallas_triton")
    ],
)
@pytest.mark.parametrize("case", [*MATRICES, *TUNED, *CANDIDATES])
def test_kernels_compile(case, backend):
    """Forward, dX and dW of each size of OLMoE-1B-7B; a jax for each Python (Makefile)."""
    found = compiled(backend)[case]
    assert isinstance(found, float), found
    assert found < 1
