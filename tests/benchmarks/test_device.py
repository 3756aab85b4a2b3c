"""benchmarks.device: what was found is kept, whatever happens to a part or to the command."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, run_module

from benchmarks import device, device_golden, device_parts
from olmoe_jax.checkpoints import safetensors_file

ROW = 'print(\'{"size": 1234.5, "right": false}\', flush=True); '
KINDS = {
    "fine": (ROW, "done"),
    "wrong": (ROW + "raise SystemExit('error: no memory')", "failed with 1: error: no memory"),
    "crash": (ROW + "import os; os.abort()", "failed with -6: no message"),
    "cut off": (
        ROW + "print('{\"size\":', end=''); raise SystemExit(3)",
        "failed with 3: no message",
    ),
    "endless": (ROW + "import time; time.sleep(60)", "stopped after 2 s"),
}
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""
ABSENT = {
    *("datasets", "grain", "tensorboard", "transformers", "tokenizers", "torch", "matplotlib"),
    *("huggingface_hub", "safetensors", "httpx2", "sacrebleu", "pyarrow", "pandas", "peft"),
}


def rows(output):
    lines = (output / device.RESULTS).read_text().splitlines()
    return [record["row"] for record in map(json.loads, lines) if "row" in record]


@pytest.mark.parametrize("kind", KINDS)
def test_each_end_of_a_part_is_its_result(tmp_path, kind):
    script, expected = KINDS[kind]
    part = device.Part(kind, "Section", (sys.executable, "-c", script), 60)
    late = device.Part("late", "Section", (), 60)
    with device.Results(tmp_path, [part, late], trial=True) as results:
        outcome = device.run(part, 2 if kind == "endless" else 60, results)
        results.ended(part, outcome, 1.0)
    assert outcome == expected
    assert rows(tmp_path) == [{"size": 1234.5, "right": False}]
    page = (tmp_path / device.PAGE).read_text()
    assert "## Section\n\n| size | right |\n| --- | --- |\n| 1,234 | NO |\n" in page
    assert f"| {kind} | {expected} | 1 |\n| late | not reached | 0 |\n" in page


def test_only_backends_of_the_machine_are_proven(tmp_path):
    parts = device.parts("tiny")
    proofs = {part.name.split()[1] for part in parts if part.name.startswith("proofs")}
    with device.Results(tmp_path, parts, trial=True) as results:
        assert all(map(results.may_run, proofs)), "the machine part has said nothing yet"
        for what, found in {
            "attention": "chunked",
            "grouped matmul": "blocked, ragged_dot",
        }.items():
            results.found(parts[0], {"what": f"{what} backends", "found": found})
        assert {*filter(results.may_run, proofs)} == {"chunked", "blocked", "ragged_dot"}


def test_the_page_names_what_is_needed():
    text = (ROOT / "docs" / "devices" / "README.md").read_text()
    assert [name for name in device_parts.PACKAGES if name not in text] == []


def test_the_golden_cases_find_a_wrong_tensor(tmp_path):
    """The error is that of all experts together, and NaN is the largest."""
    exact = {f"grad.experts.{e}.up": np.full((2, 2), e + 1.0) for e in range(3)}
    cases = {
        "same": (exact, 0.0),
        "one": (exact | {"grad.experts.2.up": np.zeros((2, 2))}, (9 / 14) ** 0.5),
        "nan": (exact | {"loss": np.array(np.nan)}, np.nan),
    }
    for name, (tensors, error) in cases.items():
        wanted = exact | {"loss": np.array(2.0)}
        for file, content in (("a", {"loss": np.array(2.0)} | tensors), ("e", wanted)):
            safetensors_file.save(tmp_path / f"{file}-{name}", content)
        found, kind = device_golden.worst(tmp_path / f"a-{name}", tmp_path / f"e-{name}")
        np.testing.assert_allclose(found, error, rtol=1e-12)
        assert kind in {"one": ["grad.experts.N.up"], "nan": ["loss"]}.get(name, [kind])


def blocked(tmp_path):
    """An environment in which nothing imports what need not be there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKER.replace("{ABSENT}", repr(ABSENT)))
    return {
        "PYTHONPATH": str(tmp_path / "site"),
        "OLMOE_JAX_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
    }


def test_the_golden_inputs_need_no_other_package(tmp_path):
    script = "import pathlib, benchmarks.device_golden as g; g.write_inputs(pathlib.Path())"
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | blocked(tmp_path) | {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"},
        check=True,
    )
    assert {"batch.safetensors", "experts.json"} < {file.name for file in tmp_path.iterdir()}
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 1000


@pytest.mark.slow
def test_killed_halfway(tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.device", "--minutes=5", f"--output={output}"]
    flags = ["--shape=tiny", "--parts", "machine", "matmul", "decoding"]
    with subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=os.environ | blocked(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("matmul: dtype bfloat16"):
                process.kill()
    page = (output / device.PAGE).read_text()
    assert page.startswith("# 1 x cpu (cpu)")
    assert "\n| machine | done | " in page
    assert "\n| decoding | not reached | 0 |\n" in page
    assert rows(output)[-1]["dtype"] == "bfloat16"
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-f", f"directory={output}"], check=False).returncode == 0:
        assert time.monotonic() < deadline, "the part lives on and holds the device"
        time.sleep(0.2)
    code, _, error = run_module("benchmarks.device", "--minutes=5", f"--output={output}")
    assert (code, error) == (
        2,
        f"error: --output={output}: holds results; write another directory\n",
    )


@pytest.mark.slow
def test_terminated_halfway(tmp_path):
    """`timeout` ends the command with SIGTERM, and the part with it."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.device", "--minutes=5", f"--output={output}"]
    with subprocess.Popen(
        [*command, "--shape=tiny", "--parts", "machine"],
        cwd=ROOT,
        env=os.environ | blocked(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert rows(output)[0]["what"] == "date"
    assert subprocess.run(["pgrep", "-f", f"directory={output}"], check=False).returncode == 1


@pytest.mark.exhaustive
def test_all_parts_on_the_cpu(tmp_path):
    output = tmp_path / "out"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.device", "--minutes=30", "--shape=tiny"),
            f"--output={output}",
        ],
        cwd=ROOT,
        env=os.environ | blocked(tmp_path),
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    parts = [json.loads(line) for line in (output / device.RESULTS).read_text().splitlines()]
    outcomes = {part["part"]: part["outcome"] for part in parts if "outcome" in part}
    absent = {f"proofs {name}" for name in ("mosaic", "pallas_triton", "splash", "ragged_dot")}
    absent |= {"proofs cudnn", "proofs tokamax"}
    assert {name for name, outcome in outcomes.items() if outcome != "done"} == absent
    assert {outcomes[name] for name in absent} == {"not on this machine"}
    found = rows(output)
    assert all(row.get("right", True) and row.get("bit-identical", True) for row in found)
    for section, count in {
        "loss": 9,
        "planned GiB": 4,
        "batch": 3,
        "killed after step": 2,
    }.items():
        assert sum(section in row for row in found) == count
    assert "NO" not in result.stdout
