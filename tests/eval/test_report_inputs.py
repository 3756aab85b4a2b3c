"""The report reads runs and evaluations that are damaged, cut off, or no plain files."""

import json
import os
import re

import pytest
from helpers import message_of
from tiny_report import report, write_evaluation, write_harness, write_run

from eval.report.__main__ import main
from eval.report.inputs import read_inputs
from olmoe_jax.checkpoints.metrics import Metrics


def line(**changes) -> str:
    row = {"id": "0", "prompt": "p", "output": "o", "answer": 1, "reference": [], "rouge_l": 1}
    return json.dumps(row | changes)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a/model.json", "{}", "field model is missing"),
        ("a/model.json", '{"model": ""}', 'model is ""; it must have at least 1 character'),
        ("a/model.json", '{"model": "m", "adapter": true}', "adapter is true; it must be text"),
        ("a/gsm/result.json", '{"metrics": {}}', "settings is missing; the same eval.run command"),
        ("a/gsm/result.json", '{"settings": {"data": {}}, "metrics": {}}', "data: is a list or an"),
        (
            "a/gsm/result.json",
            '{"settings": {}, "metrics": {"m": {"value": NaN}}}',
            "m.value is NaN; it must be a finite number",
        ),
        ("a/gsm/rows.jsonl", line(output=None), "line 1: output is null; it must be text"),
        ("a/gsm/rows.jsonl", line(other="x"), 'line 1: other is "x"; it must be a number'),
        ("a/gsm/rows.jsonl", line(other=7), "line 1: other is 7; it must be less than"),
        ("r/config.json", '{"method": {"name": []}, "train": {}}', "method.name is []; it must be"),
        ("r/metrics.jsonl", '{"loss": 1}\n', "line 1: field step is missing"),
        ("r/metrics.jsonl", '{"step": -1}\n', "line 1: step is -1; it must be greater"),
        ("r/metrics.jsonl", '{"step": 1, "loss": 1e308}\n', "line 1: loss is 1e+308; it must be"),
        ("r/metrics.jsonl", '{"step": 1, "eval_loss": "a"}\n', 'eval_loss is "a"; it must be a'),
        ("h/results_1.json", "[]", "the content is []; it must be an object"),
        ("h/results_1.json", "{}", "field config.model is missing"),
        ("h/samples_t_1.jsonl", '{"doc_id": 0}\n', "line 1: field arguments is missing"),
    ],
)
def test_a_damaged_file_is_named_with_its_field(tmp_path, file, content, words):
    write_evaluation(tmp_path / "a", gsm=[1.0])
    write_run(tmp_path / "r", "frozen")
    write_harness(tmp_path / "h", {}, t=[1.0])
    (tmp_path / file).write_text(content)
    argument = str(tmp_path / file[0])
    message = message_of(read_inputs, [argument])
    assert message.startswith(f"{tmp_path / file}: ")
    assert words in message
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    if "model.json" not in file and "config.json" not in file:
        message = message_of(read_inputs, [argument])
        assert f"{tmp_path / file}: a FIFO or device" in message


def test_a_killed_run_and_what_is_no_number(tmp_path):
    run = write_run(tmp_path / "r", "frozen")
    lines = '{"step": 1, "loss": NaN, "other": []}\n\n{"step": 2, "loss": 2}\n'
    (run / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')
    ((_, opened),) = read_inputs([str(run)]).runs
    assert opened.metrics == [Metrics(1), Metrics(2, 2)]
    (run / "metrics.jsonl").unlink()
    assert read_inputs([str(run)]).runs[0][1].metrics == []


def test_pictures_and_event_files_are_files(tmp_path):
    run = write_run(tmp_path / "r", "frozen")
    os.mkfifo(run / "scores.png")
    arguments = [str(run), "--output", str(tmp_path / "report")]
    assert "scores.png: a FIFO" in message_of(main, arguments)
    (run / "scores.png").unlink()
    (run / "tensorboard").mkdir()
    (run / "tensorboard/events.out.tfevents.1").write_bytes(b"\xff" * 100)
    main(arguments)
    os.mkfifo(run / "tensorboard/events.out.tfevents.2")
    assert "tfevents.2: a FIFO" in message_of(main, arguments)


def test_every_picture_has_a_file_of_its_own(tmp_path):
    data = ("法律", "摘要", "a b", "a-b", "x" * 200)
    runs = [write_run(tmp_path / str(i), "frozen", f"{name}.jsonl") for i, name in enumerate(data)]
    markdown, _ = report(tmp_path / "report", *map(str, runs))
    links = re.findall(r"!\[.*?\]\((loss_.*?)\)", markdown)
    assert len(set(links)) == 5
    assert all((tmp_path / "report" / link).exists() for link in links)
    assert "loss_a-b.svg" in links
