"""Times a decode step's matmul on this CPU: python -m benchmarks.few_rows_matmul

Few rows times one matrix after another, together more than the cache holds, on all cores at once:
`matmul_by_rows` and XLA's own matmul. Prints microseconds (median of interleaved runs) and GB/s a
core.
"""

import time
from collections.abc import Sequence

import numpy as np

from olmoe_jax.errors import ArgumentParser, run_command
from olmoe_jax.parallel.cpu import restart_with_huge_pages, use_all_cores

_BYTES = 2**28
"""Of a core's matrices."""


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.few_rows_matmul", description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args(arguments)
    use_all_cores()
    seconds = measure(args)
    size = 4 * args.hidden * args.intermediate
    for name, runs in seconds.items():
        print(f"{name:8} {1e6 * np.median(runs):8.1f} us {size / np.median(runs) / 1e9:6.1f} GB/s")
    ratio = np.median(np.divide(seconds["XLA's"], seconds["by rows"]))
    print(f"time, XLA's / by rows: {ratio:.2f}")


def measure(args) -> dict[str, list[float]]:
    """Seconds a matrix [D, F], by way and run."""
    import jax
    from jax.sharding import PartitionSpec as P

    from olmoe_jax.ops.decoding import matmul_by_rows

    def xla(x, matrices, index):
        return x @ jax.lax.dynamic_index_in_dim(matrices, index, keepdims=False)

    count = -(-_BYTES // (4 * args.hidden * args.intermediate))

    def all_of(matmul):
        def on_core(x, matrices):
            def one(index, x):  # Each needs the one before: none begins early, none is left out.
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
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for run in range(args.runs + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(x, matrices))
            if run:  # The first compiles.
                seconds[name].append((time.perf_counter() - start) / count)
    return seconds


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
