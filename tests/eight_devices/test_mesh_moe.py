"""The MoE block with its experts split over devices: the numbers of one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from jax.sharding import Mesh, NamedSharding
from tiny import tiny_config

from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.moe import MoE
from olmoe_jax.model.parameters import merge
from olmoe_jax.model.tuned import LayerTunedExperts
from olmoe_jax.parallel import sharding

B, S, D, F, E = 8, 6, 16, 8, 8
CONFIG = tiny_config(hidden_size=D, intermediate_size=F, num_experts=E)
IS_TOKEN = np.arange(S) < np.array([6, 5, 0, 6, 1, 6, 3, 6])[:, None]
MESHES = [(2, 2, 2), (1, 2, 4), (1, 1, 8)]
"""data, fsdp, expert"""


class Case(NamedTuple):
    """What differs from a plain block: its settings, its routing, its parameters."""

    settings: dict
    one_takes_all: bool = False
    tuned: bool = False


CASES = {
    "one expert takes all": Case({"dense_router_gradient": True}, one_takes_all=True),
    "adapters": Case({"lora": LoraSettings(2, 4.0, dropout=0.3)}),
    "frozen router, ragged_dot": Case({"router_trains": False, "grouped_matmul": "ragged_dot"}),
    "densemixer": Case({"dense_router_gradient": True}),
    "densemixer of 4": Case({"dense_router_gradient": True, "router_gradient_experts": 4}),
    "tuned experts": Case({"dense_router_gradient": True}, tuned=True),
}


def values_of(case: Case) -> dict[str, np.ndarray]:
    """x, router, matrices, adapters or tuned experts, and the gradient g of the output."""
    random = np.random.default_rng(0)
    inward, outward = {"D": D, "F": F}, {"F": F, "D": D}
    shapes = {"x": (B, S, D), "router": (D, E), "g": (B, S, D)}
    for name, sizes in (("gate", inward), ("up", inward), ("down", outward)):
        first, last = sizes.values()
        shapes[name] = (E, first, last)
        if case.tuned:
            shapes[f"tuned_{name}"] = (3, first, last)
        if "lora" in case.settings:
            shapes |= {f"lora.{name}_a": (E, first, 2), f"lora.{name}_b": (E, 2, last)}
    values = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    if case.one_takes_all:
        # Every token has this in it, and expert 5 likes nothing else. Not so much that the softmax
        # saturates: there the router's gradient is rounding alone.
        values["x"][..., 0] = 4.0
        values["router"][0] = 0.0
        values["router"][0, 5] = 2.5
    return values


def run(case: Case, mesh: Mesh) -> dict[str, np.ndarray]:
    """Output, load and the gradients of everything."""
    settings = ModelSettings(**case.settings)
    graph = nnx.split(nnx.eval_shape(lambda: MoE(CONFIG, settings, rngs=nnx.Rngs(0))))[0]
    keys = jax.random.split(jax.random.key(1), B) if settings.lora else None
    values = values_of(case)
    g = values.pop("g")

    def block(values):
        names = {key: key if key == "router" else f"experts.{key}" for key in values}
        module = merge(
            graph,
            {n: values[k] for k, n in names.items() if k != "x" and not k.startswith("tuned")},
        )
        selection = None
        if case.tuned:
            parts = [values[f"tuned_{name}"] for name in ("gate", "up", "down")]
            # The last one stands for none.
            selection = LayerTunedExperts(jnp.array([5, 2, E]), *parts)
        y, statistics = module(values["x"], jnp.asarray(IS_TOKEN), keys, selection, False)
        return (y, statistics.probability), statistics.load

    @jax.jit
    def step(values, g):
        # An auxiliary loss reaches the router through the probabilities' sums.
        (y, _), pullback, load = jax.vjp(block, values, has_aux=True)
        return y, load, pullback((g, jnp.arange(0.0, E) / E))[0]

    batch = NamedSharding(mesh, sharding.BATCH)
    values["x"] = jax.device_put(values["x"], batch)
    with jax.set_mesh(mesh):
        y, load, gradients = jax.device_get(step(values, jax.device_put(g, batch)))
    return {"y": y, "load": load, **gradients}


@pytest.mark.parametrize("name", CASES)
def test_the_block_of_one_device(one_device, name):
    """Exact and dropless, padding and a row of nothing else included; meshes take turns."""
    case, index = CASES[name], list(CASES).index(name)
    alone = run(case, one_device)
    tokens = IS_TOKEN.sum()
    assert alone["load"].sum() == 2 * tokens
    assert (alone["load"][5] == tokens) == case.one_takes_all
    sharded = run(case, sharding.make_mesh(*MESHES[index % 3]))
    errors = {key: relative_error(sharded[key], alone[key]) for key in alone}
    assert errors.pop("load") == 0
    # The devices of a group add up parts of the router's gradient, which nearly cancel.
    assert errors.pop("router") < 1e-5
    worst = max(errors, key=errors.get)
    assert errors[worst] < 2e-6, f"{worst}: {errors[worst]:.3g}"
    if case.one_takes_all:
        assert not sharded["gate"][alone["load"] == 0].any()
