"""Compiles each backend's grouped matmul: python -m benchmarks.grouped_matmul --topology h100:1

The devices need not be there: nothing is executed. The program is forward and gradients of a scan
over layers, whose stacked weights a backend must not copy. The script prints what one device
allocates besides inputs and outputs.
"""

import argparse
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from benchmarks.memory import GIB
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.ops.grouped_matmul import BACKENDS, check_backend, grouped_matmul
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.plan.devices import open_devices, parse_topology, prepare_environment


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.grouped_matmul", description=__doc__)
    parser.add_argument("--topology", required=True, help="one device, e.g. h100:1")
    parser.add_argument("--layers", type=whole_number(1), default=16)
    parser.add_argument(
        "--rows", type=whole_number(1), default=32_768, help="rows of all experts together"
    )
    parser.add_argument("--experts", type=whole_number(1), default=64)
    parser.add_argument("--hidden", type=whole_number(1), default=2048)
    parser.add_argument("--intermediate", type=whole_number(1), default=1024)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--backend", choices=BACKENDS, help="this one alone (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    chosen = [args.backend] if args.backend else backends(args.topology)
    result = {backend: compiled(args, backend) for backend in chosen}
    print(json.dumps(result) if args.json else report(result))


def backends(topology: str) -> list[str]:
    """Returns the backends that run on the topology's devices and are installed."""
    platform, usable = parse_topology(topology).kind.platform, []
    for backend in BACKENDS:
        try:
            usable.append(check_backend(backend, platform))
        except UserError:
            continue
    return usable


def compiled(args: argparse.Namespace, backend: str) -> dict[str, float]:
    """Returns the GiB of one layer's weights, of all layers' weights, and of temporaries."""
    topology = parse_topology(args.topology)
    prepare_environment(topology)
    jax.config.update("jax_platforms", "cpu")  # jax has read the environment already
    devices = open_devices(topology)
    whole = NamedSharding(make_mesh(devices=devices), P())

    def array(shape: tuple[int, ...], dtype: DTypeLike = args.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    matrices = (args.layers, args.experts, args.hidden, args.intermediate)
    weights = (array(matrices), array((*matrices[:2], *matrices[:1:-1])))
    rows, sizes = array((args.rows, args.hidden)), array((args.experts,), jnp.int32)

    def loss(weights: tuple[jax.Array, jax.Array], rows: jax.Array, sizes: jax.Array) -> jax.Array:
        def layer(
            rows: jax.Array, layer_weights: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, None]:
            inward, outward = layer_weights
            hidden = grouped_matmul(rows, inward, sizes, backend)
            return grouped_matmul(jax.nn.silu(hidden), outward, sizes, backend), None

        y = jax.lax.scan(jax.checkpoint(layer), rows, weights)[0]
        return jnp.sum(y.astype(jnp.float32))

    # Kernel libraries ask the default device what to emit.
    with jax.default_device(devices[0]):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(weights, rows, sizes).compile()
    one_layer = 2 * args.experts * args.hidden * args.intermediate * jnp.dtype(args.dtype).itemsize
    return {
        "weights of a layer, GiB": one_layer / GIB,
        "weights of all, GiB": args.layers * one_layer / GIB,
        "temporaries, GiB": program.memory_analysis().temp_size_in_bytes / GIB,
    }


def report(result: dict[str, dict[str, float]]) -> str:
    """Returns the results as a Markdown table."""
    columns = list(next(iter(result.values())))
    lines = [f"| backend | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for backend, values in result.items():
        lines.append(f"| {backend} | {' | '.join(f'{value:.2f}' for value in values.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
