"""What several test folders share: an oracle of the MoE block, comparisons, running commands.

The oracle is the mathematics written the slow way (every expert on every token, plain autodiff),
so that it shares nothing with the code under test but the formula.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from olmoe_jax.errors import UserError, outcome
from olmoe_jax.model.config import ModelConfig

ROOT = Path(__file__).parents[1]
ROUTER_SETTINGS = {
    "conventional": {},
    "frozen": {"router_trains": False},
    "densemixer": {"dense_router_gradient": True},
}
"""The fields of ModelSettings that say how a method's router learns."""
AS_USERS_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
"""The environment of a command that compiles as it does outside of the tests (conftest.py)."""
RUN_ON_CPU = ("blocked", "ragged_dot")
"""Backends of the grouped matmul that need neither a GPU nor Pallas' interpreter."""


def load_safetensors(file: Path) -> dict[str, np.ndarray]:
    """By the safetensors library, whose numpy front end reads no bfloat16 but whose core does."""
    dtypes = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "I64": np.int64,
    }
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def load_checkpoint_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint directory, whatever files they are in."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_safetensors(file)
        assert not part.keys() & tensors.keys(), "a tensor lies in two files"
        tensors |= part
    return tensors


def assert_same_bits(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def changed_tensors(before: Path, after: Path) -> set[str]:
    """Names of the tensors that differ between two checkpoint directories with the same names."""
    before, after = load_checkpoint_tensors(before), load_checkpoint_tensors(after)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def expert_tensors(experts) -> set[str]:
    """Hugging Face names of the tensors of an expert config's experts; keys count layers from 1."""
    return {
        f"model.layers.{int(layer) - 1}.mlp.experts.{expert}.{kind}_proj.weight"
        for layer, ids in experts.items()
        for expert in ids
        for kind in ("gate", "up", "down")
    }


def saved_arrays(output, step=4) -> set[str]:
    """Names of the arrays of a checkpoint: parameters.NAME, optimizer moments, counters."""
    metadata = json.loads((output / "checkpoints" / str(step) / "state/_METADATA").read_text())
    keys = [
        ".".join(entry["key"] for entry in leaf["key_metadata"])
        for leaf in metadata["tree_metadata"].values()
    ]
    assert len(keys) == len(set(keys))
    return set(keys)


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value, indent=1))


def relative_error(actual, expected) -> float:
    """max|a - e| / max|e|, the measure of all our tolerances; absolute where e is all zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    size = np.abs(expected).max(initial=0.0)
    return float(np.abs(actual - expected).max(initial=0.0) / (size or 1.0))


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """`relative_error` below the tolerance, for an array or every leaf of a pytree of arrays."""
    actual, expected = jax.device_get((actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        error = relative_error(a, e)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.3g}"


def moe_oracle(x, is_token, router, experts, config: ModelConfig, method="conventional"):
    """The MoE block of docs/reading.md on x [T, D]: every expert on every token, plain autodiff.

    Straight-through DenseMixer: the value of the sparse mixture with the gradient of the dense
    one, in which unselected experts' outputs and the sum that norm_topk_prob divides by (for
    unselected probabilities) are constants.
    """
    gate, up, down = experts
    stop = jax.lax.stop_gradient
    if method == "frozen":
        router = stop(router)
    probabilities = jax.nn.softmax(x @ router, axis=-1)
    chosen = jnp.argsort(-probabilities, axis=-1)[:, : config.num_experts_per_token]
    selected = (
        jnp.zeros(probabilities.shape, bool).at[jnp.arange(len(x))[:, None], chosen].set(True)
    )
    total = jnp.where(selected, probabilities, 0).sum(-1, keepdims=True)
    if not config.norm_topk_prob:
        total = jnp.ones_like(total)
    outputs = jnp.stack(
        [
            (jax.nn.silu(x @ gate[e]) * (x @ up[e])) @ down[e] * is_token[:, None]
            for e in range(config.num_experts)
        ],
        axis=1,
    )  # [T, E, D]

    def mix(weights, outputs):
        return jnp.einsum("te,ted->td", weights, outputs)

    sparse = mix(jnp.where(selected, probabilities / total, 0), outputs)
    if method != "densemixer":
        return sparse
    dense = mix(
        jnp.where(selected, probabilities / total, probabilities / stop(total)),
        jnp.where(selected[..., None], outputs, stop(outputs)),
    )
    return stop(sparse) + dense - stop(dense)


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it (scans, loops, custom gradients)."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def count_matmuls(function, *arguments) -> int:
    """Matmuls in a function's program; one in a loop's body counts once."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    kinds = ("dot_general", "ragged_dot", "ragged_dot_general")
    return sum(equation.primitive.name in kinds for equation in equations(jaxpr))


def array_sizes(function, *arguments) -> set[int]:
    """Element counts of every array that a function's program makes."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return {
        variable.aval.size
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "size")
    }


def run_command_line(*arguments, timeout: float = 300) -> tuple[int, str, str]:
    """Runs `python ARGUMENTS` from the repository's root: (exit code, stdout, stderr).

    On the CPU, and without network, so that a wrong directory name is not looked up on the hub.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def run_module(*arguments, timeout: float = 300) -> tuple[int, str, str]:
    """Runs `python -m ARGUMENTS`: (exit code, stdout, stderr)."""
    return run_command_line("-m", *arguments, timeout=timeout)


def message_of(function, *arguments) -> str:
    """The line that a function complains with."""
    with pytest.raises((UserError, OSError)) as caught:
        function(*arguments)
    if isinstance(caught.value, OSError):
        return outcome(caught.value)[1].removeprefix("error: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_user_error(result: tuple[int, str, str], *culprits: str) -> None:
    """Of a command's result: exit code 2 and one line on stderr that names each culprit."""
    code, _, stderr = result
    assert code == 2, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert stderr.startswith("error: ")
    for culprit in culprits:
        assert str(culprit) in stderr
