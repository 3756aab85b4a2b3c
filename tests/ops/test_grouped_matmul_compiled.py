"""The grouped matmul compiled for an H100, which need not be there; nothing is executed."""

import json

import pytest
from helpers import run_module


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


@pytest.mark.compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "hidden", "intermediate"),
    [(64, 2048, 1024), (64, 2048, 64), (64, 1024, 8), (5, 2048, 1024), (7, 100, 36)],
    ids=["experts", "LoRA of rank 64", "LoRA of rank 8", "five tuned experts", "no tile divides"],
)
def test_mosaic_kernels_compile(experts, hidden, intermediate):
    """Each size as D and as F: forward, dX and dW."""
    sizes = {"experts": experts, "hidden": hidden, "intermediate": intermediate}
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    flags += ["--topology", "h100:1", "--layers", "1", "--backend", "mosaic", "--json"]
    code, out, error = run_module("benchmarks.grouped_matmul", *flags, timeout=600)
    if "is not installed" in error:
        pytest.skip(error.strip())
    assert code == 0, error
    assert json.loads(out)["mosaic"]["temporaries, GiB"] < 1
