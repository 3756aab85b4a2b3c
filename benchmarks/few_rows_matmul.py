"""Times a decode step's matmul on this CPU: python -m benchmarks.few_rows_matmul

A few rows are multiplied by one matrix after another, on all cores at once, by `matmul_by_rows` and
by XLA's own matmul. The matrices together exceed the cache. The script prints microseconds (median
of interleaved runs) and GB/s per core.
"""

import argparse
import functools
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.machine import machine
from benchmarks.timing import in_turns
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores

_BYTES = 2**28
"""Bytes of a core's matrices."""


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.few_rows_matmul", description=__doc__)
    parser.add_argument("--rows", type=whole_number(1), default=4)
    parser.add_argument("--hidden", type=whole_number(1), default=2048)
    parser.add_argument("--intermediate", type=whole_number(1), default=1024)
    parser.add_argument("--runs", type=whole_number(1), default=7)
    args = parser.parse_args(arguments)
    use_all_cores()
    seconds = measure(args)
    size = 4 * args.hidden * args.intermediate
    print(machine())
    for name, runs in seconds.items():
        print(f"{name:8} {1e6 * np.median(runs):8.1f} us {size / np.median(runs) / 1e9:6.1f} GB/s")
    ratio = np.median(seconds["XLA's"] / seconds["by rows"])
    print(f"time, XLA's / by rows: {ratio:.2f}")


def measure(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns the seconds per matrix [D, F] of every run, by the way to multiply."""
    import jax
    from jax.sharding import PartitionSpec as P

    from olmoe_jax.ops.decoding import matmul_by_rows

    def xla(x: jax.Array, matrices: jax.Array, index: jax.Array) -> jax.Array:
        return x @ jax.lax.dynamic_index_in_dim(matrices, index, keepdims=False)

    count = -(-_BYTES // (4 * args.hidden * args.intermediate))

    def all_of(matmul: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        def on_core(x: jax.Array, matrices: jax.Array) -> jax.Array:
            # Each product needs the one before, so that XLA neither reorders nor drops one.
            def one(index: jax.Array, x: jax.Array) -> jax.Array:
                y = jax.lax.optimization_barrier(matmul(x, matrices, index))
                return x + 1e-9 * y[:, :1]

            return jax.lax.fori_loop(0, count, one, x)

        own = P("core")
        return jax.jit(
            jax.shard_map(on_core, mesh=mesh, in_specs=(own, own), out_specs=own, check_vma=False)
        )

    cores = jax.device_count()
    mesh = jax.make_mesh((cores,), ("core",))
    sharding = jax.NamedSharding(mesh, P("core"))
    random = np.random.default_rng(0)
    x = random.standard_normal((cores * args.rows, args.hidden), np.float32)
    matrices = random.standard_normal((cores * count, args.hidden, args.intermediate), np.float32)
    x, matrices = jax.device_put((x, matrices), sharding)
    programs = {"by rows": all_of(matmul_by_rows), "XLA's": all_of(xla)}
    spent = in_turns(
        {name: functools.partial(run, x, matrices) for name, run in programs.items()}, args.runs
    )
    return {name: runs[:, 0] / count for name, runs in spent.items()}


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
