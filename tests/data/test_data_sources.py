"""Several sources with weights: which rows an epoch takes, and the counts of each."""

import collections
import html
import json
import os

import numpy as np
import pytest

from olmoe_jax.data import TrainingData, held_out_split, tokenize_dataset
from olmoe_jax.data.__main__ import main
from olmoe_jax.data.counts import Counts
from olmoe_jax.data.reading import in_both
from olmoe_jax.errors import UserError
from olmoe_jax.sources import parse

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def files(tmp_path):
    """The paths of two files: ten rows a0 to a9, and three rows, of which one is cut away."""
    for name, prompts in {"a": [f"a{i}" for i in range(10)], "b": ["b0", "b1", "b" * 50]}.items():
        rows = [json.dumps({"prompt": prompt, "completion": "x"}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path / "a.jsonl", tmp_path / "b.jsonl"


def prompts(dataset, tokenizer):
    texts = (tokenizer.decode(dataset.example(i).tokens) for i in range(len(dataset)))
    return collections.Counter(text.split()[0] for text in texts)


def test_counts_of_each_source(files, tokenizer):
    dataset = tokenize_dataset("{}, {}".format(*files), tokenizer, 20)
    assert dataset.source_counts == [
        Counts(rows=10, tokens=50, trained=30),
        Counts(rows=3, dropped=1, cut=1, tokens=10, trained=6),
    ]
    assert dataset.counts == Counts(rows=13, dropped=1, cut=1, tokens=60, trained=36)
    assert [dataset.of_source(i).tolist() for i in range(2)] == [[*range(10)], [10, 11]]
    assert dataset.epoch(3, seed=0) is dataset
    alone = tokenize_dataset(str(files[0]), tokenizer, 20)
    assert "weights" not in dataset.identity()
    assert dataset.identity()["content"] != alone.identity()["content"]


def test_sources_of_one_name_are_a_set(files, tokenizer, tmp_path):
    (other := tmp_path / "c.jsonl").write_text('{"prompt": "c", "completion": "x"}')
    named = tokenize_dataset(f"{files[0]} name=s, {files[1]}, {other} name=s", tokenizer, 20)
    sets = {name: prompts(part, tokenizer) for name, part in named.sets().items()}
    first = {f"a{i}": 1 for i in range(10)}
    assert sets == {"s": first | {"c": 1}, None: {"b0": 1, "b1": 1}}
    plain = tokenize_dataset(f"{files[0]}, {files[1]}, {other}", tokenizer, 20)
    assert plain.identity() == named.identity()  # a name changes no row
    _, held_out = held_out_split(plain, 0.5, seed=0)
    assert held_out.sets()[None].members.tolist() == held_out.members.tolist()


@pytest.mark.parametrize("weight", [0.25, 0.5, 1, 1.5, 2, 2.7, 0.001])
def test_an_epoch_takes_each_row_as_often_as_the_weight_says(files, tokenizer, weight):
    dataset = tokenize_dataset(f"{files[0]} weight={weight}, {files[1]}", tokenizer, 20)
    total: collections.Counter = collections.Counter()
    for number in range(8):
        epoch = dataset.epoch(number, seed=1)
        found = prompts(epoch, tokenizer)
        assert (found["b0"], found["b1"]) == (1, 1)
        assert len(epoch) - 2 == max(round(10 * weight), 1)
        assert found == prompts(dataset.epoch(number, seed=1), tokenizer)
        total += found
        times = [total[f"a{i}"] for i in range(10)]
        assert max(times) - min(times) <= 1
    assert (weight == 1) == (dataset.identity().get("weights") is None)


def test_another_seed_takes_other_rows(files, tokenizer):
    dataset = tokenize_dataset(f"{files[0]} weight=0.5, {files[1]}", tokenizer, 20)
    assert prompts(dataset.epoch(0, 1), tokenizer) != prompts(dataset.epoch(0, 2), tokenizer)


def steps(dataset, **changes):
    return TrainingData(
        dataset,
        **{
            "batch_size": 4,
            "epochs": 4,
            "max_steps": None,
            "seed": 5,
            "max_seq_length": 64,
            "pack": False,
            "rows_per_batch": 4,
            "loss_normalization": "tokens",
            "microbatch_examples": 2,
            "pad_id": 0,
        }
        | changes,
    )


def tokens_of(step):
    rows = (row[row != 0] for batch in step.batches for row in batch.tokens)
    return sorted(tuple(row) for row in rows if len(row))


def test_a_run_continues_without_losing_or_repeating_a_row(files, tokenizer):
    dataset = tokenize_dataset(f"{files[0]} weight=0.5, {files[1]} weight=2", tokenizer, 20)
    data = steps(dataset)
    assert (data.steps_per_epoch, data.total_steps) == (3, 12)
    whole = [*data.iterator()]
    assert [step.examples for step in whole] == [4, 4, 1] * 4
    taken = collections.Counter(row for step in whole for row in tokens_of(step))
    assert sorted(taken.values()) == [2] * 10 + [8] * 2
    first, second = data.iterator(), steps(dataset).iterator()
    for _ in range(4):
        next(first)
    second.set_state(first.get_state())
    rest = [*second]
    assert [step.index for step in rest] == [*range(4, 12)]
    assert [tokens_of(step) for step in rest] == [tokens_of(step) for step in whole[4:]]


def test_weights_follow_the_held_out_share(files, tokenizer):
    dataset = tokenize_dataset(f"{files[0]} weight=3, {files[1]}", tokenizer, 20)
    train, evaluation = held_out_split(dataset, 0.1, seed=0)
    found = prompts(train.epoch(0, 0), tokenizer)
    assert not found.keys() & prompts(evaluation, tokenizer).keys()
    assert {count for text, count in found.items() if text.startswith("a")} == {3}
    only = dataset.subset(np.arange(10))
    with pytest.raises(UserError, match=r"b\.jsonl: all its examples are held out"):
        only.epoch(0, 0)


def test_a_file_in_two_sources_is_refused(files, tokenizer, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(files[0])
    for other in (files[0], tmp_path / "*.jsonl", tmp_path, tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match=r"a\.jsonl is in two sources, .*name it once"):
            tokenize_dataset(f"{files[0]}, {other} weight=2", tokenizer, 20)
    with pytest.raises(UserError, match="o/n is in two sources"):
        tokenize_dataset("o/n, o/n weight=2", tokenizer, 20)


def test_files_that_train_and_evaluate(files, tmp_path):
    train = parse(f"{files[0]}, o/n")
    assert in_both(train, parse(f"{files[1]}, o/n split=test")) == []
    assert in_both(train, parse(f"o/n split=train, {tmp_path}")) == [
        "o/n split=train",
        os.path.realpath(files[0]),
    ]


def test_a_source_without_a_row_to_train_on_is_refused(files, tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(UserError, match=r"c\.jsonl is empty"):
        tokenize_dataset(f"{files[0]}, {tmp_path}/c.jsonl", tokenizer, 20)
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "p" * 50, "completion": "x"}))
    with pytest.raises(UserError, match=r"c\.jsonl weight=2: no row has a token to train on"):
        tokenize_dataset(f"{files[0]}, {tmp_path}/c.jsonl weight=2", tokenizer, 20)


TABLE = [
    ["source", "rows", "dropped", "cut", "without", "end", "tokens", "that", "train"],
    ["a.jsonl", "weight=0.5", "4", "0", "0", "0", "20", "12"],
    ["b.jsonl", "3", "1", "1", "0", "10", "6"],
]


def test_preview(files, tokenizer_dir, tmp_path, capsys):
    arguments = ["preview", "--data", f"{files[0]} weight=0.5, {files[1]}", "--rows=4"]
    arguments += ["--tokenizer", str(tokenizer_dir), "--max_seq_length=20"]
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-3:]] == TABLE
    assert "--- row 4 of a.jsonl weight=0.5: 5 tokens, 3 to train on" in lines
    assert "--- row 3 of b.jsonl: 20 tokens, dropped: none to train on" in lines
    main([*arguments, "--html", str(tmp_path / "page.html")])
    page = html.unescape((tmp_path / "page.html").read_text())
    assert all(line in page for line in lines[-4:])
    assert "row 3 of b.jsonl" in page


def test_flags_that_no_source_reads(files, tokenizer_dir):
    arguments = ["preview", "--data", f"{files[0]}", "--tokenizer", str(tokenizer_dir)]
    for flag in ("--split=test", "--hub_config=main"):
        with pytest.raises(UserError, match=f"{flag}: only read of a data set OWNER/NAME"):
            main([*arguments, "--max_seq_length=20", flag])


def test_progress_bar(files, tokenizer, tmp_path, monkeypatch, capsys):
    """A bar is on a terminal, after the delay, for whoever asks for it."""
    from olmoe_jax.data import tokenized

    def shown(terminal, delay, progress, number):
        (tmp_path / f"{number}.jsonl").write_text(files[0].read_text() + "\n" * number)
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(tokenized, "_BAR_DELAY", delay)
        tokenize_dataset(str(tmp_path / f"{number}.jsonl"), tokenizer, 20, progress=progress)
        return capsys.readouterr().err

    assert "tokenising" in shown(True, 0, True, 1)
    assert shown(False, 0, True, 2) == ""
    assert shown(True, 2, True, 3) == ""
    assert shown(True, 0, False, 4) == ""
