"""Run by test_grouped_matmul_compiled.py: compiles a backend's kernels for an H100 at every size.

Nothing is executed, and no H100 need be there. Argument: the backend. Prints a line of JSON for
each case: its name, and the GiB of temporaries or the error of a kernel that does not compile.
"""

import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.ops.grouped_matmul import grouped_matmul
from olmoe_jax.ops.linear import ExpertWeights, Linear
from olmoe_jax.ops.router_gradient import candidate_scores
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.plan.devices import open_devices, parse_topology, prepare_environment

TOKENS, CHOSEN, EXPERTS, D, F = 4096, 8, 64, 2048, 1024
"""The sizes of OLMoE-1B-7B, and the tokens of one row."""
MATRICES = {
    "experts, inward": (EXPERTS, D, F),
    "experts, outward": (EXPERTS, F, D),
    **{
        f"rank {rank}, {factor} {way}": (EXPERTS, *size)
        for rank in (8, 64)
        for way, (width, out) in {"inward": (D, F), "outward": (F, D)}.items()
        for factor, size in {"A": (width, rank), "B": (rank, out)}.items()
    },
    "no tile divides": (7, 100, 36),
}
"""Experts, width and output width of y, dX and dW."""
TUNED = {f"{count} tuned experts": count for count in (1, 5, 20)}
CANDIDATES = {f"router gradient of {m} experts": m for m in (16, 32)}


def programs(backend: str) -> dict[str, tuple[Callable, tuple[tuple[int, ...], ...]]]:
    """By case: a function, and the shapes of its arguments; the last argument is int32."""
    rows = TOKENS * CHOSEN

    def products(x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend), x, w)
        return (y, *pull(g))

    def tuned(count: int) -> Callable:
        def function(x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple:
            indices = jnp.arange(count)

            def product(x: jax.Array, tuned: jax.Array) -> jax.Array:
                return grouped_matmul(x, w, sizes, backend, tuned=tuned, indices=indices)

            y, pull = jax.vjp(product, x, w[:count])
            return (y, *pull(g))

        return function

    def scores(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        g, *weights, candidates = arrays
        return candidate_scores(x, g, ExpertWeights(*map(Linear, weights)), candidates, backend)

    inward, outward = (EXPERTS, D, F), (EXPERTS, F, D)
    sizes = {name: ((rows, n), (e, n, m), (rows, m), (e,)) for name, (e, n, m) in MATRICES.items()}
    tokens = (TOKENS, D)
    return {
        **{name: (products, shapes) for name, shapes in sizes.items()},
        **{name: (tuned(count), sizes["experts, inward"]) for name, count in TUNED.items()},
        **{
            name: (scores, (tokens, tokens, inward, inward, outward, (TOKENS, m - CHOSEN)))
            for name, m in CANDIDATES.items()
        },
    }


def main(backend: str) -> None:
    topology = parse_topology("h100:1")
    prepare_environment(topology)
    devices = open_devices(topology)
    whole = NamedSharding(make_mesh(devices=devices), P())
    found: float | str
    # Kernel libraries ask the default device what to emit.
    with jax.default_device(devices[0]):
        for name, (function, shapes) in programs(backend).items():
            dtypes = [jnp.bfloat16] * (len(shapes) - 1) + [jnp.int32]
            arguments = [
                jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ]
            try:
                program = jax.jit(function).lower(*arguments).compile()
                found = program.memory_analysis().temp_size_in_bytes / 2**30
            except Exception as error:  # of any compiler: it is this case's result
                found = f"{type(error).__name__}: {error}"[:500]
            print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
