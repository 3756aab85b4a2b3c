"""Whether a run fits, and what it costs, before there are devices to run it on.

    python -m olmoe_jax.plan --config configs/densemixer_gsm.py --topology h100:8

compiles the configured training step for devices that need not be there and reports memory,
communication and a bound on the speed. From Python: `olmoe_jax.plan.plan(config, "h100:8")`.
"""

import importlib
from typing import Any

_HOMES = {"plan": "olmoe_jax.plan.planning", "Plan": "olmoe_jax.plan.planning"}
__all__ = ["Plan", "plan"]


def __getattr__(name: str) -> Any:
    """Imports on first use: the command sets jax's environment before jax is there."""
    if name not in _HOMES:
        raise AttributeError(f"module 'olmoe_jax.plan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
