"""The configuration: types, ranges and names are checked, and complaints say what to write."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.table import DATASETS, METHODS, experiment
from olmoe_jax.command_line import help_text, parse_config
from olmoe_jax.config import (
    FIELDS,
    Config,
    DataOptions,
    MeshOptions,
    MethodOptions,
    ModelOptions,
    OptimizerOptions,
    TrainOptions,
    apply_overrides,
    first_difference,
    from_dict,
    parse_override,
    to_dict,
    validate,
)
from olmoe_jax.config_file import load_config
from olmoe_jax.errors import UserError

ROOT = Path(__file__).parents[1]
GSM = experiment("densemixer", "gsm")


def message_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def override_error(path: str, text: str) -> str:
    return message_of(apply_overrides, GSM, {path: text})


# Overrides


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train.batch_size", "8", 8),
        ("mesh.fsdp", "-1", -1),
        ("train.max_steps", "20", 20),
        ("train.max_steps", "none", None),
        ("train.max_steps", "None", None),
        ("optimizer.learning_rate", "2e-5", 2e-5),
        ("optimizer.weight_decay", "1", 1.0),
        ("data.pack", "false", False),
        ("data.pack", "True", True),
        ("data.eval_path", "none", None),
        ("data.eval_path", "a=b c.jsonl", "a=b c.jsonl"),
        ("method.name", "frozen", "frozen"),
        ("model.remat", "none", "none"),  # a choice of that name, not the absent value
        ("train.export_dtype", "float32", "float32"),
        ("train.export_dtype", "none", None),
    ],
)
def test_override(path, text, value):
    section, name = path.split(".")
    overridden = getattr(getattr(apply_overrides(GSM, {path: text}), section), name)
    assert overridden == value
    assert type(overridden) is type(value)
    assert parse_override(path, text) == value


def test_overrides_leave_the_rest_alone():
    config = apply_overrides(GSM, {"train.seed": "3", "mesh.data": "2"})
    assert config == dataclasses.replace(
        GSM, train=dataclasses.replace(GSM.train, seed=3), mesh=MeshOptions(data=2)
    )
    assert apply_overrides(GSM, {}) == GSM


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("train.batch_size", "8.5", "expected int; write e.g. 256"),
        ("train.batch_size", "none", "expected int; write e.g. 256"),
        ("train.batch_size", "", "expected int; write e.g. 256"),
        ("train.max_steps", "many", "expected int or none; write e.g. 1 or none"),
        ("optimizer.learning_rate", "fast", "expected float; write e.g. 1e-06"),
        ("data.pack", "1", "expected bool; write e.g. true"),
        (
            "method.name",
            "mixer",
            "expected one of frozen, conventional, densemixer, esft_gate, esft_token",
        ),
        ("method.lora_rank", "64.0", "expected int or none; write e.g. 1 or none"),
        ("method.lora_rslora", "yes", "expected bool; write e.g. false"),
        ("train.export_dtype", "int8", "expected one of bfloat16, float32 or none"),
    ],
)
def test_wrong_type_in_an_override(path, text, expected):
    assert override_error(path, text) == f"{path}={text}: {expected}"


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("train.batchsize", "train.batch_size"),
        ("train.batch-size", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("optimiser.beta_1", "optimizer.beta1"),
        ("data.eval_paht", "data.eval_path"),
        ("seed", "train.seed"),
        ("pack", "data.pack"),
        ("train.output_dir.x", "train.output_dir"),
    ],
)
def test_unknown_field_names_the_nearest(unknown, nearest):
    message = override_error(unknown, "1")
    assert message == f"unknown config field {unknown}: did you mean {nearest}?"


def test_a_section_is_not_a_field():
    message = override_error("mesh", "8")
    assert message == "mesh is a section, not a field: set one of mesh.data, mesh.fsdp"


# Ranges and combinations


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("optimizer.learning_rate", "-1.0", "must be positive; write e.g. 1e-06"),
        ("optimizer.learning_rate", "0.0", "must be positive; write e.g. 1e-06"),
        ("optimizer.learning_rate", "nan", "must be finite; write e.g. 1e-06"),
        ("optimizer.learning_rate", "inf", "must be finite; write e.g. 1e-06"),
        ("optimizer.warmup_ratio", "1.5", "must be from 0 to 1; write e.g. 0.03"),
        ("optimizer.warmup_ratio", "-0.1", "must be from 0 to 1; write e.g. 0.03"),
        ("optimizer.weight_decay", "-0.1", "must be 0.0 or more; write e.g. 0.0"),
        ("optimizer.beta1", "1.0", "must be 0 or more and below 1; write e.g. 0.9"),
        ("optimizer.beta2", "-0.5", "must be 0 or more and below 1; write e.g. 0.999"),
        ("optimizer.epsilon", "0.0", "must be positive; write e.g. 1e-08"),
        ("optimizer.max_grad_norm", "0.0", "must be positive; write e.g. 1.0"),
        ("data.eval_fraction", "1.0", "must be 0 or more and below 1; write e.g. 0.1"),
        ("data.max_seq_length", "1", "must be 2 or more; write e.g. 4096"),
        ("data.train_path", "", "must not be empty; write e.g. RoxanneWsyw/gsm:train.jsonl"),
        ("data.eval_path", "", "must not be empty; write e.g. PATH or none"),
        ("model.path", "", "must not be empty; write e.g. allenai/OLMoE-1B-7B-0125"),
        ("method.router_gradient_experts", "0", "must be 1 or more; write e.g. 1 or none"),
        ("method.router_aux_loss_coefficient", "-0.1", "must be 0.0 or more; write e.g. 0.0"),
        ("method.lora_rank", "0", "must be 1 or more; write e.g. 1 or none"),
        ("method.lora_alpha", "0.0", "must be positive; write e.g. 16.0"),
        ("method.lora_dropout", "1.0", "must be 0 or more and below 1; write e.g. 0.1"),
        (
            "method.lora_targets",
            "q,experts",
            "must be some of q,k,v,o,gate,up,down, separated by commas; write e.g. "
            "q,k,v,o,gate,up,down",
        ),
        ("method.esft_top_p", "1.5", "must be above 0 and at most 1; write e.g. 0.2 or none"),
        ("method.esft_score_tokens", "0", "must be 1 or more; write e.g. 300000"),
        ("method.experts_path", "", "must not be empty; write e.g. PATH or none"),
        ("method.adapter_path", "", "must not be empty; write e.g. PATH or none"),
        ("train.output_dir", "", "must not be empty; write e.g. runs/densemixer_gsm"),
        ("train.batch_size", "0", "must be 1 or more; write e.g. 256"),
        ("train.epochs", "0", "must be 1 or more; write e.g. 4"),
        ("train.max_steps", "0", "must be 1 or more; write e.g. 1 or none"),
        ("train.seed", "-1", "must be from 0 to 4294967295; write e.g. 0"),
        ("train.seed", "4294967296", "must be from 0 to 4294967295; write e.g. 0"),
        ("train.microbatch_examples", "0", "must be 1 or more; write e.g. 4"),
        ("train.rows_per_device", "0", "must be 1 or more; write e.g. 1"),
        ("train.eval_every", "0", "must be 1 or more; write e.g. 1 or none"),
        ("train.checkpoint_every", "-5", "must be 1 or more; write e.g. 100"),
        ("train.keep_checkpoints", "0", "must be 1 or more; write e.g. 2"),
        ("train.max_nonfinite_steps", "0", "must be 1 or more; write e.g. 5"),
        ("mesh.data", "0", "must be 1 or more; write e.g. 1"),
        ("mesh.fsdp", "0", "must be positive, or -1; write e.g. -1"),
    ],
)
def test_range(path, text, expected):
    assert override_error(path, text) == f"{path}={text}: {expected}"


def test_every_number_has_a_range():
    for path, entry in FIELDS.items():
        assert entry.rule or entry.kind not in (int, float), path


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.init": "random"}, "model.init=random: needs"),
        ({"model.config_path": "x"}, "model.config_path=x: only read with model.init=random"),
        (
            {"method.name": "frozen", "method.router_gradient_experts": "16"},
            "method.router_gradient_experts=16: only for method.name=densemixer, not frozen",
        ),
        (
            {"method.name": "esft_gate", "method.router_gradient_experts": "16"},
            "method.router_gradient_experts=16: only for method.name=densemixer, not esft_gate",
        ),
        (
            {"method.name": "esft_gate", "method.lora_rank": "8"},
            "method.lora_rank=8: esft_gate trains whole experts; write none",
        ),
        (
            {"method.experts_path": "e.json"},
            "method.experts_path=e.json: only for esft_gate and esft_token, not densemixer",
        ),
        ({"method.esft_top_p": "0.3"}, "method.esft_top_p=0.3: only for esft_gate and esft_token"),
        (
            {
                "method.name": "esft_gate",
                "method.experts_path": "e.json",
                "method.esft_score_tokens": "9",
            },
            "method.esft_score_tokens=9: not read with method.experts_path",
        ),
        ({"method.adapter_path": "a"}, "method.adapter_path=a: only read with method.lora_rank"),
        ({"method.lora_alpha": "8.0"}, "method.lora_alpha=8.0: only read with method.lora_rank"),
        (
            {"data.eval_path": "none", "data.eval_fraction": "0", "train.eval_every": "5"},
            "train.eval_every=5: there is nothing to evaluate on",
        ),
        (
            {"data.eval_path": "none", "data.eval_fraction": "0", "train.export_best": "true"},
            "train.export_best=true: the best model is",
        ),
    ],
)
def test_combinations(overrides, expected):
    assert message_of(apply_overrides, GSM, overrides).startswith(expected)


def test_combinations_that_work():
    apply_overrides(GSM, {"model.init": "random", "model.config_path": "tiny/config.json"})
    apply_overrides(GSM, {"method.router_gradient_experts": "16"})
    esft = {"method.name": "esft_token", "method.experts_path": "e.json"}
    apply_overrides(GSM, {**esft, "method.esft_densemixer": "true"})
    mixed = {"method.esft_densemixer": "true", "method.router_gradient_experts": "16"}
    apply_overrides(GSM, {**esft, **mixed})
    apply_overrides(GSM, {"method.lora_rank": "8", "method.adapter_path": "a"})
    apply_overrides(GSM, {"data.eval_path": "none", "data.eval_fraction": "0"})


def test_the_defaults_leave_only_the_paths_open():
    assert message_of(validate, Config()).startswith("data.train_path=: must not be empty")
    config = Config(data=DataOptions(train_path="a.jsonl"), train=TrainOptions(output_dir="out"))
    assert validate(config) == config


# Values from Python


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("train", TrainOptions(batch_size="8"), "train.batch_size='8': expected int"),
        ("train", TrainOptions(batch_size=8.0), "train.batch_size=8.0: expected int"),
        ("train", TrainOptions(batch_size=True), "train.batch_size=True: expected int"),
        ("train", TrainOptions(seed=None), "train.seed=None: expected int"),
        ("train", TrainOptions(output_dir=Path("x")), "train.output_dir=PosixPath('x'): expected"),
        ("data", DataOptions(pack=1), "data.pack=1: expected bool"),
        ("optimizer", OptimizerOptions(beta1="0.9"), "optimizer.beta1='0.9': expected float"),
        ("method", MethodOptions(name="lora"), "method.name='lora': expected one of frozen, "),
        ("mesh", {"data": 2}, "mesh={'data': 2}: expected a MeshOptions"),
    ],
)
def test_wrong_type_from_python(section, values, expected):
    config = dataclasses.replace(GSM, **{section: values})
    assert message_of(validate, config).startswith(expected)


def test_an_int_becomes_a_float():
    config = validate(dataclasses.replace(GSM, optimizer=OptimizerOptions(learning_rate=1)))
    assert type(config.optimizer.learning_rate) is float


# Dictionaries


def test_dict_round_trip_through_json():
    config = apply_overrides(GSM, {"train.max_steps": "7", "data.pack": "false"})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_from_dict_fills_in_defaults_and_is_strict():
    assert from_dict({"train": {"seed": 5}}) == Config(train=TrainOptions(seed=5))
    assert message_of(from_dict, {"train": {"sed": 5}}) == (
        "unknown config field train.sed: did you mean train.seed?"
    )
    assert message_of(from_dict, {"train": {"seed": "5"}}).startswith("train.seed='5': expected")
    assert message_of(from_dict, {"modle": {}}).startswith("unknown config field modle")
    assert message_of(from_dict, {"train": 5}) == "train=5: expected a section with fields"


def test_first_difference():
    old = to_dict(GSM)
    changed = {"optimizer.learning_rate": "2e-5", "data.pack": "false", "train.max_steps": "9"}
    new = to_dict(apply_overrides(GSM, changed))
    pack = "data.pack: the run has true, this command says false"
    rate = "optimizer.learning_rate: the run has 1e-06, this command says 2e-05"
    steps = "train.max_steps: the run has none, this command says 9"
    assert first_difference(old, old, set()) is None
    assert first_difference(old, new, set()) == pack
    assert first_difference(old, new, {"data.pack"}) == rate
    assert first_difference(old, new, {"data.pack", "optimizer.learning_rate"}) == steps
    assert first_difference(old, new, set(changed)) is None


def test_first_difference_across_versions_of_the_fields():
    new = to_dict(GSM)
    older = to_dict(GSM)
    del older["train"]["seed"]
    assert first_difference(older, new) is None
    older["train"]["shuffle"] = True
    assert first_difference(older, new) == (
        "train.shuffle: the run has true, this command says none"
    )


# The experiments


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", METHODS)
def test_experiment_file(method, dataset):
    config = validate(load_config(ROOT / "configs" / f"{method}_{dataset}.py"))
    assert config == experiment(method, dataset)
    base = method.removesuffix("_lora")
    expected = MethodOptions(name=base)
    if "_lora" in method:
        expected = MethodOptions(name=base, lora_rank=64, lora_alpha=16.0, lora_dropout=0.1)
    assert config.method == expected
    assert config.model == ModelOptions("allenai/OLMoE-1B-7B-0125", "pretrained", None, "bfloat16")
    assert config.train.output_dir == f"runs/{method}_{dataset}"
    assert (config.train.batch_size, config.train.epochs) == (256, 4)
    assert config.data.max_seq_length == 4096


def test_there_are_48_experiments():
    files = {file.stem for file in (ROOT / "configs").glob("*_*.py")} - {"__init__"}
    assert files == {f"{method}_{dataset}" for method in METHODS for dataset in DATASETS}
    assert len(files) == 48


@pytest.mark.parametrize(
    ("name", "train_path", "eval_path", "learning_rate", "microbatch_examples"),
    [
        ("frozen_gsm", "RoxanneWsyw/gsm:train.jsonl", "RoxanneWsyw/gsm:test.jsonl", 1e-6, 4),
        ("densemixer_codealpaca", "RoxanneWsyw/CodeAlpaca:train.jsonl", None, 1e-6, 4),
        (
            "conventional_law",
            "RoxanneWsyw/ESFT-law:train.jsonl",
            "RoxanneWsyw/ESFT-law:test.jsonl",
            2e-5,
            4,
        ),
        (
            "densemixer_summary",
            "RoxanneWsyw/ESFT-summary:train.jsonl",
            "RoxanneWsyw/ESFT-summary:test.jsonl",
            2e-5,
            2,
        ),
        ("frozen_lora_gsm", "RoxanneWsyw/gsm:train.jsonl", "RoxanneWsyw/gsm:test.jsonl", 1e-4, 4),
        (
            "densemixer_lora_translation",
            "RoxanneWsyw/ESFT-translation:train.jsonl",
            "RoxanneWsyw/ESFT-translation:test.jsonl",
            4e-4,
            2,
        ),
        (
            "esft_gate_law",
            "RoxanneWsyw/ESFT-law:train.jsonl",
            "RoxanneWsyw/ESFT-law:test.jsonl",
            1e-3,
            4,
        ),
        ("esft_token_codealpaca", "RoxanneWsyw/CodeAlpaca:train.jsonl", None, 2e-5, 4),
        (
            "frozen_translation",
            "RoxanneWsyw/ESFT-translation:train.jsonl",
            "RoxanneWsyw/ESFT-translation:test.jsonl",
            2e-5,
            2,
        ),
    ],
)
def test_table_by_hand(name, train_path, eval_path, learning_rate, microbatch_examples):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert (config.data.train_path, config.data.eval_path) == (train_path, eval_path)
    assert config.data.eval_fraction == 0.1
    assert config.optimizer == OptimizerOptions(
        learning_rate, "linear", 0.03, 0.0, 0.9, 0.999, 1e-8, 1.0
    )
    assert config.train.microbatch_examples == microbatch_examples


def test_experiment_outside_the_table():
    assert "frozen, conventional, densemixer" in message_of(experiment, "dense", "gsm")
    assert "gsm, codealpaca, intent" in message_of(experiment, "frozen", "gsm8k")


# Config files


def config_error(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return message_of(load_config, path).removeprefix(str(tmp_path / "mine.py"))


def test_broken_config_files(tmp_path):
    imports = "from olmoe_jax.config import *\n"
    assert config_error(tmp_path, "x = 1\n").startswith(": define get_config() in it")
    assert config_error(tmp_path, "get_config = 1\n").startswith(": define get_config() in it")
    assert config_error(tmp_path, "def get_config():\n    return 3\n") == (
        ": get_config() returned a int; it must return a olmoe_jax.config.Config"
    )
    assert config_error(tmp_path, "import os\ndef get_config():\n    1 / 0\n") == (
        ":3: ZeroDivisionError: division by zero"
    )
    assert config_error(tmp_path, "x = 1\ndef get_config(:\n").startswith(":2: SyntaxError: ")
    assert config_error(tmp_path, "import no_such_module\n").startswith(":1: ModuleNotFoundError")
    unknown = imports + "def get_config():\n    return Config(train=TrainOptions(batchsize=8))\n"
    assert config_error(tmp_path, unknown).startswith(":3: TypeError: ")
    assert config_error(tmp_path, unknown).endswith("; did you mean train.batch_size?")
    wrong = imports + "def get_config():\n    return Config(train=TrainOptions(batch_size='8'))\n"
    assert config_error(tmp_path, wrong) == "train.batch_size='8': expected int; write e.g. 256"


def test_missing_config_files(tmp_path):
    assert message_of(load_config, ROOT / "configs/densmixer_gsm").startswith(
        f"{ROOT}/configs/densmixer_gsm: no such file; nearest there: densemixer_gsm.py"
    )
    (tmp_path / "a.py").touch()
    assert message_of(load_config, tmp_path / "zzz.yaml").endswith("no name there is like it")
    assert message_of(load_config, tmp_path / "no/b.py").endswith(
        f"there is no directory {tmp_path}/no"
    )
    assert "is a directory" in message_of(load_config, tmp_path)


# The command line

CONFIG = str(ROOT / "configs" / "densemixer_gsm.py")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", CONFIG, "--config.mesh.fsdp", "-1", "--config.train.seed", "3"],
        [f"--config={CONFIG}", "--config.mesh.fsdp=-1", "--config.train.seed=3"],
        ["--config.train.seed=1", "--config.train.seed=3", f"--config={CONFIG}"],
    ],
)
def test_flags(arguments):
    assert parse_config(arguments) == apply_overrides(GSM, {"train.seed": "3"})


def test_a_value_may_contain_equals_signs():
    config = parse_config(["--config", CONFIG, "--config.data.train_path=a=b.jsonl"])
    assert config.data.train_path == "a=b.jsonl"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config is missing: write e.g. --config configs/densemixer_gsm.py"),
        (["--config="], "--config is missing"),
        (["--config"], "--config needs a value"),
        (["--config", CONFIG, "--config.data.pack"], "--config.data.pack needs a value"),
        (["--config", "--config.train.seed=1"], "--config needs a value"),
        (["gsm"], "unexpected argument gsm: flags are --name=value"),
        (["--confg", CONFIG], "unknown flag --confg: did you mean --config?"),
        (["--seed=1"], "unknown flag --seed: did you mean --config.train.seed?"),
        (["--train.sed", "1"], "unknown flag --train.sed: did you mean --config.train.seed?"),
        (["--hlp"], "unknown flag --hlp: did you mean --help?"),
        (["--config", CONFIG, "--config.="], "unknown config field : did you mean"),
    ],
)
def test_bad_flags(arguments, expected):
    assert message_of(parse_config, arguments).startswith(expected)


def test_help_lists_every_field():
    text = help_text()
    for path, entry in FIELDS.items():
        assert f"--config.{path}=" in text
        assert entry.help.split(":")[0].split(",")[0][:20] in text
    assert "--config.train.batch_size=256  (int)\n      examples per step\n" in text
    assert "--config.train.export_dtype=none  (one of bfloat16, float32 or none)" in text
    assert max(map(len, text.splitlines())) <= 100


def run_train(directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_train_help_from_another_directory(tmp_path):
    result = run_train(tmp_path, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "python train.py --config configs/densemixer_gsm.py" in result.stdout
    assert all(path in result.stdout for path in FIELDS)


def test_train_bad_usage_is_one_line_and_exit_2(tmp_path):
    result = run_train(tmp_path, "--config", CONFIG, "--config.optimizer.learning_rate=-1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: optimizer.learning_rate=-1.0: must be positive; write e.g. 1e-06\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_command_line_is_read_without_jax():
    code = f"""
import sys
from olmoe_jax.command_line import parse_config
parse_config(["--config", {CONFIG!r}])
assert "jax" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
