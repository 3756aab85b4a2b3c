"""One training step: gradients summed over micro-batches, then one update.

A step's loss is a SUM over its tokens; the weights made by the data pipeline hold the division,
so micro-batches and devices only ever add. R rows, S positions, L layers, E experts.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from olmoe_jax.data import Batch
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.moe import RouterStatistics
from olmoe_jax.model.olmoe import graph_of, load_balancing_loss
from olmoe_jax.model.parameters import ROUTER, Parameters, merge
from olmoe_jax.ops.cross_entropy import weighted_cross_entropy
from olmoe_jax.sharding import BATCH
from olmoe_jax.training.optimizer import Optimizer, Schedule, clip_scale, global_norm


class DeviceBatch(NamedTuple):
    """A micro-batch on the devices; every array is [R, S]."""

    tokens: jax.Array  # int32
    targets: jax.Array  # int32: what each position predicts
    segment_ids: jax.Array  # int32: 1… per row, 0 for padding
    positions: jax.Array  # int32: restarting with each example
    loss_weights: jax.Array  # float32: sum to 1 over a step


def place_batch(batch: Batch, mesh: Mesh) -> DeviceBatch:
    """This process's rows as part of the global batch, rows split over all devices."""
    place = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, BATCH))
    return DeviceBatch(*(place(getattr(batch, name)) for name in DeviceBatch._fields))


class TrainState(NamedTuple):
    """What an update changes, and a checkpoint holds."""

    step: jax.Array  # int32: updates attempted
    parameters: Parameters  # the trained ones, in the dtypes of `setup.kept_dtype`
    optimizer: Any  # of `Optimizer.init`
    skipped: jax.Array  # int32: updates skipped so far because something was not finite
    skipped_in_a_row: jax.Array  # int32


class Accumulated(NamedTuple):
    """Sums over the micro-batches seen so far in a step."""

    gradients: Parameters  # in the parameters' dtypes
    loss: jax.Array  # float32, without the auxiliary loss
    statistics: RouterStatistics  # [L, …]
    # float32 [L, D, E]: DenseMixer's part of the router's gradient, where the router so learns.
    unselected: jax.Array | None = None


class StepMetrics(NamedTuple):
    """What a step reports; scalars are float32 or int32 on the devices."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    statistics: RouterStatistics
    router_gradient: dict[str, jax.Array] | None = None  # of `router_gradient_norms`


def changed_choices(chosen: jax.Array, before: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The share of the tokens' experts that were not among these tokens' experts before.

    Args:
      chosen, before: [L, B, S, K] int32.
      segment_ids: [B, S] int32, 0 for padding, which does not count.
    """
    is_new = ~(chosen[..., :, None] == before[..., None, :]).any(-1)
    is_token = jnp.broadcast_to((segment_ids > 0)[..., None], is_new.shape)
    return jnp.sum(is_new & is_token) / jnp.maximum(1, jnp.sum(is_token))


