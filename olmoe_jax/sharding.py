"""Mesh axes and the one table that says which logical axis of a parameter lies on which.

Axes `data` (replicas) and `fsdp` (parameters, gradients and optimizer state sharded; the batch is
split over both). Parameters are gathered in the compute dtype where they are used; embedding and
head, which have a row per token of the vocabulary, stay split (`ops/embedding.py`,
`ops/cross_entropy.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = P(AXES)
"""Spec of an array whose leading dimension is the batch."""

RULES: dict[str, str | None] = {
    "layer": None,
    "expert": "fsdp",
    "vocab": "fsdp",
    "embed": "fsdp",
    "heads": "fsdp",
    "kv_heads": "fsdp",
    "mlp": "fsdp",
    "rank": None,
    "selected": None,
    "router": None,
    "norm": None,
}


def make_mesh(data: int = 1, fsdp: int = -1, devices=None) -> Mesh:
    """A mesh [data, fsdp] over all devices; -1 stands for "all the remaining ones".

    Raises:
      UserError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [data, fsdp]
    if -1 in sizes:
        known = -data * fsdp if sizes.count(-1) == 1 else 1
        if count % known:
            raise UserError(
                f"mesh.data={data} mesh.fsdp={fsdp}: {known} does not divide the {count} devices; "
                f"use a divisor of {count}"
            )
        sizes[sizes.index(-1)] = count // known
        sizes = [1 if size == -1 else size for size in sizes]
    if sizes[0] * sizes[1] != count:
        raise UserError(
            f"mesh.data={data} mesh.fsdp={fsdp}: needs {sizes[0] * sizes[1]} devices, but there "
            f"are {count}; set mesh.fsdp=-1 to use all of them"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES)


def partition_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh) -> P:
    """Where a parameter of this shape and these logical axes lies on the mesh.

    The leading dimension that a rule shards and the mesh axis divides gets the axis (leading
    dimensions reshard cheapest); a mesh axis is used once, and what cannot be split is replicated.
    """
    spec: list[str | None] = [None] * len(shape)
    for dimension, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        mesh_axis = RULES[axis]
        if mesh_axis and mesh_axis not in spec and size % mesh.shape[mesh_axis] == 0:
            spec[dimension] = mesh_axis
    return P(*spec)


def vocabulary_axis(shape: tuple[int, int], mesh) -> str | None:
    """The mesh axis that splits the rows of a [V, D] parameter; None: V does not divide."""
    return partition_spec(shape, ("vocab", "embed"), mesh)[0]


def parameter_shardings(specs, mesh: Mesh) -> dict[str, NamedSharding]:
    """Shardings for a dict of `ParameterSpec`s."""
    return {
        name: NamedSharding(mesh, partition_spec(spec.shape, spec.axes, mesh))
        for name, spec in specs.items()
    }


def active_mesh():
    """The mesh set by `jax.set_mesh`; None outside of one, and for one device.

    XLA does not remove a `shard_map`'s collectives over one device: on a CPU they copy the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shard_batch(x: jax.Array) -> jax.Array:
    """Constrains the leading dimension of an activation to the batch axes, under a mesh."""
    if active_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def on_own_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """function(*arrays), under a mesh run by each device on its own part of the batch.

    For what cannot be partitioned, such as kernels; all arrays lead with the batch.
    """
    mesh = active_mesh()
    if mesh is not None:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False
        )
    return function(*arrays)


def by_value(weight: jax.Array) -> jax.Array:
    """The weight; put it before a `shard_map` that some of the mesh's axes do not split.

    jax 0.12 cannot add the gradient of such an argument to a Ref: here it becomes an array first.
    """
    return weight * 1 if jnp.issubdtype(weight.dtype, jnp.floating) else weight


def gathered(weight: jax.Array) -> jax.Array:
    """The whole weight on every device. Cast it first, so that fewer bytes travel."""
    return weight if active_mesh() is None else jax.lax.with_sharding_constraint(weight, P())
