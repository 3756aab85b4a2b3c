"""Scores -> experts, by hand and against the published scripts; the files and their mistakes."""

import json

import numpy as np
import pytest
from helpers import assert_user_error, run_module
from tiny import tiny_config

from olmoe_jax import esft as command
from olmoe_jax.checkpoints.expert_config import ExpertConfig, read_expert_config
from olmoe_jax.checkpoints.safetensors_file import load
from olmoe_jax.errors import UserError
from olmoe_jax.methods.selection import read_scores, scores_to_json, select

CONFIG = tiny_config()
SCORES = np.array([[0.1, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 8.0]])


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        # Layer 1: 0.4, 0.7, 0.9, 1.0; layer 2: quarters, ties by id; layer 3: all in one.
        (0.05, ((1,), (0,), (3,))),
        (0.4, ((1,), (0, 1), (3,))),
        (0.41, ((1, 2), (0, 1), (3,))),
        (0.75, ((1, 2, 3), (0, 1, 2), (3,))),
        # More than everything: every expert, those without a score too.
        (1.1, ((0, 1, 2, 3),) * 3),
    ],
)
def test_by_hand(top_p, expected):
    assert select(SCORES, top_p).experts == expected
    # Only shares count.
    assert select(SCORES * [[3.0], [0.5], [7.0]], top_p).experts == expected


def test_across_layers_by_hand():
    """An expert's shares over layers: 1: [.75, .25], 2: [0, 1]; the layers rolled by one."""
    scores = np.array([[0.75, 0.0], [0.25, 1.0]])
    assert select(scores, 0.5, "across_layers").experts == ((1,), (0,))
    assert select(scores, 0.5, "within_layer").experts == ((0,), (1,))


def test_a_dead_expert_is_chosen_last():
    scores = np.array([[0.0, 0.5, 0.5], [0.0, 0.2, 0.8]])
    for normalization in ("within_layer", "across_layers"):
        assert select(scores, 0.9, normalization).experts == ((1, 2), (1, 2))
    with np.errstate(all="raise"):
        assert select(np.zeros((2, 3)), 0.5).experts == ((0, 1, 2), (0, 1, 2))


CASES = ("small", "olmoe_shaped", "dead_expert")


def json_scores(table) -> np.ndarray:
    return np.array([list(row.values()) for row in table.values()], float)


@pytest.mark.parametrize("case", CASES)
def test_reference_from_gate_logits(shared, case):
    """Raw scores by numpy; across_layers is what the published scripts print."""
    folder = shared / "reference/esft_select" / case
    content = json.loads((folder / "case.json").read_text())
    logits = load(folder / "gate_logits.safetensors")
    layers, top_k = content["sizes"]["layers"], content["sizes"]["top_k"]
    names = sorted(logits, key=lambda name: int("".join(filter(str.isdigit, name)) or 0))
    stacked = np.stack([logits[name] for name in names]) if len(names) > 1 else logits[names[0]]
    stacked = stacked.astype(np.float64).reshape(layers, -1, content["sizes"]["experts"])
    exponentials = np.exp(stacked - stacked.max(-1, keepdims=True))
    # The scripts pass probabilities through text with six decimals.
    probabilities = np.round(exponentials / exponentials.sum(-1, keepdims=True), 6)
    compared = 0
    for trial in content["runs"]:
        if trial["score_function"] == "gate":
            raw = probabilities.mean(axis=1)
        else:
            raw = (probabilities >= trial["token_threshold"]).mean(axis=1) / top_k
        corrected = trial["expected_corrected"]
        within = raw / raw.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(within, json_scores(corrected["scores"]), atol=1.5e-4)
        if case == "dead_expert":  # 0 / 0 in the scripts: not imitated
            continue
        target = trial["expected"]
        chosen = select(raw, trial["top_p"], "across_layers").to_json()["experts"]
        wanted = target["expert_config"]["experts"]
        assert {k: sorted(v) for k, v in chosen.items()} == {
            k: sorted(v) for k, v in wanted.items()
        }
        compared += 1
    assert compared or case == "dead_expert"


# Files


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def valid_experts():
    return {"experts": {"1": [3, 1], "2": []}, "shared_experts": False, "non_expert_modules": True}


