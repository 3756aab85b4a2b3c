"""Runs whose base, data, tokenizer or expert config lie elsewhere than at their start."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import load_checkpoint_tensors, message_of
from tiny import LORA, short_run, write_base, write_tensors
from training.interruptions import refused, snapshot, without_seconds
from training.tiny_run import make_files, metrics

import olmoe_jax
from convert import from_hf, to_hf
from eval.backends import check_backend
from olmoe_jax.checkpoints import checksums
from olmoe_jax.checkpoints.opening import open_source, weights_identity
from olmoe_jax.generation import command
from olmoe_jax.training.reporting import Reporter

pytestmark = pytest.mark.slow

ESFT = {"method__name": "esft_gate", "train__max_steps": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer_dir):
    """A base, data, a tokenizer and an expert config; tests must not change them."""
    path = tmp_path_factory.mktemp("inputs")
    files = make_files(path / "files", tokenizer_dir)
    write_base(path / "base")
    (path / "experts.json").write_text(json.dumps({"experts": {"1": [3], "2": [6, 1]}}))
    return files, path


def config_of(inputs, output, **changes):
    files, path = inputs
    return short_run(files, path / "base", output, **changes)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Finished runs, by what trains."""
    path = tmp_path_factory.mktemp("runs")
    options = {
        "lora": LORA | {"train__max_steps": 2},
        "esft": ESFT | {"method__experts_path": str(inputs[1] / "experts.json")},
        "full": {"train__max_steps": 1},
    }
    for name, changes in options.items():
        olmoe_jax.train(config_of(inputs, path / name, **changes))
    return path, options


@pytest.fixture
def moved(inputs, tmp_path):
    """All inputs in another place, the weights in three files."""
    _, path = inputs
    files = make_files(tmp_path / "moved", shutil.copytree(inputs[0].tokenizer, tmp_path / "tok"))
    shutil.copy(path / "experts.json", tmp_path / "moved")
    shutil.copytree(path / "base", tmp_path / "moved" / "base")
    (tmp_path / "moved" / "base" / "model.safetensors").unlink()
    write_tensors(tmp_path / "moved" / "base", load_checkpoint_tensors(path / "base"), shards=3)
    return files, tmp_path / "moved"


def other_base(path: Path, like: Path, change=1.01) -> Path:
    """A copy of a base in which one tensor differs."""
    shutil.copytree(like, path)
    tensors = load_checkpoint_tensors(like)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    write_tensors(path, tensors | {name: tensors[name] * np.float32(change)})
    return path


def test_a_run_continues_elsewhere(inputs, moved, runs, tmp_path, monkeypatch, capsys):
    """Stopped, moved and continued, it is the run that nothing stopped, and it exports."""
    whole, options = runs[0] / "lora", runs[1]["lora"]

    class StoppedError(Exception):
        pass

    def stop(self, line, scalars):
        report(self, line, scalars)
        if line["step"] == 2:
            raise StoppedError

    report = Reporter.step
    output, saving = tmp_path / "run", {"train__checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", stop)
        with pytest.raises(StoppedError):
            olmoe_jax.train(config_of(inputs, output, **options, **saving))
    olmoe_jax.train(config_of(moved, output, **options, **saving))
    said = capsys.readouterr().out
    for field, old, new in [
        ("data.tokenizer_path", inputs[0].tokenizer, moved[0].tokenizer),
        ("data.train_path", inputs[0].train, moved[0].train),
        ("model.path", inputs[1] / "base", moved[1] / "base"),
    ]:
        assert f"continues with {field}={new} (was {old}): same content\n" in said
    assert said.count("continues with") == 3
    assert without_seconds(metrics(output)) == without_seconds(metrics(whole))
    stored = json.loads((output / "config.json").read_text())
    assert stored["model"]["path"] == str(moved[1] / "base")
    assert stored["train"]["max_steps"] == 2
    shutil.rmtree(moved[1] / "base")
    to_hf.main(["--checkpoint", str(output), "--output", str(tmp_path / "adapter"), "--adapter"])
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(moved[1] / "base")


