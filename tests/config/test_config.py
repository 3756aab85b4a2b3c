"""The configuration: types, ranges and names are checked, and complaints say what to write."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers import message_of

from configs.table import experiment
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
    to_dict,
    validate,
)
from olmoe_jax.config.methods import METHODS, readers
from olmoe_jax.config.options import REMOVED
from olmoe_jax.config.values import check_types

GSM = experiment("densemixer", "gsm")


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
        ("model.attention", "chunked", "chunked"),
        ("model.attention", "none", None),
    ],
)
def test_override(path, text, value):
    section, name = path.split(".")
    overridden = getattr(getattr(apply_overrides(GSM, {path: text}), section), name)
    assert overridden == value
    assert type(overridden) is type(value)


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
            f"expected one of {', '.join(METHODS)}",
        ),
        ("method.lora_rank", "64.0", "expected int or none; write e.g. 1 or none"),
        ("model.base_quantization", "int4", "expected one of nf4, int8 or none"),
        ("train.best_metric", "loss", "expected one of eval_loss, exact_match"),
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


def test_a_field_that_is_gone_says_what_to_write_instead():
    assert override_error("optimizer.fused_update", "true") == (
        "config field optimizer.fused_update is gone: leave it out; for less memory write "
        "optimizer.moments_dtype=bfloat16 and optimizer.gradients_dtype=bfloat16"
    )
    for path in REMOVED:
        section, name = path.split(".")
        assert path not in FIELDS
        assert override_error(path, "1") == message_of(from_dict, {section: {name: 1}})


def test_a_section_is_not_a_field():
    message = override_error("mesh", "8")
    assert message.startswith(
        "mesh is a section, not a field: set one of mesh.data, mesh.fsdp, mesh.expert"
    )


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
        ("optimizer.weight_decay", "-0.1", "must be 0 or more; write e.g. 0.0"),
        ("optimizer.beta1", "1.0", "must be 0 or more and below 1; write e.g. 0.9"),
        ("optimizer.beta2", "-0.5", "must be 0 or more and below 1; write e.g. 0.999"),
        ("optimizer.epsilon", "0.0", "must be positive; write e.g. 1e-08"),
        ("optimizer.max_grad_norm", "0.0", "must be positive; write e.g. 1.0"),
        ("data.eval_fraction", "1.0", "must be 0 or more and below 1; write e.g. 0.1"),
        ("data.max_seq_length", "1", "must be from 2 to 1048576; write e.g. 4096"),
        ("data.train_path", "", "must not be empty; write e.g. RoxanneWsyw/gsm:train.jsonl"),
        ("data.eval_path", "", "must not be empty; write e.g. RoxanneWsyw/gsm:train.jsonl or none"),
        ("model.path", "", "must not be empty; write e.g. allenai/OLMoE-1B-7B-0125"),
        ("method.router_gradient_experts", "0", "must be 1 or more; write e.g. 1 or none"),
        ("method.router_aux_loss_coefficient", "-0.1", "must be 0 or more; write e.g. 0.0"),
        ("method.lora_rank", "0", "must be from 1 to 65536; write e.g. 1 or none"),
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
        ("train.rows_per_device", "0", "must be from 1 to 4096; write e.g. 1"),
        ("train.epochs", "4294967296", "must be below 4294967296; write e.g. 4"),
        ("train.wandb_project", " ", "must be a name; write e.g. olmoe or none"),
        ("train.eval_every", "0", "must be 1 or more; write e.g. 1 or none"),
        ("train.checkpoint_every", "-5", "must be 1 or more; write e.g. 100"),
        ("train.keep_checkpoints", "0", "must be 1 or more; write e.g. 2"),
        ("train.max_nonfinite_steps", "0", "must be 1 or more; write e.g. 5"),
        ("generate.every", "0", "must be 1 or more; write e.g. 1 or none"),
        ("mesh.data", "0", "must be 1 or more; write e.g. 1"),
        ("mesh.fsdp", "0", "must be positive, or -1; write e.g. -1"),
        ("mesh.expert", "-1", "must be 1 or more; write e.g. 1"),
    ],
)
def test_range(path, text, expected):
    assert override_error(path, text) == f"{path}={text}: {expected}"


def test_home_in_every_path(monkeypatch):
    """In a flag, in a config file, in Python; `~` elsewhere in a path is a character."""
    monkeypatch.setenv("HOME", "/home/me")
    paths = [path for path, field in FIELDS.items() if field.is_place]
    named = [path for path in FIELDS if path.endswith(("path", "_dir", "_template"))]
    assert sorted(paths) == sorted(named)
    for path in paths:
        section, name = path.split(".")
        assert FIELDS[path].parse("~/a~/b") == "/home/me/a~/b"
        changed = dataclasses.replace(getattr(GSM, section), **{name: "~"})
        config = check_types(dataclasses.replace(GSM, **{section: changed}))
        assert getattr(getattr(config, section), name) == "/home/me"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("data.chat_template", "none"),
        ("data.eval_path", "None"),
        ("model.base_quantization", "none"),
        ("train.max_steps", "none"),
    ],
)
def test_none_as_text_in_a_config_file(path, text):
    """Help and errors spell None so. It would be a file, or be refused as "expected … or none"."""
    section, name = path.split(".")
    changed = dataclasses.replace(getattr(GSM, section), **{name: text})
    config = check_types(dataclasses.replace(GSM, **{section: changed}))
    assert getattr(getattr(config, section), name) is None


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
            "method.router_gradient_experts=16: only for method.name=densemixer, esft_gate",
        ),
        (
            {"method.name": "esft_gate", "method.router_gradient_experts": "16"},
            "method.router_gradient_experts=16: with esft_gate, only read "
            "with method.esft_densemixer=true",
        ),
        (
            {"method.name": "frozen", "method.router_gradient_dtype": "float8_e4m3fn"},
            "method.router_gradient_dtype=float8_e4m3fn: only for "
            "method.name=densemixer, esft_gate",
        ),
        (
            {"method.router_gradient_dtype": "bfloat16"},
            "method.router_gradient_dtype=bfloat16: is model.compute_dtype, the default",
        ),
        (
            {
                "method.router_gradient_dtype": "float8_e4m3fn",
                "method.router_gradient_experts": "16",
            },
            "method.router_gradient_experts=16: no grouped matmul computes in float8_e4m3fn",
        ),
        (
            {"method.name": "esft_gate", "method.lora_rank": "8"},
            "method.lora_rank=8: only for method.name=frozen, conventional",
        ),
        (
            {"method.experts_path": "e.json"},
            "method.experts_path=e.json: only for method.name=esft_gate",
        ),
        (
            {"method.esft_top_p": "0.3"},
            "method.esft_top_p=0.3: only for method.name=esft_gate",
        ),
        (
            {
                "method.name": "esft_gate",
                "method.experts_path": "e.json",
                "method.esft_score_tokens": "9",
            },
            "method.esft_score_tokens=9: not read with method.experts_path",
        ),
        (
            {"model.compute_dtype": "float32", "optimizer.gradients_dtype": "bfloat16"},
            "optimizer.gradients_dtype=bfloat16: the model would read its weights in bfloat16",
        ),
        (
            {"optimizer.master_dtype": "bfloat16"},
            "optimizer.master_dtype=bfloat16: gradients add up in the weights' dtype",
        ),
        ({"method.adapter_path": "a"}, "method.adapter_path=a: only read with method.lora_rank"),
        ({"method.lora_alpha": "8.0"}, "method.lora_alpha=8.0: only read with method.lora_rank"),
        (
            {"data.eval_path": "none", "data.eval_fraction": "0", "train.eval_every": "5"},
            "train.eval_every=5: there is nothing to evaluate",
        ),
        (
            {"data.eval_path": "none", "data.eval_fraction": "0", "train.export_best": "true"},
            "train.export_best=true: evaluations find the best",
        ),
        (
            {"data.eval_path": "none", "data.eval_fraction": "0", "generate.every": "5"},
            "generate.every=5: there is nothing to decode",
        ),
        (
            {"train.best_metric": "exact_match"},
            "train.best_metric=exact_match: the run decodes nothing",
        ),
        ({"generate.examples": "5"}, "generate.examples=5: only read with generate.every"),
    ],
)
def test_combinations(overrides, expected):
    assert message_of(apply_overrides, GSM, overrides).startswith(expected)


def test_combinations_that_work():
    apply_overrides(GSM, {"model.init": "random", "model.config_path": "tiny/config.json"})
    apply_overrides(GSM, {"method.router_gradient_experts": "16"})
    apply_overrides(GSM, {"method.lora_rank": "8", "optimizer.moments_dtype": "int8"})
    esft = {"method.name": "esft_token", "method.experts_path": "e.json"}
    apply_overrides(GSM, {**esft, "method.esft_densemixer": "true"})
    mixed = {"method.esft_densemixer": "true", "method.router_gradient_experts": "16"}
    apply_overrides(GSM, {**esft, **mixed})
    apply_overrides(GSM, {"method.lora_rank": "8", "method.adapter_path": "a"})
    apply_overrides(GSM, {"data.eval_path": "none", "data.eval_fraction": "0"})
    lean = {f"optimizer.{name}_dtype": "bfloat16" for name in ("moments", "gradients", "master")}
    apply_overrides(GSM, lean)


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
        (
            "train",
            TrainOptions("x", epochs=10**5000),
            "train.epochs=<int>: must be below 4294967296",
        ),
        (
            "optimizer",
            OptimizerOptions(learning_rate=10**400),
            f"optimizer.learning_rate={10**400}: expected float",
        ),
        ("data", DataOptions(pack=(x for x in ())), "data.pack=<generator object"),
        ("model", ModelOptions(path="a\0b"), "model.path=a\0b: has a character that no path can"),
        ("data", DataOptions("\ud800"), "data.train_path=\ud800: has a character that no path can"),
        ("train", TrainOptions("~none_/x"), "train.output_dir=~none_/x: there is no user 'none_'"),
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
    del older["train"]["seed"], older["optimizer"]["moments_dtype"]
    older["optimizer"]["fused_update"] = older["method"]["lora_rslora"] = False
    older["data"]["cache_dir"] = "anywhere"
    assert first_difference(older, new) is None
    assert first_difference(older | {"optimizer": {"offload": True}}, new) == (
        "optimizer.offload: the run has true; the field is gone: leave it out; for less memory "
        "write optimizer.moments_dtype=bfloat16 and optimizer.gradients_dtype=bfloat16"
    )
    older["train"]["shuffle"] = True
    assert first_difference(older, new) == (
        "train.shuffle: the run has true, this command says none"
    )


def test_every_field_of_the_method_is_read():
    """By every method (these two), or by those whose rows name it."""
    fields = {path.removeprefix("method.") for path in FIELDS if path.startswith("method.")}
    by_all = {name for name in fields if not readers(name)}
    assert by_all == {"name", "router_aux_loss_coefficient"}
    assert {name for row in METHODS.values() for name in row.own_fields} <= fields
