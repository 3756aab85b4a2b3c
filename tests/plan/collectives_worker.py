"""Run by test_plan_collectives.py on 8 virtual devices: what steps on several meshes communicate.

Argument: a directory with a config.json. Prints {"METHOD DATAxFSDPxEXPERT EXCHANGE": {"collectives"
of the accumulate program, "gathered": what it gathers}}.
"""

import json
import sys
from pathlib import Path

import jax
from helpers import equations

from olmoe_jax.checkpoints.source import read_model_config
from olmoe_jax.config import from_dict
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.collectives import communication
from olmoe_jax.plan.programs import StepPrograms
from olmoe_jax.training.setup import model_settings, with_backends

MESHES = {
    "1x2x4": (1, 2, 4),
    "1x8x1": (1, 8, 1),
    "2x4x1": (2, 4, 1),
}
CASES = [("densemixer", mesh) for mesh in MESHES]
CASES += [("conventional", mesh) for mesh in ("1x2x4", "1x8x1")]


def accumulate(method: str, mesh: str):
    """The jaxpr and the optimised HLO of a step's accumulate program."""
    data, fsdp, expert = MESHES[mesh]
    config = from_dict(
        {
            "model": {"init": "random", "config_path": sys.argv[1], "compute_dtype": "bfloat16"},
            "data": {"train_path": "none.jsonl", "max_seq_length": 64},
            "method": {"name": method},
            "train": {"output_dir": "none", "rows_per_device": 2},
            "mesh": {"data": data, "fsdp": fsdp, "expert": expert},
        }
    )
    model = read_model_config(Path(sys.argv[1]))
    settings = with_backends(model_settings(config), model, "cpu")
    step = StepPrograms(config, model, settings, None, sharding.make_mesh(data, fsdp, expert))
    shapes = step.shapes
    arguments = shapes.trained, shapes.frozen, shapes.accumulated, shapes.batch, shapes.position
    with jax.set_mesh(step.mesh):
        traced = step.functions.accumulate.trace(*arguments)
        return traced.jaxpr, traced.lower().compile().as_text()


def gathers(jaxpr):
    """(dtype, shape) of everything that is gathered explicitly."""
    for equation in equations(jaxpr):
        value = equation.outvars[0].aval if equation.outvars else None
        whole = equation.primitive.name == "sharding_constraint" and (
            equation.params["sharding"].is_fully_replicated
        )
        if whole or equation.primitive.name == "all_gather":
            yield str(value.dtype), value.shape


def main():
    assert jax.device_count() == 8
    result = {}
    for method, mesh in CASES:
        jaxpr, hlo = accumulate(method, mesh)
        result[f"{method} {mesh}"] = {
            "collectives": [c._asdict() for c in communication(hlo).collectives],
            "gathered": list(gathers(jaxpr)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
