"""Every path of every command, spelt so that the operating system or the command refuses it."""

import importlib
import json
import os
import resource

import numpy as np
import pytest
import safetensors.numpy
from helpers import ROOT

from olmoe_jax.errors import UserError, outcome, printable

TRAIN = (
    "--config CONFIG --config.model.path=MODEL --config.data.train_path=ROWS "
    "--config.data.max_seq_length=64 --config.train.output_dir=OUT"
)
COMMANDS = [
    ("convert.to_hf", "--checkpoint MODEL --output OUT", "--checkpoint --base --output"),
    ("convert.from_hf", "--model MODEL --output OUT", "--model --output"),
    (
        "convert.merge_lora",
        "--model MODEL --adapter MODEL --output OUT",
        "--model --adapter --output",
    ),
    (
        "convert.parity",
        "--model MODEL --batch BATCH --method frozen --output OUT",
        "--model --batch --adapter --experts --output",
    ),
    (
        "eval.run",
        "--model MODEL --tasks gsm --data DATA --output OUT",
        "--model --adapter --base --data --output",
    ),
    ("eval.report.__main__", "DATA --output OUT", "DATA --output"),
    ("eval.reproduce.__main__", "--small --output OUT", "--output"),
    ("eval.reproduce.__main__", "--model MODEL --data DATA --output OUT", "--data"),
    (
        "olmoe_jax.generation.command",
        "--model MODEL --prompt x",
        "--model --adapter --base --prompts",
    ),
    (
        "olmoe_jax.data.__main__",
        "preview --data ROWS --tokenizer MODEL --max_seq_length 9",
        "--data --tokenizer",
    ),
    (
        "olmoe_jax.esft",
        "score --model MODEL --data ROWS --output OUT",
        "--model --data --tokenizer --output",
    ),
    (
        "olmoe_jax.esft",
        "select --scores FILE --function gate --top_p 0.1 --output OUT",
        "--scores --output",
    ),
    ("olmoe_jax.plan.__main__", f"--topology cpu:1 {TRAIN}", "--config --config.model.path"),
    (
        "train",
        TRAIN,
        "--config --config.model.path --config.data.train_path --config.data.eval_path "
        "--config.data.tokenizer_path --config.train.output_dir",
    ),
    ("train", f"{TRAIN} --config.model.init=random", "--config.model.config_path"),
    ("train", f"{TRAIN} --config.method.lora_rank=2", "--config.method.adapter_path"),
    ("train", f"{TRAIN} --config.method.name=esft_gate", "--config.method.experts_path"),
]
"""(module, words of a command, its words that are paths)."""


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model):
    """The values of the commands' flags, and paths that no command can use."""
    path = tmp_path_factory.mktemp("paths")
    (path / "file").write_text("x")
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "fifo")
    rows = [{"prompt": "a", "completion": "b"}] * 3
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "data" / "gsm8k").mkdir(parents=True)
    (path / "data" / "gsm8k" / "test.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n')
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), np.ones((1, 2), np.int64))
    safetensors.numpy.save_file(batch, path / "batch")
    good = {
        "BATCH": path / "batch",
        "MODEL": tiny_model,
        "OUT": path / "out",
        "FILE": path / "file",
        "DATA": path / "data",
        "ROWS": path / "rows.jsonl",
        "CONFIG": ROOT / "configs" / "frozen_gsm.py",
    }
    bad = [
        path / ("a" * 300),
        path / "file" / "x",
        path / "loop",
        path / "loop" / "x.jsonl",
        path / "fifo",
        path / "fifo" / "x",
        "/proc/no_such/x",
        "/dev/full",
        "/dev/full/x.jsonl",
        "~nobody_has_this_name/x",
        "a\udc80",
        "a\0b",
        "",
        "/" + "a/" * 3000,
    ]
    return good, [str(place) for place in bad]


@pytest.mark.parametrize(
    ("command", "words", "flag"),
    [(command, words, flag) for command, words, flags in COMMANDS for flag in flags.split()],
)
def test_a_path_that_cannot_be(places, tmp_path, monkeypatch, command, words, flag):
    """It is one line, and nothing is left behind."""
    good, bad = places
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main = importlib.import_module(command).main
    for place in bad:
        here = good | ({flag: place} if flag in good else {})
        arguments = []
        for word in words.split():
            name, equals, value = word.rpartition("=")
            arguments.append(f"{name}{equals}{here.get(value, value)}")
        # The last one counts where a flag stands twice.
        arguments += [] if flag in good else [f"{flag}={place}"]
        with pytest.raises((UserError, OSError)) as caught:
            main(arguments)
        code, line = outcome(caught.value)
        assert code == 2, (place, line)
        assert "\n" not in line
        # Another input, which is no good one here, may be read before the output is made.
        if place and flag != "--output":
            assert flag.removeprefix("--config.") in line or printable(place)[:60] in line
    assert not [*tmp_path.iterdir()]
    assert not good["OUT"].exists()


@pytest.fixture
def full_disk():
    """No file can grow beyond 2 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("convert.to_hf", "--checkpoint MODEL --output OUT"),
        ("convert.from_hf", "--model MODEL --output OUT"),
    ],
)
def test_a_full_disk(places, full_disk, tmp_path, command, words):
    good = places[0] | {"OUT": tmp_path / "out"}
    arguments = []
    for word in words.split():
        name, equals, value = word.rpartition("=")
        arguments.append(f"{name}{equals}{good.get(value, value)}")
    with pytest.raises((UserError, OSError)) as caught:
        importlib.import_module(command).main(arguments)
    code, line = outcome(caught.value)
    assert code == 2
    assert line.startswith(f"error: {tmp_path}/out: file too large; ")
