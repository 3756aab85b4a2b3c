"""The golden numbers of the PyTorch reference, all of them in one process.

The checks are those of tools/check_reference.py beside the numbers, which runs one command for each
case; here the commands run in this process. Six run as real commands too, three of them with XLA's
optimisations.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import AS_USERS_COMPILE, load_safetensors, run_command_line

from olmoe_jax.checkpoints.source import read_model_config
from olmoe_jax.ops.routing import RouterStatistics, load_balancing_loss

pytestmark = pytest.mark.golden

SUITE = Path(os.environ.get("OLMOE_JAX_SHARED", "nowhere")) / "reference"
CASES = sorted(str(file.parent.relative_to(SUITE)) for file in SUITE.rglob("case.json"))
COMMANDS = {
    "core/combined/densemixer": False,
    "lora/densemixer_router_unfrozen": False,
    "lora/merged_bfloat16_gate": True,
    "esft/non_expert_modules_densemixer": False,
    "esft_select/small": False,
    "trajectory/densemixer_wd0.1": True,
}
"""Cases that run as commands too, and whether XLA optimises the command's programs.

Without optimisations, the programs are in the cache of those that run in this process.
"""


def in_process(*command: object) -> str:
    """Runs `python COMMAND` here; returns what the command prints."""
    option, module, *arguments = map(str, command)
    assert option == "-m"
    printed, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", [module, *arguments]),
    ):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(errors.getvalue()) from end
    return printed.getvalue()


def as_command(*command: object, optimised: bool) -> str:
    """Runs `python COMMAND`; returns what the command prints."""
    with mock.patch.dict(os.environ, AS_USERS_COMPILE if optimised else {}):
        code, out, error = run_command_line(*command)
    if code:
        raise RuntimeError(error)
    return out


@pytest.fixture(scope="module")
def checks(shared) -> ModuleType:
    """The module tools/check_reference.py."""
    file = shared / "tools" / "check_reference.py"
    spec = importlib.util.spec_from_file_location("check_reference", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problems(checks: ModuleType, name: str, work: Path) -> list[str]:
    """What differs in a case, in words; `work` keeps what the command writes."""
    folder = SUITE / name
    case = json.loads((folder / "case.json").read_text())
    kinds = {
        "trajectory": checks.check_trajectory,
        "merge": checks.check_merge,
        "esft_select": checks.check_select,
        "gradients": checks.check_gradients,
    }
    return kinds[case["kind"]](folder, case, work)


@pytest.mark.parametrize("name", CASES or ["all"])
def test_in_process(checks, monkeypatch, tmp_path, name):
    monkeypatch.setattr(checks, "run", in_process)
    assert not problems(checks, name, tmp_path)
    if name.startswith("core/"):
        folder = SUITE / name
        case = json.loads((folder / "case.json").read_text())
        expected = checks.expected_tensors(folder, case)["aux_loss"]
        ours = aux_loss(folder.parent, load_safetensors(tmp_path / "out.safetensors"))
        np.testing.assert_allclose(ours, expected, **case["tolerances"]["aux_loss"])


@pytest.mark.parametrize("name", COMMANDS)
def test_as_a_command(checks, monkeypatch, tmp_path, name):
    run = functools.partial(as_command, optimised=COMMANDS[name])
    monkeypatch.setattr(checks, "run", run)
    assert not problems(checks, name, tmp_path)


def test_every_kind_of_case_is_checked(shared):
    """The rows of data/cases.json are tests/data/test_data_formats.py's."""
    manifest = json.loads((shared / "reference" / "MANIFEST.json").read_text())["cases"]
    assert {name for name in manifest if not name.startswith("data")} == set(CASES)


def aux_loss(folder: Path, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Our load-balancing loss from the router logits that the command wrote, without padding."""
    real = load_safetensors(folder / "batch.safetensors")["attention_mask"].astype(bool)
    config = read_model_config(folder / "checkpoint")
    probabilities, loads = [], []
    for layer in range(config.num_layers):
        logits = tensors[f"router_logits.{layer}"].astype(np.float64)[real.reshape(-1)]
        p = np.asarray(jax.nn.softmax(logits))
        chosen = np.argsort(-p, axis=1)[:, : config.num_experts_per_token]
        probabilities.append(p.sum(0))
        loads.append(np.bincount(chosen.ravel(), minlength=config.num_experts))
    statistics = RouterStatistics(np.array(loads), np.array(probabilities), None, None)
    return load_balancing_loss(statistics, config.num_experts_per_token)
