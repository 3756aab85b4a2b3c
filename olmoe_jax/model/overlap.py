"""The layers of a model with sharded weights: exchange for one layer runs beside another's kernels.

In a plain scan a layer gathers its weights and then waits for them, and its backward waits for the
sum of its gradients over the devices: XLA moves nothing from one turn of a loop to another. Here a
turn starts what the next turn needs, and finishes what the turn before left:

    forward   turn i: runs layer i,                     gathers the weights of layer i+1
    backward  turn i: runs layer i again and backwards, gathers the weights of layer i-1,
                      scatters the gradients of layer i+1, and adds them to the sums

Of each layer the forward keeps only the input, as `remat="full"` does. A device holds the weights
of two layers at a time. The first turn of the backward scatters zeros, and its last turn gathers
the first layer again: a condition would cost more to read than it saves.

The loops run inside one `jax.shard_map`, so that a device's own gradients can wait for their sum.
Shapes: L layers, B rows.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from olmoe_jax.model.attention import Context
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.parameters import ROUTER, merge
from olmoe_jax.model.tuned import LayerTunedExperts
from olmoe_jax.ops.quantization import dequantized
from olmoe_jax.ops.routing import RouterStatistics
from olmoe_jax.parallel import sharding

Layer = Callable[[jax.Array, Any, jax.Array, dict[str, Any]], tuple[jax.Array, Any]]
"""layer(x, shared, index, weights) -> x, statistics; on one device, with whole weights."""


def serves(mesh: Mesh | AbstractMesh | None, remat: str) -> bool:
    """Returns whether `run_module` serves a mesh: weights travel, and tokens do not.

    Several processes of CPUs keep the plain scan. A CPU computes nothing while it exchanges, and
    gloo once mixed up two transfers of this loop, which may run in either order.
    """
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        return False
    travels = mesh is not None and mesh.shape["fsdp"] > 1 and mesh.shape[sharding.EXPERT] == 1
    return travels and remat == "full"


def run_module(
    layers: nnx.Module,
    tuned: LayerTunedExperts | None,
    axes: Mapping[str, Sequence[str]],
    settings: ModelSettings,
    x: jax.Array,
    context: Context,
    sums: Mapping[str, Any],
) -> tuple[jax.Array, RouterStatistics]:
    """Runs a model's stacked layers; the backward adds the gradients of the weights to `sums`.

    Args:
      layers: the `DecoderLayer`, with the parameters of all layers.
      tuned: the tuned experts of all layers; None: there are none.
      axes: by name, the logical axes of the model's parameters.
      settings: how the model computes.
      x: [B, S, D], the first layer's input.
      context: the inputs that all layers share.
      sums: the refs to which the gradients of what trains are added, by name. The tuned experts,
        whose parameters are not stacked over the layers, get their gradient from differentiation.

    Returns:
      [B, S, D]; the router's statistics [L, …], summed over the devices, without logits.
    """
    graph, stacked = nnx.split(layers)
    weights = {
        ".".join(("layers", *map(str, path))): variable.get_value()
        for path, variable in nnx.to_flat_state(stacked)
    }
    refs = {name: sums[name] for name in weights if name in sums}
    trained = list(refs)
    if tuned:
        weights |= {f"tuned.{name}": value for name, value in tuned._asdict().items()}
        axes = {**axes, "tuned.indices": ("tuned",)}
        trained += [f"tuned.{name}" for name in tuned._fields if f"tuned.{name}" in sums]
    dtype, mesh = settings.compute_dtype, sharding.active_mesh()
    assert mesh is not None

    def spec(name: str, value: jax.Array) -> P:
        outer = () if name.startswith("layers.") else ("layer",)
        return sharding.partition_spec(value.shape, (*outer, *axes[name]), mesh)

    def cast(name: str, shard: jax.Array) -> jax.Array:
        return shard.astype(dtype) if shard.dtype == jnp.float32 and name != ROUTER else shard

    def layer(
        x: jax.Array, context: Context, index: jax.Array, weights: dict[str, Any]
    ) -> tuple[jax.Array, RouterStatistics]:
        own: dict[str, Any] = {}
        own_tuned: dict[str, Any] = {}
        for name, value in dequantized(weights, dtype).items():
            part, _, name_in_part = name.partition(".")
            (own if part == "layers" else own_tuned)[name_in_part] = value
        x, (statistics, _) = merge(graph, own)(
            x,
            context.of_layer(index),
            tuned=LayerTunedExperts(**own_tuned) if own_tuned else None,
        )
        return x, statistics

    specs = {n: jax.tree.map(functools.partial(spec, n), w) for n, w in weights.items()}
    return _run_layers(layer, x, context, weights, specs, cast, trained, refs)


def _run_layers(
    layer: Layer,
    x: jax.Array,
    shared: Any,
    weights: dict[str, Any],
    specs: Mapping[str, Any],
    cast: Callable[[str, jax.Array], jax.Array],
    trained: Iterable[str],
    sums: Mapping[str, Any],
) -> tuple[jax.Array, Any]:
    """Computes `run_module` for any `layer`, which runs on a device's rows of x and `shared`.

    `weights`, `specs` and `sums` are dicts by name: arrays [L, …] or trees of them, how the mesh
    shards these, and refs. `cast` converts a shard, before it travels, to the dtype in which the
    layer computes. Of `trained`, what has no ref gets its gradient from differentiation.
    """
    mesh: Any = sharding.active_mesh()
    batch = sharding.BATCH
    axes = tuple(axis for axis in sharding.AXES if mesh.shape[axis] > 1)
    count = len(jax.tree.leaves(weights)[0])
    layers, last = jnp.arange(count), count - 1
    trained = tuple(trained)

    def gathered(weights: dict[str, Any], index: jax.Array | int) -> dict[str, Any]:
        def whole(name: str, shard: jax.Array, spec: P) -> jax.Array:
            shard = jax.lax.dynamic_index_in_dim(shard, index, keepdims=False)
            if any(spec):
                shard = cast(name, shard)
            for dimension, entry in enumerate(spec[1:]):
                if entry:
                    shard = jax.lax.all_gather(shard, entry, axis=dimension, tiled=True)
            return shard

        return {
            name: jax.tree.map(lambda w, spec, name=name: whole(name, w, spec), value, specs[name])
            for name, value in weights.items()
        }

    def scattered(gradients: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def share(gradient: jax.Array, spec: P) -> jax.Array:
            others = set(axes)
            for dimension, entry in enumerate(spec[1:]):
                if entry:
                    others -= set(sharding.mesh_axes(entry))
                    gradient = jax.lax.psum_scatter(
                        gradient, entry, scatter_dimension=dimension, tiled=True
                    )
            return jax.lax.psum(gradient, tuple(others)) if others else gradient

        return {name: share(gradient, specs[name]) for name, gradient in gradients.items()}

    def forward(x: jax.Array, shared: Any, weights: dict[str, Any]) -> tuple[Any, ...]:
        def turn(carry: tuple, index: jax.Array) -> tuple[tuple, tuple]:
            x, current = carry
            following = gathered(weights, jnp.minimum(index + 1, last))
            y, statistics = layer(x, shared, index, current)
            # The barrier keeps the exchange in this turn, which ends when both are done.
            return jax.lax.optimization_barrier((y, following)), (x, statistics)

        carry, (inputs, statistics) = jax.lax.scan(turn, (x, gathered(weights, 0)), layers)
        return *carry, inputs, jax.lax.psum(statistics, axes)

    def backward(
        g: jax.Array,
        g_statistics: Any,
        shared: Any,
        weights: dict[str, Any],
        current: dict[str, Any],
        inputs: jax.Array,
        sums: dict[str, Any],
    ) -> jax.Array:
        def add(gradients: dict[str, jax.Array], index: jax.Array | int) -> None:
            for name, gradient in gradients.items():
                sums[name][index] += gradient.astype(sums[name].dtype)

        def turn(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (g, current, pending), (index, x, g_statistics) = carry, inputs
            following = gathered(weights, jnp.maximum(index - 1, 0))
            # The scatter runs beside the layer's second forward: its operand is gone when this
            # layer's gradients come.
            g, ready = jax.lax.optimization_barrier((g, scattered(pending)))
            add(ready, jnp.minimum(index + 1, last))

            def run(x: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
                return layer(x, shared, index, current | own)

            _, pull = jax.vjp(run, x, {name: current[name] for name in trained})
            done = (*pull((g, g_statistics)), following)
            g, gradients, following = jax.lax.optimization_barrier(done)
            return (g, following, gradients), None

        zeros = {name: jnp.zeros_like(current[name]) for name in trained}
        turns = (layers, inputs, g_statistics)
        (g, _, pending), _ = jax.lax.scan(turn, (g, current, zeros), turns, reverse=True)
        add(scattered(pending), 0)
        return g

    def on_devices(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    rows = P(None, *batch)  # [L, B, …]
    run_forward = on_devices(forward, (batch, batch, specs), (batch, P(), rows, P()))

    @jax.custom_vjp
    def run(x: jax.Array, shared: Any, weights: dict[str, Any], sums: dict[str, Any]) -> Any:
        y, _, _, statistics = run_forward(x, shared, weights)
        return y, statistics

    def saving(x: jax.Array, shared: Any, weights: dict[str, Any], sums: dict[str, Any]) -> Any:
        y, current, inputs, statistics = run_forward(x, shared, weights)
        return (y, statistics), (shared, weights, current, inputs, sums)

    def differentiated(saved: tuple, gradients: tuple) -> tuple:
        *arguments, sums = saved
        weights = arguments[1]
        new = {
            name: jax.new_ref(jnp.zeros_like(weights[name])) for name in trained if name not in sums
        }
        by_name = {name: specs[name] for name in trained}
        in_specs = (batch, P(), batch, specs, P(), rows, by_name)
        g = on_devices(backward, in_specs, batch)(*gradients, *arguments, sums | new)
        g_weights = {name: jax.freeze(new[name]) if name in new else None for name in weights}
        return g, None, g_weights, None

    run.defvjp(saving, differentiated)
    return run(x, shared, weights, {name: sums[name] for name in trained if name in sums})
