"""Two steps on a tiny model: as accumulate and update, and as one fused step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random_weights, tiny_config
from lora.tiny_adapters import random_adapters

from olmoe_jax.data import Batch
from olmoe_jax.methods.trained import split_trained, trained_names
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.parallel import sharding
from olmoe_jax.training.fused import fused_step
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer, TrainState, initial_state, place_batch

RATE = 1e-2
LORA = LoraSettings(4, 8.0, dropout=0.3)


class Case(NamedTuple):
    """What differs between the steps that are compared."""

    method: str = "densemixer"
    lora: LoraSettings | None = None
    weight_decay: float = 0.1
    aux_loss: float = 0.0
    tied: bool = False


def make_batch(scale: float = 1.0) -> Batch:
    """Eight rows, most with padding; the loss is `scale` times the mean over their tokens."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, 61, (8, 10)).astype(np.int32)
    lengths = np.array([10, 9, 4, 10, 1, 7, 10, 3])
    segments = (np.arange(10) < lengths[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), tokens.shape)
    weights = np.where(segments, scale / segments.sum(), 0).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), segments, positions, weights)


class TwoWays:
    """The compiled functions of a case's step, and where it starts."""

    def __init__(self, case: Case, mesh):
        self.mesh = mesh
        config = tiny_config(tie_word_embeddings=case.tied)
        settings = ModelSettings(
            compute_dtype=jnp.dtype(jnp.float32),
            router_method=case.method,
            remat="full",
            lora=case.lora,
        )
        self.trainer = trainer = Trainer(
            config,
            settings,
            adamw(0.9, 0.999, 1e-8, case.weight_decay),
            schedule("constant", RATE, 0, 10),
            None,
            case.aux_loss,
        )
        weights = random_weights(config)
        if case.lora:
            weights |= random_adapters(config, case.lora)
        places = sharding.parameter_shardings(parameter_specs(config, settings), mesh)
        trains = trained_names(lora=case.lora is not None, router=case.method != "frozen")
        with jax.set_mesh(mesh):
            placed = {name: jax.device_put(value, places[name]) for name, value in weights.items()}
            self.trained, self.frozen = split_trained(trains, placed)
        self.accumulate, self.update = jax.jit(trainer.accumulate), jax.jit(trainer.update)
        self.fused = jax.jit(fused_step, static_argnums=0)

    def start(self) -> TrainState:
        return initial_state(self.trained, self.trainer.optimizer)

    def run(self, fused: bool, batches: list[Batch]):
        """The state after these steps, and the metrics of each."""
        state, found = self.start(), []
        with jax.set_mesh(self.mesh):
            for number, rows in enumerate(batches):
                batch, position = place_batch(rows, self.mesh), np.array([number, 0], np.uint32)
                if fused:
                    state, metrics = self.fused(self.trainer, state, self.frozen, batch, position)
                else:
                    sums = self.accumulate(
                        state.parameters,
                        self.frozen,
                        self.trainer.zero_sums(self.trained),
                        batch,
                        position,
                    )
                    state, metrics = self.update(state, sums)
                # Of which a fused step reports nothing.
                found.append(metrics._replace(router_gradient=None))
        return jax.device_get((state, found))


def largest_difference(two_ways: TwoWays) -> dict[str, float]:
    """Between two steps one way and the other: of the states, and (relative) of the metrics."""
    (state, metrics), (fused, its_metrics) = (
        two_ways.run(fused, [make_batch()] * 2) for fused in (False, True)
    )
    assert jax.tree.structure(state) == jax.tree.structure(fused)
    for name, value in state.parameters.items():
        assert not np.array_equal(value, np.asarray(two_ways.trained[name])), name

    def difference(ours, theirs):
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        return np.abs(ours - theirs).max()

    states = jax.tree.map(difference, fused, state)
    relative = jax.tree.map(
        lambda a, b: difference(a, b) / max(1e-6, np.abs(b).max()), its_metrics, metrics
    )
    return {"state": max(jax.tree.leaves(states)), "metrics": max(jax.tree.leaves(relative))}
