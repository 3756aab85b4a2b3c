"""The libraries' attention kernels for GPUs and TPUs behind one signature.

All take q [B, S, H, d], k and v [B, S, G, d], segments [B, S] and skip blocks of later keys; see
`olmoe_jax.ops.attention.attention`. The libraries are imported where they are used: each is for
one platform. `interpret` runs a Pallas kernel on the CPU, for tests.
"""

import functools
import math

import jax
import jax.numpy as jnp

_MULTIPLE = 128
"""The kernels' blocks must divide a row."""


def _in_whole_blocks(kernel):
    """Pads rows to a multiple of _MULTIPLE, at the end, where no query sees it."""

    @functools.wraps(kernel)
    def padded(q, k, v, segments, **options):
        length = q.shape[1]
        padding = (0, -length % _MULTIPLE)
        q, k, v = (jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0))) for x in (q, k, v))
        segments = jnp.pad(segments, ((0, 0), padding), constant_values=-1)
        return kernel(q, k, v, segments, **options)[:, :length]

    return padded


@_in_whole_blocks
def splash(q, k, v, segments, interpret: bool = False) -> jax.Array:
    """TPU: splash attention, which ships with jax."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, heads, size = q.shape[1:]
    block = math.gcd(length, 512)
    sides = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([library.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**{f"block_{side}": block for side in sides}),
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(size), k, v))
    return jax.vmap(kernel)(q, k, v, library.SegmentIds(segments, segments)).swapaxes(1, 2)


@_in_whole_blocks
def pallas_triton(q, k, v, segments, interpret: bool = False) -> jax.Array:
    """NVIDIA: the Pallas FlashAttention-2 that ships with jax."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    # With these, an H100's registers and an A100's shared memory suffice for heads of 128.
    query, key, backward = (128, 64, 64) if q.dtype.itemsize == 2 else (64, 64, 32)
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
def cudnn(q, k, v, segments) -> jax.Array:
    """NVIDIA: cuDNN's; it takes segments as a mask [B, 1, S, S], which all heads share."""
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
