"""Proofs: a backend's results and gradients on this device, against plain XLA; and their times.

An error is the largest difference, relative to the largest number of the same row (or matrix).
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from olmoe_jax.ops.attention import attention
from olmoe_jax.ops.grouped_matmul import grouped_matmul


def tolerance(dtype: DTypeLike) -> float:
    """Returns the largest error of a right backend: the rounding of a few numbers in a row."""
    # GPUs may multiply float32 in tensor cores, which keep 10 bits of the mantissa.
    return 2e-2 if jnp.dtype(dtype).itemsize == 2 else 3e-3


def prove_grouped_matmul(backend: str, shape: tuple[int, int, int, int], dtype: DTypeLike) -> float:
    """Returns the largest error of y, dx, dw and the tuned matrices' gradient, or NaN if one is.

    The groups are uneven, two of them are empty, and an eighth of the rows belongs to none.

    Args:
      backend: one of `grouped_matmul.BACKENDS`.
      shape: rows N, in D, out F, groups E (3 or more).
      dtype: of x and w.
    """
    groups = shape[-1]
    x, w, g, sizes = _grouped(shape, dtype)
    indices = jnp.asarray([0, groups - 1, groups], jnp.int32)  # an empty group, one, and padding

    @jax.jit
    def products(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend), x, w)
        tuned = w[jnp.minimum(indices, groups - 1)]
        _, pull_tuned = jax.vjp(
            lambda tuned: grouped_matmul(x, w, sizes, backend, tuned=tuned, indices=indices), tuned
        )
        return (y, *pull(g), *pull_tuned(g))

    y, dx, dw = _products(x, w, g, sizes)
    d_tuned = jnp.append(dw, jnp.zeros_like(dw[:1]), 0)[indices]
    return _worst(products(x, w, g), (y, dx, dw, d_tuned))


def prove_attention(backend: str, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> float:
    """Returns the error of the output, dq, dk and dv.

    Each row holds texts of uneven lengths, and ends in padding.

    Args:
      backend: one of `attention.BACKENDS`.
      shape: rows B, positions S, heads H, key/value heads G, head size d.
      dtype: of q, k and v.
    """
    *operands, segments = _texts(shape, dtype)
    expected = _attention_results(_attention, *operands, segments)
    actual = _attention_results(functools.partial(attention, backend=backend), *operands, segments)
    # A key that few queries see has a small gradient, of large numbers that cancel.
    return _worst(*([array.reshape(1, -1) for array in arrays] for arrays in (actual, expected)))


def time_grouped_matmul(backend: str, shape: tuple[int, int, int, int], dtype: DTypeLike) -> float:
    """Returns the seconds of y, dx and dw; the arguments are those of `prove_grouped_matmul`."""
    x, w, g, sizes = _grouped(shape, dtype)

    @jax.jit
    def products(x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend), x, w)
        return (y, *pull(g))

    return best_seconds(products, x, w, g, sizes)


def time_attention(backend: str, shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> float:
    """Returns the seconds of output, dq, dk and dv; arguments as in `prove_attention`."""
    function = functools.partial(attention, backend=backend)
    return best_seconds(functools.partial(_attention_results, function), *_texts(shape, dtype))


def best_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the seconds of the fastest of five calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _grouped(shape: tuple[int, int, int, int], dtype: DTypeLike) -> tuple[jax.Array, ...]:
    """Returns x, w, dy and the sizes of uneven groups, two of them empty."""
    rows, width, out, groups = shape
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(groups)) * ~np.isin(np.arange(groups), (0, groups // 2))
    sizes = jnp.asarray(rng.multinomial(rows - rows // 8, shares / shares.sum()), jnp.int32)
    return *_normal(dtype, (rows, width), (groups, width, out), (rows, out)), sizes


def _texts(shape: tuple[int, int, int, int, int], dtype: DTypeLike) -> tuple[jax.Array, ...]:
    """Returns q, k, v, the output's gradient, and segments of uneven lengths."""
    batch, length, heads, groups, size = shape
    arrays = _normal(dtype, *((batch, length, n, size) for n in (heads, groups, groups, heads)))
    cuts = np.sort(np.random.default_rng(0).integers(1, length, (batch, 3)))
    segments = (np.arange(length) >= cuts[..., None]).sum(1)
    return *arrays, jnp.asarray(segments, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _attention_results(
    function: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    segments: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns the output, dq, dk and dv."""
    y, pull = jax.vjp(lambda *qkv: function(*qkv, segments), q, k, v)
    return (y, *pull(g.astype(y.dtype)))


def _normal(dtype: DTypeLike, *shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(*pair).astype(dtype) for pair in zip(keys, shapes, strict=True)]


@jax.jit
def _products(
    x: jax.Array, w: jax.Array, g: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns y, dx and dw in float32: all rows by each matrix, and the rows of others masked."""
    ends, row = jnp.cumsum(sizes), jnp.arange(len(x))
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def group(sums: tuple, one: tuple) -> tuple[tuple, jax.Array]:
        (y, dx), (matrix, size, end) = sums, one
        matrix, mine = matrix.astype(jnp.float32), ((row >= end - size) & (row < end))[:, None]
        y, dx = y + mine * dot(x, matrix), dx + mine * dot(g, matrix.T)
        return (y, dx), dot(x.T, mine * g)

    (y, dx), dw = jax.lax.scan(group, (jnp.zeros_like(g), jnp.zeros_like(x)), (w, sizes, ends))
    return y, dx, dw


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns attention in float32 with all S^2 scores, by jax's own function."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    same = segments[:, None, :, None] == segments[:, None, None, :]
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(
            q, k, v, mask=same, is_causal=True, implementation="xla"
        )


def _worst(actual: Sequence[jax.Array], expected: Sequence[jax.Array]) -> float:
    """Returns the largest error of some arrays; that of a row of zeros counts too."""
    errors = []
    for a, b in zip(actual, expected, strict=True):
        axes = tuple(range(1, b.ndim))
        scale = jnp.max(jnp.abs(b), axes)
        scale = jnp.maximum(scale, 1e-3 * jnp.max(scale))
        errors.append(jnp.max(jnp.max(jnp.abs(a.astype(jnp.float32) - b), axes) / scale))
    return float(jnp.max(jnp.stack(errors)))
