"""Run by test_expert_mesh.py on 8 virtual devices: the MoE block's worst errors, as JSON.

Argument: "one" of the cases or "all".
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import relative_error, tiny_config
from jax.sharding import NamedSharding

from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.model.moe import MoE
from olmoe_jax.model.parameters import merge
from olmoe_jax.model.tuned import LayerTunedExperts
from olmoe_jax.parallel import sharding

B, S, D, F, E = 8, 6, 16, 8, 8
CONFIG = tiny_config(hidden_size=D, intermediate_size=F, num_experts=E)
IS_TOKEN = np.arange(S) < np.array([6, 5, 0, 6, 1, 6, 3, 6])[:, None]
MESHES = {"2x2x2": (2, 2, 2), "1x2x4": (1, 2, 4), "1x1x8": (1, 1, 8)}
SETTINGS = {
    "conventional": {"lora": LoraSettings(2, 4.0, dropout=0.3)},
    "frozen": {"grouped_matmul": "ragged_dot"},
    "densemixer": {},
    "densemixer of 4": {"router_gradient_experts": 4},
}


def case(one_takes_all: bool):
    """x, router, matrices and adapters, tuned experts, and the gradient of the output."""
    random = np.random.default_rng(0)
    inward, outward = {"D": D, "F": F}, {"F": F, "D": D}
    shapes = {"x": (B, S, D), "router": (D, E), "g": (B, S, D)}
    for name, sizes in (("gate", inward), ("up", inward), ("down", outward)):
        first, last = sizes.values()
        shapes |= {name: (E, first, last), f"tuned_{name}": (3, first, last)}
        shapes |= {f"lora.{name}_a": (E, first, 2), f"lora.{name}_b": (E, 2, last)}
    values = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    if one_takes_all:
        # Every token has this in it, and expert 5 likes nothing else.
        values["x"][..., 0] = 4.0
        values["router"][0, 5] = 5.0
    return values


def run(values, mesh, method, exchange, tuned=False):
    """Output, load and the gradients of everything, as numpy."""
    settings = ModelSettings(
        router_method=method.split()[0], expert_exchange=exchange, **SETTINGS[method]
    )
    graph = nnx.split(nnx.eval_shape(lambda: MoE(CONFIG, settings, rngs=nnx.Rngs(0))))[0]
    keys = jax.random.split(jax.random.key(1), B) if settings.lora else None
    own = {"x", "router", "gate", "up", "down"}
    own |= {key for key in values if key.startswith("lora.") and settings.lora}
    own |= {key for key in values if key.startswith("tuned") and tuned}

    def block(values):
        names = {key: key if key == "router" else f"experts.{key}" for key in own}
        module = merge(
            graph,
            {n: values[k] for k, n in names.items() if k != "x" and not k.startswith("tuned")},
        )
        selection = None
        if tuned:
            parts = [values[f"tuned_{name}"] for name in ("gate", "up", "down")]
            # The last one stands for none.
            selection = LayerTunedExperts(jnp.array([5, 2, E]), *parts)
        return module(values["x"], jnp.asarray(IS_TOKEN), keys, selection, False)

    @jax.jit
    def step(values, g):
        y, pullback, statistics = jax.vjp(block, values, has_aux=True)
        return y, statistics.load, pullback(g)[0]

    batch = NamedSharding(mesh, sharding.BATCH)
    inputs = {key: value for key, value in values.items() if key in own}
    inputs["x"] = jax.device_put(inputs["x"], batch)
    with jax.set_mesh(mesh):
        y, load, gradients = jax.device_get(step(inputs, jax.device_put(values["g"], batch)))
    return {"y": y, "load": load, **gradients}


def main():
    assert jax.device_count() == 8
    one = sharding.make_mesh(devices=jax.devices()[:1])
    cases = [("densemixer", True, False)]
    if sys.argv[1] == "all":
        cases = [(m, all_to_one, False) for m in SETTINGS for all_to_one in (False, True)]
        cases.append(("densemixer", False, True))
    errors = {}
    for index, (method, one_takes_all, tuned) in enumerate(cases):
        values = case(one_takes_all)
        alone = run(values, one, method, "tokens", tuned)
        tokens = IS_TOKEN.sum()
        assert alone["load"].sum() == 2 * tokens
        assert (alone["load"][5] == tokens) == one_takes_all
        # Meshes take turns; tokens travel on every one.
        shapes = list(MESHES)
        for exchange, mesh in (("tokens", shapes[index % 3]), ("weights", shapes[index // 2 % 3])):
            sharded = run(values, sharding.make_mesh(*MESHES[mesh]), method, exchange, tuned)
            name = f"{method}{' tuned' * tuned}{' one' * one_takes_all} {exchange} {mesh}"
            errors[name] = {key: relative_error(sharded[key], alone[key]) for key in alone}
            if one_takes_all and not tuned:
                assert not sharded["gate"][alone["load"] == 0].any()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
