"""The whole job against transformers' Trainer, which this environment has."""

import json
import sys

import pytest

from benchmarks import whole_job
from olmoe_jax.errors import UserError


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"question": "How many are two and two?", "answer": "2 + 2 = 4\n#### 4"})
    file.write_text(f"{row}\n" * 8)
    return file


@pytest.mark.exhaustive
def test_both_sides_train_and_export(rows, tmp_path, tokenizer_dir, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(whole_job, "make_venv", lambda *_: None)
    (tmp_path / whole_job.VENV).symlink_to(sys.prefix)
    whole_job.main(
        [
            *("--shape=tiny", f"--vocab={len(tokenizer)}", "--steps=2", "--batch_size=4"),
            *("--rounds=1", f"--data={rows}", f"--tokenizer={tokenizer_dir}"),
            f"--venvs={tmp_path}",
        ]
    )
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(" | ")[0] for line in lines] == ["| ours, cold", "| ours, warm", "| Trainer"]
    losses = [float(line.split(" | ")[-1].removesuffix(" |")) for line in lines]
    # The rows are equal, and so are the steps' examples.
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=2e-3)


def test_too_few_rows(rows, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(whole_job, "make_venv", lambda *_: None)
    with pytest.raises(UserError, match=r"rows\.jsonl: has 8 rows; write fewer"):
        whole_job.main([f"--data={rows}", f"--tokenizer={tokenizer_dir}", f"--venvs={tmp_path}"])
