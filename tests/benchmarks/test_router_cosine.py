"""The cosine of a limited router gradient with the full one, on a tiny model."""

import numpy as np
import pytest
from tiny import make_model, tiny_config

from benchmarks import router_cosine
from olmoe_jax.parallel.batch import DeviceBatch


@pytest.mark.exhaustive
def test_cosines_grow_with_the_experts_that_get_their_gradient():
    config = tiny_config(num_experts=16)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16)).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape)
    weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
    batch = DeviceBatch(tokens, tokens, np.ones_like(tokens), positions, weights)
    cosines = router_cosine.router_cosines(make_model(config), batch)
    assert list(cosines) == ["2", "4", "8", "16"]
    assert 0 < cosines["2"] < cosines["4"] < cosines["8"] < 0.9999
    assert cosines["16"] == pytest.approx(1.0)
