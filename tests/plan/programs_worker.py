"""Run by test_plan_programs.py on 8 virtual devices: plans of tiny runs, and what training runs.

Argument: a directory with a config.json. Prints {name: the plan as JSON, with "text" and for the
first also "training": what the training's own accumulate program takes}.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from olmoe_jax import data
from olmoe_jax.config import from_dict
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.collectives import communication
from olmoe_jax.plan.planning import plan
from olmoe_jax.plan.report import facts, to_text
from olmoe_jax.training.setup import build_program, open_model
from olmoe_jax.training.step import place_batch


def configuration(eval_fraction: float = 0.0, **method):
    return from_dict(
        {
            "model": {"init": "random", "config_path": sys.argv[1], "compute_dtype": "float32"},
            "data": {
                "train_path": "none.jsonl",
                "tokenizer_path": sys.argv[1],
                "max_seq_length": 64,
                "eval_fraction": eval_fraction,
            },
            "method": method,
            "train": {"output_dir": "none", "rows_per_device": 2},
        }
    )


def trained(config):
    """What the compiled accumulate program of a run takes and communicates."""
    mesh = sharding.make_mesh(1, -1)
    with jax.set_mesh(mesh):
        program = build_program(config, open_model(config), mesh, 10)
        rows = np.ones((16, 64), np.int32)
        batch = place_batch(data.Batch(rows, rows, rows, rows, rows.astype(np.float32)), mesh)
        arguments = program.state.parameters, program.frozen
        position = np.zeros(2, np.uint32)
        compiled = program.accumulate.lower(
            *arguments, program.zero_sums(), batch, position
        ).compile()
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "communicated": communication(compiled.as_text()).bytes,
    }


def too_small(planned, divided: float):
    """The plan on devices that have half of what it needs; `divided`: share of weights and state.

    (In the tiny model's plans the temporaries are nearly everything.)
    """
    kind = dataclasses.replace(planned.topology.kind, capacity=planned.peak // 2)
    topology = dataclasses.replace(planned.topology, kind=kind)
    return dataclasses.replace(planned, topology=topology, divided=int(divided * planned.peak))


full = configuration(0.1, name="densemixer")
planned = {
    "full": plan(full, "cpu:8", rows_per_step=40),
    "lora": plan(configuration(name="densemixer", lora_rank=4), "cpu:8"),
    "esft": plan(configuration(name="esft_gate"), "cpu:8", esft_experts=2),
}
quantized = configuration(name="densemixer", lora_rank=4)
base = dataclasses.replace(
    quantized.model,
    init="pretrained",
    path=sys.argv[1],
    config_path=None,
    base_quantization="nf4",
)
planned["nf4"] = plan(dataclasses.replace(quantized, model=base), "cpu:8")
planned["state too large"] = too_small(planned["full"], 0.9)
planned["temporaries too large"] = too_small(planned["full"], 0.1)
result = {name: {**facts(p), "text": to_text(facts(p))} for name, p in planned.items()}
result["full"]["training"] = trained(full)
print(json.dumps(result))
