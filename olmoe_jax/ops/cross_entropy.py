"""Weighted cross-entropy that holds the logits of one chunk of positions at a time.

The gradient of a chunk is computed with its loss, as in Liger Kernel's fused linear cross-entropy
(https://arxiv.org/abs/2410.10989). This takes three matmuls over the vocabulary; a backward pass
that computes the logits again would take four. Nothing is kept but the gradients.

Under a mesh the head stays split over its V rows, as in Megatron-LM's vocabulary-parallel loss
(https://arxiv.org/abs/1909.08053). The devices gather a chunk's hidden states, each computes the
logits of its own rows, and only the softmax's sums are exchanged. A device sends and receives 6 D
bytes for each position of the devices that share the vocabulary (bfloat16 hidden states, float32
gradients). Gathering the head and scattering its gradient would take 6 D bytes for each of the V
rows, and the memory for both. A head whose V no mesh axis divides is gathered.

Shapes: B rows, S positions, D model width, V vocabulary; on one device, N positions of a chunk
(over all devices that share the vocabulary) and W rows of the head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec as P

from olmoe_jax.parallel import sharding

CHUNK = 512
"""Positions of one device in a chunk: the live logits are [CHUNK, V] float32 per device."""

Gradients = tuple[jax.Array | None, jax.Array | None, jax.Array | None]
"""Gradients of hidden, head and weights; None where nobody asks for one."""


@jax.custom_vjp
def weighted_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """Returns the sum over positions of weight * -log softmax(head h)[target], a float32 scalar.

    Logits and their sums are float32, from operands in the dtype of `hidden`. The head's gradient
    adds up in float32. Differentiable once.

    Args:
      hidden: [B, S, D] in the compute dtype.
      head: [V, D] as the parameter is stored and sharded.
      targets: [B, S] int.
      weights: [B, S] float32. Weight 0 hides the position's values, infinities included, from the
        loss and from every gradient.
    """
    return _loss_and_gradients(hidden, head, targets, weights)[0]


def _forward(
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
) -> tuple[jax.Array, tuple]:
    loss, (d_hidden, d_head, d_weights) = _loss_and_gradients(
        hidden.value, head.value, targets.value, weights.value, True, head.perturbed
    )
    if d_head is not None:
        d_head = d_head.astype(head.value.dtype)
    return loss, (d_hidden, d_head, None, d_weights)


def _backward(gradients: tuple, cotangent: jax.Array) -> tuple:
    return jax.tree.map(lambda gradient: (cotangent * gradient).astype(gradient.dtype), gradients)


# Symbolic zeros tell the forward rule whether the head trains: a frozen head costs nothing.
weighted_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    differentiate: bool = False,
    train_head: bool = False,
) -> tuple[jax.Array, Gradients]:
    """Returns the loss and its gradients; the head's gradient is float32."""
    head = head.astype(hidden.dtype)  # Cast first: a head that must be gathered moves fewer bytes.
    run = functools.partial(_on_device, differentiate=differentiate, train_head=train_head)
    mesh = sharding.active_mesh()
    if mesh is None:
        return run(hidden, head, targets, weights, axes=(), vocabulary=())
    vocabulary = sharding.vocabulary_axes(head.shape, mesh)
    batch = sharding.BATCH
    return jax.shard_map(
        functools.partial(run, axes=sharding.AXES, vocabulary=vocabulary),
        mesh=mesh,
        in_specs=(batch, P(vocabulary), batch, batch),
        out_specs=(P(), (batch, P(vocabulary), batch)),  # of gradients that are None: no matter
        check_vma=False,
    )(hidden, head, targets, weights)


def _on_device(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    axes: tuple[str, ...],
    vocabulary: tuple[str, ...],
    differentiate: bool,
    train_head: bool,
) -> tuple[jax.Array, Gradients]:
    """Computes `_loss_and_gradients` on one device; `vocabulary` are the `axes` that split V."""
    # Chunks of equal size: the last one is filled up with positions of weight 0.
    positions = targets.size
    count = -(-positions // CHUNK)
    size = -(-positions // count)

    def chunks(x: jax.Array) -> jax.Array:  # [B, S, ...] -> [count, size, ...]
        x = x.reshape(positions, *x.shape[2:])
        x = jnp.pad(x, [(0, count * size - positions)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    def joined(chunks: jax.Array, like: jax.Array) -> jax.Array:  # the inverse of `chunks`
        return chunks.reshape(-1, *like.shape[2:])[:positions].reshape(like.shape)

    def body(d_head: jax.Array | None, inputs: tuple[jax.Array, jax.Array, jax.Array]):
        losses, logit_gradient, hidden = _chunk(*inputs, head, vocabulary)
        d_hidden = None
        if differentiate:
            d_hidden = _matmul("nw,wd->nd", logit_gradient, head)
            if vocabulary:
                # Each device has the share of its own rows of the head: add up and split.
                d_hidden = jax.lax.psum_scatter(d_hidden, vocabulary, tiled=True)
            d_hidden = d_hidden.astype(hidden.dtype)
        if d_head is not None:
            d_head += _matmul("nw,nd->wd", logit_gradient, hidden)
        return d_head, (losses, d_hidden)

    d_head = jnp.zeros(head.shape, jnp.float32) if train_head else None
    inputs = chunks(hidden), chunks(targets), chunks(weights)
    d_head, (losses, d_hidden) = jax.lax.scan(body, d_head, inputs)
    losses = joined(losses, weights)
    loss = jnp.sum(weights * losses)
    if axes:
        loss = jax.lax.psum(loss, axes)
        d_head = jax.lax.psum(d_head, tuple(name for name in axes if name not in vocabulary))
    if not differentiate:
        return loss, (None, None, None)
    return loss, (joined(d_hidden, hidden), d_head, losses)


def _chunk(
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    head: jax.Array,
    axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a chunk's losses, its logits' gradient [N, W] and its hidden states [N, D].

    The losses are those of the device's own positions; the others are gathered.
    """
    size = len(targets)
    first: jax.Array | int = 0  # the token of this device's first row of the head
    if axes:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        hidden, targets, weights = gather(hidden), gather(targets), gather(weights)
        first = jax.lax.axis_index(axes) * len(head)
    # Masking the loss alone is not enough: 0 * inf in the head's gradient is not a number.
    hidden = jnp.where(weights[:, None] != 0, hidden, 0)
    logits = _matmul("nd,wd->nw", hidden, head)
    is_target = first + jnp.arange(len(head)) == targets[:, None]
    largest = jnp.max(logits, axis=1)
    if axes:
        largest = jax.lax.pmax(largest, axes)
    exponentials = jnp.exp(logits - largest[:, None])
    sums = jnp.sum(exponentials, axis=1), jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    if axes:
        sums = jax.lax.psum(sums, axes)
    normalizer, target_logits = sums
    losses = jnp.where(weights != 0, jnp.log(normalizer) + largest - target_logits, 0)
    gradient = weights[:, None] * (exponentials / normalizer[:, None] - is_target)
    if axes:
        own = jax.lax.axis_index(axes) * size
        losses = jax.lax.dynamic_slice_in_dim(losses, own, size)
    return losses, gradient.astype(hidden.dtype), hidden


def _matmul(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