def initial_state(parameters: Parameters, optimizer: Optimizer) -> TrainState:
    """The state before the first update."""
    zero = jnp.int32(0)
    return TrainState(zero, parameters, optimizer.init(parameters), zero, zero)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The functions to compile for one run; everything static is here.

    Attributes:
      config: the architecture.
      settings: how the model computes.
      optimizer: makes the updates.
      schedule: gives the learning rate of an update.
      max_grad_norm: clip the gradients to this global norm.
      aux_loss_coefficient: weight of the load-balancing loss in the objective.
      seed: of the adapters' dropout and of stochastic rounding.
    """

    config: ModelConfig
    settings: ModelSettings
    optimizer: Optimizer
    schedule: Schedule
    max_grad_norm: float
    aux_loss_coefficient: float = 0.0
    seed: int = 0

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The model's structure."""
        return graph_of(self.config, self.settings)

    def loss(
        self,
        trained: Parameters,
        frozen: Parameters,
        batch: DeviceBatch,
        dropout_key: jax.Array | None = None,
        router_probe: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, RouterStatistics]]:
        """The objective of a micro-batch, and its (loss, router statistics)."""
        model = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            dropout_key=dropout_key,
            router_probe=router_probe,
        )
        with jax.named_scope("loss"):
            loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        objective = loss
        if self.aux_loss_coefficient:
            share = jnp.sum(batch.loss_weights)
            balance = load_balancing_loss(statistics, self.config)
            objective += self.aux_loss_coefficient * share * balance
        return objective, (loss, statistics)

    def evaluate(
        self, trained: Parameters, frozen: Parameters, batch: DeviceBatch
    ) -> tuple[jax.Array, jax.Array]:
        """A batch's loss, and which experts are chosen: [L, B, S, K] int32, the best first."""
        model = merge(self.graph, trained | frozen)
        hidden, statistics = model.hidden(
            batch.tokens, batch.segment_ids, batch.positions, with_router_logits=True
        )
        loss = weighted_cross_entropy(hidden, model.head(), batch.targets, batch.loss_weights)
        return loss, jax.lax.top_k(statistics.logits, self.config.num_experts_per_token)[1]

    def zero_sums(self, trained: Parameters) -> Accumulated:
        """What `accumulate` adds a step's first micro-batch to; `trained` may be shapes."""
        experts = jnp.zeros((self.config.num_layers, self.config.num_experts))
        statistics = RouterStatistics(experts, experts, jnp.zeros(self.config.num_layers), None)
        gradients = {name: jnp.zeros(value.shape, value.dtype) for name, value in trained.items()}
        unselected = None
        if self.settings.router_method == "densemixer" and ROUTER in trained:
            unselected = jnp.zeros(trained[ROUTER].shape)
        return Accumulated(gradients, jnp.zeros(()), statistics, unselected)

    def accumulate(
        self,
        trained: Parameters,
        frozen: Parameters,
        accumulated: Accumulated,
        batch: DeviceBatch,
        position: jax.Array,
    ) -> Accumulated:
        """Adds a micro-batch's gradients, loss and statistics to the step's, at first `zero_sums`.

        `position`: [2] uint32, the step and the micro-batch in it; with the seed, it fixes what
        dropout drops.
        """
        key = None
        if self.settings.lora and self.settings.lora.dropout:
            key = jax.random.key(self.seed)
            for number in position:
                key = jax.random.fold_in(key, number)

        def loss(trained, router_probe):
            return self.loss(trained, frozen, batch, key, router_probe)

        # A probe's value does not matter; its gradient is added to `unselected`.
        inputs = trained, accumulated.unselected
        objective, backward, sums = jax.vjp(loss, *inputs, has_aux=True)
        # Added in place, layer by layer: a second copy of all gradients never exists.
        gradients = jax.tree.map(jax.new_ref, (accumulated.gradients, accumulated.unselected))
        backward.with_refs(*gradients)(jnp.ones_like(objective))
        sums = jax.tree.map(jnp.add, (accumulated.loss, accumulated.statistics), sums)
        gradients, unselected = jax.tree.map(jax.freeze, gradients)
        return Accumulated(gradients, *sums, unselected)

    def update(self, state: TrainState, accumulated: Accumulated) -> tuple[TrainState, StepMetrics]:
        """One AdamW update; when the loss or the gradients are not finite, none."""
        gradients = accumulated.gradients
        norm = global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(accumulated.loss)
        scale = clip_scale(norm, self.max_grad_norm)
        gradients = jax.tree.map(lambda g: g * scale, gradients)  # float32, never stored
        learning_rate = self.schedule(state.step)
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        parameters, optimizer = self.optimizer.update(
            gradients,
            state.optimizer,
            state.parameters,
            learning_rate,
            # Apart from the keys of the step's micro-batches, see `accumulate`.
            jax.random.fold_in(key, np.uint32(2**32 - 1)),
        )

        def keep_if_skipped(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped = jnp.where(finite, 0, 1)
        new = TrainState(
            state.step + 1,
            keep_if_skipped(parameters, state.parameters),
            keep_if_skipped(optimizer, state.optimizer),
            state.skipped + skipped,
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        metrics = StepMetrics(
            accumulated.loss,
            norm,
            learning_rate,
            new.skipped,
            new.skipped_in_a_row,
            accumulated.statistics,
            router_gradient_norms(accumulated),
        )
        return new, metrics


def router_gradient_norms(accumulated: Accumulated) -> dict[str, jax.Array]:
    """Norms over all layers of the router's gradient, before clipping; empty: it does not train.

    "norm"; with DenseMixer besides, "selected" and "unselected": of the parts that come through the
    selected experts (what conventional training would give, and any auxiliary loss) and through the
    others, and "cosine" between these.
    """
    if ROUTER not in accumulated.gradients:
        return {}
    whole, unselected = accumulated.gradients[ROUTER], accumulated.unselected
    if unselected is None:
        return {"norm": global_norm({ROUTER: whole})}
    selected = whole - unselected
    parts = {"norm": whole, "selected": selected, "unselected": unselected}
    norms = {name: global_norm({ROUTER: part}) for name, part in parts.items()}
    product = jnp.maximum(norms["selected"] * norms["unselected"], jnp.finfo("float32").tiny)
    return norms | {"cosine": jnp.sum(selected * unselected) / product}
