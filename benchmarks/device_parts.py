"""The parts of `benchmarks.device`: each runs in a process of its own and prints rows of JSON.

`python -m benchmarks.device_parts NAME …` runs one of them alone.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import device_golden
from benchmarks.shapes import SHAPES, Shape
from olmoe_jax.errors import (
    ArgumentParser,
    UserError,
    first_line,
    run_command,
    shorten,
    whole_number,
)
from olmoe_jax.root import ROOT

STARTED = time.time()
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
    *("numpy", "pydantic", "typing_extensions", "xxhash", "tqdm"),
)
"""The parts need these packages; their own requirements come with them."""
FEW_EXPERTS = {"tiny": 4}
LORA_RANK = {"tiny": 8}
STEPS = {
    "conventional": ("--method=conventional",),
    "densemixer": ("--method=densemixer",),
    "m16": ("--method=densemixer", "--router_gradient_experts={few}"),
    "float8": ("--method=densemixer", "--router_gradient_dtype=float8_e4m3fn"),
    "lora": ("--method=densemixer", "--lora_rank={rank}"),
    "esft": ("--method=esft", "--tuned_experts={few}"),
}
"""The flags of benchmarks.step for each kind of training."""
PLANNED = ("densemixer", "lora", "esft")
"""The kinds that take different memory, in order of worth: a compilation takes half a minute."""
LEAN = ("--gradients_dtype=bfloat16", "--moments_dtype=bfloat16")
"""Flags with which full fine-tuning of OLMoE-1B-7B fits one GPU of 80 GB (docs/planning.md)."""

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.device_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--backend", help="proofs: of the grouped matmul, or of attention")
    parser.add_argument("--kind", choices=STEPS, default="densemixer", help="step: what trains")
    parser.add_argument(
        "--rows", type=whole_number(1), nargs="+", default=[1, 4], help="step: of a batch"
    )
    parser.add_argument("--remat", choices=("full", "selective", "none"), default="full")
    parser.add_argument("--steps", type=whole_number(1), default=5)
    parser.add_argument("--directory", type=Path, help="where to read and write")
    args = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for row in PARTS[args.part](args):
        print(json.dumps(row), flush=True)


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent is gone: it would keep the device's memory."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def machine(args: argparse.Namespace) -> Iterator[Row]:
    """The device, the driver, the versions and the date."""
    from olmoe_jax import accelerator

    now = datetime.datetime.now(datetime.UTC)
    yield {"what": "date", "found": now.isoformat(timespec="minutes")}
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    yield {"what": "versions", "found": f"Python {sys.version.split()[0]}, {', '.join(versions)}"}
    if missing:
        yield {"what": "missing", "found": f"pip install {' '.join(missing)}"}
    yield {"what": "driver", "found": accelerator.detect()[1]}
    if program := shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,power.limit,clocks.max.sm"
        command = [program, f"--query-gpu={query}", "--format=csv,noheader"]
        smi = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        yield {"what": query, "found": smi.stdout.strip()}
    import jax

    from olmoe_jax.ops import attention, grouped_matmul

    devices, platform = jax.devices(), jax.default_backend()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0) / 2**30
    memory = f", {limit:.1f} GiB for jax" if limit else ""
    kind = f"{len(devices)} x {devices[0].device_kind} ({platform}){memory}"
    yield {"what": "devices", "found": kind}
    head, dtype = _head_size(SHAPES[args.shape]), _dtypes()[0]
    for name, module in (("grouped matmul", grouped_matmul), ("attention", attention)):
        size = (head, dtype) if module is attention else ()
        yield {"what": f"default {name}", "found": module.check_backend(None, platform, *size)}
        yield {"what": f"{name} backends", "found": ", ".join(_usable(module, platform, *size))}


def _usable(module: Any, platform: str, *size: Any) -> Iterator[str]:
    """Yields the backends that run on the platform and are installed."""
    for backend in module.BACKENDS:
        with contextlib.suppress(UserError):
            yield module.check_backend(backend, platform, *size)


def proofs(args: argparse.Namespace) -> Iterator[Row]:
    """Each backend at the model's sizes: its error against plain XLA, and its time."""
    from olmoe_jax.ops import attention, grouped_matmul, proof

    shape, backend = SHAPES[args.shape], args.backend
    sizes, rank = (shape.hidden, shape.intermediate), LORA_RANK.get(args.shape, 64)
    rows = shape.tokens * shape.experts_per_token
    heads = (shape.heads, shape.heads, _head_size(shape))
    for dtype in _dtypes():
        cases: list[tuple[Any, Any, tuple[int, ...], int | None]] = []
        if backend in attention.BACKENDS:
            run = proof.prove_attention, proof.time_attention
            cases.append((*run, (1, shape.length, *heads), None))
        if backend in grouped_matmul.BACKENDS:
            matrices = [sizes, sizes[::-1], (sizes[0], rank), (rank, sizes[0]), (sizes[0], 8)]
            run = proof.prove_grouped_matmul, proof.time_grouped_matmul
            # Programs take seconds to compile: the type that trains here gets all sizes.
            for matrix in matrices if dtype == _dtypes()[0] else matrices[:1]:
                # An eighth of the rows belongs to no group.
                flops = 3 * 2 * (rows - rows // 8) * matrix[0] * matrix[1]
                cases.append((*run, (rows, *matrix, shape.experts), flops))
        for prove, measure, size, flops in cases:
            row: Row = {"backend": backend, "dtype": dtype, "sizes": "x".join(map(str, size))}
            try:
                error = prove(backend, size, dtype)
                row |= {"error": error, "right": error <= proof.tolerance(dtype)}
                seconds = measure(backend, size, dtype)
                row |= {"ms": seconds * 1e3}
                row |= {"TFLOP/s": flops / seconds / 1e12} if flops else {}
            except Exception as failure:  # a compiler's, of any type: it is this case's result
                row |= {"right": False, "failed": shorten(first_line(failure), 200)}
            yield row


def golden(args: argparse.Namespace) -> Iterator[Row]:
    """Loss, logits and gradients of convert.parity on this device, against the CPU's in float32."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        device_golden.write_inputs(directory)
        flags = ["golden_numbers", f"--directory={directory}"]
        _child(flags, JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        for case, dtype, here in device_golden.numbers(directory, "device"):
            exact, rounded = (directory / f"cpu-{case}-{kind}" for kind in device_golden.LIMITS)
            error, worst = device_golden.worst(here, exact)
            row = {"case": case, "dtype": dtype, "error": error, "of": worst}
            allowed = device_golden.LIMITS[dtype]
            if dtype == "bfloat16":
                row["error on the CPU"] = device_golden.worst(rounded, exact)[0]
                allowed *= row["error on the CPU"]
            yield row | {"right": error <= allowed}


def golden_numbers(args: argparse.Namespace) -> Iterator[Row]:
    """Writes convert.parity's numbers of all cases on the CPU."""
    for case, dtype, _ in device_golden.numbers(args.directory, "cpu"):
        yield {"case": case, "dtype": dtype}


def matmul(args: argparse.Namespace) -> Iterator[Row]:
    """The speed of a large square matmul: what everything else is a share of."""
    import jax.numpy as jnp

    from benchmarks.step import dense_matmul
    from olmoe_jax.ops.proof import best_seconds

    for dtype in ("bfloat16", "float32"):
        multiply, flops = dense_matmul(jnp.dtype(dtype))
        yield {"dtype": dtype, "TFLOP/s": flops / best_seconds(multiply) / 1e12}


def step(args: argparse.Namespace) -> Iterator[Row]:
    """Steps with their update, on random tokens; the rows are those of each device."""
    import jax

    from benchmarks import step as benchmark

    for rows in args.rows:
        flags = step_flags(args.shape, args.kind, rows * jax.device_count())
        flags = benchmark.make_parser().parse_args(flags)
        flags.remat, flags.steps = args.remat, args.steps
        gc.collect()  # the state of the rows before
        result = benchmark.measure(flags)
        seconds, flops = min(result["step_seconds"]), result["flops_per_step"]
        yield {
            "kind": args.kind,
            "rows": rows,
            "remat": args.remat,
            "ms": seconds * 1e3,
            "tokens/s": result["tokens_per_step"] / seconds,
            "model TFLOP/s": flops / seconds / 1e12,
            "of the matmul": flops / seconds / result["matmul_flops_per_second"],
            "peak GiB": result["peak_memory_gib"],
            "loss": result["loss"],
            "first step after s": result["first_step"] - STARTED,
        }


def step_flags(shape: str, kind: str, rows: int) -> list[str]:
    """Returns the flags of benchmarks.step, with the smallest state that a GPU of 80 GB needs."""
    sizes = {"few": FEW_EXPERTS.get(shape, 16), "rank": LORA_RANK.get(shape, 64)}
    flags = [f"--shape={shape}", f"--rows={rows}", "--what=update"]
    flags += [flag.format(**sizes) for flag in STEPS[kind]]
    return [*flags, *(LEAN if SHAPES[shape].compute_dtype == "bfloat16" else ())]


def plan(args: argparse.Namespace) -> Iterator[Row]:
    """Yields the plan of each step that was measured, compiled for an H100 on the CPU."""
    from olmoe_jax.plan.devices import open_devices, parse_topology, prepare_environment

    measured = [row for row in read_rows(args.directory, "step") if row["kind"] in PLANNED]
    measured.sort(key=lambda row: (row["rows"], PLANNED.index(row["kind"])))
    on_cpu = any("(cpu)" in row["found"] for row in read_rows(args.directory, "machine"))
    topology = parse_topology("cpu:1" if on_cpu else "h100:1")
    prepare_environment(topology)
    import jax

    from benchmarks import step as benchmark
    from benchmarks.shapes import shape_of
    from olmoe_jax.parallel.sharding import make_mesh
    from olmoe_jax.plan.programs import StepPrograms
    from olmoe_jax.training.base_model import with_backends

    jax.config.update("jax_platforms", "cpu")
    # Programs for a device that is described cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh(devices=open_devices(topology))
    for row in measured:
        flags = step_flags(args.shape, row["kind"], row["rows"])
        parsed = benchmark.make_parser().parse_args([*flags, f"--remat={row['remat']}"])
        config, model = benchmark.setup(parsed, shape_of(parsed))
        compute = with_backends(model.compute, model.config, topology.kind.platform)
        settings = model.method.model_settings(compute)
        programs = StepPrograms(config, model.config, settings, model.method, mesh)
        needs = max(programs.compile(name, 1).needs for name in ("accumulate", "update")) / 2**30
        same = {name: row[name] for name in ("kind", "rows", "remat")}
        ratio = row["peak GiB"] / needs
        yield same | {"planned GiB": needs, "measured GiB": row["peak GiB"], "ratio": ratio}


def read_rows(output: Path, begin: str) -> Iterator[Row]:
    """Yields the rows of the parts whose names begin with `begin`."""
    for line in (output / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["part"].startswith(begin) and "row" in record:
            yield record["row"]


def decoding(args: argparse.Namespace) -> Iterator[Row]:
    """Greedy decoding of random prompts of 64 tokens, their prefill included."""
    import dataclasses

    from benchmarks.generation import decode
    from benchmarks.random_model import random_model
    from olmoe_jax.parallel import sharding

    shape, new = SHAPES[args.shape], 128 if args.shape == "full" else 32
    mesh = sharding.decoding_mesh(shape.experts)
    model = random_model(shape, mesh)
    for batch in (1, 16, 64):
        prompts = dataclasses.replace(shape, rows=batch, length=64)
        seconds = min(decode(model, mesh, prompts, new, 2)["seconds"])
        yield {"batch": batch, "new tokens": new, "s": seconds, "tokens/s": batch * new / seconds}


def first_step(args: argparse.Namespace) -> Iterator[Row]:
    """The time from a command to the end of its first step, without and with its programs kept."""
    with tempfile.TemporaryDirectory() as cache:
        for kept in ("no (cold)", "yes (warm)"):
            flags = ["step", f"--shape={args.shape}", "--rows=1", "--steps=1"]
            (row,) = _child(flags, JAX_COMPILATION_CACHE_DIR=cache)
            yield {"programs kept": kept, "first step after s": row["first step after s"]}


def resume(args: argparse.Namespace) -> Iterator[Row]:
    """A run that is killed and continued, against one that is not."""
    # A run of the full shape does not fit every disk.
    shape = "tiny" if args.shape == "tiny" else "mid"
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        flags = ["resume_run", f"--shape={shape}", "--steps=8", "--directory"]
        programs = {"JAX_COMPILATION_CACHE_DIR": str(directory / "programs")}
        whole = {row["step"]: row for row in _child([*flags, str(directory / "a")], **programs)}
        for kept in ("yes", "no"):
            run = str(directory / f"b-{kept}")
            first = _child([*flags, run], kill_after=5, **programs)
            if kept == "no":
                programs = {"JAX_COMPILATION_CACHE_DIR": str(directory / "others")}
            rest = _child([*flags, run], **programs)
            both = [*first, *rest]
            wrong = [row["step"] for row in both if row != whole[row["step"]]]
            yield {
                "programs kept": kept,
                "killed after step": first[-1]["step"],
                "continued with step": rest[0]["step"],
                "bit-identical": not wrong,
                "first difference": f"step {wrong[0]}" if wrong else "none",
            }


def resume_run(args: argparse.Namespace) -> Iterator[Row]:
    """A run of `args.steps` steps with a checkpoint after every second one."""
    import jax
    import numpy as np
    import xxhash

    from benchmarks import step as benchmark
    from benchmarks.shapes import shape_of
    from olmoe_jax.parallel.sharding import make_mesh
    from olmoe_jax.training.checkpoint import Checkpointer

    flags = [f"--shape={args.shape}", "--layers=2", "--what=update"]
    flags = benchmark.make_parser().parse_args([*flags, f"--compute_dtype={_dtypes()[0]}"])
    shape, mesh = shape_of(flags), make_mesh()
    with jax.set_mesh(mesh):
        program, _ = benchmark.build(flags, shape, mesh)
        batch = program.to_devices(benchmark.random_batch(shape))
        checkpoints = Checkpointer(args.directory, keep=2, identity={})
        restored = checkpoints.restore(program.state)
        state, done = (restored.state, restored.step) if restored else (program.state, 0)
        for index in range(done, args.steps):
            state, metrics = program.step(state, [batch], index)
            arrays = jax.device_get(jax.tree.leaves(state))
            bits = xxhash.xxh3_128_hexdigest(b"".join(np.asarray(x).tobytes() for x in arrays))
            yield {"step": index + 1, "loss": float(metrics.loss), "state": bits}
            if index % 2:
                checkpoints.save(index + 1, state, {}, {}, {}, None)
                checkpoints.wait()
        checkpoints.close()


def _child(flags: Sequence[str], kill_after: int | None = None, **environment: str) -> list[Row]:
    """Runs a part as a process of its own; kills it after that many rows. Returns its rows.

    Raises:
      UserError: the part failed.
    """
    command = [sys.executable, "-m", "benchmarks.device_parts", *flags]
    rows = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            rows += [row] if (row := parse_row(line)) else []
            if len(rows) == kill_after:
                process.kill()
                return rows
    if process.returncode:
        raise UserError(f"{' '.join(flags)}: exit code {process.returncode}; its log is above")
    return rows


def parse_row(line: str) -> Row | None:
    """Returns the row that a line of a part's output holds; None: something else, or cut off."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        return value if isinstance(value, dict) else None
    return None


def _dtypes() -> tuple[str, ...]:
    """Returns the dtypes of a device: that of training first."""
    import jax

    both = ("bfloat16", "float32")
    return both[::-1] if jax.default_backend() == "cpu" else both


def _head_size(shape: Shape) -> int:
    return shape.hidden // shape.heads


PARTS = {
    part.__name__: part
    for part in (
        *(machine, proofs, golden, golden_numbers, matmul, step, plan, decoding),
        *(first_step, resume, resume_run),
    )
}

if __name__ == "__main__":
    from olmoe_jax.parallel.compilation import keep_programs
    from olmoe_jax.parallel.cpu import restart_with_huge_pages

    restart_with_huge_pages()
    keep_programs()
    run_command(main)
