"""Run by test_compiled_step.py, with XLA's optimisations: what the compiled step is made of.

Prints as JSON, by case: "largest", the numbers in the largest tensor of the MoE block, and
"allowed", those in the K-fold copy of the tokens or in one layer's expert weights, whichever is
larger; and "compile_seconds", CPU times by number of layers.
"""

import json
import math
import re
import time

import jax
import numpy as np

from benchmarks.shapes import shape_of
from benchmarks.step import build, make_parser, random_batch
from olmoe_jax.parallel import sharding

# Sizes that tell a copy for all experts (tokens x 16) from one for the selected (tokens x 2).
SIZES = [
    "--layers=3",
    "--hidden=64",
    "--intermediate=64",
    "--experts=16",
    "--rows=4",
    "--length=64",
]


def lower(*flags):
    """The shape, and the lowered program that adds up gradients."""
    args = make_parser().parse_args(["--shape=tiny", "--rows=4", *SIZES, *flags])
    shape, mesh = shape_of(args), sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        program, _ = build(args, shape, mesh)
        state, batch = program.state, program.to_devices(random_batch(shape))
        position = np.zeros(2, np.uint32)
        start = time.process_time()
        lowered = program.accumulate.lower(
            state.parameters, program.frozen, program.zero_sums(), batch, position
        )
    return shape, lowered, start


def largest(*flags):
    """Of the instructions in the MoE block, but for the stacked weights and their gradients."""
    shape, lowered, _ = lower(*flags)
    sizes = [0]
    for line in lowered.compile().as_text().splitlines():
        if not re.search(r'op_name="[^"]*\bmoe\b', line):
            continue
        result = line.split(" = ", 1)[1].split("(", 1)[0]
        for text in re.findall(r"\[([\d,]+)\]", result):
            dimensions = [int(size) for size in text.split(",")]
            if dimensions[0] != shape.layers:
                sizes.append(math.prod(dimensions))
    copies = shape.tokens * shape.experts_per_token * shape.hidden
    weights = shape.experts * shape.hidden * shape.intermediate
    return {"largest": max(sizes), "allowed": max(copies, weights)}


def compile_seconds(layers: int) -> float:
    jax.clear_caches()
    _, lowered, start = lower(f"--layers={layers}", "--remat=full")
    lowered.compile()
    return time.process_time() - start


def main() -> None:
    seconds = {2: [], 16: []}
    for _ in range(3):  # in turn: a machine's slow minutes slow both
        for layers, measured in seconds.items():
            measured.append(compile_seconds(layers))
    result = {
        "conventional": largest("--method=conventional"),
        "densemixer": largest("--method=densemixer"),
        "densemixer, remat": largest("--method=densemixer", "--remat=full"),
        # On a CPU this backend multiplies all rows by all weights: what must be found.
        "dense expansion": largest("--method=conventional", "--grouped_matmul=ragged_dot"),
        "compile_seconds": seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
