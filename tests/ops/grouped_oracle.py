"""The grouped matmul the slow way, and our functions on the same inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoe_jax.ops.grouped_matmul import grouped_matmul


def make_inputs(rows: int, d: int, f: int, groups: int, dtype=np.float32):
    """x, w and the gradient of the output."""
    random = np.random.default_rng(0)
    shapes = (rows, d), (groups, d, f), (rows, f)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def loop_oracle(x, w, g, sizes):
    """Output and gradients, one row at a time in float64."""
    x, w, g = (np.asarray(value, np.float64) for value in (x, w, g))
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        y[row] = x[row] @ w[group]
        dx[row] = w[group] @ g[row]
        dw[group] += np.outer(x[row], g[row])
    return y, dx, dw


@functools.partial(jax.jit, static_argnames="backend")
def run(x, w, g, sizes, backend):
    """Output and gradients."""
    y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes), backend), x, w)
    return y, *pullback(g)