def test_expert_config_round_trip(tmp_path):
    config = read_expert_config(write(tmp_path / "e.json", valid_experts()), CONFIG)
    assert config == ExpertConfig(((1, 3), ()), True)
    again = read_expert_config(write(tmp_path / "f.json", config.to_json()), CONFIG)
    assert again == config
    assert config.to_json() == valid_experts() | {"experts": {"1": [1, 3], "2": []}}


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ({"1": [0], "2": [8]}, "layer 2 has [8]; write different ids from 0 to 7"),
        ({"1": [-1], "2": []}, "layer 1 has [-1]; write different ids from 0 to 7"),
        ({"1": [1.0], "2": []}, "experts.1.0 is 1.0; it must be a whole number"),
        ({"1": [True], "2": []}, "experts.1.0 is true; it must be a whole number"),
        ({"1": ["1"], "2": []}, 'experts.1.0 is "1"; it must be a whole number'),
        ({"1": 1, "2": []}, "experts.1 is 1; it must be a list"),
        ({"1": [2, 5, 2], "2": []}, "layer 1 has [2, 5, 2]; write different ids from 0 to 7"),
        ({"1": [0], "2": [1], "3": [2]}, "layer 3: this model's layers are 1 to 2"),
        ({"0": [0], "1": [1], "2": [2]}, "layer 0: this model's layers are 1 to 2"),
        ({"1": [0]}, "layer 2 is missing; write [] where a layer trains no expert"),
        ({"1": [], "2": []}, "names no expert; write ids for at least one layer"),
        ([[0], [1]], "experts is [[0],[1]]; it must be an object"),
    ],
)
def test_bad_expert_config(tmp_path, experts, expected):
    file = write(tmp_path / "e.json", {"experts": experts})
    with pytest.raises(UserError) as caught:
        read_expert_config(file, CONFIG)
    assert str(caught.value).startswith(f"{file}: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [[], 3, {}, {"experts": None}])
def test_not_an_expert_config(tmp_path, content):
    with pytest.raises(UserError, match=r"experts is missing|must be an object"):
        read_expert_config(write(tmp_path / "e.json", content), CONFIG)


def test_shared_experts_are_refused(tmp_path):
    file = write(tmp_path / "e.json", valid_experts() | {"shared_experts": True})
    with pytest.raises(UserError, match="shared_experts is true, but OLMoE has none; write false"):
        read_expert_config(file, CONFIG)


def test_scores_round_trip(tmp_path):
    scores = {"gate": SCORES, "token": SCORES / 3}
    file = write(tmp_path / "s.json", scores_to_json(scores))
    for function, values in scores.items():
        np.testing.assert_array_equal(read_scores(file, function), values)
    assert json.loads(file.read_text())["gate_scores"]["1"] == {
        "0": 0.1,
        "1": 0.4,
        "2": 0.3,
        "3": 0.2,
    }


def damaged(**changes):
    table = scores_to_json({"gate": SCORES})["gate_scores"]
    for name, row in changes.items():
        layer = name.removeprefix("layer")
        table[layer] = row if not isinstance(row, dict) else table.get(layer, {}) | row
    return table


def without(table, key):
    return {k: v for k, v in table.items() if k != key}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (without(damaged(), "1"), '"gate_scores" lacks layer 1 (layers count from 1)'),
        (without(damaged(), "2"), '"gate_scores" lacks layer 2 (layers count from 1)'),
        ({"0": {"0": 1.0}}, '"gate_scores" lacks layer 1'),
        ({**damaged(), "2": without(damaged()["2"], "3")}, '"gate_scores" layer 2 needs a number'),
        (damaged(layer2={"4": 0.5}), '"gate_scores" layer 2 needs a number for each expert, "0"'),
        (damaged(layer1=[0.5]), "gate_scores.1 is [0.5]; it must be an object"),
        (damaged(layer1={"1": None}), "gate_scores.1.1 is null; it must be a number"),
        (damaged(layer3={"2": "x"}), 'gate_scores.3.2 is "x"; it must be a number'),
        (damaged(layer3={"2": -0.1}), "gate_scores.3.2 is -0.1; it must be greater than or equal"),
        (damaged(layer3={"2": float("nan")}), "gate_scores.3.2 is NaN; it must be a finite number"),
        (damaged(layer3={"2": 1e308}), "gate_scores.3.2 is 1e+308; it must be less than"),
    ],
)
def test_bad_scores(tmp_path, table, expected):
    file = write(tmp_path / "s.json", {"gate_scores": table})
    with pytest.raises(UserError) as caught:
        read_scores(file, "gate")
    assert str(caught.value).startswith(f"{file}: {expected}")


def test_scores_of_the_other_function(tmp_path):
    file = write(tmp_path / "s.json", {"gate_scores": damaged()})
    with pytest.raises(UserError, match=r'has no "token_scores"; make one with olmoe_jax\.esft'):
        read_scores(file, "token")


# The command


def arguments(tmp_path, **changes):
    values = {"scores": tmp_path / "s.json", "function": "gate", "top_p": 0.4}
    values |= {"output": tmp_path / "out.json"} | changes
    write(tmp_path / "s.json", scores_to_json({"gate": SCORES}))
    return ["select", *(f"--{name}={value}" for name, value in values.items())]


def test_command(tmp_path, capsys):
    command.main(arguments(tmp_path))
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "experts": {"1": [1], "2": [0, 1], "3": [3]},
        "shared_experts": False,
        "non_expert_modules": False,
    }
    assert "selected 4 experts, 1 to 2 a layer" in capsys.readouterr().out
    command.main([*arguments(tmp_path, top_p=1.1), "--non_expert_modules"])
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["non_expert_modules"]
    assert all(len(ids) == 4 for ids in content["experts"].values())


@pytest.mark.parametrize("top_p", [0, -0.5, 1.2])
def test_top_p_out_of_range(tmp_path, top_p):
    with pytest.raises(
        UserError, match=r"--top_p=.*: must be above 0 and at most 1; write e\.g\. 0\.2"
    ):
        command.main(arguments(tmp_path, top_p=top_p))
    assert not (tmp_path / "out.json").exists()


def test_command_mistakes(tmp_path):
    """In a process of its own: exit code 2, one line, nothing written."""
    bad = arguments(tmp_path, scores=tmp_path / "none.json")
    assert_user_error(run_module("olmoe_jax.esft", *bad), tmp_path / "none.json", "no such file")
    nowhere = tmp_path / "missing" / "out.json"
    with pytest.raises(FileNotFoundError, match=r"missing/out\.json"):
        command.main(arguments(tmp_path, output=nowhere))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.json"]
