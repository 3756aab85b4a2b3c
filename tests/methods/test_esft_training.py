"""An ESFT run: the experts it chose are kept, nothing else changes, and its adapter applies."""

import json

import jax
import numpy as np
import pytest
from helpers import (
    assert_same_bits,
    changed_tensors,
    expert_tensors,
    load_checkpoint_tensors,
    load_safetensors,
    run_command_line,
    saved_arrays,
)
from tiny import short_run, write_base
from training.interruptions import stop
from training.tiny_run import losses

import olmoe_jax
from convert import merge_lora, to_hf
from olmoe_jax.methods import esft
from olmoe_jax.methods.selection import read_scores, select

pytestmark = pytest.mark.slow

ESFT = {
    "method__name": "esft_token",
    "method__esft_score_tokens": 100,
    "model__compute_dtype": "bfloat16",
    "optimizer__learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def run(run_files, bfloat16_base, tmp_path_factory):
    """Scores and selects by itself."""
    output = tmp_path_factory.mktemp("runs") / "esft"
    return olmoe_jax.train(short_run(run_files, bfloat16_base, output, **ESFT)).output_dir


@pytest.fixture(scope="module")
def chosen(run):
    return json.loads((run / "experts.json").read_text())["experts"]


def test_scores_and_experts_are_kept(run, chosen):
    assert (run / "scores.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    scores = read_scores(run / "scores.json", "token")
    assert scores.shape == read_scores(run / "scores.json", "gate").shape == (2, 8)
    expected = select(scores, 0.2)  # the paper's share for token scores
    assert {layer: sorted(ids) for layer, ids in chosen.items()} == {
        layer: sorted(ids) for layer, ids in expected.to_json()["experts"].items()
    }
    assert 0 < len(expert_tensors(chosen)) < 3 * 16


def test_the_rest_has_the_bases_bytes(run, chosen, bfloat16_base):
    expected = expert_tensors(chosen) | {"lm_head.weight"}
    assert changed_tensors(bfloat16_base, run / "hf") == expected
    assert {str(v.dtype) for v in load_checkpoint_tensors(run / "hf").values()} == {"bfloat16"}


def test_each_trained_expert_is_in_its_own_place(run, chosen, bfloat16_base):
    """Four updates of at most 0.02 each: an expert in another's place would be further off."""
    before, after = (load_checkpoint_tensors(path) for path in (bfloat16_base, run / "hf"))
    assert max(map(len, chosen.values())) > 1
    for name in expert_tensors(chosen):
        change = after[name].astype(np.float32) - before[name].astype(np.float32)
        assert 0 < np.abs(change).max() < 0.1, name


def test_a_checkpoint_holds_what_trains(run, chosen):
    trained = {"lm_head", *(f"tuned.{kind}" for kind in ("gate", "up", "down"))}
    saved = saved_arrays(run)
    parameters = {name for name in saved if name.startswith("parameters.")}
    assert parameters == {f"parameters.{name}" for name in trained}
    assert not [name for name in saved if name.startswith("frozen.") or "experts" in name]
    moments = {name for name in saved if name.startswith("optimizer.")}
    assert len([name for name in moments if name.endswith(tuple(trained))]) == 2 * len(trained)


def test_adapter_of_the_trained_tensors(run, chosen, bfloat16_base, tmp_path):
    """convert.to_hf --adapter and merge_lora give what convert.to_hf gives, byte for byte."""
    adapter, merged, direct = (tmp_path / name for name in ("adapter", "merged", "direct"))
    to_hf.main(["--checkpoint", str(run), "--output", str(adapter), "--adapter"])
    to_hf.main(["--checkpoint", str(run), "--output", str(direct)])
    base = ["--model", str(bfloat16_base), "--adapter", str(adapter)]
    merge_lora.main([*base, "--output", str(merged)])
    assert_same_bits(load_checkpoint_tensors(merged), load_checkpoint_tensors(direct))
    assert_same_bits(load_checkpoint_tensors(direct), load_checkpoint_tensors(run / "hf"))
    trained = load_safetensors(adapter / "trained.safetensors")
    assert trained.keys() == expert_tensors(chosen) | {"lm_head.weight"}
    assert {value.dtype for value in trained.values()} == {np.dtype(np.float32)}
    assert json.loads((adapter / "expert_config.json").read_text()) == {
        "experts": {layer: sorted(ids) for layer, ids in chosen.items()},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert (adapter / "tokenizer.json").exists()
    # In float32 the trained tensors keep their bits, which bfloat16 rounds.
    whole = tmp_path / "float32"
    merge_lora.main([*base, "--output", str(whole), "--dtype", "float32"])
    tensors = load_checkpoint_tensors(whole)
    for name, value in load_checkpoint_tensors(bfloat16_base).items():
        expected = trained.get(name, value.astype(np.float32))
        assert tensors[name].tobytes() == np.ascontiguousarray(expected).tobytes(), name


def test_a_continued_run_does_not_score_again(
    run, run_files, bfloat16_base, tmp_path, at_step, monkeypatch
):
    """It trains the experts that it chose first, and has the losses of the whole run."""
    config = short_run(run_files, bfloat16_base, tmp_path / "run", **ESFT)
    at_step(2, stop)
    assert not olmoe_jax.train(config).finished
    kept = (tmp_path / "run" / "experts.json").read_bytes()

    def scored(*_, **__):
        raise AssertionError("scored again")

    monkeypatch.setattr(esft, "expert_scores", scored)
    assert olmoe_jax.train(config).finished
    assert (tmp_path / "run" / "experts.json").read_bytes() == kept
    assert losses(tmp_path / "run") == losses(run)


def given(tmp_path, **content):
    file = tmp_path / "experts.json"
    file.write_text(json.dumps(content))
    return {"method__experts_path": str(file)}


EMPTY_LAYER = {"1": [], "2": [6, 1]}
SHAREABLE = {"experts": {"1": [3], "2": [0, 5]}, "shared_experts": False}


@pytest.mark.parametrize(
    ("content", "options", "also"),
    [
        pytest.param(
            {"experts": EMPTY_LAYER}, {}, {"lm_head.weight"}, marks=pytest.mark.exhaustive
        ),
        ({"experts": EMPTY_LAYER}, {"method__esft_train_head": False}, set()),
        pytest.param(
            {"experts": EMPTY_LAYER},
            {"method__esft_densemixer": True},
            {"lm_head.weight"},
            marks=pytest.mark.exhaustive,
        ),
        (
            {"experts": EMPTY_LAYER},
            {"method__esft_densemixer": True, "method__router_gradient_experts": 4},
            {"lm_head.weight"},
        ),
    ],
)
def test_given_experts(run_files, bfloat16_base, tmp_path, content, options, also):
    options = ESFT | given(tmp_path, **content) | options
    del options["method__esft_score_tokens"]
    output = tmp_path / "out"
    olmoe_jax.train(short_run(run_files, bfloat16_base, output, **options))
    expected = expert_tensors(content["experts"]) | also
    assert changed_tensors(bfloat16_base, output / "hf") == expected
    assert not (output / "scores.json").exists()
    stored = json.loads((output / "experts.json").read_text())
    assert stored["experts"] == {layer: sorted(ids) for layer, ids in content["experts"].items()}


def test_non_expert_modules(run_files, bfloat16_base, tmp_path):
    """Everything but the frozen experts trains; the router too."""
    content = SHAREABLE | {"non_expert_modules": True}
    options = ESFT | given(tmp_path, **content)
    del options["method__esft_score_tokens"]
    output = tmp_path / "out"
    olmoe_jax.train(short_run(run_files, bfloat16_base, output, **options))
    tensors = load_checkpoint_tensors(bfloat16_base)
    allowed = expert_tensors(content["experts"])
    allowed |= {name for name in tensors if ".experts." not in name}
    assert changed_tensors(bfloat16_base, output / "hf") == allowed
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    to_hf.main(["--checkpoint", str(output), "--output", str(adapter), "--adapter"])
    base = ["--model", str(bfloat16_base), "--adapter", str(adapter)]
    merge_lora.main([*base, "--output", str(merged)])
    assert_same_bits(load_checkpoint_tensors(merged), load_checkpoint_tensors(output / "hf"))


@pytest.mark.exhaustive
def test_tied_embeddings(run_files, tmp_path):
    """The head is the embedding, which trains."""
    tied = write_base(tmp_path / "tied", "bfloat16", tie_word_embeddings=True)
    options = ESFT | given(tmp_path, **SHAREABLE)
    del options["method__esft_score_tokens"]
    output = tmp_path / "out"
    olmoe_jax.train(short_run(run_files, tied, output, **options))
    expected = expert_tensors(SHAREABLE["experts"]) | {"model.embed_tokens.weight"}
    assert changed_tensors(tied, output / "hf") == expected
    assert "parameters.embed" in saved_arrays(output)


def test_random_weights(run_files, tmp_path):
    """model.init=random: the scored model is the one that trains; it is exported whole."""
    output = tmp_path / "out"
    olmoe_jax.train(
        run_files.config(
            output,
            method__name="esft_gate",
            data__eval_path=None,
            data__eval_fraction=0.0,
            train__max_steps=2,
            optimizer__warmup_ratio=0.0,
        )
    )
    to_hf.main(["--checkpoint", str(output), "--output", str(tmp_path / "again")])
    assert not changed_tensors(output / "hf", tmp_path / "again")


def test_to_hf_in_a_process(run, tmp_path):
    arguments = ("-m", "convert.to_hf", "--checkpoint", run, "--output", tmp_path / "a")
    code, stdout, stderr = run_command_line(*arguments, "--adapter")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1] == f"wrote {tmp_path / 'a'}"
    assert jax.default_backend() == "cpu"
