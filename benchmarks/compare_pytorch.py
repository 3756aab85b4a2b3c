"""Times our training step against PyTorch's: python -m benchmarks.compare_pytorch

Both sides run forward and backward at the same shape in float32 on the same number of CPU cores.
DenseMixer is compared with the reference (densemixer on transformers 4), conventional training with
transformers 4 and 5, LoRA with PEFT, and ESFT with transformers 4, where all but 8 experts of each
layer are frozen, as in the reference. In each round every side runs once, in its own process, one
after the other, with the huge pages that train.py asks for. A side's time is the best of all its
steps. Our side runs with model.remat=selective, which computes no matmul twice.

PyTorch's threads spin while they wait for each other, so that other work on these cores costs
PyTorch many times its share. Measure on an idle machine, or with --threads 1 and compare the CPU
time. The first run makes the virtual environments of the PyTorch sides.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.timing import in_rounds, use_cores
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.files import user_path
from olmoe_jax.parallel.cpu import TUNABLES
from olmoe_jax.root import ROOT

VENVS = {
    "reference": ("torch==2.13.0", "numpy", "transformers==4.51.3", "densemixer==1.0.1"),
    "transformers5": ("torch==2.13.0", "numpy", "transformers==5.23.0", "peft==0.21.2"),
}
OURS = None


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the compared programs: ours, or PyTorch's in one of VENVS."""

    name: str
    venv: str | None
    flags: tuple[str, ...]


EXACT = Side("ours", OURS, ("--method=densemixer",))
APPROXIMATE = Side("ours, m=16", OURS, ("--method=densemixer", "--router_gradient_experts=16"))
REFERENCE = Side("densemixer 1.0.1", "reference", ("--method=densemixer",))
CONVENTIONAL = (
    Side("ours", OURS, ("--method=conventional",)),
    Side("transformers 4.51.3", "reference", ("--method=conventional",)),
    Side(
        "transformers 5.23.0, grouped_mm",
        "transformers5",
        ("--method=conventional", "--experts_implementation=grouped_mm"),
    ),
)
LORA = ("--method=conventional", "--lora_rank=16")
ADAPTERS = (
    # PEFT drops no inputs of adapters beside fused experts.
    Side("ours", OURS, (*LORA, "--lora_dropout=0")),
    Side(
        "peft 0.21.2 on transformers 5.23.0",
        "transformers5",
        (*LORA, "--experts_implementation=grouped_mm"),
    ),
)
ESFT = (
    Side("ours", OURS, ("--method=esft", "--tuned_experts=8")),
    Side("transformers 4.51.3", "reference", ("--method=conventional", "--tuned_experts=8")),
)
SMALL = ("--vocab=2048",)
CASES: dict[str, tuple[tuple[str, ...], tuple[Side, ...]]] = {
    "densemixer": (SMALL, (EXACT, APPROXIMATE, REFERENCE)),
    "conventional": (SMALL, CONVENTIONAL),
    "conventional_large_vocabulary": (("--vocab=50304",), CONVENTIONAL),
    "conventional_long_row": ((*SMALL, "--rows=1", "--length=4096"), CONVENTIONAL),
    "lora": (SMALL, ADAPTERS),
    "esft": (SMALL, ESFT),
}
"""The shape's flags and the sides of each case. The other sides are compared with the first one."""


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.compare_pytorch", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--shape", default="mid", help="shape of benchmarks.step")
    parser.add_argument("--rounds", type=whole_number(1), default=3)
    parser.add_argument(
        "--steps", type=whole_number(1), default=3, help="steps of a side in a round"
    )
    parser.add_argument("--threads", type=whole_number(1), default=2, help="CPU cores to use")
    parser.add_argument("--venvs", type=user_path, default=ROOT / "build" / "pytorch")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    args = parser.parse_args(arguments)
    use_cores(args.threads)
    venvs = args.venvs.absolute()
    for name in sorted({side.venv for case in args.cases for side in CASES[case][1]} - {OURS}):
        make_venv(venvs / name, VENVS[name])
    results = {case: compare(case, args, venvs) for case in args.cases}
    print(json.dumps(results, indent=2) if args.json else table(results))


