"""LoRA beside a quantized base: it is a run whose base has the dequantized weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ROUTER_SETTINGS,
    array_sizes,
    assert_close,
    assert_same_bits,
    load_checkpoint_tensors,
    message_of,
)
from tiny import (
    LORA,
    base_weights,
    make_batch,
    program_of,
    random_adapters,
    random_weights,
    short_run,
    tiny_config,
)
from training.interruptions import stop
from training.tiny_run import losses

import olmoe_jax
from convert import merge_lora, to_hf
from olmoe_jax.config import validate
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.model.lora import TARGETS, LoraSettings, is_target
from olmoe_jax.ops.quantization import Quantized, dequantize, quantize
from olmoe_jax.parallel.batch import place_batch
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.optimizer import adamw, schedule
from olmoe_jax.training.step import Trainer

SETTINGS = LoraSettings(4, 8.0, dropout=0.3)
NF4 = LORA | {"model__base_quantization": "nf4", "model__remat": "full"}


def accumulate(method="densemixer", remat="full"):
    """(accumulate, trained, frozen, rest of its arguments); the base is wide enough for blocks."""
    config = tiny_config(hidden_size=96, intermediate_size=80)
    settings = ModelSettings(**ROUTER_SETTINGS[method], remat=remat, lora=SETTINGS)
    trainer = Trainer(
        config, settings, adamw(0.9, 0.999, 1e-8, 0.0), schedule("constant", 1.0, 0, 1), 1.0
    )
    frozen = random_weights(config)
    trained = random_adapters(config, SETTINGS)
    if method != "frozen":
        trained["layers.moe.router"] = frozen.pop("layers.moe.router")
    batch = place_batch(make_batch(), make_mesh(devices=jax.devices()[:1]))
    position = np.array([3, 1], np.uint32)
    trained = jax.tree.map(jnp.asarray, trained)
    return trainer.accumulate, trained, frozen, (trainer.zero_sums(trained), batch, position)


def quantized(frozen, scheme):
    return {n: quantize(w, scheme) if is_target(n) else w for n, w in frozen.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("densemixer", "nf4"),
        pytest.param("frozen", "nf4", marks=pytest.mark.exhaustive),
        pytest.param("conventional", "int8", marks=pytest.mark.exhaustive),
    ],
)
def test_gradients_are_those_of_the_dequantized_base(method, scheme):
    function, trained, frozen, rest = accumulate(method)
    lean = quantized(frozen, scheme)
    full = {
        name: np.asarray(dequantize(w, jnp.float32)) if isinstance(w, Quantized) else w
        for name, w in lean.items()
    }
    assert sum(isinstance(weight, Quantized) for weight in lean.values()) == len(TARGETS)
    assert not np.array_equal(full["layers.attention.q"], frozen["layers.attention.q"])
    ours, oracle = (jax.jit(function)(trained, base, *rest) for base in (lean, full))
    assert_close(
        {"loss": ours.loss, **ours.gradients}, {"loss": oracle.loss, **oracle.gradients}, 2e-6
    )
    assert all(np.abs(value).max() > 0 for value in ours.gradients.values())


@pytest.mark.slow
def test_no_copy_of_all_layers():
    """Dequantized weights exist one layer at a time; without remat the backward would keep all."""
    for remat in ("full", "none"):
        function, trained, frozen, rest = accumulate("frozen", remat)
        lean = quantized(frozen, "nf4")
        sizes = array_sizes(function, trained, lean, *rest)
        layer = frozen["layers.moe.experts.gate"][0].size
        assert layer in sizes
        assert (2 * layer in sizes) == (remat == "none")


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_run_holds_its_base_quantized(run_files, base, tmp_path, scheme):
    options = NF4 | {"model__base_quantization": scheme}
    program = program_of(short_run(run_files, base, tmp_path / "out", **options))
    plain = program_of(short_run(run_files, base, tmp_path / "out", **LORA))
    weights = base_weights(base)
    for name, value in program.frozen.items():
        if name in ("embed", "lm_head") or name.endswith("norm"):
            np.testing.assert_array_equal(value, plain.frozen[name])
            continue
        expected = quantize(weights[name], scheme)
        assert (value.width, value.codes.dtype) == (expected.width, expected.codes.dtype)
        np.testing.assert_array_equal(value.codes, expected.codes)
        np.testing.assert_array_equal(value.scales, expected.scales)
    assert_same_bits(*(jax.device_get(p.state.parameters) for p in (program, plain)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method__lora_rank": None, "method__lora_alpha": 16.0}, "write none, or train adapters"),
        ({"method__name": "esft_gate", "method__lora_rank": None}, "write none, or train adapters"),
        ({"model__remat": "none"}, "write model.remat=full or selective"),
        (
            {"model__init": "random", "model__config_path": "config.json"},
            "only for a pretrained base; write none",
        ),
    ],
)
def test_refused(run_files, base, tmp_path, changes, says):
    message = message_of(validate, short_run(run_files, base, tmp_path, **(NF4 | changes)))
    assert message.startswith("model.base_quantization=nf4: ")
    assert says in message


@pytest.mark.slow
def test_trains_continues_and_exports(run_files, base, tmp_path, at_step, capsys):
    """The loss falls; stopped, the run continues exactly; the adapter merges."""
    changes = {"optimizer__learning_rate": 0.02, "train__max_steps": 12}
    run = functools.partial(short_run, run_files, base)
    whole = olmoe_jax.train(run(tmp_path / "whole", **(NF4 | changes))).output_dir
    said = capsys.readouterr().out
    assert (
        "method: densemixer with LoRA: rank 4, alpha 8, dropout 0.1, base quantized to nf4" in said
    )
    values = list(losses(whole).values())
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.2
    config = run(tmp_path / "stopped", **(NF4 | changes))
    at_step(4, stop)
    assert not olmoe_jax.train(config).finished
    stopped = olmoe_jax.train(config).output_dir
    assert losses(stopped) == losses(whole)
    adapters = [load_checkpoint_tensors(output / "adapter") for output in (whole, stopped)]
    assert_same_bits(*adapters)
    # Onto the base itself, which the run only read.
    adapter = ["--adapter", str(whole / "adapter"), "--output", str(tmp_path / "merged")]
    merge_lora.main(["--model", str(base), *adapter])
    to_hf.main(["--checkpoint", str(whole), "--output", str(tmp_path / "converted")])
    merged, converted = (
        load_checkpoint_tensors(tmp_path / name) for name in ("merged", "converted")
    )
    assert_close(merged, converted)