def test_another_spelling_is_the_same_place(inputs, runs, tmp_path, monkeypatch, capsys):
    path, options = runs
    output = shutil.copytree(path / "lora", tmp_path / "run")
    before = (output / "config.json").read_text()
    base = inputs[1] / "base"
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("HOME", str(base.parent))
    for spelling in ("base", "./base/", f"{base}/", "../" + base.parent.name + "/base", "~/base"):
        changes = options["lora"] | {"model__path": spelling}
        olmoe_jax.train(config_of(inputs, output, **changes))
        said = capsys.readouterr().out
        assert "continuing after step 2 of 2" in said
        assert "continues with" not in said
    assert (output / "config.json").read_text() == before
    (tmp_path / "link").symlink_to(base)
    olmoe_jax.train(
        config_of(
            (inputs[0], tmp_path), output, **changes | {"model__path": str(tmp_path / "link")}
        )
    )
    assert (
        f"continues with model.path={tmp_path}/link (was {base}): same" in capsys.readouterr().out
    )


@pytest.mark.exhaustive
def test_a_run_begun_with_relative_paths(inputs, runs, tmp_path, monkeypatch):
    """Its config.json has the absolute ones: another directory is the current one later."""
    files, path = inputs
    monkeypatch.chdir(path)
    changes = {"model__path": "base", "data__train_path": "files/train.jsonl"}
    config = config_of(inputs, tmp_path / "run", **runs[1]["lora"], **changes)
    output = olmoe_jax.train(config).output_dir
    monkeypatch.chdir(tmp_path)
    to_hf.main(["--checkpoint", "run", "--output", "hf"])
    stored = json.loads((output / "config.json").read_text())
    assert (stored["model"]["path"], stored["data"]["train_path"]) == (
        str(path / "base"),
        str(files.train),
    )


def test_other_weights_are_refused(inputs, runs, tmp_path):
    """Of one expert, in another place or in the old one."""
    path, options = runs
    output = shutil.copytree(path / "lora", tmp_path / "run")
    base = other_base(tmp_path / "base", inputs[1] / "base")
    message = refused(config_of((inputs[0], tmp_path), output, **options["lora"]))
    assert "is of other base weights (model.path has another content); bring it back" in message
    values = json.loads((output / "config.json").read_text())
    values["model"]["path"] = str(base)
    checksums.write_json(output / "config.json", values)
    assert "model.path has another" in refused(
        config_of((inputs[0], tmp_path), output, **options["lora"])
    )
    export = ["--checkpoint", str(output), "--output", str(tmp_path / "hf")]
    message = message_of(to_hf.main, export)
    assert f"{base} has other weights than the base of {output}; write where" in message
    assert not (tmp_path / "hf").exists()


def test_other_data_or_another_tokenizer_is_refused(inputs, moved, runs, tmp_path):
    path, options = runs
    output = shutil.copytree(path / "lora", tmp_path / "run")
    files, _ = moved
    with files.train.open("a") as file:
        file.write('{"prompt": "1+1=", "completion": "2"}\n')
    message = refused(config_of(moved, output, **options["lora"]))
    assert "is of other training data (data.train_path has another content)" in message
    shutil.copy(inputs[0].train, files.train)
    vocabulary = files.tokenizer / "tokenizer.json"
    vocabulary.write_text(
        vocabulary.read_text()
        .replace('"a":', '"swap":')
        .replace('"b":', '"a":')
        .replace('"swap":', '"b":')
    )
    message = refused(config_of(moved, output, **options["lora"]))
    assert "is of other training data (the tokenizer is another)" in message


def test_a_moved_expert_config(inputs, moved, runs, tmp_path, capsys):
    path, options = runs
    output = shutil.copytree(path / "esft", tmp_path / "run")
    file = moved[1] / "experts.json"
    changes = options["esft"] | {"method__experts_path": str(file)}
    olmoe_jax.train(config_of(inputs, output, **changes))
    assert f"continues with method.experts_path={file} (was " in capsys.readouterr().out
    file.write_text(json.dumps({"experts": {"1": [3], "2": [6, 2]}}))
    message = refused(config_of(inputs, output, **changes))
    assert f"method.experts_path={file}: names other experts than {output}/experts.json" in message


