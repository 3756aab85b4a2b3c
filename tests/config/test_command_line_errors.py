"""Every mistake in a call of train.py: one line that says what to write instead, exit code 2,
nothing written."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from training.tiny_run import MODEL, ROOT, Files, make_files

ROWS = {
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"prompt": "1+1=", "completion": "2"}\n\n{"prompt": \n',
    "list.jsonl": '{"prompt": "1+1=", "completion": "2"}\n[1, 2]\n',
    "fields.jsonl": '{"prompt": "1+1=", "completion": "2"}\n{"txt": "hello"}\n',
    "types.jsonl": '{"prompt": "1+1=", "completion": 2}\n',
    "long.jsonl": json.dumps({"prompt": "1+" * 50 + "1=", "completion": "51"}) + "\n",
    "one.jsonl": '{"prompt": "1+1=", "completion": "2"}\n',
    "rows.txt": "prompt,completion\n",
    "fake.parquet": "not parquet",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer_dir):
    directory = tmp_path_factory.mktemp("command_line")
    for name, text in ROWS.items():
        (directory / name).write_text(text)
    for name, changes in {
        "other": {"model_type": "mixtral"},
        "small": {"vocab_size": 20},
        "incomplete": {"num_experts": None},
    }.items():
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps({**MODEL, **changes}))
    (directory / "nothing").mkdir()
    return make_files(directory / "good", tokenizer_dir)


def call(monkeypatch, capsys, arguments: list[str]) -> str:
    """Runs train.py in this process; returns what it wrote to stderr, without "error: "."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # set: the process is not restarted
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.out == ""
    return one_line(captured.err)


def one_line(stderr: str) -> str:
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    return stderr.removeprefix("error: ").rstrip()


@pytest.fixture
def error_of(files, tmp_path, monkeypatch, capsys):
    """The error of a tiny run with these changes; the output directory must not appear."""

    def run(**changes) -> str:
        output = tmp_path / "output"
        message = call(monkeypatch, capsys, files.arguments(output, **changes))
        assert not output.exists()
        assert not list(tmp_path.iterdir())
        return message

    return run


def folder(files: Files) -> Path:
    return files.model.parents[1]


DATA = [
    ("absent.jsonl", "{path}: no such file or directory; check the path"),
    ("empty.jsonl", "{path} is empty: a data file needs at least one row"),
    ("blank.jsonl", "{path} is empty: a data file needs at least one row"),
    ("broken.jsonl", "{path}: line 3: not JSON ("),
    ("list.jsonl", "{path}: line 2: the content is "),
    (
        "fields.jsonl",
        "{path}: line 2: unknown fields (found: txt); accepted: prompt + completion; prompt + ",
    ),
    ("types.jsonl", "{path}: line 1: field completion must be text, not int"),
    (
        "long.jsonl",
        "{path}: no row has a token to train on within max_seq_length=64; raise data.max_seq_",
    ),
    ("rows.txt", "{path} is not a kind of data file that is read: use .jsonl, .json, .parquet"),
    ("fake.parquet", "{path} is not a Parquet file: "),
    ("nothing", "{path} is a directory: name a data file in it (.jsonl, .json, .parquet, "),
]


@pytest.mark.parametrize("field", ["data__train_path", "data__eval_path"])
@pytest.mark.parametrize(("name", "expected"), DATA)
def test_data_file(error_of, files, field, name, expected):
    path = str(folder(files) / name)
    assert error_of(**{field: path}).startswith(expected.format(path=path))


def test_one_example_cannot_be_split(error_of, files):
    path = str(folder(files) / "one.jsonl")
    message = error_of(data__train_path=path, data__eval_path=None)
    assert message.startswith("cannot hold out evaluation examples")
    assert message.endswith("set data.eval_path or data.eval_fraction=0")


def test_data_path_that_is_no_path(error_of):
    message = error_of(data__train_path="gsm8k")
    assert message.startswith("no data file at gsm8k, and it is no hub id: give a .jsonl, ")
    assert "owner/name" in message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (
            "optimizer__learning_rat",
            1e-3,
            "unknown config field optimizer.learning_rat: did you mean optimizer.learning_rate?",
        ),
        ("train__bach_size", 8, "unknown config field train.bach_size: did you mean train.batch"),
        (
            "train__batch_size",
            "many",
            "train.batch_size=many: expected int; write e.g. 256",
        ),
        ("data__pack", "maybe", "data.pack=maybe: expected bool; write e.g. true"),
        (
            "optimizer__learning_rate",
            -1e-3,
            "optimizer.learning_rate=-0.001: must be positive; write e.g. 1e-06",
        ),
        ("method__name", "dense", "method.name=dense: expected one of frozen, conventional, dense"),
    ],
)
def test_configuration(error_of, field, value, expected):
    assert error_of(**{field: value}).startswith(expected)


