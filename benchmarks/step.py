"""Times training steps on random tokens: python -m benchmarks.step --shape mid --method densemixer

A step is the trainer's own program on rows of random tokens: forward and backward of the mean
loss, with the gradients of everything that trains (--what gradients) or also with the AdamW update
(--what update). A dense matmul is timed in turn with the steps. Its speed is the most that this
machine reaches now, and the report gives the step's share of it.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.machine import machine
from benchmarks.memory import GIB, peak_resident_gib, resident_gib, settled_resident_gib
from benchmarks.shapes import Shape, add_shape_flags, shape_of
from benchmarks.timing import timed
from olmoe_jax import methods
from olmoe_jax.config import (
    Config,
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
)
from olmoe_jax.data import Batch
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.model.config import ModelSettings, model_config_from_hf
from olmoe_jax.model.flops import step_flops_per_token
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.cpu import restart_with_huge_pages
from olmoe_jax.training.base_model import BaseModel
from olmoe_jax.training.program import Program, build_program

METHODS = ("frozen", "conventional", "densemixer", "esft")
DTYPES = {
    "router_gradient_dtype": ("bfloat16", "float8_e4m3fn"),
    "moments_dtype": ("float32", "bfloat16", "int8"),
    "gradients_dtype": ("float32", "bfloat16"),
    "master_dtype": ("float32", "bfloat16"),
}
"""Flags that are fields of a run's configuration, and their values."""
BACKENDS = ("grouped_matmul", "attention")


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    parser.add_argument("--steps", type=whole_number(1), default=5, help="timed steps")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    result = measure(args)
    print(json.dumps(result) if args.json else report(result))


