"""A run on several sources with weights."""

import json

import pytest
from training.interruptions import refused
from training.tiny_run import metrics

import olmoe_jax

pytestmark = pytest.mark.slow


def test_counts_by_source_and_other_weights_are_refused(files, tmp_path, capsys):
    def config(weight):
        return files.config(
            tmp_path / "run",
            data__train_path=f"{files.train}, {files.evaluation} weight={weight}",
            data__eval_path=None,
            data__eval_fraction=0.0,
        )

    olmoe_jax.train(config(2))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [line for line in lines if line[:1] in (["source"], ["train.jsonl"], ["eval.jsonl"])]
    assert [line[: len(line) - 2] for line in table[1:]] == [
        ["train.jsonl", "22", "0", "0", "0"],
        ["eval.jsonl", "weight=2", "7", "0", "0", "0"],
    ]
    # 22 rows and twice 7, 4 to a step, in two epochs.
    assert len(metrics(tmp_path / "run")) == 2 * 9
    card = (tmp_path / "run/hf/README.md").read_text()
    assert "| data.train_path | train.jsonl, eval.jsonl weight=2 |" in card
    stored = json.loads((tmp_path / "run/config.json").read_text())["data"]["train_path"]
    assert stored == f"{files.train}, {files.evaluation} weight=2"
    assert "the weights of the sources are others" in refused(config(1.5))
