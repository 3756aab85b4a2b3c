"""What a run leaves behind: metrics, TensorBoard, checkpoints, exports; what a method trains."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from training.tiny_run import MODEL, exported_bytes, losses, metrics

import olmoe_jax
from olmoe_jax.checkpoints.loading import random_parameters
from olmoe_jax.checkpoints.opening import RunCheckpoint
from olmoe_jax.checkpoints.source import read_model_config
from olmoe_jax.config import to_dict
from olmoe_jax.model.config import ModelSettings
from olmoe_jax.parallel import sharding
from olmoe_jax.training import loop, reporting
from olmoe_jax.training import program as program_module
from olmoe_jax.training.event_file import TAGS
from olmoe_jax.training.step import changed_choices

STEPS = 12
OPTIONS = {
    "optimizer__learning_rate": 0.02,
    "train__eval_every": 1,
    "train__export_best": True,
    "train__checkpoint_every": 5,
}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """With answers that training makes ever less likely: the best model is not the last."""
    evaluation = tmp_path_factory.mktemp("evaluation") / "eval.jsonl"
    rows = [{"prompt": f"{n}+{n}=", "completion": "#@~^{}" * (n + 3)} for n in range(5)]
    evaluation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**OPTIONS, "data__eval_path": str(evaluation)}


@pytest.fixture(scope="module")
def config(files, options, tmp_path_factory):
    return files.config(tmp_path_factory.mktemp("runs") / "short", **options)


def train(config):
    """The run's result, and the program that it built."""
    programs = []

    def build_program(*arguments):
        programs.append(program_module.build_program(*arguments))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_program", build_program)
        result = olmoe_jax.train(config)
    (program,) = programs
    return result, program


@pytest.fixture(scope="module")
def run(config):
    return train(config)


@pytest.fixture(scope="module")
def output(run):
    result, _ = run
    assert (result.step, result.finished) == (STEPS, True)
    return result.output_dir


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_sums", "accumulate", "update", "evaluate"])
def test_nothing_is_compiled_twice(run, name):
    """Over two epochs with a smaller last step each, and evaluations in between."""
    _, program = run
    assert getattr(program, name)._cache_size() == 1


@pytest.fixture(scope="module")
def eval_losses(output):
    return {line["step"]: line["eval_loss"] for line in metrics(output) if "eval_loss" in line}


def test_metrics_lines(output):
    steps = [line for line in metrics(output) if "loss" in line]
    fields = ["step", "loss", "learning_rate", "grad_norm", "tokens", "seconds"]
    assert all(list(line) == fields for line in steps)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(line["seconds"] > 0 and line["grad_norm"] > 0 for line in steps)
    evaluations = [line for line in metrics(output) if "loss" not in line]
    assert [list(line) for line in evaluations] == [["step", "eval_loss"]] * STEPS
    assert [line["step"] for line in evaluations] == list(range(1, STEPS + 1))


def test_each_epoch_trains_on_every_example_once(output, files, eval_losses):
    """22 examples in steps of 4: the last step of an epoch has 2, and is trained on too."""
    rows = [json.loads(line) for line in files.train.read_text().splitlines()]
    # Bytes, the space between prompt and completion, and end of text.
    total = sum(len(row["prompt"]) + len(row["completion"]) + 2 for row in rows)
    tokens = [line["tokens"] for line in metrics(output) if "loss" in line]
    assert sum(tokens[:6]) == sum(tokens[6:]) == total
    assert tokens[:6] != tokens[6:]
    assert eval_losses[5] != eval_losses[6]


def test_a_continued_run_does_not_hold_its_state_twice(output, files, options, tmp_path):
    shutil.copytree(output, tmp_path / "again")
    # From the last checkpoint, with nothing left to do.
    result, program = train(files.config(tmp_path / "again", **options))
    assert result.step == STEPS
    assert all(array.is_deleted() for array in jax.tree.leaves(program.state))


def test_config_is_resolved(output, config):
    stored = json.loads((output / "config.json").read_text())
    assert stored == to_dict(config)
    assert stored["optimizer"]["beta2"] == 0.999


