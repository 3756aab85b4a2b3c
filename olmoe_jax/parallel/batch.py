"""A batch on the devices: rows of tokens, split over all axes of the mesh."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from olmoe_jax.parallel.sharding import BATCH


class DeviceBatch(NamedTuple):
    """A micro-batch on the devices; every array is [B, S], B rows of S positions."""

    tokens: jax.Array  # int32
    targets: jax.Array  # int32: what each position predicts
    segment_ids: jax.Array  # int32: 1… per row, 0 for padding
    positions: jax.Array  # int32: restarting with each example
    loss_weights: jax.Array  # float32: sum to 1 over a step


def place_batch(rows: Iterable[np.ndarray], mesh: Mesh) -> DeviceBatch:
    """Places this process's rows, an `olmoe_jax.data.Batch`, as its part of the global batch."""
    place = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, BATCH))
    return DeviceBatch(*map(place, rows))
