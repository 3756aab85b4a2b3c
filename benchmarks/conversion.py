"""Converts a checkpoint of OLMoE-1B-7B's exact shapes there and back: time, memory, equality.

    python -m benchmarks.conversion --output DIR

Random bfloat16 weights in sharded safetensors (14 GB) are copied as files, converted by
convert.from_hf, and converted back by convert.to_hf. Each command runs in its own process and is
timed until its bytes are on the disk. Its peak memory is compared with that of a process that only
imports the same modules. DIR needs room for three copies; the checkpoint of an earlier run is used
again. With --forward, the checkpoint is then loaded and gives logits in bfloat16.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.memory import GIB, peak_resident_gib
from benchmarks.random_model import hf_config, write_random_model
from benchmarks.shapes import Shape, add_shape_flags, shape_of
from olmoe_jax.checkpoints import names
from olmoe_jax.checkpoints.huggingface import HFCheckpoint
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.files import read_json, user_path


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.conversion", description=__doc__)
    add_shape_flags(parser)
    parser.set_defaults(shape="full")
    parser.add_argument("--output", type=user_path, required=True)
    parser.add_argument("--forward", action="store_true", help="also load it and compute logits")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args(arguments)
    show = json.dumps if args.json else report
    result = {"machine": machine()} | measure(args.output, shape_of(args))
    print(show(result), flush=True)
    if args.forward:
        command = "import sys; from benchmarks.conversion import finite_logits as f; f(sys.argv[1])"
        result["forward"] = run("-c", command, str(args.output / "hf"))
        print(show(result))


def measure(output: Path, shape: Shape) -> dict[str, Any]:
    """Runs the commands one after the other. Returns their figures and if the weights are equal.

    Raises:
      UserError: `output` holds a checkpoint of another shape.
    """
    model, copy, ours, back = (output / name for name in ("hf", "copy", "converted", "back"))
    if not model.exists():
        write_random_model(model, shape, "bfloat16")
    elif read_json(dict[str, Any], model / "config.json") != hf_config(shape, "bfloat16"):
        raise UserError(f"{model}: is a checkpoint of another shape; write another --output")
    result = {"gib": sum(file.stat().st_size for file in model.iterdir()) / GIB}
    result["idle"] = run("-c", "import convert.from_hf, convert.to_hf")
    for path in (copy, ours, back):
        shutil.rmtree(path, ignore_errors=True)
    copying = "import shutil, sys; shutil.copytree(*sys.argv[1:])"
    result["copy"] = run("-c", copying, str(model), str(copy))
    shutil.rmtree(copy)
    result["from_hf"] = run("-m", "convert.from_hf", "--model", str(model), "--output", str(ours))
    result["to_hf"] = run("-m", "convert.to_hf", "--checkpoint", str(ours), "--output", str(back))
    shutil.rmtree(ours)
    result["bit_exact"] = same_weights(model, back)
    shutil.rmtree(back)
    return result


def run(*arguments: str) -> dict[str, float]:
    """Runs a Python command. Returns the seconds until its output is on disk, and its peak GiB."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"python {' '.join(arguments)} failed")
    os.sync()
    return {"seconds": time.perf_counter() - start, "peak_gib": peak}


def peak_of(pid: int) -> float:
    """Returns the most memory that a process ever held, in GiB; 0 if it has just ended."""
    try:
        return peak_resident_gib(pid)
    except OSError:
        return 0.0


def same_weights(one: Path, other: Path) -> bool:
    """Says if two checkpoints have the same tensors, bit for bit."""
    first, second = HFCheckpoint(one), HFCheckpoint(other)
    return all(
        first.read(weight, layer).tobytes() == second.read(weight, layer).tobytes()
        for weight in names.weights(first.config)
        for layer in names.layer_indices(weight, first.config)
    )


def finite_logits(path: str) -> None:
    """Loads a checkpoint and computes the logits of 16 tokens in bfloat16.

    Raises:
      UserError: a logit is not finite.
    """
    import jax.numpy as jnp

    import olmoe_jax
    from olmoe_jax.generation.likelihood import log_likelihoods
    from olmoe_jax.model.config import ModelSettings

    settings = ModelSettings(compute_dtype=jnp.bfloat16)
    model = olmoe_jax.from_pretrained(path, settings=settings)
    # Over the sum of all logits' exponentials: finite if they are.
    value, _ = log_likelihoods(model, [([0], range(1, 16))])[0]
    print(
        f"log p of 15 tokens: {value:.2f}; of any under equal odds: "
        f"{-15 * math.log(model.config.vocab_size):.2f}",
        file=sys.stderr,
    )
    if not math.isfinite(value):
        raise UserError(f"{path}: logits that are not finite")


def report(result: dict[str, Any]) -> str:
    """Returns the result as text for a person."""
    idle, copy = result["idle"]["peak_gib"], result["copy"]["seconds"]
    lines = [
        result["machine"],
        f"{result['gib']:.2f} GiB; a process that only imports holds {idle:.2f} GiB",
    ]
    for name in ("copy", "from_hf", "to_hf", "forward"):
        if name not in result:
            continue
        seconds, peak = result[name]["seconds"], result[name]["peak_gib"]
        lines.append(
            f"{name:8} {seconds:7.1f} s, {copy / seconds:5.2f} x the speed of copying the files; "
            f"peak {peak:.2f} GiB, {peak - idle:+.2f} over idle"
        )
    lines.append("bit-exact" if result["bit_exact"] else "NOT the same weights")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
