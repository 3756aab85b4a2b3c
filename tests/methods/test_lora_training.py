"""What a LoRA run holds in memory and on disk, and that each method trains and continues."""

import json
import math

import jax
import numpy as np
import pytest
from helpers import assert_same_bits, load_checkpoint_tensors, saved_arrays
from tiny import LORA, base_weights, program_of, short_run
from training.interruptions import stop
from training.tiny_run import losses

import olmoe_jax
from convert import to_hf
from olmoe_jax.parallel.sharding import make_mesh
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.parameters import initial_parameters

RAGGED = ((1, 4, 7), (0,))
BFLOAT16 = {"model__compute_dtype": "bfloat16"}
ESFT = {"method__name": "esft_gate"}


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("changes", "experts", "trained"),
    [
        # Two layers of q, o (32 to 32), k, v (32 to 16); 8 experts of 3 x (32 to 16); routers.
        (
            LORA | {"method__name": "frozen"},
            None,
            2 * 4 * (2 * 64 + 2 * 48 + 8 * 3 * 48),
        ),
        (LORA, None, 2 * 4 * (2 * 64 + 2 * 48 + 8 * 3 * 48) + 2 * 32 * 8),
        (ESFT, RAGGED, 4 * 3 * 32 * 16 + 258 * 32),
        (ESFT | {"method__esft_train_head": False}, ((), (2,)), 3 * 32 * 16),
    ],
)
def test_bytes(run_files, bfloat16_base, tmp_path, changes, experts, trained):
    """Twelve bytes for each trained parameter (master and moments); frozen ones as in the base."""
    config = short_run(run_files, bfloat16_base, tmp_path / "out", **(BFLOAT16 | changes))
    program = program_of(config, experts)
    count = sum(math.prod(value.shape) for value in program.state.parameters.values())
    assert count == trained
    held = size(program.state)
    assert held == pytest.approx(12 * trained, rel=0.05)
    assert {value.dtype for value in program.state.parameters.values()} == {np.dtype("float32")}
    frozen = {name: str(value.dtype) for name, value in program.frozen.items()}
    router = {"layers.moe.router"} & frozen.keys()
    assert {frozen.pop(name) for name in router} <= {"float32"}
    assert set(frozen.values()) == {"bfloat16"}
    assert not program.frozen.keys() & program.state.parameters.keys()
    stored = load_checkpoint_tensors(bfloat16_base)
    held_experts = np.asarray(program.frozen["layers.moe.experts.gate"])
    for layer in range(2):
        for expert in range(8):
            name = f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
            assert np.array_equal(stored[name], held_experts[layer, expert].T)


