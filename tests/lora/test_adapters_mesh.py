"""No mesh changes a number: losses, gradients (with dropout), and scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_eight_devices(base):
    """Of 8 virtual devices: their number is fixed when jax starts, hence another process."""
    flags = "--xla_force_host_platform_device_count=8"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("adapters_mesh_worker.py"), base],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout.splitlines()[-1])
    assert set(errors) == {
        *(f"{kind} {mesh}" for kind in ("lora", "esft") for mesh in ("data=2,fsdp=4", "fsdp=8")),
        "scores",
    }
    # Sixteen adapters' parts more or less: seven targets, A and B, router and head.
    assert len(errors["lora fsdp=8"]) == 1 + 14 + 2
    assert len(errors["esft fsdp=8"]) == 1 + 3 + 2
    for name, of_mesh in errors.items():
        for key, error in of_mesh.items():
            assert error <= 1e-5, f"{name} {key}: {error:.3g}"