def test_loss_curve(output):
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def board(output):
    """{tag: {step: value}} of a run's TensorBoard files, and the texts of "config"."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(output / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert len(values) == len(events.Scalars(tag)), tag
        scalars[tag] = values
    texts = [tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors("config")]
    return scalars, [text.item().decode() for text in texts]


def test_tensorboard(output, config):
    scalars, texts = board(output)
    assert set(scalars) == {
        TAGS["train/loss"],
        TAGS["train/learning_rate"],
        TAGS["train/grad_norm"],
        "train/skipped_updates",
        "train/epoch",
        "data/padding_share",
        "data/tokens",
        "speed/seconds_per_step",
        TAGS["speed/tokens_per_second"],
        "speed/model_teraflops_per_second",
        "router/entropy_mean",
        "router/unused_experts",
        "router_load_max/layer_00",
        "router_load_max/layer_01",
        "router_load_min/layer_00",
        "router_load_min/layer_01",
        "router_entropy/layer_00",
        "router_entropy/layer_01",
        "router_gradient/norm",
        "router/changed_choices",
        "router/dead_experts",
        "time/data_seconds",
        "time/devices_seconds",
        "time/evaluation_seconds",
        "time/checkpoint_seconds",
        "memory/host_gib",
        TAGS["eval/loss"],
        "eval/perplexity",
    }
    for tag, values in scalars.items():
        if tag not in ("time/evaluation_seconds", "time/checkpoint_seconds"):
            assert list(values) == list(range(1, STEPS + 1)), tag
        assert np.isfinite(list(values.values())).all(), tag
    for line in metrics(output):
        if "loss" in line:
            assert scalars[TAGS["train/loss"]][line["step"]] == pytest.approx(line["loss"])
            norm = scalars[TAGS["train/grad_norm"]][line["step"]]
            assert norm == pytest.approx(line["grad_norm"])
        else:
            assert scalars[TAGS["eval/loss"]][line["step"]] == pytest.approx(line["eval_loss"])
    assert scalars["train/epoch"][6] == 1
    assert scalars["train/epoch"][STEPS] == 2
    # Between one expert and all, in nats.
    assert all(0 < entropy <= np.log(8) for entropy in scalars["router/entropy_mean"].values())
    assert all(1 <= load <= 8 for load in scalars["router_load_max/layer_00"].values())
    for step in range(1, STEPS + 1):
        assert scalars["router_gradient/norm"][step] < scalars[TAGS["train/grad_norm"]][step]
    assert len(texts) == 1
    assert json.loads(texts[0].removeprefix("```json").removesuffix("```")) == to_dict(config)


@pytest.mark.slow
def test_tensorboard_images_and_hyperparameters(output, config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import (
        EXPERIMENT_TAG,
        SESSION_START_INFO_TAG,
        parse_experiment_plugin_data,
        parse_session_start_info_plugin_data,
    )

    events = EventAccumulator(str(output / "tensorboard"), {"images": 0}).Reload()
    maps = events.Images("router/expert_load")
    assert [image.step for image in maps] == list(range(1, STEPS + 1))
    assert all(image.encoded_image_string.startswith(b"\x89PNG\r\n\x1a\n") for image in maps)
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    columns = parse_session_start_info_plugin_data(content).hparams
    assert columns["optimizer.learning_rate"].number_value == config.optimizer.learning_rate
    assert columns["method.name"].string_value == "densemixer"
    # Every field has its column, also one without a value.
    fields = {f"{s}.{name}" for s, values in to_dict(config).items() for name in values}
    assert columns.keys() == fields
    assert columns["method.lora_rank"].string_value == "none"
    content = events.SummaryMetadata(EXPERIMENT_TAG).plugin_data.content
    experiment = parse_experiment_plugin_data(content)
    first = {column.name for column in experiment.hparam_infos if column.differs}
    assert {"method.name", "optimizer.learning_rate"} <= first < fields
    assert len(first) == 5
    shown = experiment.metric_infos
    assert [metric.display_name for metric in shown] == ["loss", "eval_loss", "exact_match"]
    assert shown[0].name.tag in events.Tags()["scalars"]
    first = sorted(events.Tags()["scalars"])[:5]
    names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "eval_loss")
    assert first == [f"1_run/{place}_{name}" for place, name in enumerate(names, 1)]


def test_changed_choices():
    """The second token's experts are {1, 2} and were {2, 3}; the third is padding."""
    chosen = np.array([[[[0, 1], [1, 2], [0, 1]]], [[[4, 5], [6, 7], [0, 1]]]])
    before = np.array([[[[1, 0], [2, 3], [6, 7]]], [[[4, 5], [6, 7], [2, 3]]]])
    assert changed_choices(chosen, before, np.array([[1, 1, 0]])) == pytest.approx(1 / 8)
    assert changed_choices(chosen, chosen, np.array([[1, 1, 0]])) == 0


def test_a_heat_map_is_of_the_tokens_since_the_last(output, run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reporting, "heat_maps", lambda maps, file: drawn.extend(maps.values()))
    reporter = reporting.Reporter(tmp_path, 0, 3, json.loads((output / "config.json").read_text()))
    reporter.expert_load(1, np.array([[30, 0, 10], [4, 4, 4]]))
    reporter.close()
    assert drawn[0].tolist() == [[2.25, 0, 0.75], [1, 1, 1]]
    assert board(tmp_path)[0]["router/dead_experts"] == {1: 1}