def test_configuration_file(monkeypatch, capsys, tmp_path):
    message = call(monkeypatch, capsys, ["--config", str(ROOT / "configs" / "densmixer_gsm.py")])
    assert "no such file; nearest there: densemixer_gsm.py" in message


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"mesh__fsdp": 3}, "mesh.data=1 mesh.fsdp=3: needs 3 devices, but there "),
        ({"mesh__data": 2, "mesh__fsdp": -1}, "mesh.data=2 mesh.fsdp=-1: 2 does not divide the "),
        ({"mesh__fsdp": 1, "mesh__expert": 2}, "mesh.data=1 mesh.fsdp=1 mesh.expert=2: needs 2 "),
    ],
)
def test_mesh(error_of, mesh, expected):
    import jax

    if jax.device_count() > 1:
        pytest.skip("more than one device")
    assert error_of(**mesh).startswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model__init": "pretrained", "model__config_path": None, "model__path": "{absent}"},
            "{absent}: no such directory; write a directory or a hub id",
        ),
        (
            {"model__init": "pretrained", "model__config_path": None, "model__path": "{nothing}"},
            "{nothing}/config.json: no such file",
        ),
        (
            {"model__config_path": "{absent}"},
            "model.config_path={absent}: no such directory or config.json; write a directory",
        ),
        (
            {"model__config_path": "{nothing}"},
            "{nothing}/config.json: no such file or directory; check",
        ),
        # Not silently the config.json beside it.
        (
            {"model__config_path": "{other}/mine.json"},
            "model.config_path={other}/mine.json: no such",
        ),
        (
            {"model__config_path": "{other}"},
            "{other}/config.json: model_type is 'mixtral'; this project trains OLMoE",
        ),
        (
            {"model__config_path": "{incomplete}"},
            "{incomplete}/config.json: num_experts is null; it must",
        ),
        (
            {"model__grouped_matmul": "tokamax"},
            "model.grouped_matmul=tokamax: runs on gpu; this is cpu; write blocked",
        ),
        (
            {"model__attention": "splash"},
            "model.attention=splash: runs on tpu; this is cpu; write chunked",
        ),
        (
            {"data__tokenizer_path": "{absent}"},
            "{absent}: no such directory; write a directory or a hub id",
        ),
        (
            {"data__tokenizer_path": "{nothing}"},
            "{nothing}/tokenizer.json: no such file",
        ),
        (
            {"model__config_path": "{small}"},
            "the tokenizer of {tokenizer} gives token ",
        ),
        (
            {"data__max_seq_length": 513},
            "data.max_seq_length=513: the model has 512 positions (max_position_embeddings of its "
            "config.json); write at most 512, or model.allow_extrapolation=true",
        ),
    ],
)
def test_model_and_tokenizer(error_of, files, changes, expected):
    names = ("absent", "nothing", "other", "small", "incomplete")
    paths = {name: str(folder(files) / name) for name in names}
    paths["tokenizer"] = str(files.tokenizer)
    changes = {
        name: value.format(**paths) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    message = error_of(**changes)
    assert message.startswith(expected.format(**paths))
    if "small" in expected + str(changes):
        assert message.endswith("set data.tokenizer_path to the model's")


def contents(directory: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(directory.iterdir())}


def test_output_directory(files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    message = call(monkeypatch, capsys, files.arguments(output))
    assert message.startswith(f"train.output_dir={output}: holds files but no run; write an empty")
    from olmoe_jax.config import to_dict

    (output / "config.json").write_text(json.dumps(to_dict(files.config(output, train__seed=7))))
    before = contents(output)
    message = call(monkeypatch, capsys, files.arguments(output))
    assert message == (
        f"train.output_dir={output} holds another run: train.seed: the run has 7, this command "
        "says 0; write another train.output_dir, or train.resume=restart to set the old run aside "
        "and start afresh"
    )
    (output / "config.json").write_text("{")
    message = call(monkeypatch, capsys, files.arguments(output))
    assert message.startswith(f"{output}/config.json: not JSON")
    (output / "config.json").write_text(before["config.json"])
    assert contents(output) == before


def test_output_directory_that_cannot_be_made(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        message = call(monkeypatch, capsys, files.arguments(output))
        assert message == f"{output}: not a directory; a part of the path is a file"
    assert contents(tmp_path) == {"file": ""}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__train_path": "{broken}"}, "{broken}: line 3: not JSON ("),
        pytest.param(
            {"model__config_path": "{small}"}, "the tokenizer of ", marks=pytest.mark.slow
        ),
        pytest.param(
            {"mesh__fsdp": 3},
            "mesh.data=1 mesh.fsdp=3: needs 3 devices, but there are 1; ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_as_a_process(files, tmp_path, changes, expected):
    """Nothing else, such as the warnings of a library, is on stderr."""
    paths = {"broken": folder(files) / "broken.jsonl", "small": folder(files) / "small"}
    changes = {
        name: value.format(**paths) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    output = tmp_path / "output"
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *files.arguments(output, **changes)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert one_line(result.stderr).startswith(expected.format(**paths))
    assert not list(tmp_path.iterdir())
