"""No mesh changes a number: losses, gradients (with dropout), and scores."""

from pathlib import Path

import pytest
from helpers import on_eight_devices


@pytest.mark.slow
def test_eight_devices(base):
    errors = on_eight_devices(Path(__file__).with_name("adapters_mesh_worker.py"), base)
    assert set(errors) == {
        *(
            f"{kind} {mesh}"
            for kind in ("lora", "nf4", "esft", "loaded")
            for mesh in ("data=2,fsdp=4", "fsdp=8")
        ),
        "scores",
    }
    # Sixteen adapters' parts more or less: seven targets, A and B, router and head.
    assert len(errors["lora fsdp=8"]) == 1 + 14 + 2
    assert len(errors["esft fsdp=8"]) == 1 + 3 + 2
    assert len(errors["nf4 fsdp=8"]) == len(errors["lora fsdp=8"])
    for name, of_mesh in errors.items():
        for key, error in of_mesh.items():
            assert error <= 1e-5, f"{name} {key}: {error:.3g}"
