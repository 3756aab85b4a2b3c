"""Weighted cross-entropy that never holds the logits of more than a chunk of positions.

The gradient of a chunk is computed with its loss, as in Liger Kernel's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989): three matmuls over the vocabulary instead of the four of a
backward pass that computes the logits anew, and nothing to keep but the gradients themselves.

Under a mesh the head stays split over its V rows (as in Megatron-LM's vocabulary-parallel loss,
https://arxiv.org/abs/1909.08053): a chunk's hidden states are gathered, every device computes the
logits of its own rows, and the softmax' sums travel. A device so receives and sends 6 D bytes for
each position of the devices along the axis (bfloat16 hidden states, float32 gradients); to gather
the head and scatter its gradient takes 6 D bytes for each of the V rows, and memory for both.
A head whose V the mesh axis does not divide is gathered.

Shapes: B rows, S positions, D model width, V vocabulary; on one device: N positions of a chunk (of
all devices among which the vocabulary is split), W rows of the head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from olmoe_jax import sharding

CHUNK = 512
"""Positions of a device in a chunk: all live logits are [CHUNK, V] float32 per device."""


@jax.custom_vjp
def weighted_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum over positions of weight * -log softmax(head h)[target], a float32 scalar.

    Logits and their sums are float32, from operands in the dtype of `hidden`; the head's gradient
    adds up in float32. Differentiable once, in `hidden` and `head`.

    Args:
      hidden: [B, S, D] in the compute dtype.
      head: [V, D] as the parameter is stored and sharded.
      targets: [B, S] int; weights: [B, S] float32, a constant. Weight 0 hides whatever is there,
        infinities too.
    """
    return _loss_and_gradients(hidden, head, targets, weights)[0]


def _forward(hidden, head, targets, weights):
    loss, d_hidden, d_head = _loss_and_gradients(
        hidden.value, head.value, targets.value, weights.value, True, head.perturbed
    )
    return loss, (d_hidden, d_head.astype(head.value.dtype) if head.perturbed else None)


def _backward(gradients, cotangent):
    scaled = jax.tree.map(lambda gradient: (cotangent * gradient).astype(gradient.dtype), gradients)
    return *scaled, None, None


# With symbolic zeros the forward rule knows whether the head trains; a frozen head costs nothing.
weighted_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(hidden, head, targets, weights, differentiate=False, train_head=False):
    """The loss, d_hidden [B, S, D] in hidden's dtype and d_head [V, D] float32 (None: unwanted)."""
    head = head.astype(hidden.dtype)  # Before it travels, where it must.
    run = functools.partial(_on_device, differentiate=differentiate, train_head=train_head)
    mesh = sharding.active_mesh()
    if mesh is None:
        return run(hidden, head, targets, weights, axis=None, sum_axes=())
    axis = sharding.vocabulary_axis(head.shape, mesh)
    sum_axes = tuple(name for name in sharding.AXES if name != axis)
    batch = sharding.BATCH
    return jax.shard_map(
        functools.partial(run, axis=axis, sum_axes=sum_axes),
        mesh=mesh,
        in_specs=(batch, P(axis), batch, batch),
        out_specs=(P(), batch if differentiate else None, P(axis) if train_head else None),
        check_vma=False,
    )(hidden, head, targets, weights)


def _on_device(hidden, head, targets, weights, *, axis, sum_axes, differentiate, train_head):
    """As `_loss_and_gradients`, on one device's batch and rows of the head.

    axis: the mesh axis that splits the vocabulary; sum_axes: those over which to sum up.
    """
    shape, positions = hidden.shape, targets.size
    count = -(-positions // CHUNK)
    size = -(-positions // count)

    def chunks(x):
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, count * size - positions)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    def body(carry, inputs):
        loss, d_head = carry
        chunk_loss, logit_gradient, hidden = _chunk(*inputs, head, axis)
        d_hidden = None
        if differentiate:
            d_hidden = _matmul("nw,wd->nd", logit_gradient, head)
            if axis:
                d_hidden = jax.lax.psum_scatter(d_hidden, axis, tiled=True)
            d_hidden = d_hidden.astype(hidden.dtype)
        if train_head:
            d_head += _matmul("nw,nd->wd", logit_gradient, hidden)
        return (loss + chunk_loss, d_head), d_hidden

    start = jnp.float32(0), jnp.zeros(head.shape, jnp.float32) if train_head else None
    inputs = chunks(hidden), chunks(targets), chunks(weights)
    (loss, d_head), d_hidden = jax.lax.scan(body, start, inputs)
    if differentiate:
        d_hidden = d_hidden.reshape(-1, shape[-1])[:positions].reshape(shape)
    if sum_axes:
        loss, d_head = jax.lax.psum((loss, d_head), sum_axes)
    return loss, d_hidden, d_head


def _chunk(hidden, targets, weights, head, axis):
    """A chunk's loss, its gradient in the logits [N, W] and the hidden states [N, D] of it."""
    first = 0
    if axis:
        gather = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        hidden, targets, weights = gather(hidden), gather(targets), gather(weights)
        first = jax.lax.axis_index(axis) * len(head)
    # Here and not in the loss: what weight 0 hides must not meet the gradient's zeros either.
    hidden = jnp.where(weights[:, None] != 0, hidden, 0)
    logits = _matmul("nd,wd->nw", hidden, head)
    is_target = first + jnp.arange(len(head)) == targets[:, None]
    largest = jnp.max(logits, axis=1)
    if axis:
        largest = jax.lax.pmax(largest, axis)
    exponentials = jnp.exp(logits - largest[:, None])
    sums = jnp.sum(exponentials, axis=1), jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    if axis:
        sums = jax.lax.psum(sums, axis)
    normalizer, target_logits = sums
    loss = jnp.sum(weights * (jnp.log(normalizer) + largest - target_logits))
    gradient = weights[:, None] * (exponentials / normalizer[:, None] - is_target)
    return loss, gradient.astype(hidden.dtype), hidden


def _matmul(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
