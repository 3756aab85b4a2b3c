"""Advice: what to change in a configuration that does not fit its devices."""

import math
from collections.abc import Iterator

from olmoe_jax.config import Config
from olmoe_jax.plan.planning import RunPlan


def advice(plan: RunPlan) -> list[str]:
    """Returns the changes that make a run smaller, the most effective first; none if it fits."""
    if plan.fits:
        return []
    state, activations = list(_smaller_state(plan)), list(_smaller_activations(plan.config))
    # Begin with the larger part of the memory.
    return state + activations if plan.divided >= _undivided(plan) else activations + state


def _undivided(plan: RunPlan) -> int:
    """Returns the bytes that stay on a device however many there are: mostly activations."""
    return max(0, plan.peak - plan.divided)


def _smaller_state(plan: RunPlan) -> Iterator[str]:
    """Yields changes that shrink weights, gradients and moments on a device."""
    config, lora_rank = plan.config, plan.config.method.lora_rank
    left = plan.available - _undivided(plan)
    if config.mesh.data > 1:
        yield "mesh.data=1 (every group holds a full copy of the state)"
    elif left > 0:
        count = plan.topology.count
        needed = 2 ** math.ceil(math.log2(count * plan.divided / left))
        yield f"more devices: about {max(needed, 2 * count)} of this kind"
    if lora_rank is None and plan.settings.tuned_experts is None:
        yield "method.lora_rank=64 (trains adapters: 9% of the state)"
    elif lora_rank and not config.model.base_quantization:
        yield "model.base_quantization=nf4 (the frozen matrices in 4 bits)"
    elif lora_rank and lora_rank > 8:
        yield f"method.lora_rank={lora_rank // 2}"
    if fields := _bfloat16_fields(config):
        changes = " ".join(f"optimizer.{name}=bfloat16" for name in fields)
        yield f"{changes} (see docs/training.md for what it costs in accuracy)"


def _bfloat16_fields(config: Config) -> list[str]:
    """Returns the optimizer's next fields to set to bfloat16, those that cost least first."""
    options = config.optimizer
    # Gradients and master weights in bfloat16 need activations in bfloat16.
    in_bfloat16 = config.model.compute_dtype == "bfloat16"
    steps = [["moments_dtype", "gradients_dtype"], ["master_dtype"]]
    if not in_bfloat16:
        steps = [["moments_dtype"]]
    left = [[name for name in step if getattr(options, name) == "float32"] for step in steps]
    return next(filter(None, left), [])


def _smaller_activations(config: Config) -> Iterator[str]:
    """Yields changes that shrink what the forward keeps for the backward."""
    if config.model.remat != "full":
        yield "model.remat=full"
    if config.train.rows_per_device > 1:
        yield f"train.rows_per_device={config.train.rows_per_device // 2}"
    if config.data.max_seq_length > 1024:
        yield f"data.max_seq_length={config.data.max_seq_length // 2}"
