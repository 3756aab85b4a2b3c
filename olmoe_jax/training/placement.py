"""Where a run's state lies on the devices."""

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.model.parameters import Parameters
from olmoe_jax.training.step import Trainer, TrainState, initial_state


def state_shardings(
    trainer: Trainer, trained: Parameters, by_name: dict[str, NamedSharding], mesh: Mesh
) -> TrainState:
    """Moments lie where their parameters lie (blocks' scales nearly so), scalars everywhere."""
    replicated = NamedSharding(mesh, P())

    def place(path, _):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if not names:
            return replicated
        where = by_name[names[-1]]
        if path[-1] == jax.tree_util.GetAttrKey("scales"):
            # One for each block of the last dimension, which need not divide.
            where = NamedSharding(mesh, P(*where.spec[:-1]))
        return where

    state = jax.eval_shape(lambda p: initial_state(p, trainer.optimizer), trained)
    return jax.tree_util.tree_map_with_path(place, state)
