"""Attention kernels of libraries for GPUs and TPUs, behind one signature.

Each takes q [B, S, H, d], k and v [B, S, G, d] and segments [B, S] as
`olmoe_jax.ops.attention.attention` does, and skips blocks of later keys. Each library is for one
platform and is imported in its function. `interpret` runs a Pallas kernel on the CPU, for tests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_MULTIPLE = 128
"""The multiple that a row's length must be: the kernels' blocks must divide a row."""


def _in_whole_blocks(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a kernel that takes rows of any length.

    The rows are padded at their end, which no query sees, to a multiple of _MULTIPLE.
    """

    @functools.wraps(kernel)
    def padded(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, **options: Any
    ) -> jax.Array:
        length = q.shape[1]
        padding = (0, -length % _MULTIPLE)
        q, k, v = (jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), padding), constant_values=-1)
        return kernel(q, k, v, segments, **options)[:, :length]

    return padded


@_in_whole_blocks
def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
    """Runs splash attention, which ships with jax, on TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, heads, size = q.shape[1:]
    block = math.gcd(length, 512)
    sizes: dict[str, Any] = {
        f"block_{side}": block for side in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    }
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([library.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**sizes),
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(size), k, v))
    return jax.vmap(kernel)(q, k, v, library.SegmentIds(segments, segments)).swapaxes(1, 2)


@_in_whole_blocks
def pallas_triton(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, interpret: bool = False
) -> jax.Array:
    """Runs the Pallas FlashAttention-2 that ships with jax, on NVIDIA GPUs."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    # With heads of 128, these blocks fit an H100's registers and an A100's shared memory.
    query, key, backward = (128, 64, 64) if q.dtype.itemsize == 2 else (64, 64, 32)
    # The kernel knows no key/value groups: each head gets its own copy.
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, heads_per_group, axis=2) for x in (k, v))
    return mha(
        q,
        k,
        v,
        segments,
        sm_scale=1 / math.sqrt(q.shape[-1]),
        causal=True,
        block_sizes=BlockSizes(query, key, backward, backward, backward, backward),
        interpret=interpret,
    )


@_in_whole_blocks
def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Runs cuDNN's attention. The segments become a mask [B, 1, S, S] that all heads share."""
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