@pytest.fixture(scope="module")
def run(run_files, bfloat16_base, tmp_path_factory):
    """LoRA on two targets only, the router frozen."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    options = BFLOAT16 | LORA | {"method__lora_targets": "v,down", "method__name": "frozen"}
    return olmoe_jax.train(short_run(run_files, bfloat16_base, output, **options)).output_dir


@pytest.mark.slow
def test_a_checkpoint_holds_what_trains(run):
    names = {f"layers.attention.lora.v_{part}" for part in "ab"}
    names |= {f"layers.moe.experts.lora.down_{part}" for part in "ab"}
    saved = saved_arrays(run)
    assert {name for name in saved if name.startswith("parameters.")} == {
        f"parameters.{name}" for name in names
    }
    rest = {name for name in saved if not name.startswith("parameters.")}
    moments = {name for name in rest if "layers" in name}
    assert {name.split("layers.")[1] for name in moments} == {
        name.split("layers.")[1] for name in names
    }
    assert len(moments) == 2 * len(names)
    # The last two are empty branches: nothing frozen, and the weight decay's state.
    counters = {"step", "skipped", "skipped_in_a_row", "optimizer.0.count"}
    assert rest - moments == counters | {"frozen", "optimizer.1"}
    # On disk too: a few times what trains, far from the base.
    files = [file for file in (run / "checkpoints").rglob("*") if file.is_file()]
    arrays = sum(file.stat().st_size for file in files if "/d/" in str(file))
    trained = 2 * 4 * (48 + 8 * 48)
    assert arrays < 12 * trained + 50_000


@pytest.mark.slow
def test_frozen_tensors_are_the_bases_bit_by_bit(run, bfloat16_base, tmp_path):
    """v and down are adapted; of the merged export everything else has the base's bytes."""
    to_hf.main(["--checkpoint", str(run), "--output", str(tmp_path / "merged")])
    before, after = (load_checkpoint_tensors(path) for path in (bfloat16_base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert {name.split(".")[-2] for name in changed} == {"v_proj", "down_proj"}
    adapted = {name for name in before if ".v_proj." in name or ".down_proj." in name}
    assert len(changed) > 0.8 * len(adapted)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["v_proj", "down_proj"]
    assert not (run / "adapter" / "router.safetensors").exists()


@pytest.mark.slow
def test_a_finished_run_says_so_and_keeps_its_adapter(run, run_files, bfloat16_base, capsys):
    """The same command again: no step, no second export."""
    options = BFLOAT16 | LORA | {"method__lora_targets": "v,down", "method__name": "frozen"}
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    olmoe_jax.train(short_run(run_files, bfloat16_base, run, **options))
    said = capsys.readouterr().out
    assert "continuing after step 4 of 4" in said
    assert "method: frozen with LoRA: rank 4, alpha 8, dropout 0.1" in said
    assert f"{run / 'adapter'} is there already" in said
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_new_adapters_leave_the_base_alone(run_files, base, tmp_path):
    """At step 0 what is frozen has the base's bits, B is zero and A comes from the seed."""
    trained = {}
    for seed in (0, 1):
        options = LORA | {"train__seed": seed}
        config = short_run(run_files, base, tmp_path / "out", **options)
        mesh = make_mesh(devices=jax.devices()[:1])
        trained[seed], frozen = jax.device_get(initial_parameters(config, open_model(config), mesh))
        weights = base_weights(base)
        router = {"layers.moe.router": weights.pop("layers.moe.router")}
        assert_same_bits(frozen, weights)
        assert trained[seed]["layers.moe.router"].tobytes() == next(iter(router.values())).tobytes()
    for name, value in trained[0].items():
        if name.endswith("_b"):
            assert not value.any()
        elif name.endswith("_a"):
            assert (value != trained[1][name]).any()


METHODS = {
    "frozen": {"method__name": "frozen"},
    "conventional": {"method__name": "conventional"},
    "densemixer": {"method__name": "densemixer"},
    "frozen_lora": LORA | {"method__name": "frozen"},
    "conventional_lora": LORA | {"method__name": "conventional"},
    "densemixer_lora": LORA | {"method__name": "densemixer"},
    "esft_gate": {"method__name": "esft_gate", "method__esft_top_p": 0.5},
    "esft_token": {"method__name": "esft_token", "method__esft_densemixer": True},
}
IN_CI = ("conventional", "esft_gate")
"""The methods whose runs CI continues here.

test_esft_training.py continues a run of ESFT by token scores, test_quantized_base.py and
training/test_moved_inputs.py one of DenseMixer with LoRA.
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[] if name in IN_CI else pytest.mark.exhaustive) for name in METHODS],
)
def test_trains_and_continues(run_files, base, tmp_path, at_step, method):
    """The loss falls, and a run that was stopped has the numbers of one that was not."""
    changes = METHODS[method] | {"optimizer__learning_rate": 0.02, "train__max_steps": 10}
    whole = olmoe_jax.train(short_run(run_files, base, tmp_path / "whole", **changes)).output_dir
    values = list(losses(whole).values())
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.2
    config = short_run(run_files, base, tmp_path / "stopped", **changes)
    at_step(4, stop)
    stopped = olmoe_jax.train(config)
    assert not stopped.finished
    assert stopped.step in (4, 5)
    assert olmoe_jax.train(config).finished
    assert losses(stopped.output_dir) == losses(whole)
    exported = "adapter" if "lora" in method else "hf"
    tensors = [load_checkpoint_tensors(tmp_path / name / exported) for name in ("whole", "stopped")]
    assert_same_bits(*tensors)