def test_checkpoints_kept_are_the_last_two_and_the_best(output, eval_losses):
    best = min(eval_losses, key=eval_losses.get)
    saved = {5, 10, STEPS}
    lowest = np.inf
    for step, loss in eval_losses.items():
        if loss < lowest:
            lowest = loss
            saved.add(step)
    expected = {*sorted(saved)[-2:], best}
    assert len(expected) == 3, "the best must not be among the last two for this to test anything"
    kept = {int(path.name) for path in (output / "checkpoints").iterdir()}
    assert kept == expected


def parameters(source) -> dict[str, np.ndarray]:
    """All weights of a checkpoint, stacked."""
    from olmoe_jax.checkpoints import names

    return {
        weight.name: np.stack(
            [np.asarray(source.read(weight, i)) for i in names.layer_indices(weight, source.config)]
        )
        for weight in names.weights(source.config)
    }


def eval_loss_in_torch(directory, config) -> float:
    """The mean loss per completion token, as transformers computes the model."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for line in Path(config.data.eval_path).read_text().splitlines():
        row = json.loads(line)
        tokens = torch.tensor(
            tokenizer(f"{row['prompt']} {row['completion']}{tokenizer.eos_token}")["input_ids"]
        )
        start = len(row["prompt"])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        total += torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], tokens[start:], reduction="sum"
        ).item()
        count += len(tokens) - start
    return total / count


def test_export_has_our_loss_in_transformers(output, config, eval_losses):
    assert eval_loss_in_torch(output / "hf", config) == pytest.approx(eval_losses[STEPS], rel=1e-4)


def test_best_export_has_the_lowest_loss(output, config, eval_losses):
    best = min(eval_losses.values())
    assert best < 0.99 * eval_losses[STEPS]
    assert eval_loss_in_torch(output / "hf_best", config) == pytest.approx(best, rel=1e-4)


def test_exports_alone_can_be_made_anew(output, files, options, tmp_path, capsys):
    """Rerunning a finished run trains nothing; its exports are the same."""
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "hf")
    shutil.rmtree(copy / "hf_best")
    result = olmoe_jax.train(files.config(copy, **options))
    assert (result.step, result.finished) == (STEPS, True)
    assert metrics(copy) == metrics(output)
    for name in ("hf/model.safetensors", "hf_best/model.safetensors", "hf/config.json"):
        assert (copy / name).read_bytes() == (output / name).read_bytes()
    # What is there already is not overwritten, and the user is told.
    capsys.readouterr()
    before = exported_bytes(copy)
    olmoe_jax.train(files.config(copy, **options))
    assert exported_bytes(copy) == before
    assert f"{copy / 'hf'} is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_an_equal_eval_loss_later_is_not_better(files, tmp_path):
    """The best step exported must be one whose checkpoint is kept."""
    changes = {
        "optimizer__learning_rate": 1e-30,
        "train__export_best": True,
        "train__keep_checkpoints": 1,
    }
    output = olmoe_jax.train(files.config(tmp_path / "run", **changes)).output_dir
    first, second = (line["eval_loss"] for line in metrics(output) if "eval_loss" in line)
    assert first == second
    assert (output / "hf_best" / "model.safetensors").exists()


ROUTER = "layers.moe.router"


@pytest.fixture(scope="module")
def routers(files, tmp_path_factory):
    """The router before training and after, by method."""
    model = read_model_config(files.model)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    routers = {
        "untrained": np.asarray(
            random_parameters(model, ModelSettings(), 0, mesh, lambda name: True)[ROUTER]
        )
    }
    for method in ("frozen", "conventional", "densemixer"):
        output = tmp_path_factory.mktemp("runs") / method
        changes = {"method__name": method, "train__epochs": 1, "train__export_hf": False}
        # Decay must not reach the frozen router either.
        changes["optimizer__weight_decay"] = 0.1
        result = olmoe_jax.train(files.config(output, **changes))
        assert not (output / "hf").exists()
        assert min(losses(output).values()) < losses(output)[1]
        routers[method] = parameters(RunCheckpoint(output, result.step))[ROUTER]
    return routers


@pytest.mark.slow
def test_frozen_leaves_the_router_bit_identical(routers):
    assert routers["untrained"].shape == (2, 32, MODEL["num_experts"])
    np.testing.assert_array_equal(routers["frozen"], routers["untrained"])


@pytest.mark.slow
def test_conventional_and_densemixer_train_the_router_differently(routers):
    for one, other in (
        ("conventional", "untrained"),
        ("densemixer", "untrained"),
        ("densemixer", "conventional"),
    ):
        assert np.abs(routers[one] - routers[other]).max() > 1e-4, (one, other)
