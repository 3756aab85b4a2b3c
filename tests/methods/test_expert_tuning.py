"""The decisions of methods that tune experts, without a run."""

import dataclasses
import json

import pytest
from tiny import tiny_config

from olmoe_jax import methods
from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.config import MethodOptions
from olmoe_jax.errors import UserError
from olmoe_jax.methods import Preparation
from olmoe_jax.methods.expert_tuning import ExpertTuning
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.parameters import ROUTER

CONFIG = tiny_config()
ALL = ("tuned.gate", "lm_head", "embed", ROUTER, "final_norm", "layers.moe.experts.gate")


class Even(ExpertTuning):
    """Tunes the even experts, or the odd ones with an odd seed."""

    def choose(self, seed):
        ids = tuple(range(seed % 2, CONFIG.num_experts, 2))
        return ExpertConfig((ids[::-1],) * CONFIG.num_layers)


def esft(tmp_path, non_expert_modules, **options):
    file = tmp_path / "experts.json"
    experts = {"1": [3], "2": [0]}
    file.write_text(json.dumps({"experts": experts, "non_expert_modules": non_expert_modules}))
    options = MethodOptions(name="esft_gate", experts_path=str(file), **options)
    return methods.build(options, CONFIG)


def trains(method):
    return {name for name in ALL if method.trains(name)}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_knows_a_choice_by_the_seed(seed):
    method, assumed = Even(MethodOptions(name="esft_gate"), CONFIG).for_plan(seed, 3)
    assert assumed is None
    assert method.experts.experts == (tuple(range(seed, 8, 2)),) * 2  # sorted
    assert trains(method) == {"tuned.gate"}


def test_a_run_keeps_its_choice(tmp_path):
    """The choice by the seed is written; a continued run takes what is written."""
    method = Even(MethodOptions(name="esft_gate"), CONFIG)
    run = Preparation(tmp_path, None, ModelSettings(), None, None, {}, seed=1)
    chosen = method.prepare(run).experts
    assert chosen.experts == ((1, 3, 5, 7),) * 2
    assert method.prepare(dataclasses.replace(run, seed=0)).experts == chosen
    assert json.loads((tmp_path / "experts.json").read_text()) == chosen.to_json()


@pytest.mark.parametrize("head", [True, False])
def test_the_head(tmp_path, head):
    """It trains as the option says; with non_expert_modules it trains, and `false` is an error."""
    assert trains(esft(tmp_path, False, esft_train_head=head)) == {"tuned.gate"} | (
        {"lm_head"} if head else set()
    )
    if head:
        assert trains(esft(tmp_path, True)) == set(ALL) - {"layers.moe.experts.gate"}
        return
    with pytest.raises(UserError, match="trains the head too"):
        esft(tmp_path, True, esft_train_head=False)