def make_venv(path: Path, requirements: Sequence[str]) -> None:
    """Installs the requirements into a new virtual environment, unless it exists already."""
    complete = path / "complete"
    if complete.exists() and complete.read_text().split() == list(requirements):
        return
    print(f"installing {' '.join(requirements)} into {path}", file=sys.stderr)
    shutil.rmtree(path, ignore_errors=True)
    run_checked([sys.executable, "-m", "venv", path])
    run_checked([path / "bin" / "python", "-m", "pip", "install", "--quiet", *requirements])
    complete.write_text("\n".join(requirements))


def compare(case: str, args: argparse.Namespace, venvs: Path) -> list[dict[str, Any]]:
    """Runs all rounds of a case. Returns each side's best time, peak memory and ratio."""
    shape, sides = CASES[case]
    print(f"{case}:", file=sys.stderr)
    programs = {side.name: functools.partial(run_side, side, shape, args, venvs) for side in sides}
    results: list[dict[str, Any]] = []
    for name, of_side in in_rounds(programs, args.rounds).items():
        results.append(
            {
                "side": name,
                "seconds": min(min(run["step_seconds"]) for run in of_side),
                "cpu_seconds": min(min(run["step_cpu_seconds"]) for run in of_side),
                "peak_resident_gib": max(run["peak_resident_gib"] for run in of_side),
                "peak_over_model_gib": max(run["peak_over_model_gib"] for run in of_side),
                "loss": of_side[0]["loss"],
                "step_seconds": [run["step_seconds"] for run in of_side],
            }
        )
    for result in results:
        if abs(result["loss"] - results[0]["loss"]) > 0.1:
            raise UserError(
                f"{case}: {result['side']} has another loss, so it computes something else"
            )
        result["ratio"] = result["seconds"] / results[0]["seconds"]
        rounds = zip(result["step_seconds"], results[0]["step_seconds"], strict=True)
        result["ratio_of_round"] = [min(steps) / min(ours) for steps, ours in rounds]
    return results


def run_side(
    side: Side, shape: Sequence[str], args: argparse.Namespace, venvs: Path
) -> dict[str, Any]:
    """Runs one process of a side. Returns what its script prints."""
    flags = [f"--shape={args.shape}", *shape, f"--steps={args.steps}", *side.flags]
    if side.venv is OURS:
        command = [sys.executable, "-m", "benchmarks.step", "--json", "--remat=selective", *flags]
    else:
        python = venvs / side.venv / "bin" / "python"
        command = [python, "-m", "benchmarks.pytorch_step", f"--threads={args.threads}", *flags]
    result = result_of(command)
    if (spread := result.get("router_spread")) is not None:
        patched = side is REFERENCE
        if patched != (spread > 1e-3):
            raise UserError(f"{side.name}: the densemixer patch is {'not ' * patched}in effect")
    return result


def result_of(command: Sequence[str | Path]) -> dict[str, Any]:
    """Runs a command. Returns the JSON object that it prints last."""
    return json.loads(run_checked(command).splitlines()[-1])


def run_checked(command: Sequence[str | Path]) -> str:
    """Runs a command. Returns its standard output."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | TUNABLES
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{' '.join(map(str, command))}: {reason}")
    return result.stdout


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Returns the results as a Markdown table, below what they were measured on."""
    lines = [
        machine(),
        "",
        "| case | side | seconds | times ours | in each round | CPU seconds | peak memory, GiB | "
        "over the model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, sides in results.items():
        for result in sides:
            rounds = ", ".join(f"{ratio:.2f}" for ratio in result["ratio_of_round"])
            lines.append(
                f"| {case} | {result['side']} | {result['seconds']:.3f} | {result['ratio']:.2f} | "
                f"{rounds} | {result['cpu_seconds']:.3f} | "
                f"{result['peak_resident_gib']:.2f} | {result['peak_over_model_gib']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
