"""Mesh axes and the one table that says which logical axis of a parameter lies on which.

Axes `data` (replicas), `fsdp` and `expert` (parameters, gradients and optimizer state sharded over
both); the batch is split over all three. Parameters are gathered in the compute dtype where they
are used; embedding and head, which have a row per token of the vocabulary, stay split
(`ops/embedding.py`, `ops/cross_entropy.py`). The experts are gathered over `fsdp`, and over
`expert` the tokens travel (`ops/expert_parallel.py`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.errors import UserError

EXPERT = "expert"
AXES = ("data", "fsdp", EXPERT)
"""The mesh's axes. Devices of an `expert` group are neighbours: they exchange in every layer."""
BATCH = P(AXES)
"""The spec of an array whose leading dimension is the batch."""

_SHARDED = (EXPERT, "fsdp")
"""The axes that shard parameters. `expert` first: after a gather over `fsdp`, a device's experts
follow each other."""

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


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    expert: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh [data, fsdp, expert] over all devices; -1 stands for "all the remaining ones".

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
    """Makes a mesh of all devices, whose axis `expert` has as many as divide the experts."""
    return make_mesh(data=-1, fsdp=1, expert=math.gcd(jax.device_count(), num_experts))


def describe(mesh_shape: Mapping[str, int]) -> str:
    """Returns the axes and their sizes, for a person."""
    return " ".join(f"{axis}={size}" for axis, size in mesh_shape.items())


def check_experts(expert: int, num_experts: int) -> None:
    """Raises `UserError` when `mesh.expert` does not divide the model's experts."""
    if num_experts % expert:
        raise UserError(
            f"mesh.expert={expert}: does not divide the model's {num_experts} experts; use a "
            f"divisor of {num_experts}"
        )


def partition_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> P:
    """Returns how the mesh shards a parameter of this shape and these logical axes.

    A mesh axis shards the first dimension that a rule gives to it and that it divides (leading
    dimensions reshard cheapest). Each mesh axis is used once; no other dimension is split.
    """
    free = {axis: size for axis, size in mesh.shape.items() if size > 1}
    spec: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        taken: list[str] = []
        parts = 1
        for mesh_axis in RULES[axis]:
            if mesh_axis in free and size % (parts * free[mesh_axis]) == 0:
                parts *= free.pop(mesh_axis)
                taken.append(mesh_axis)
        spec.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return P(*spec)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that split a dimension, from its entry in a `PartitionSpec`."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def vocabulary_axes(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that split the rows of a [V, D] parameter; (): V does not divide."""
    return mesh_axes(partition_spec(shape, ("vocab", "embed"), mesh)[0])


def expert_axes(num_experts: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the mesh axes that split the experts."""
    return mesh_axes(partition_spec((num_experts,), ("expert",), mesh)[0])


def parameter_shardings(specs: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of each parameter, from its `model.parameters.ParameterSpec`."""
    return {
        name: NamedSharding(mesh, partition_spec(spec.shape, spec.axes, mesh))
        for name, spec in specs.items()
    }


def active_mesh() -> AbstractMesh | None:
    """Returns the mesh set by `jax.set_mesh`; None outside of one, for one device, and inside of
    a `jax.shard_map`.

    XLA does not remove a `shard_map`'s collectives over one device: on a CPU they copy the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def shard_batch(x: jax.Array) -> jax.Array:
    """Constrains the leading dimension of an activation to the batch axes, under a mesh."""
    if active_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def on_own_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Returns function(*arrays); under a mesh each device runs it on its own part of the batch.

    XLA cannot partition kernels, which need this. The batch is every array's leading dimension.
    """
    mesh = active_mesh()
    if mesh is not None:
        function = jax.shard_map(
            function, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False
        )
    return function(*arrays)


def by_value(weight: jax.Array) -> jax.Array:
    """Returns the weight, as the result of a computation.

    An argument of a `shard_map` that some of the mesh's axes do not split needs this: jax 0.12
    cannot add the gradient of such an argument to a Ref.
    """
    return weight * 1 if jnp.issubdtype(weight.dtype, jnp.floating) else weight


def gathered(weight: jax.Array) -> jax.Array:
    """Gathers the whole weight on every device. Cast it first, so that fewer bytes travel."""
    return weight if active_mesh() is None else jax.lax.with_sharding_constraint(weight, P())
