"""Run by test_weight_copies.py, with XLA's optimisations: what a step writes of a layer's experts.

Prints as JSON "seconds", the CPU time of tracing and compiling the program `accumulate` for one
H100, which need not be there, and the program's instructions that write as much as an expert matrix
of all experts of a layer, by kind: "copies" of weights, "sums" (a layer of the gradients' sums,
read before it is written) and "kernels". The model is OLMoE-1B-7B with another number of layers.
Arguments: that number, and the fields of the section `method`, as NAME=VALUE.
"""

import dataclasses
import json
import math
import os
import re
import sys
from collections import defaultdict

from olmoe_jax import methods
from olmoe_jax.config import from_dict
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.devices import open_devices, parse_topology, prepare_environment
from olmoe_jax.plan.hlo import Computation, Instruction, parse
from olmoe_jax.plan.planning import OLMOE_1B_7B
from olmoe_jax.plan.programs import StepPrograms
from olmoe_jax.training.base_model import compute_settings, with_backends

MODEL = dataclasses.replace(OLMOE_1B_7B, num_layers=int(sys.argv[1]))
MATRIX = MODEL.num_experts * MODEL.hidden_size * MODEL.intermediate_size
MOVES_NOTHING = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")


def accumulate(method: dict[str, str | int]) -> str:
    """The optimised HLO of a micro-batch's program on one H100."""
    topology = parse_topology("h100:1")
    prepare_environment(topology)
    config = from_dict(
        {
            "data": {"train_path": "none.jsonl"},
            "method": method,
            "optimizer": {"gradients_dtype": "bfloat16", "moments_dtype": "bfloat16"},
            "train": {"output_dir": "none"},
        }
    )
    tuning, _ = methods.build(config.method, MODEL).for_plan(0, 4)
    settings = tuning.model_settings(with_backends(compute_settings(config), MODEL, "gpu"))
    mesh = sharding.make_mesh(devices=open_devices(topology))
    hlo = StepPrograms(config, MODEL, settings, tuning, mesh).executable("accumulate")[1]
    assert hlo
    return hlo


def layers_written(hlo: str) -> dict[str, list[str]]:
    """The results as large as an expert matrix of a layer, by kind, with XLA's names."""
    computations, _ = parse(hlo)
    instructions = [i for body in computations.values() for i in body.values()]
    # What happens inside a fusion is not written.
    inside = {
        name
        for i in instructions
        if i.opcode.startswith("fusion")
        for name in re.findall(r"calls=%?([\w.\-]+)", i.attributes)
    }
    found = defaultdict(list)
    for name, body in computations.items():
        for i in body.values():
            if name in inside or i.opcode in MOVES_NOTHING or i.opcode.endswith("-done"):
                continue
            if any(is_layer(dimensions) for dimensions in re.findall(r"\[([\d,]+)\]", i.shape)):
                found[kind(i, body)].append(f"{i.opcode} {i.name}")
    return found


def is_layer(dimensions: str) -> bool:
    """Whether a shape is that of one layer's matrices: [E, D, F] or [1, E, D, F]."""
    sizes = [int(size) for size in dimensions.split(",")]
    return math.prod(sizes) == MATRIX and len([size for size in sizes if size > 1]) == 3


def kind(instruction: Instruction, body: Computation) -> str:
    if instruction.opcode == "custom-call":
        return "kernels"
    # A loop's body returns the stack of weights as it came; the sums' stack it changes.
    first = re.match(r"%?([\w.\-]+)", instruction.operands)
    source = first and body.get(first[1])
    if source and source.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", source.attributes)[1])
        root = [i for i in body.values() if i.opcode == "tuple"][-1]
        returned = re.findall(r"%([\w.\-]+)", root.operands)
        if len(returned) > index and returned[index] != source.name:
            return "sums"
    return "copies"


if __name__ == "__main__":
    pairs = (argument.split("=") for argument in sys.argv[2:])
    fields = {key: int(value) if value.isdigit() else value for key, value in pairs}
    start = sum(os.times()[:4])  # with the assembler's processes
    hlo = accumulate(fields)
    print(json.dumps({"seconds": sum(os.times()[:4]) - start, **layers_written(hlo)}))
