"""All 48 experiments at the size of OLMoE-1B-7B: what trains, counted; nothing is allocated."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

from configs.table import DATASETS, EXPERIMENTS
from olmoe_jax import methods
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.config import validate
from olmoe_jax.config.load import load_config
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.plan.planning import OLMOE_1B_7B
from olmoe_jax.training.introduction import parameter_table
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer, initial_state

EXPERTS = tuple(tuple(range(layer % 5)) for layer in range(16))
"""An expert list of ragged layers, some empty: 3 times 0+1+2+3+4, and layer 15's none."""

EXPERT = 3 * 2048 * 1024
HEAD = 50304 * 2048
ROUTERS = 16 * 2048 * 64
LAYER = 4 * 2048 * 2048 + 4 * 2048 + 64 * EXPERT
ADAPTERS = 16 * 64 * (4 * (2048 + 2048) + 64 * 3 * (2048 + 1024))
TRAINED = {
    "frozen": 2 * HEAD + 16 * LAYER + 2048,
    "conventional": 6_919_161_856,
    "densemixer": 6_919_161_856,
    "frozen_lora": ADAPTERS,
    "conventional_lora": ADAPTERS + ROUTERS,
    "densemixer_lora": ADAPTERS + ROUTERS,
    "esft_gate": 30 * EXPERT + HEAD,
    "esft_token": 30 * EXPERT + HEAD,
}
LEARNING_RATES = {
    "full": dict.fromkeys(("gsm", "codealpaca"), 1e-6)
    | dict.fromkeys(("intent", "law", "summary", "translation"), 2e-5),
    "lora": dict.fromkeys(("gsm", "codealpaca", "summary"), 1e-4)
    | dict.fromkeys(("intent", "law", "translation"), 4e-4),
    "esft": dict.fromkeys(("gsm", "codealpaca"), 2e-5)
    | dict.fromkeys(("intent", "law"), 1e-3)
    | dict.fromkeys(("summary", "translation"), 5e-3),
}


def test_the_numbers_by_hand():
    assert TRAINED["frozen"] + ROUTERS == TRAINED["conventional"]
    assert ADAPTERS == 620_756_992
    assert sum(map(len, EXPERTS)) == 30
    assert len(TRAINED) * len(DATASETS) == 48


@functools.cache
def built(options):
    """(trained shapes, frozen shapes, gradient shapes, state shapes) of a run's programs."""
    method, assumed = methods.build(options, OLMOE_1B_7B).for_plan(0, 1)
    if assumed:
        method = method.with_experts(ExpertConfig(EXPERTS))
    settings = method.model_settings(ModelSettings(compute_dtype=jnp.bfloat16))
    trained, frozen = {}, {}
    for name, spec in parameter_specs(OLMOE_1B_7B, settings).items():
        kept, dtype = (trained, jnp.float32) if method.trains(name) else (frozen, jnp.bfloat16)
        kept[name] = jax.ShapeDtypeStruct(spec.shape, dtype)
    optimizer = adamw(0.9, 0.999, 1e-8, 0.0)
    trainer = Trainer(OLMOE_1B_7B, settings, optimizer, schedule("linear", 1.0, 0, 1), 1.0)
    integers = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    batch = DeviceBatch(*[integers] * 4, jax.ShapeDtypeStruct((2, 128), jnp.float32))
    position = jax.ShapeDtypeStruct((2,), jnp.uint32)
    zero = jax.eval_shape(trainer.zero_sums, trained)
    accumulated = jax.eval_shape(trainer.accumulate, trained, frozen, zero, batch, position)
    state = jax.eval_shape(lambda p: initial_state(p, optimizer), trained)
    return trained, frozen, accumulated.gradients, state


def count(parameters) -> int:
    return sum(math.prod(value.shape) for value in parameters.values())


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", EXPERIMENTS)
def test_experiment(method, dataset):
    config = validate(load_config(ROOT / "configs" / f"{method}_{dataset}.py"))
    kind = "lora" if "lora" in method else "esft" if "esft" in method else "full"
    assert config.optimizer.learning_rate == LEARNING_RATES[kind][dataset]
    assert config.train.batch_size == 256
    assert config.method.name == method.removesuffix("_lora")
    trained, frozen, gradients, state = built(config.method)
    assert count(trained) == TRAINED[method]
    base = {
        name: value
        for name, value in (trained | frozen).items()
        if ".lora." not in name and not name.startswith("tuned.")
    }
    assert count(base) == 6_919_161_856
    assert {name: value.shape for name, value in gradients.items()} == {
        name: value.shape for name, value in trained.items()
    }
    assert {value.dtype for value in gradients.values()} == {jnp.dtype(jnp.float32)}
    # Master weights and two moments, 4 bytes each.
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert size == pytest.approx(12 * TRAINED[method], rel=1e-6)


def test_parameter_table():
    """The table at the start of a run: groups, trained and frozen counts, the sum last."""
    lora = load_config(ROOT / "configs" / "densemixer_lora_gsm.py").method
    lines = [line.split() for line in parameter_table(*built(lora)[:2])]
    assert lines[0] == ["parameters", "trained", "frozen"]
    rows = {" ".join(words[:-2]): words[-2:] for words in lines[1:]}
    assert rows["attention adapters"] == ["16,777,216", "0"]
    assert rows["expert adapters"] == ["603,979,776", "0"]
    assert rows["router"] == ["2,097,152", "0"]
    assert rows["experts"] == ["0", "6,442,450,944"]
    assert lines[-1] == ["all", "622,854,144", "6,917,064,704"]
    esft = load_config(ROOT / "configs" / "esft_gate_gsm.py").method
    rows = {
        line.split("  ")[1]: line.split()[-2:] for line in parameter_table(*built(esft)[:2])[1:]
    }
    assert rows["tuned experts"] == ["188,743,680", "0"]
    assert rows["head"] == ["103,022,592", "0"]
    # The base's copies of the tuned experts take no part: the sum is the base's 6,919,161,856.
    assert rows["experts"] == ["0", "6,253,707,264"]
    assert rows["all"] == ["291,766,272", "6,627,395,584"]
