"""Times a conventional step beside its matmuls alone: python -m benchmarks.matmul_limit --shape mid

The matmuls have the sizes of the step's own, forward and backward, with as many rows for every
expert, operands that lie as XLA multiplies them best, and nothing before or after them. So their
time is what the step would take if XLA did all else for nothing. Each size is timed in turn with
the step, and the best of each counts.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.machine import machine
from benchmarks.shapes import Shape, shape_of
from benchmarks.step import make_parser, make_step
from benchmarks.timing import in_turns
from olmoe_jax.errors import UserError, run_command, whole_number
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.cpu import restart_with_huge_pages


class Matmul(NamedTuple):
    """The size of a product [rows, inner] [inner, columns]."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """FLOPs of one product."""
        return 2 * self.rows * self.inner * self.columns


def main(arguments: Sequence[str]) -> None:
    parser = make_parser()
    parser.prog, parser.description = "python -m benchmarks.matmul_limit", __doc__
    parser.set_defaults(method="conventional", remat="selective")
    parser.add_argument("--runs", type=whole_number(1), default=5, help="timed runs of each")
    args = parser.parse_args(arguments)
    if args.method != "conventional" or args.lora_rank is not None:
        raise UserError("--method, --lora_rank: only a conventional step counts; leave them out")
    mesh, counts = sharding.make_mesh(), matmuls(shape_of(args))
    with jax.set_mesh(mesh):
        step = make_step(args, mesh)[0]
        programs = {size: some_of(size) for size in counts}
        best = {
            name: runs[:, 0].min()
            for name, runs in in_turns({"step": step} | programs, args.runs).items()
        }
    parts = {size: counts[size] * best[size] / len(programs[size].args[0]) for size in counts}
    flops = sum(count * size.flops for size, count in counts.items())
    total = sum(parts.values())
    print(f"{machine()}\n\n| rows, inner, columns | times a step | seconds | GFLOP/s |")
    print("| --- | --- | --- | --- |")
    for size, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        speed = counts[size] * size.flops / seconds / 1e9
        print(f"| {', '.join(map(str, size))} | {counts[size]:g} | {seconds:.3f} | {speed:.0f} |")
    print(f"\nmatmuls alone: {total:.3f} s, {flops / total / 1e9:.0f} GFLOP/s")
    print(f"the step: {best['step']:.3f} s, {best['step'] / total:.2f} times as long")


def matmuls(shape: Shape) -> dict[Matmul, float]:
    """Returns how often a conventional step multiplies matrices of each size.

    Attention skips later keys: half of its products counts.
    """
    counts: dict[Matmul, float] = {}

    def add(count: float, *sizes: Matmul) -> None:
        for size in sizes:
            counts[size] = counts.get(size, 0) + count

    def linear(count: int, rows: int, inner: int, columns: int) -> None:
        """Adds y = x w and the gradients of x and w."""
        add(
            count,
            Matmul(rows, inner, columns),
            Matmul(rows, columns, inner),
            Matmul(inner, rows, columns),
        )

    tokens, hidden = shape.tokens, shape.hidden
    linear(4 * shape.layers, tokens, hidden, hidden)
    linear(shape.layers, tokens, hidden, shape.experts)
    linear(1, tokens, hidden, shape.vocab)
    rows = tokens * shape.experts_per_token // shape.experts
    linear(2 * shape.layers * shape.experts, rows, hidden, shape.intermediate)
    linear(shape.layers * shape.experts, rows, shape.intermediate, hidden)
    # The scores, again in the backward pass, and their gradient; the output, and the gradients of
    # v, q and k.
    size, halves = hidden // shape.heads, shape.layers * shape.rows * shape.heads / 2
    add(3 * halves, Matmul(shape.length, size, shape.length))
    add(4 * halves, Matmul(shape.length, shape.length, size))
    return counts


def some_of(size: Matmul) -> functools.partial:
    """Returns a call that multiplies several matrices of a size: about 4 GFLOP, at most 64."""
    count = min(64, max(1, round(4e9 / size.flops)))
    random = np.random.default_rng(0)

    def matrices(*shape: int) -> list[jax.Array]:
        return [jax.numpy.asarray(random.normal(size=shape), "float32") for _ in range(count)]

    multiply = jax.jit(lambda left, right: [a @ b for a, b in zip(left, right, strict=True)])
    return functools.partial(
        multiply, matrices(size.rows, size.inner), matrices(size.inner, size.columns)
    )


if __name__ == "__main__":
    restart_with_huge_pages()
    run_command(main)
