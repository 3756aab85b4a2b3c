"""FLOPs and the roofline by hand; topologies, missing compilers and advice."""

import dataclasses

import jax.numpy as jnp
import pytest
from helpers import ROOT
from jax.experimental import topologies
from tiny import tiny_config

from configs.table import EXPERIMENTS
from olmoe_jax import methods
from olmoe_jax.config import MethodOptions
from olmoe_jax.config.load import load_config
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.flops import step_flops_per_token
from olmoe_jax.model.lora import LoraSettings
from olmoe_jax.plan.costs import roofline
from olmoe_jax.plan.devices import KINDS, open_devices, parse_topology
from olmoe_jax.plan.planning import OLMOE_1B_7B, _architecture

LORA = LoraSettings(64, 16.0)


def method(name, **options):
    return methods.build(MethodOptions(name=name, **options), OLMOE_1B_7B)


def flops(trains=lambda name: True, **settings):
    """Returns GFLOPs per token at full size, attending to 2048 positions on average."""
    parts = step_flops_per_token(OLMOE_1B_7B, ModelSettings(**settings), trains, 2048)
    return type(parts)(*(part / 1e9 for part in parts))


def test_full_fine_tuning():
    conventional = flops()
    assert conventional.forward == pytest.approx(2.63, abs=0.005)
    assert conventional.model == pytest.approx(7.88, abs=0.005)
    assert conventional.executed == conventional.model
    # The layers again, without the head and the third matmul of the 8 selected experts.
    not_again = 2 * (50304 * 2048 + 16 * 8 * 2048 * 1024) / 1e9
    assert flops(remat="full").recomputed == pytest.approx(conventional.forward - not_again)
    assert flops(remat="selective") == conventional


@pytest.mark.parametrize("limit", [None, 8, 16, 64])
def test_densemixer_adds_a_forward_of_the_experts_that_were_not_selected(limit):
    densemixer = flops(dense_router_gradient=True, router_gradient_experts=limit)
    expert = 3 * 2048 * 1024
    added = 2 * 16 * ((limit or 64) - 8) * expert / 1e9
    assert densemixer.model == pytest.approx(flops().model + added)
    # Exact: all 64 experts run in the backward, also the 8 that ran before.
    again = 2 * 16 * 8 * expert / 1e9 if limit in (None, 64) else 0.0
    assert densemixer.recomputed == pytest.approx(again)


def test_lora_has_no_gradients_of_the_frozen_weights():
    full = flops()
    lora = flops(method("frozen", lora_rank=64).trains, lora=LORA)
    # q, k, v, o and the three matrices of 8 experts: A [in, 64] and B [64, out].
    adapters = 2 * 16 * 64 * (4 * 4096 + 8 * 3 * 3072) / 1e9
    assert lora.forward == pytest.approx(full.forward + adapters)
    scores = 4 * 16 * 2048 * 2048 / 1e9  # in the forward
    inputs = full.forward - scores + adapters
    assert lora.backward == pytest.approx(inputs + adapters + 2 * scores)
    # An expert's down projection does not run again; of its adapter A B, only A does.
    not_again = 2 * (50304 * 2048 + 16 * 8 * 2048 * (1024 + 64)) / 1e9
    again = flops(lora=LORA, remat="full").recomputed
    assert again == pytest.approx(lora.forward - not_again)


def test_esft_has_gradients_of_its_tuned_experts():
    tuned = ((0, 1, 2, 3),) * 16
    trains = method("esft_gate").for_plan(0, 4)[0].trains
    esft, full = flops(trains, tuned_experts=tuned), flops()
    # 4 of 64 experts see, on average, half an expert's worth of a token's 8.
    weights = 2 * (50304 * 2048 + 16 * 0.5 * 3 * 2048 * 1024) / 1e9
    scores = 4 * 16 * 2048 * 2048 / 1e9
    assert esft.forward == pytest.approx(full.forward)
    assert esft.backward == pytest.approx(full.forward - scores + weights + 2 * scores)


def test_tied_embeddings_count_as_head():
    settings = ModelSettings(compute_dtype=jnp.float32)
    tied, own = (
        step_flops_per_token(
            tiny_config(tie_word_embeddings=tie), settings, lambda name: True, 8
        ).model
        for tie in (True, False)
    )
    assert tied == own


def test_roofline():
    bounds = roofline(parse_topology("h100:8"), 989e12, 3.35e12 / 2, 450e9 * 2, 0.0)
    assert (bounds.compute, bounds.memory, bounds.network) == pytest.approx((1.0, 0.5, 2.0))
    assert (bounds.bound, bounds.seconds) == ("network", pytest.approx(2.0))
    between_hosts = roofline(parse_topology("h100:16"), 0.0, 0.0, 450e9, 0.0)
    assert between_hosts.network == pytest.approx(9.0)
    assert roofline(parse_topology("cpu:8"), 1.0, 1.0, 1.0, 1.0) is None


def test_roofline_adds_what_is_exposed():
    bounds = roofline(parse_topology("h100:8"), 989e12, 0.0, 450e9 / 2, 450e9 / 4)
    assert (bounds.exposed, bounds.seconds) == pytest.approx((0.25, 1.25))
    assert bounds.bound == "compute"


@pytest.mark.parametrize(
    ("text", "count", "shape"),
    [
        ("h100:2", 2, "1x1x2"),
        ("h100:16", 16, "1x2x8"),
        ("v5e:8", 8, "v5e:2x4"),
        ("v6e:4x4", 16, "v6e:4x4"),
        ("v5p:4", 4, "v5p:2x2x1"),
    ],
)
def test_topology(text, count, shape):
    topology = parse_topology(text)
    assert (topology.count, topology.shape) == (count, shape)


@pytest.mark.parametrize("text", ["h100:9", "h100:2x4", "v5e:3", "v5e:4x2", "v5p:2x2", "cpu:0"])
def test_wrong_sizes_say_the_right_ones(text):
    with pytest.raises(UserError, match=r"write .*(1 \(1x1\)|4 \(2x2x1\)|COUNT)") as caught:
        parse_topology(text)
    assert f"--topology={text}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("h100:8", NotImplementedError("topology not implemented for cuda")),
        ("v5e:8", RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")),
    ],
)
def test_missing_compiler_says_how_to_install_it(monkeypatch, text, error):
    def missing(*_, **__):
        raise error

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    topology = parse_topology(text)
    with pytest.raises(UserError) as caught:
        open_devices(topology)
    assert topology.kind.install in str(caught.value)
    assert KINDS["h100"].install == 'pip install "jax[cuda13]"'


def test_too_few_cpu_devices():
    with pytest.raises(UserError, match="xla_force_host_platform_device_count=4096"):
        open_devices(parse_topology("cpu:4096"))


def test_published_models_are_known():
    for method in EXPERIMENTS:
        assert _architecture(load_config(ROOT / "configs" / f"{method}_gsm.py")) == OLMOE_1B_7B
    assert dataclasses.asdict(OLMOE_1B_7B)["num_experts"] == 64
