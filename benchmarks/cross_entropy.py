"""Loss and gradients, chunked against all logits at once: python -m benchmarks.cross_entropy

The script prints the seconds (median of interleaved runs) and the temporary memory of both ways.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import machine
from benchmarks.timing import in_turns
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the loss from all logits at once; autodiff gives its gradients."""
    head = head.astype(hidden.dtype)
    logits = jnp.einsum("bsd,vd->bsv", hidden, head, preferred_element_type=jnp.float32)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.cross_entropy", description=__doc__)
    parser.add_argument("--rows", type=whole_number(1), default=1)
    parser.add_argument("--length", type=whole_number(1), default=4096)
    parser.add_argument("--width", type=whole_number(1), default=256)
    parser.add_argument("--vocab", type=whole_number(1), default=8192)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=whole_number(1), default=5)
    args = parser.parse_args(arguments)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (args.rows, args.length)
    hidden = jax.random.normal(keys[0], (*shape, args.width), args.dtype)
    head = jax.random.normal(keys[1], (args.vocab, args.width)) / args.width**0.5
    targets = jax.random.randint(keys[2], shape, 0, args.vocab)
    operands = hidden, head, targets, jnp.full(shape, 1 / targets.size)

    functions = {"chunked": weighted_cross_entropy, "plain": plain}
    compiled = {
        name: jax.jit(jax.value_and_grad(function, (0, 1))).lower(*operands).compile()
        for name, function in functions.items()
    }
    spent = in_turns({n: functools.partial(f, *operands) for n, f in compiled.items()}, args.runs)
    seconds = {name: runs[:, 0] for name, runs in spent.items()}
    print(machine())
    for name, function in compiled.items():
        temporary = function.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:8} {np.median(seconds[name]):8.3f} s {temporary:8.1f} MiB")
    ratio = np.median(seconds["chunked"] / seconds["plain"])
    print(f"time, chunked / plain: {ratio:.2f}")


if __name__ == "__main__":
    run_command(main)
