"""Whatever travels over the expert axis, tokens or weights: the MoE block of one device."""

from pathlib import Path

import pytest
from helpers import on_eight_devices

GRADIENTS = {"x", "router", "gate", "up", "down"}


def errors_of(cases: str) -> dict[str, dict[str, float]]:
    errors = on_eight_devices(Path(__file__).with_name("expert_mesh_worker.py"), cases)
    for name, of_case in errors.items():
        assert {"y", "load", *GRADIENTS} <= set(of_case)
        assert of_case["load"] == 0
        worst = max(of_case, key=of_case.get)
        assert of_case[worst] < 2e-6, f"{name}: {worst} {of_case[worst]:.3g}"
    return errors


def test_an_expert_that_takes_every_token():
    """Exact and dropless, with DenseMixer's router gradient; padding, and a row of nothing else."""
    assert set(errors_of("one")) == {"densemixer one tokens 2x2x2", "densemixer one weights 2x2x2"}


@pytest.mark.slow
def test_all_router_modes_with_even_and_uneven_routing():
    """Also adapters with dropout, selected experts, and two backends of the grouped matmul."""
    errors = errors_of("all")
    assert len(errors) == 18
    assert {name.split()[-1] for name in errors} == {"2x2x2", "1x2x4", "1x1x8"}
    assert "lora.gate_a" in errors["conventional tokens 2x2x2"]
    assert "tuned_down" in errors["densemixer tuned tokens 1x1x8"]