@pytest.mark.exhaustive
def test_a_moved_adapter(inputs, runs, tmp_path, capsys):
    path, options = runs
    options = options["lora"] | {"method__adapter_path": str(path / "lora")}
    output = olmoe_jax.train(config_of(inputs, tmp_path / "run", **options)).output_dir
    capsys.readouterr()
    options["method__adapter_path"] = str(
        shutil.copytree(path / "lora" / "adapter", tmp_path / "a")
    )
    olmoe_jax.train(config_of(inputs, output, **options))
    assert f"continues with method.adapter_path={tmp_path}/a (was" in capsys.readouterr().out
    shutil.copytree(output / "adapter", tmp_path / "a", dirs_exist_ok=True)
    message = refused(config_of(inputs, output, **options))
    assert "of other adapter weights (method.adapter_path has another content)" in message


def test_inputs_of_an_attempt_without_a_checkpoint_do_not_count(inputs, moved, runs, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    other, output = tmp_path / "other.json", tmp_path / "run"
    other.write_text(json.dumps({"experts": {"1": [7], "2": [0, 5]}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            olmoe_jax.train(config_of(inputs, output, **ESFT, method__experts_path=str(other)))
    assert (output / "experts.json").exists()
    olmoe_jax.train(config_of(moved, output, **runs[1]["esft"]))
    files, same = (snapshot(path / "hf") for path in (output, runs[0] / "esft"))
    assert files.pop("README.md") != same.pop("README.md")  # they name the runs
    assert files == same


@pytest.fixture(scope="module")
def lost(inputs, runs, tmp_path_factory):
    """The runs without the base that config.json names, the base, and another base."""
    path = tmp_path_factory.mktemp("lost")
    shutil.copytree(runs[0], path / "runs")
    for name in ("lora", "esft", "full"):
        values = json.loads((path / "runs" / name / "config.json").read_text())
        values["model"]["path"] = str(path / "gone")
        checksums.write_json(path / "runs" / name / "config.json", values)
    return path / "runs", inputs[1] / "base", other_base(path / "other", inputs[1] / "base")


@pytest.mark.parametrize(
    "name", ["lora", "esft", pytest.param("full", marks=pytest.mark.exhaustive)]
)
def test_export_with_a_base_that_moved(lost, runs, tmp_path, name):
    path, base, other = lost
    export = ["--checkpoint", str(path / name), "--output", str(tmp_path / "out")]
    if name != "full":
        message = message_of(to_hf.main, export)
        assert f"{path / name} needs its base: {path.parent / 'gone'}: no such directory" in message
        assert "--base DIR (of convert.to_hf, olmoe_jax.generate and eval.run)" in message
    message = message_of(to_hf.main, [*export, "--base", str(other)])
    assert f"{other} has other weights than the base of {path / name}" in message
    assert not (tmp_path / "out").exists()
    to_hf.main([*export, "--base", str(base)])
    to_hf.main(["--checkpoint", str(runs[0] / name), "--output", str(tmp_path / "expected")])
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


@pytest.mark.parametrize("name", ["lora", pytest.param("esft", marks=pytest.mark.exhaustive)])
def test_generation_and_evaluation_with_a_base_that_moved(lost, capsys, name):
    path, base, other = lost
    run = str(path / name)
    arguments = ["--model", run, "--prompt", "1+1=", "--max_new_tokens", "2"]
    command.main([*arguments, "--base", str(base)])
    assert capsys.readouterr().out
    check_backend("jax", run, base=str(base))
    for function, given in [(command.main, arguments), (check_backend, ["jax", run])]:
        wrong = (
            [*given, "--base", str(other)]
            if function is command.main
            else [*given, None, str(other)]
        )
        message = message_of(function, *([wrong] if function is command.main else wrong))
        assert f"{other} has other weights" in message
    assert "needs its base" in message_of(command.main, arguments)


def test_what_needs_no_base(inputs, lost):
    _, base, other = lost
    for path in (base, inputs[0].tokenizer):
        message = message_of(open_source, str(path), None, str(other))
        assert message == f"--base {other}: {path} is not a training run; leave --base out"
    assert "which need no base" in message_of(check_backend, "hf", str(base), None, str(other))


def test_the_same_weights_in_other_files(inputs, moved, lost, tmp_path):
    """Shards, a converted checkpoint and a full run's export; not another expert."""
    _, base, other = lost
    from_hf.main(["--model", str(base), "--output", str(tmp_path / "converted")])
    expected = weights_identity(open_source(str(base)))
    for path in (moved[1] / "base", tmp_path / "converted"):
        assert weights_identity(open_source(str(path))) == expected
    assert weights_identity(open_source(str(other))) != expected
