"""The command `python -m olmoe_jax.doctor`: what this machine has, and what is wrong with it."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from olmoe_jax import accelerator
from olmoe_jax.errors import ArgumentParser, UserError, first_line, one_line, run_command, shorten
from olmoe_jax.files import cache_directory
from olmoe_jax.hub import reason

GIB = 2**30
HUB_SECONDS = 5
_MODEL = "allenai/OLMoE-1B-7B-0125"
_CPU_LAYER = {"hidden": 256, "intermediate": 128, "experts": 16, "chosen": 4, "tokens": 2048}
_OLMOE_LAYER = {"hidden": 2048, "intermediate": 1024, "experts": 64, "chosen": 8, "tokens": 8192}

Line = tuple[str, str, str | None]
"""A name, what was found, and the cure of what is wrong with it."""


def main(arguments: Sequence[str]) -> None:
    """Prints the page. Exits with 2 if something is wrong."""
    ArgumentParser(
        prog="python -m olmoe_jax.doctor",
        description="Says what this machine has, which kernels work on it, what is wrong and the "
        "command\nthat cures it. Exits with 2 if something is wrong.",
    ).parse_args(arguments)
    cures: dict[str, str] = {}
    for part in (memory_and_disk, hub, versions, devices, kernels, layer):
        if cures.keys() & {"jax", "devices"}:
            break  # what follows would speak of another device, or not run at all
        for name, text, cure in part():
            print(f"{'WRONG ' if cure else '      '}{name:15} {one_line(text)}", flush=True)
            if cure:
                cures[name] = cure
    for name, cure in cures.items():
        print(f"\n{name}: {cure}", end="")
    print("" if cures else "\nnothing is wrong")
    sys.exit(2 if cures else 0)


def versions() -> Iterator[Line]:
    """Python, and whether the parts of jax are of one version."""
    yield "python", f"{platform.python_version()} on {platform.platform()}", None
    # What an interrupted pip left behind has no name.
    installed = {item.name for item in importlib.metadata.distributions()} - {None}
    found = {
        name: importlib.metadata.version(name)
        for name in sorted(installed)
        if name in ("jax", "jaxlib", "libtpu") or name.startswith("jax-cuda")
    }
    # libtpu counts its own versions.
    same = {tuple(version.split(".")[:3]) for name, version in found.items() if name != "libtpu"}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    right = len(same) == 1 and {"jax", "jaxlib"} <= found.keys()
    yield "jax", text or "not installed", None if right else "make install"


def devices() -> Iterator[Line]:
    """What is in the machine, and whether jax uses it."""
    import jax

    kind, evidence = accelerator.detect()
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # as jax words it
        text = f"{evidence}; jax cannot start: {first_line(error)}"
        yield "devices", text, f"unset JAX_PLATFORMS, or make install ACCELERATOR={kind}"
        return
    text = f"{evidence}; jax has {len(found)} x {found[0].device_kind} ({found[0].platform})"
    unused = found[0].platform == "cpu" and kind != "cpu"
    cure = f"make install ACCELERATOR={kind}" if unused else None
    if unused and os.environ.get("JAX_PLATFORMS"):
        cure = "unset JAX_PLATFORMS"
    elif found[0].platform == "cpu" and "update it" in evidence:
        cure = "update the NVIDIA driver, then make install"
    yield "devices", text, cure
    limit = (found[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        yield "device memory", f"{limit / GIB:.1f} GiB for jax, each", None


def memory_and_disk() -> Iterator[Line]:
    """Free memory, and the free space and the size of what a run writes to."""
    with contextlib.suppress(OSError, KeyError):  # not Linux
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
        cure = "end other programs" if free < 1 else None
        yield "memory", f"{free:.1f} of {total:.1f} GiB free", cure
    try:
        cache = cache_directory()
    except UserError as error:
        yield "cache", str(error), "set OLMOE_JAX_CACHE to a directory, or unset it"
        return
    for name, path in (("here", Path.cwd()), ("cache", cache)):
        there = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(there).free / GIB
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        text = f"{path}: {free:.1f} GiB free" if usable else f"{path}: cannot be written"
        cure = "cd to a directory with space that you may write to"
        if path == cache:
            cure = "set OLMOE_JAX_CACHE to a directory with space that you may write to"
        yield name, text, cure if not usable or free < 1 else None
    for name in ("tokenized", "compiled"):
        files = [file for file in (cache / name).rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / GIB
        yield name, f"{len(files)} files, {size:.2f} GiB; rm -r {cache / name} frees it", None


def hub() -> Iterator[Line]:
    """Whether the Hugging Face hub gives OLMoE's files; a hub that is silent counts as none."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        yield "hub", "HF_HUB_OFFLINE is set: local paths and the hub's cache alone", None
        return
    failed = [f"no answer within {HUB_SECONDS} s"]

    def ask() -> None:
        try:
            huggingface_hub.HfApi().model_info(_MODEL, timeout=HUB_SECONDS)
            failed.clear()
        except Exception as error:  # of many unrelated types, as in `hub.downloading`
            failed[:] = [reason(error, _MODEL, "model")]

    # A name server that is silent holds up any timeout of a connection.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    cure = "check the network, or export HF_HUB_OFFLINE=1 and write local paths"
    text = failed[0] if failed else f"gives {_MODEL}"
    yield "hub", shorten(text, 200), cure if failed else None


