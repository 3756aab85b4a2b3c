"""Bad input on the command line: exit 2, one line that names the culprit, nothing left behind."""

import numpy as np
import pytest
from helpers import assert_user_error, message_of, run_module, write_json
from tiny import hf_config, tiny_config, write_hf_checkpoint

from convert import from_hf, parity, to_hf
from olmoe_jax.checkpoints import safetensors_file
from olmoe_jax.errors import UserError

CONFIG = tiny_config()


@pytest.fixture
def model(tmp_path):
    write_hf_checkpoint(tmp_path / "model", CONFIG, shards=3)
    return tmp_path / "model"


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "model")


def test_truncated_shard(tmp_path, model):
    shard = model / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    arguments = ("--model", model, "--output", tmp_path / "out")
    assert_user_error(run_module("convert.from_hf", *arguments), shard.name, "truncated")
    assert left_behind(tmp_path) == []


def test_a_damaged_conversion(tmp_path, model, capsys):
    """One bit of any file; without checksums, as an earlier version wrote it, it opens."""
    output = tmp_path / "out"
    from_hf.main(["--model", str(model), "--output", str(output)])
    arguments = ["--checkpoint", str(output), "--output", str(tmp_path / "hf")]
    largest = max(output.rglob("*"), key=lambda path: path.stat().st_size)
    for file in (largest, output / "model" / "config.json"):
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        message = message_of(to_hf.main, arguments)
        assert message == (
            f"{file}: damaged, its checksum differs; convert it again with convert.from_hf"
        )
        file.write_bytes(content)
    (output / "checksums.json").unlink()
    to_hf.main(arguments)
    said = capsys.readouterr().err
    assert said == (
        f"warning: {output}: an earlier version of olmoe_jax wrote it, without checksums; damage "
        "would not be noticed; convert it again to have them\n"
    )


def test_existing_output(tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    arguments = ("--checkpoint", model, "--output", tmp_path / "out")
    assert_user_error(run_module("convert.to_hf", *arguments), tmp_path / "out", "exists already")
    assert left_behind(tmp_path) == ["out"]
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_a_step_of_what_is_no_run(tmp_path, model):
    """The step would be ignored: such a checkpoint has one set of weights."""
    arguments = ["--checkpoint", str(model), "--output", str(tmp_path / "out"), "--step", "300"]
    expected = f"--step 300: {model} is not a training run; leave --step out"
    assert message_of(to_hf.main, arguments) == expected
    assert left_behind(tmp_path) == []


def test_parity_of_another_architecture(tmp_path, model):
    write_json(model / "config.json", hf_config(CONFIG, model_type="llama"))
    arguments = ("--model", model, "--batch", tmp_path / "none", "--method", "frozen")
    result = run_module("convert.parity", *arguments, "--output", tmp_path / "out")
    assert_user_error(result, "config.json", "'llama'")
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("command", [from_hf, to_hf, parity])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exited:
        command.main(["--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m {command.__name__}" in out.split("example:")[1]


@pytest.mark.parametrize(
    ("command", "arguments", "culprit"),
    [
        (from_hf, [], "--model"),
        (from_hf, ["--model=x"], "--output"),
        (from_hf, ["--model=x", "--output=y", "--outptu=z"], "--outptu"),
        (to_hf, ["--checkpoint=x", "--output=y", "--dtype=int8"], "--dtype"),
        (to_hf, ["--checkpoint=x", "--output=y", "--step=last"], "--step"),
        (to_hf, ["--checkpoint=x", "--output=y", "--max_shard_size=5TB"], "--max_shard_size: 5TB"),
        (parity, ["--model=x", "--batch=b", "--output=o", "--method=lora"], "--method"),
    ],
)
def test_bad_usage_is_one_line(command, arguments, culprit):
    with pytest.raises(UserError, match=culprit) as caught:
        command.main(arguments)
    assert "--help" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--adapter=a", "--experts=e.json"], "--experts e.json: an --adapter trains alone; leave"),
        (["--router=trained"], "--router trained: only read with --adapter; write --method"),
        (["--learning_rate=0.1"], "--learning_rate 0.1: only read with --optimizer_steps; add"),
        (["--warmup_steps=3"], "--warmup_steps 3: only read with --optimizer_steps; add that"),
    ],
)
def test_parity_flags_that_others_leave_unread(tmp_path, flags, expected):
    common = ["--model=x", "--batch=b", f"--output={tmp_path / 'out'}", "--method=frozen"]
    assert message_of(parity.main, [*common, *flags]).startswith(expected)


def batch(tmp_path, shape=(2, 4), **changes):
    arrays = {
        "input_ids": np.ones(shape, np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "labels": np.ones(shape, np.int64),
    }
    arrays |= changes
    file = tmp_path / "batch.safetensors"
    safetensors_file.save(file, {name: a for name, a in arrays.items() if a is not None})
    return file


@pytest.mark.parametrize(
    ("shape", "changes", "extra", "culprits"),
    [
        ((2, 4), {"labels": None}, [], ["batch.safetensors", "labels"]),
        ((4,), {}, [], ["input_ids", "2 dimensions"]),
        ((2, 4), {}, ["--optimizer_steps=1"], ["input_ids", "4 dimensions"]),
        ((2, 1, 2, 4), {}, ["--optimizer_steps=3"], ["--optimizer_steps 3", "2 updates"]),
        ((1, 1, 2, 4), {}, ["--optimizer_steps=0"], ["--optimizer_steps"]),
        ((2, 4), {"labels": np.ones((2, 5), np.int64)}, [], ["labels", "[2, 5]"]),
        ((2, 4), {"input_ids": np.full((2, 4), 61)}, [], ["input_ids", "61"]),
    ],
    ids=["missing", "flat", "no_updates", "too_few", "zero_steps", "other_shape", "unknown_id"],
)
def test_parity_batches(tmp_path, model, shape, changes, extra, culprits):
    file = batch(tmp_path, shape, **changes)
    arguments = [f"--model={model}", f"--batch={file}", "--method=conventional"]
    with pytest.raises(UserError) as caught:
        parity.main([*arguments, f"--output={tmp_path / 'out'}", *extra])
    for culprit in culprits:
        assert culprit in str(caught.value)
    assert left_behind(tmp_path) == ["batch.safetensors"]


def test_parity_without_a_batch_file(tmp_path, model):
    arguments = [f"--model={model}", f"--batch={tmp_path / 'none'}", "--method=conventional"]
    with pytest.raises(UserError, match="none: no such file"):
        parity.main([*arguments, f"--output={tmp_path / 'out'}"])
    assert left_behind(tmp_path) == []
