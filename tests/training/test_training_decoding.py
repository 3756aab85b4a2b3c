"""Decoding a held-out sample while training: it changes nothing, and names the best checkpoint."""

import json
import shutil
import sys

import pytest
from helpers import ROOT, message_of
from training import processes
from training.interruptions import Crash, crash, without_seconds
from training.test_processes import WORKER
from training.test_training_run import board
from training.tiny_run import exported_bytes, losses, metrics

import olmoe_jax
from convert import to_hf
from olmoe_jax.config import TrainOptions, to_dict
from olmoe_jax.training.base_model import open_model
from olmoe_jax.training.best import Best, best_step, score_of
from olmoe_jax.training.datasets import load_datasets
from olmoe_jax.training.decoding import Answer, held_out_sample
from olmoe_jax.training.event_file import TAGS
from olmoe_jax.training.reporting import answers_text

STEPS = 12
OPTIONS = {"train__max_steps": 6, "train__keep_checkpoints": 1, "train__checkpoint_every": 4}
DECODING = {
    "generate__every": 1,
    "generate__examples": 5,
    "generate__max_new_tokens": 6,
}


def decoded(output) -> dict[int, float]:
    return {line["step"]: line["exact_match"] for line in metrics(output) if "exact_match" in line}


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """Rows whose answer a few steps teach: a completion that is always the same."""
    file = tmp_path_factory.mktemp("easy") / "rows.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": "ab"} for n in range(22)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"data__train_path": str(file), "data__eval_path": str(file)}
    # The step's programs are those of test_training_run.py, which are compiled already.
    return paths | {"train__keep_checkpoints": 1, "optimizer__learning_rate": 0.02}


@pytest.fixture(scope="module")
def run(files, easy, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "easy"
    best = {"train__best_metric": "exact_match", "train__export_best": True}
    assert olmoe_jax.train(files.config(output, **easy, **DECODING, **best)).finished
    return output


@pytest.mark.slow
def test_nothing_else_changes(files, easy, run, tmp_path, capsys):
    plain = olmoe_jax.train(files.config(tmp_path / "plain", **easy)).output_dir
    both = f"note: {easy['data__train_path']} is in data.train_path and in data.eval_path, so"
    assert both in capsys.readouterr().out
    assert losses(run) == losses(plain)
    assert exported_bytes(run) == exported_bytes(plain)
    others = [line for line in metrics(run) if "exact_match" not in line]
    assert without_seconds(others) == without_seconds(metrics(plain))


@pytest.mark.slow
def test_it_sees_the_model_learn(run, files):
    found = decoded(run)
    assert list(found) == list(range(1, STEPS + 1))
    assert found[1] == 0
    assert found[STEPS] == 1
    scalars, _ = board(run)
    assert scalars[TAGS["eval/exact_match"]] == pytest.approx(found)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(run / "tensorboard"), {"tensors": 0})
    texts = {
        event.step: tensor_util.make_ndarray(event.tensor_proto).item().decode()
        for event in (events.Reload(), events.Tensors("eval/answers"))[1]
    }
    assert list(texts) == list(found)
    assert texts[STEPS].count("**right**\n\n    ab\n") == 4
    assert "**wrong**" in texts[1]
    assert "+" in texts[1].split("**expected**")[0]


@pytest.mark.slow
def test_the_first_of_the_best_is_kept_and_exported(run, tmp_path):
    found = decoded(run)
    first = next(step for step, value in found.items() if value == 1)
    assert first < STEPS - 1, "the last checkpoint must not be the best for this to test anything"
    assert best_step(run) == first
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [first, STEPS]
    to_hf.main(["--checkpoint", str(run), "--output", str(tmp_path / "best"), "--step", "best"])
    exported = (tmp_path / "best/model.safetensors").read_bytes()
    assert exported == (run / "hf_best/model.safetensors").read_bytes()
    assert exported != exported_bytes(run)


def test_best_by_each_metric(tmp_path):
    def steps(values, metric):
        best = Best(TrainOptions(best_metric=metric))
        return [i for i, value in enumerate(values) if best.improvement({metric: value})]

    values = [3.0, 2.0, 2.0, float("nan"), None, 4.0, 1.0]
    assert steps(values, "eval_loss") == [0, 1, 6]
    assert steps(values, "exact_match") == [0, 5]
    assert Best(TrainOptions()).improvement({"eval_loss": 2.0}) == {"eval_loss": 2.0, "score": -2.0}
    assert score_of({"eval_loss": 2.0}) == -2
    assert "no checkpoint with an evaluation" in message_of(best_step, tmp_path)


def test_answers_in_tensorboard_are_no_markup():
    text = answers_text([Answer("a\nb", "c", "```\n<b>\n\n**x**", False)])
    assert text.endswith("**wrong**\n\n    ```\n    <b>\n    \n    **x**\n")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"generate__max_new_tokens": 512},
            "generate.max_new_tokens=512: the model has 512 positions, prompt included; write "
            "fewer, or generate.every=none",
        ),
        (
            {"generate__max_new_tokens": 511},
            "generate.every=1: no evaluation example has a prompt of 1 to 1 tokens and a whole "
            "answer (512 positions of the model less 511 new tokens); write a smaller "
            "generate.max_new_tokens, or generate.every=none",
        ),
        *(
            (
                {"model__allow_extrapolation": extrapolation},
                "generate.every=1: no evaluation example has a prompt of 1 to 64 tokens and a "
                "whole answer (data.max_seq_length=64); write a larger data.max_seq_length, or "
                "generate.every=none",
            )
            for extrapolation in (True, False)
        ),
    ],
)
def test_no_example_fits(files, tmp_path, changes, expected):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1+1=", "completion": 100 * "2"}))
    changes = DECODING | {"data__eval_path": str(long)} | changes
    assert message_of(olmoe_jax.train, files.config(tmp_path / "run", **changes)) == expected
    assert not (tmp_path / "run").exists()


