"""Forward and backward of attention, every backend: python -m benchmarks.attention [--topology …]

Without --topology, the script times the chunked backend on this machine beside a plain one that
attends from 512 queries at a time to all keys. The runs are interleaved, and the ratio is the
median over the pairs. With --topology (h100:8, v5e:2x4, …) it compiles every backend for these
devices, which need not be there, and prints what a device allocates besides inputs and outputs.
"""

import argparse
import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from benchmarks.machine import machine
from benchmarks.timing import in_turns
from olmoe_jax.errors import ArgumentParser, UserError, run_command, whole_number
from olmoe_jax.ops.attention import BACKENDS, attention, check_backend
from olmoe_jax.parallel.sharding import BATCH, make_mesh, on_own_rows
from olmoe_jax.plan.devices import open_devices, parse_topology, prepare_environment

ALL_KEYS = "all keys"


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument(
        "--shape", default="4,256,8,64", help="rows per device, length, heads, size"
    )
    parser.add_argument("--kv_heads", type=whole_number(1), help="default: as many as heads")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--segments", type=whole_number(1), default=4, help="examples packed into each row"
    )
    parser.add_argument("--runs", type=whole_number(1), default=10)
    parser.add_argument("--topology", help="compile for these devices instead")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", args.shape):
        raise UserError(f"--shape={args.shape}: write four numbers, e.g. 4,256,8,64")
    _, length, heads, _ = map(int, args.shape.split(","))
    if heads % (args.kv_heads or heads):
        raise UserError(f"--kv_heads={args.kv_heads}: write a divisor of the {heads} heads")
    if args.segments > length:
        raise UserError(f"--segments={args.segments}: write at most the length, {length}")
    result = compiled(args) if args.topology else {"machine": machine()} | timed(args)
    print(json.dumps(result) if args.json else "\n".join(f"{k}: {v}" for k, v in result.items()))


def all_keys(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Attends from 512 queries at a time to all keys; the backward recomputes the probabilities.

    Args:
      q: [B, S, H, d].
      k, v: [B, S, G, d], with H / G heads of q for each head of k and v.
      segments: [B, S] int.
    """
    length = q.shape[1]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    chunk = 512 if length % 512 == 0 else length

    def queries(start: jax.Array) -> jax.Array:
        own, own_segments = (
            jax.lax.dynamic_slice_in_dim(part, start, chunk, 1) for part in (q, segments)
        )
        scores = jnp.einsum("bshd,bthd->bhst", own, k, preferred_element_type=jnp.float32)
        earlier = jnp.arange(length) <= (start + jnp.arange(chunk))[:, None]
        visible = earlier & (own_segments[:, :, None] == segments[:, None, :])
        scores = jnp.where(visible[:, None], scores / math.sqrt(q.shape[-1]), -jnp.inf)
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(scores).astype(v.dtype), v)

    out = jax.lax.map(jax.checkpoint(queries), jnp.arange(0, length, chunk))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def forward_and_backward(backend: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function that computes the output and the gradients of q, k and v.

    Its arguments are q, k, v, the segments and the output's gradient.
    """

    def function(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        if backend == ALL_KEYS:
            return all_keys(q, k, v, segments)
        return attention(q, k, v, segments, backend)

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, g: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, backward = jax.vjp(lambda *qkv: on_own_rows(function, *qkv, segments), q, k, v)
        return out, *backward(g)

    return run


def shapes(args: argparse.Namespace, devices: int = 1) -> list[tuple[int, ...]]:
    """Returns the shapes of q, k, v, the segments and the output's gradient."""
    rows, length, heads, size = map(int, args.shape.split(","))
    q, k = ((rows * devices, length, n, size) for n in (heads, args.kv_heads or heads))
    return [q, k, k, q[:2], q]


def timed(args: argparse.Namespace) -> dict[str, float]:
    """Returns milliseconds of `all_keys` and of the chunked backend, and how many times as long.

    The ratio of the CPU times is less disturbed by other processes on the machine.
    """
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=shape), args.dtype) for shape in shapes(args)]
    rows, length = arrays[3].shape
    ends = np.sort(random.integers(1, length, (rows, args.segments - 1)))
    arrays[3] = jnp.asarray([np.searchsorted(row, np.arange(length), "right") for row in ends])
    functions = {name: jax.jit(forward_and_backward(name)) for name in (ALL_KEYS, "chunked")}
    spent = in_turns(
        {name: functools.partial(function, *arrays) for name, function in functions.items()},
        args.runs,
    )
    wall, cpu = np.median(spent[ALL_KEYS] / spent["chunked"], axis=0)
    result = {f"{name}, ms": round(1e3 * np.median(spent[name], axis=0)[0], 2) for name in spent}
    return result | {"ratio": round(wall, 2), "ratio of CPU times": round(cpu, 2)}


def compiled(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns MiB of temporaries and the largest array over S², for each of the backends."""
    topology = parse_topology(args.topology)
    prepare_environment(topology)
    jax.config.update("jax_platforms", "cpu")  # jax has read the environment already
    mesh = make_mesh(devices=open_devices(topology))
    q, k, v, segments, g = (
        jax.ShapeDtypeStruct(
            shape, jnp.int32 if len(shape) == 2 else args.dtype, sharding=NamedSharding(mesh, BATCH)
        )
        for shape in shapes(args, topology.count)
    )
    result = {}
    for backend in (ALL_KEYS, *BACKENDS):
        if backend != ALL_KEYS:
            try:
                check_backend(backend, topology.kind.platform, q.shape[-1], q.dtype)
            except UserError:
                continue
        try:
            program = _compile(forward_and_backward(backend), (q, k, v, segments, g), mesh)
        except RuntimeError as error:
            # jax asks the library for its version, and loads the library only with a GPU's driver.
            if "cuDNN not found" in str(error):
                continue
            raise
        result[backend] = {
            "temporaries, MiB": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
            "largest array / length²": round(_largest_array(program) / q.shape[1] ** 2, 3),
        }
    return result


def _compile(
    function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct], mesh: Mesh
) -> jax.stages.Compiled:
    device = mesh.devices.flat[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    with jax.set_mesh(mesh), jax.default_device(device):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compile()


def _largest_array(program: jax.stages.Compiled) -> int:
    """Returns the elements of the largest array on one device."""
    dimensions = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(size) for size in found.split(",")])) for found in dimensions)


if __name__ == "__main__":
    run_command(main)
