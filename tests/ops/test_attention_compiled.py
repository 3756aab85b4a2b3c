"""The kernels compiled for H100s and TPUs, which need not be there; nothing is executed."""

import json

import pytest
from helpers import run_module


@pytest.mark.compilers
@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("topology", "kernel"), [("h100:8", "pallas_triton"), ("v5e:2x4", "splash")]
)
def test_no_array_of_scores_on_an_accelerator(topology, kernel, dtype, kv_heads):
    flags = ["--shape", "1,4096,4,128", "--kv_heads", kv_heads, "--dtype", dtype]
    code, out, error = run_module(
        "benchmarks.attention", "--topology", topology, *flags, "--json", timeout=600
    )
    if "is not installed" in error:
        pytest.skip(error.strip())
    assert code == 0, error
    found = json.loads(out)
    assert found["all keys"]["largest array / length²"] > 0.4  # 512 of 4096 queries, 4 heads
    for backend in (kernel, "chunked"):
        assert found[backend]["largest array / length²"] < 0.2, backend
        assert found[backend]["temporaries, MiB"] < 64, backend