def kernels() -> Iterator[Line]:
    """Each backend of the platform: its error against plain XLA."""
    import jax

    from olmoe_jax.ops import attention, grouped_matmul, proof

    kind = jax.default_backend()
    dtype = "float32" if kind == "cpu" else "bfloat16"
    rows = (200, 32, 48, 6) if kind == "cpu" else (2048, 256, 384, 8)
    texts = (2, 160, 4, 2, 16) if kind == "cpu" else (2, 512, 4, 2, 128)
    matmul, attend = grouped_matmul.check_backend, attention.check_backend
    yield from _proofs(
        "grouped_matmul",
        grouped_matmul.BACKENDS,
        lambda backend: matmul(backend, kind),
        lambda backend: proof.prove_grouped_matmul(backend, rows, dtype),
        proof.tolerance(dtype),
    )
    yield from _proofs(
        "attention",
        attention.BACKENDS,
        lambda backend: attend(backend, kind, texts[-1], dtype),
        lambda backend: proof.prove_attention(backend, texts, dtype),
        proof.tolerance(dtype),
    )


def _proofs(
    field: str,
    backends: dict[str, Any],
    check: Callable[[str | None], str],
    prove: Callable[[str], float],
    tolerance: float,
) -> Iterator[Line]:
    default, unavailable = check(None), []
    for backend in backends:
        try:
            check(backend)
        except UserError:
            unavailable.append(backend)
            continue
        start = time.perf_counter()
        try:
            error = prove(backend)
            right, text = error <= tolerance, f"error {error:.1e} of {tolerance:.0e}"
        except Exception as failure:  # a compiler's, of any type; the page names it
            right, text = False, shorten(first_line(failure), 200)
        seconds = time.perf_counter() - start
        cure = f"do not write --config.model.{field}={backend}"
        if backend in ("blocked", "chunked"):  # plain XLA, which runs everywhere
            cure = "make install brings the jax that is tested; please report it if that is no cure"
        elif backend == default:
            always = "blocked" if field == "grouped_matmul" else "chunked"
            cure = f"write --config.model.{field}={always}"
        text = f"{backend}: {text}, {seconds:.1f} s{' (default)' * (backend == default)}"
        yield field, text, None if right else cure
    yield field, f"not on this machine: {', '.join(unavailable) or 'none'}", None


def layer() -> Iterator[Line]:
    """The speed of one MoE layer's forward and backward, on one device."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    size = _CPU_LAYER if on_cpu else _OLMOE_LAYER
    text = ", ".join(f"{name} {value}" for name, value in size.items())
    try:
        speed = tokens_per_second(dtype="float32" if on_cpu else "bfloat16", **size)
    except Exception as failure:  # as in `_proofs`
        yield "one layer", shorten(first_line(failure), 200), "look at the kernels above"
        return
    yield "one layer", f"{speed:,.0f} tokens/s forward and backward ({text})", None


def tokens_per_second(
    hidden: int, intermediate: int, experts: int, chosen: int, tokens: int, dtype: str
) -> float:
    """Returns the tokens per second of the MoE block's value and gradients: the best of five."""
    import jax
    import jax.numpy as jnp

    from olmoe_jax.model.config import ModelConfig, ModelSettings
    from olmoe_jax.model.moe import moe_block
    from olmoe_jax.ops.linear import ExpertWeights, Linear
    from olmoe_jax.ops.proof import best_seconds

    config = ModelConfig(512, hidden, intermediate, 1, 1, 1, hidden, experts, chosen, 1e4, 1e-5)
    inward, outward = (experts, hidden, intermediate), (experts, intermediate, hidden)
    shapes = ((1, tokens, hidden), (hidden, experts), inward, inward, outward)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    x, router, *weights = map(jax.random.normal, keys, shapes)
    x, *weights = (array.astype(dtype) for array in (x, *weights))

    @jax.jit
    def step(x: jax.Array, router: jax.Array, weights: list[jax.Array]) -> Any:
        def loss(x: jax.Array, router: jax.Array, weights: list[jax.Array]) -> jax.Array:
            maps = ExpertWeights(*map(Linear, weights))
            is_token = jnp.ones((1, tokens), bool)
            y, _ = moe_block(config, ModelSettings(), x, is_token, None, router, maps)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))(x, router, weights)

    return tokens / best_seconds(step, x, router, weights)


if __name__ == "__main__":
    run_command(main)
