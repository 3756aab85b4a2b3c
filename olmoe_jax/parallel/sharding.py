"""Mesh axes and the one table that says which logical axis of a parameter lies on which.

Axes `data` (replicas), `fsdp` and `expert` (parameters, gradients and optimizer state sharded over
both); the batch is split over all three. Parameters are gathered in the compute dtype where they
are used; embedding and head, which have a row per token of the vocabulary, stay split
(`ops/embedding.py`, `ops/cross_entropy.py`). The experts are gathered over `fsdp`, and over
`expert` either they or the tokens travel (`ops/expert_parallel.py`).
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.errors import UserError

EXPERT = "expert"
AXES = ("data", "fsdp", EXPERT)
"""The devices of an `expert` group are neighbours: what travels there, travels in every layer."""
HOST = "pinned_host"
"""The kind of memory of a host from which its devices read directly."""
BATCH = P(AXES)
"""Spec of an array whose leading dimension is the batch."""

_SHARDED = (EXPERT, "fsdp")
"""Of parameters. `expert` first: gathered over `fsdp`, a device's experts follow each other."""

RULES: dict[str, tuple[str, ...]] = {
    "layer": (),
    "expert": _SHARDED,
    "vocab": _SHARDED,
    "embed": _SHARDED,
    "heads": _SHARDED,
    "kv_heads": _SHARDED,
    "mlp": _SHARDED,
    "rank": (),
    "tuned": (),
    "router": (),
    "norm": (),
}


def make_mesh(data: int = 1, fsdp: int = -1, expert: int = 1, *, devices=None) -> Mesh:
    """A mesh [data, fsdp, expert] over all devices; -1 stands for "all the remaining ones".

    Raises:
      UserError: the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count, sizes = len(devices), [data, fsdp, expert]
    asked = f"mesh.data={data} mesh.fsdp={fsdp}" + (f" mesh.expert={expert}" * (expert != 1))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if count % known:
            raise UserError(
                f"{asked}: {known} does not divide the {count} devices; use a divisor of {count}"
            )
        sizes[sizes.index(-1)] = count // known
        sizes = [1 if size == -1 else size for size in sizes]
    elif known != count:
        raise UserError(
            f"{asked}: needs {known} devices, but there are {count}; set mesh.fsdp=-1 to use all "
            "of them"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES)


def decoding_mesh(num_experts: int) -> Mesh:
    """All devices: over as many as divide the experts these are split, the rest have replicas."""
    return make_mesh(data=-1, fsdp=1, expert=math.gcd(jax.device_count(), num_experts))


def describe(mesh_shape: Mapping[str, int]) -> str:
    """The axes and their sizes, for a person."""
    return " ".join(f"{axis}={size}" for axis, size in mesh_shape.items())


def check_host_memory(mesh: Mesh) -> None:
    """Raises `UserError` when arrays of the mesh's devices cannot lie in their hosts' memory."""
    device = mesh.local_devices[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"optimizer.offload=true: {device.device_kind} does not offer the host's memory "
            f"({HOST}); write false"
        )


def check_experts(expert: int, num_experts: int) -> None:
    """Raises `UserError` when `mesh.expert` does not divide the model's experts."""
    if num_experts % expert:
        raise UserError(
            f"mesh.expert={expert}: does not divide the model's {num_experts} experts; use a "
            f"divisor of {num_experts}"
        )


def partition_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh) -> P:
    """Where a parameter of this shape and these logical axes lies on the mesh.

    The leading dimension that a rule shards and a mesh axis divides gets the axis (leading
    dimensions reshard cheapest); a mesh axis is used once, and what cannot be split is replicated.
    """
    free = {axis: size for axis, size in mesh.shape.items() if size > 1}
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        taken, parts = [], 1
        for mesh_axis in RULES[axis]:
            if mesh_axis in free and size % (parts * free[mesh_axis]) == 0:
                parts *= free.pop(mesh_axis)
                taken.append(mesh_axis)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return P(*spec)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that split a dimension, from its entry in a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def vocabulary_axes(shape: tuple[int, ...], mesh) -> tuple[str, ...]:
    """The mesh axes that split the rows of a [V, D] parameter; none: V does not divide."""
    return mesh_axes(partition_spec(shape, ("vocab", "embed"), mesh)[0])


def expert_axes(num_experts: int, mesh) -> tuple[str, ...]:
    """The mesh axes that split the experts."""
    return mesh_axes(partition_spec((num_experts,), ("expert",), mesh)[0])


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