def make_parser() -> ArgumentParser:
    """Returns a parser of the flags that say what a step is."""
    parser = ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    add_shape_flags(parser)
    parser.add_argument("--method", choices=METHODS, default="densemixer")
    parser.add_argument(
        "--router_gradient_experts", type=whole_number(1), help="DenseMixer's m; default: all"
    )
    parser.add_argument(
        "--lora_rank", type=whole_number(1), help="adapters of this rank; default: none"
    )
    parser.add_argument("--lora_dropout", type=float, help="default: the configuration's")
    parser.add_argument(
        "--tuned_experts",
        type=whole_number(1),
        default=8,
        help="esft: experts that train in each layer",
    )
    parser.add_argument("--remat", choices=("none", "selective", "full"), default="none")
    for name in BACKENDS:
        parser.add_argument(f"--{name}", help="backend; default: the platform's")
    for name, dtypes in DTYPES.items():
        parser.add_argument(f"--{name}", choices=dtypes, help="default: the configuration's")
    parser.add_argument("--what", choices=("gradients", "update"), default="gradients")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the program, runs it once to compile it, then times it in turn with a matmul."""
    devices, shape, mesh = jax.devices(), shape_of(args), sharding.make_mesh()
    imported = resident_gib()
    matmul, matmul_flops = dense_matmul(jnp.dtype(shape.compute_dtype))
    with jax.set_mesh(mesh):
        step, flops_per_token = make_step(args, mesh)
        made = peak_resident_gib()
        with_model = settled_resident_gib()
        loss = float(step()[1])  # the first call compiles
        first_step = time.time()
        timed(matmul)
        compiled = peak_resident_gib()
        settled_resident_gib()
        steps, matmuls = [], []
        for _ in range(args.steps):
            steps.append(timed(step))
            matmuls += [timed(matmul)[0] for _ in range(3)]
    on_cpu, stats = jax.default_backend() == "cpu", devices[0].memory_stats() or {}
    most = max(made, compiled, of_steps := peak_resident_gib())
    peak = most - imported if on_cpu else stats.get("peak_bytes_in_use", 0) / GIB
    # One matmul uses all cores, which virtual CPU devices share.
    matmul_flops *= 1 if on_cpu else len(devices)
    return {
        "shape": dataclasses.asdict(shape),
        "method": args.method,
        "router_gradient_experts": args.router_gradient_experts,
        "lora_rank": args.lora_rank,
        "what": args.what,
        "remat": args.remat,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "machine": machine(),
        "loss": loss,
        "first_step": first_step,  # seconds of the clock
        "step_seconds": [wall for wall, _ in steps],
        "step_cpu_seconds": [cpu for _, cpu in steps],
        "tokens_per_step": shape.tokens,
        "flops_per_step": flops_per_token * shape.tokens,
        "matmul_flops_per_second": matmul_flops / min(matmuls),
        # Accelerators: the allocator's peak on one device. CPU: the growth of the process since its
        # imports, compilation included.
        "peak_memory_gib": peak,
        "peak_resident_gib": most,
        "peak_over_model_gib": of_steps - with_model,  # compilation not included
    }


def make_step(
    args: argparse.Namespace, mesh: Mesh
) -> tuple[Callable[[], tuple[Any, jax.Array]], float]:
    """Returns a function that runs a step, and the step's FLOPs per token.

    The function returns the step's outputs and its loss. Call both under `jax.set_mesh(mesh)`. The
    random weights are complete when this returns.

    Raises:
      UserError: a flag has no effect or cannot work.
    """
    shape = shape_of(args)
    if args.router_gradient_experts is not None and args.method != "densemixer":
        raise UserError(f"--router_gradient_experts is densemixer's; --method={args.method}")
    if args.lora_rank is not None and args.method == "esft":
        raise UserError("--lora_rank does not go with --method=esft; leave one of them out")
    if args.method == "esft" and args.tuned_experts > shape.experts:
        raise UserError(f"--tuned_experts must be 1 to {shape.experts}")
    if args.lora_dropout is not None and not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora_dropout={args.lora_dropout}: write a share, 0 to below 1")
    if shape.rows % mesh.size:
        raise UserError(f"--rows={shape.rows}: must be a multiple of the {mesh.size} devices")
    program, flops_per_token = build(args, shape, mesh)
    jax.block_until_ready((program.state, program.frozen))
    batch = program.to_devices(random_batch(shape))
    zero_sums, accumulate, apply = program.zero_sums, program.accumulate, program.update
    state, frozen, position = program.state, program.frozen, np.zeros(2, np.uint32)

    def gradients(parameters: Parameters) -> tuple[Any, jax.Array]:
        sums = accumulate(parameters, frozen, zero_sums(), batch, position)
        return sums, sums.loss

    if args.what == "gradients":
        # Only the parameters are bound, so that the unused optimizer state is freed.
        return functools.partial(gradients, state.parameters), flops_per_token

    def update():
        nonlocal state
        state, metrics = apply(state, gradients(state.parameters)[0])
        program.hold(state.parameters)
        return state, metrics.loss

    return update, flops_per_token


def build(args: argparse.Namespace, shape: Shape, mesh: Mesh) -> tuple[Program, float]:
    """Returns the program of a run with random weights, and its FLOPs per token.

    The FLOPs are what the mathematics of the step needs, as a run reports them.
    """
    options, model = setup(args, shape)
    program = build_program(options, model, mesh, total_steps=1000)
    trains = program.state.parameters.__contains__
    flops = step_flops_per_token(model.config, model.settings, trains, shape.length / 2)
    return program, flops.model


def setup(args: argparse.Namespace, shape: Shape) -> tuple[Config, BaseModel]:
    """Returns the configuration and the model of a run with random weights."""
    given = {name: value for name in DTYPES if (value := getattr(args, name))}
    router_dtype = given.pop("router_gradient_dtype", None)
    dropout = {} if args.lora_dropout is None else {"lora_dropout": args.lora_dropout}
    # A step does not depend on how ESFT scores experts.
    method = MethodOptions(
        name="esft_gate" if args.method == "esft" else args.method,
        router_gradient_experts=args.router_gradient_experts,
        router_gradient_dtype=router_dtype,
        lora_rank=args.lora_rank,
        **dropout,
    )
    settings = ModelSettings(
        compute_dtype=jnp.dtype(shape.compute_dtype),
        remat=args.remat,
        **{backend: getattr(args, backend) for backend in BACKENDS},
    )
    config = model_config_from_hf(shape.hf_config(), f"--shape={args.shape}")
    chosen, _ = methods.build(method, config).for_plan(0, args.tuned_experts)
    options = Config(
        model=ModelOptions(init="random"),
        data=DataOptions(max_seq_length=shape.length),
        method=method,
        optimizer=OptimizerOptions(**given),
        train=TrainOptions(rows_per_device=shape.rows),
    )
    return options, BaseModel(config, settings, chosen, None, None, None)


def random_batch(shape: Shape) -> Batch:
    """Returns rows of random tokens, one example each, with weights that make the loss a mean.

    Raises:
      UserError: a row of one token has nothing to predict.
    """
    if shape.length < 2:
        raise UserError(f"--length={shape.length}: write 2 or more")
    size = (shape.rows, shape.length)
    tokens = np.random.default_rng(0).integers(0, shape.vocab, size, dtype=np.int32)
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = 0
    weights = np.full(size, 1 / (shape.rows * (shape.length - 1)), np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), size)
    return Batch(tokens, targets, np.ones(size, np.int32), positions, weights)


def dense_matmul(dtype: jnp.dtype) -> tuple[Callable[[], jax.Array], float]:
    """Returns a large square matmul on one device to compare with, and its FLOPs."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.full((side, side), 0.5, dtype)
    multiply = jax.jit(jnp.dot)
    return lambda: multiply(x, x), 2.0 * side**3


def report(result: dict[str, Any]) -> str:
    """Returns the result as text for a person."""
    times, shape = result["step_seconds"], result["shape"]
    best, flops = min(times), result["flops_per_step"]
    peak = result["matmul_flops_per_second"]
    sizes = ", ".join(f"{name} {value}" for name, value in shape.items())
    m, rank = result["router_gradient_experts"], result["lora_rank"]
    method = result["method"] + (f", m={m}" if m else "") + (f", LoRA rank {rank}" if rank else "")
    return f"""{method}; {result["what"]}, remat {result["remat"]}, {result["device"]}
{result["machine"]}
{sizes}
step          {best:.3f} s at best, {statistics.median(times):.3f} s median of {len(times)}
throughput    {result["tokens_per_step"] / best:,.0f} tokens/s
model         {flops / best / 1e9:,.1f} GFLOP/s of {flops / 1e9:,.1f} GFLOP a step
dense matmul  {peak / 1e9:,.1f} GFLOP/s; the step is at {flops / best / peak:.0%} of it
peak memory   {result["peak_memory_gib"]:.2f} GiB"""


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