def test_an_answer_without_a_number_is_refused_by_its_line(files, tmp_path):
    rows = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(4)]
    rows[2]["answer"] = "about two"
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = DECODING | {"data__eval_path": str(file)}
    message = message_of(olmoe_jax.train, files.config(tmp_path / "run", **changes))
    assert message.startswith(f"{file}: line 3: generate.every compares this answer: 'about two'")


def test_conversations_are_asked_by_the_runs_template(files, tmp_path):
    """The prompt is what the template writes before the answer, and the ends are the run's."""
    template = ROOT / "tests/data/chat_templates/tulu.jinja"
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("1+1?", "#### 2"), ("2+2?", "#### 4"))
    ]
    file = tmp_path / "rows.jsonl"

    def sample(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = {"data__train_path": str(file), "data__eval_path": str(file)}
        paths["data__chat_template"] = str(template)
        config = files.config(tmp_path / "run", **DECODING, **paths)
        model = open_model(config)
        return held_out_sample(config, model, load_datasets(config, model))

    found = sample(rows)
    asked = [
        found.tokenizer.apply_chat_template(
            row["messages"][:1],
            chat_template=template.read_text(),
            add_generation_prompt=True,
            tokenize=False,
        )
        for row in rows
    ]
    assert sorted(found.texts) == [(asked[0], "#### 2"), (asked[1], "#### 4")]
    assert found.ends == [found.tokenizer.eos_token_id]
    rows.append({"messages": [*rows[0]["messages"][:1], {"role": "assistant", "content": "two"}]})
    message = message_of(sample, rows)
    assert message.startswith(f"{file}: line 3: generate.every compares this answer: 'two'")


@pytest.mark.slow
@pytest.mark.parametrize("last", [3, pytest.param(5, marks=pytest.mark.exhaustive)])
def test_continues_after_a_crash(files, tmp_path, at_step, last):
    options = OPTIONS | DECODING | {"train__best_metric": "exact_match"}
    whole = olmoe_jax.train(files.config(tmp_path / "whole", **options)).output_dir
    at_step(last, crash)
    with pytest.raises(Crash):
        olmoe_jax.train(files.config(tmp_path / "run", **options))
    output = olmoe_jax.train(files.config(tmp_path / "run", **options)).output_dir
    assert without_seconds(metrics(output)) == without_seconds(metrics(whole))
    assert exported_bytes(output) == exported_bytes(whole)
    assert board(output)[0][TAGS["eval/exact_match"]] == board(whole)[0][TAGS["eval/exact_match"]]
    # How often it decodes may change; the score that names the best may not.
    changed = options | {"generate__every": 3}
    assert olmoe_jax.train(files.config(output, **changed)).finished
    shutil.rmtree(output / "hf")
    message = message_of(
        olmoe_jax.train, files.config(output, **options | {"train__best_metric": "eval_loss"})
    )
    assert "train.best_metric: the run has exact_match" in message


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "method",
    [
        {"method__lora_rank": 4},  # in CI: examples/lora_on_my_data.py
        {"method__name": "esft_token", "method__esft_score_tokens": 500},
        {"method__name": "frozen", "model__compute_dtype": "bfloat16"},
    ],
)
def test_with_adapters_and_tuned_experts(files, easy, tmp_path, method):
    """What is decoded is what trains: the answers become right."""
    options = (
        easy
        | DECODING
        | method
        | {"optimizer__learning_rate": 0.03, "train__max_steps": 40, "train__epochs": 10}
        | {"generate__every": 2}
    )
    output = olmoe_jax.train(files.config(tmp_path / "run", **options)).output_dir
    assert decoded(output)[2] == 0
    assert decoded(output)[40] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices"), [pytest.param(1, 8, marks=pytest.mark.exhaustive), (2, 2)]
)
def test_sharded(files, easy, run, tmp_path, environment, count, devices):
    """On several devices, also of two processes: the same answers, losses and best step."""
    options = easy | DECODING | {"generate__every": 3, "train__best_metric": "exact_match"}
    mesh = {"mesh__data": 2, "train__rows_per_device": 1}
    config = files.config(tmp_path / "run", **options, **mesh)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps([{"config": to_dict(config), "stop_after": None}]))
    command = [sys.executable, str(WORKER), str(spec)]
    log = tmp_path / "log"
    started = processes.start(command, log, environment, count=count, devices=devices)
    assert started.wait(300) == [0] * count, started.output()
    found = decoded(tmp_path / "run")
    assert found == {step: value for step, value in decoded(run).items() if step % 3 == 0}
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-5)
    assert best_step(tmp_path / "run") == next(step for step, value in found.items() if value == 1)
