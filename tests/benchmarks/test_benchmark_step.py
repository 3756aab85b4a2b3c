"""The benchmark scripts at tiny size: what they print is complete and plausible."""

import dataclasses
import json
import math
import re

import pytest
from helpers import run_module

from benchmarks import (
    attention,
    compare_pytorch,
    cross_entropy,
    matmul_limit,
    packing,
    reproduce_hours,
    scaling,
    shapes,
    step,
    timing,
    tokenization,
)
from benchmarks.comparison import __main__ as comparison
from benchmarks.shapes import SHAPES
from olmoe_jax.errors import ArgumentParser, UserError
from olmoe_jax.model.config import ModelSettings, model_config_from_hf
from olmoe_jax.model.flops import step_flops_per_token


@pytest.fixture(scope="module")
def densemixer():
    code, stdout, stderr = run_module("benchmarks.step", "--shape=tiny", "--steps=2", "--json")
    assert code == 0, stderr
    return json.loads(stdout)


@pytest.mark.slow
def test_step_reports_time_memory_and_flops(densemixer):
    assert len(densemixer["step_seconds"]) == len(densemixer["step_cpu_seconds"]) == 2
    assert all(0 < seconds < 60 for seconds in densemixer["step_seconds"])
    assert densemixer["tokens_per_step"] == 2 * 32
    assert 1e9 < densemixer["matmul_flops_per_second"] < 1e15
    assert 0.01 < densemixer["peak_memory_gib"] < densemixer["peak_resident_gib"] < 8
    assert 0 < densemixer["peak_over_model_gib"] < densemixer["peak_memory_gib"]


