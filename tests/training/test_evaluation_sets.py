"""Evaluation of several sets: which loss belongs to which rows, and where it is reported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from olmoe_jax.config import Config, DataOptions
from olmoe_jax.data import tokenize_dataset
from olmoe_jax.parallel import sharding
from olmoe_jax.training.datasets import Datasets
from olmoe_jax.training.evaluation import Evaluated, Evaluation
from olmoe_jax.training.reporting import Reporter


@pytest.fixture
def evaluation(tmp_path, tokenizer, monkeypatch):
    """Sets of five and three rows, by a program whose loss of a target is the target's byte."""
    monkeypatch.setenv("OLMOE_JAX_CACHE", str(tmp_path / "cache"))
    for name, answer, rows in (("a", "\1", 5), ("b", "\2", 2), ("c", "\2", 1)):
        lines = (json.dumps({"prompt": str(i), "completion": answer}) for i in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = f"{tmp_path}/b.jsonl name=two, {tmp_path}/a.jsonl name=one, {tmp_path}/c.jsonl name=two"
    dataset = tokenize_dataset(paths, tokenizer, 16)

    def evaluate(trained, frozen, batch):
        choices = np.zeros((1, *batch.tokens.shape, 1), np.int32)
        return float((batch.targets * batch.loss_weights).sum()), choices

    program = SimpleNamespace(
        evaluate=evaluate,
        state=SimpleNamespace(parameters={}),
        frozen={},
        mesh=sharding.make_mesh(1, 1, 1),
        to_devices=lambda batch: batch,
    )
    config = Config(data=DataOptions(max_seq_length=16))
    datasets = Datasets(dataset, dataset, tokenizer.pad_token_id, None, [])
    return dataset, Evaluation(config, dataset, datasets, program)


def test_each_set_has_its_loss_and_all_rows_one(evaluation):
    dataset, evaluation = evaluation
    found = evaluation.run({})
    losses = {}
    for name, part in dataset.sets().items():
        examples = [part.example(i) for i in range(len(part))]
        targets = np.concatenate([e.tokens[1:][e.in_loss[1:]] for e in examples])
        losses[name] = (float(targets.sum()), len(targets))
    assert list(found.sets) == ["two", "one"]
    for name, (total, count) in losses.items():
        assert found.sets[name] == pytest.approx(total / count)
    total, count = map(sum, zip(*losses.values(), strict=True))
    assert found.loss == pytest.approx(total / count)
    assert found.changed == 0


def test_the_losses_are_reported(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, 3, {"train": {"wandb_project": None}})
    reporter.evaluation(2, Evaluated(1.5, 0.1, {"one": 1.0, "two": float("nan")}))
    reporter.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 2, "eval_loss": 1.5, "eval_losses": {"one": 1.0, "two": None}}
    assert (
        "step 2: eval loss 1.5000, one 1.0000, two nan, perplexity 4.482" in capsys.readouterr().out
    )