@pytest.mark.slow
def test_step_does_the_whole_task(densemixer):
    # Random weights know nothing: the loss is that of guessing among the vocabulary.
    assert densemixer["loss"] == pytest.approx(math.log(256), abs=0.1)
    # By hand, per token: forward 2 (layers (attention + scores + router + experts) + head), three
    # times that for the backward too, and six experts' forward for DenseMixer.
    expert = 3 * 64 * 32
    layer = 4 * 64 * 64 + 2 * 16 * 64 + 64 * 8 + 2 * expert
    forward = 2 * (2 * layer + 64 * 256)
    assert densemixer["flops_per_step"] == 64 * (3 * forward + 2 * 2 * 6 * expert)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--method=esft", "--tuned_experts=3"),
        pytest.param(
            ("--method=conventional", "--lora_rank=2", "--what=update"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_step_report(flags, capsys):
    step.main(["--shape=tiny", "--layers=1", "--steps=1", *flags])
    printed = capsys.readouterr().out
    for word in ("tokens/s", "GFLOP/s", "peak memory"):
        assert word in printed


def test_step_refuses_what_has_no_effect():
    with pytest.raises(UserError, match=r"--router_gradient_experts .*frozen"):
        step.main(["--method=frozen", "--router_gradient_experts=2"])


def test_comparison_takes_the_best_of_all_rounds(monkeypatch):
    seconds = {"ours": [[3.0, 2.0], [2.5]], "densemixer 1.0.1": [[5.0], [4.0, 6.0]]}
    seconds["ours, m=16"] = [[1.5], [1.0]]

    def run_side(side, *_):
        times = seconds[side.name].pop(0)
        memory = {"peak_resident_gib": 2.0, "peak_over_model_gib": 1.0}
        return {"step_seconds": times, "step_cpu_seconds": times, "loss": 7.6, **memory}

    monkeypatch.setattr(compare_pytorch, "run_side", run_side)
    monkeypatch.setattr(timing, "busy_cores", lambda: 0.0)
    args = type("", (), {"rounds": 2})
    result = compare_pytorch.compare("densemixer", args, None)
    assert [side["seconds"] for side in result] == [2.0, 1.0, 4.0]
    assert [side["ratio"] for side in result] == [1.0, 0.5, 2.0]
    assert "| densemixer | densemixer 1.0.1 | 4.000 | 2.00 | 2.50, 1.60 |" in compare_pytorch.table(
        {"densemixer": result}
    )


@pytest.mark.exhaustive
def test_scaling_measures_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "BASE", {"shape": "tiny", "rows": 2, "layers": 1})
    points = {m: scaling.Point(m=m) for m in (3, 4)}
    layers = {1: scaling.Point((("layers", 1),), 3)}
    monkeypatch.setattr(scaling, "SERIES", {"layers": layers, "m": points})
    monkeypatch.setattr(scaling.jax.config, "update", lambda *_: None)  # jax has started
    scaling.main([f"--output={tmp_path / 'scaling.png'}", "--rounds=2", "--steps=1"])
    # The point of the layers is the first of m, and the curves without m are the same at both.
    assert scaling.program.cache_info().currsize == 4
    rows = capsys.readouterr().out.splitlines()[-3:]
    heads = [["| layers", "1"], ["| m", "3"], ["| m", "4"]]
    assert [row.split(" | ")[:2] for row in rows] == heads
    assert rows[0].split(" | ")[2:] == rows[1].split(" | ")[2:]
    assert all(0 < float(cell) < 1e6 for row in rows for cell in row.strip(" |").split(" | ")[2:])
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_flags_override_the_shape():
    parser = ArgumentParser()
    shapes.add_shape_flags(parser)
    shape = shapes.shape_of(parser.parse_args(["--shape=mid", "--vocab=50304", "--rows=8"]))
    assert (shape.vocab, shape.rows, shape.tokens) == (50304, 8, 8 * 256)
    assert shape.hidden == SHAPES["mid"].hidden == 512


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (attention, "--runs=0", "--runs: 0: expected a whole number, 1 or more"),
        (attention, "--kv_heads=3", "--kv_heads=3: write a divisor of the 8 heads"),
        (attention, "--shape=1,1,1,16", "--segments=4: write at most the length, 1"),
        (comparison, "--output=none --jobs=0", "--jobs: 0: expected a whole number, 1 or more"),
        (cross_entropy, "--rows=0", "--rows: 0: expected a whole number, 1 or more"),
        (cross_entropy, "--dtype=foo", "--dtype: invalid choice"),
        (packing, "--batch_size=0", "--batch_size: 0: expected a whole number, 1 or more"),
        (reproduce_hours, "--utilisation=0", "--utilisation=0.0: write a share of the peak"),
        (reproduce_hours, "--utilisation=nan", "--utilisation: nan: expected a number"),
        (step, "--steps=0", "--steps: 0: expected a whole number, 1 or more"),
        (step, "--rows=0", "--rows: 0: expected a whole number, 1 or more"),
        (step, "--shape=tiny --lora_rank=2 --lora_dropout=1", "--lora_dropout=1.0: write a share"),
    ],
)
def test_a_flag_that_cannot_work_is_refused(command, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(flags.split())


def test_a_row_of_one_token_has_nothing_to_predict():
    with pytest.raises(UserError, match="--length=1: write 2 or more"):
        step.random_batch(dataclasses.replace(SHAPES["tiny"], length=1))


def test_a_text_too_short_to_draw_from_is_refused(tmp_path, tokenizer_dir):
    text = tmp_path / "text.txt"
    text.write_text("word " * tokenization.WORDS)
    with pytest.raises(UserError, match=r"text\.txt: write a text of more than 30 words"):
        tokenization.main([f"--tokenizer={tokenizer_dir}", f"--text={text}"])


@pytest.mark.parametrize("flag", ["--method=densemixer", "--lora_rank=4"])
def test_the_limit_is_that_of_a_conventional_step(flag):
    with pytest.raises(UserError, match="only a conventional step counts"):
        matmul_limit.main([flag])


def test_matmuls_are_those_that_a_step_is_said_to_need():
    shape = dataclasses.replace(SHAPES["mid"], rows=1)
    flops = sum(count * size.flops for size, count in matmul_limit.matmuls(shape).items())
    config = model_config_from_hf(shape.hf_config(), "mid")
    needed = step_flops_per_token(config, ModelSettings(), lambda _: True, shape.length / 2)
    # The backward pass computes the scores again, which the count of a step leaves out.
    scores = shape.layers * shape.tokens * shape.length * shape.hidden
    assert flops - scores == pytest.approx(needed.model * shape.tokens, rel=1e-3)
