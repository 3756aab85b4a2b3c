"""The programs of a training step, compiled for devices that need not exist.

The programs are training's own (`step_functions`), traced with shapes instead of arrays.
"""

import dataclasses
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.checkpoints.loading import quantized_like
from olmoe_jax.config import Config
from olmoe_jax.methods import Method
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import is_target
from olmoe_jax.model.parameters import Parameters, split_trained
from olmoe_jax.model.tuned import HOLDERS
from olmoe_jax.parallel import sharding
from olmoe_jax.parallel.batch import DeviceBatch
from olmoe_jax.plan.collectives import Communication, communication
from olmoe_jax.training.parameters import kept_dtype
from olmoe_jax.training.program import StepFunctions, step_functions
from olmoe_jax.training.step import Accumulated, TrainState

_STEPS = 1000
"""Length of the learning rate schedule: any number will do, no shape depends on it."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs; the compiler allocates all but `resident`."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take the place of donated arguments, and so count once
    temporaries: int
    code: int
    resident: int  # the run's arrays that the program does not touch but that stay in memory

    @property
    def peak(self) -> int:
        """The need of the program, each buffer once."""
        allocated = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return allocated + self.resident


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program of a run."""

    name: str  # "expert_load", "accumulate", "update", "hold_tuned" or "evaluate"
    runs_per_step: int  # how often a training step runs the program
    memory: Memory | None  # None: the compiler refused the program for its size
    needs: int  # bytes of one device at the peak, known for a refused program too
    communication: Communication | None  # of one run; None: the compiler does not show it


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The arrays of a run as shapes, dtypes and shardings."""

    trained: Parameters
    frozen: Parameters
    state: TrainState
    accumulated: Accumulated
    batch: DeviceBatch
    position: jax.ShapeDtypeStruct


class StepPrograms:
    """The programs of a configuration's step on a mesh; `compile` compiles one of them."""

    def __init__(
        self,
        config: Config,
        model_config: ModelConfig,
        settings: ModelSettings,
        method: Method,
        mesh: Mesh,
    ):
        self.mesh = mesh
        self.trains = method.trains
        specs = parameter_specs(model_config, settings)
        places = sharding.parameter_shardings(specs, mesh)
        dtype = kept_dtype(self.trains, settings, config.optimizer.gradients_dtype)
        parameters = {
            name: jax.ShapeDtypeStruct(spec.shape, dtype(name), sharding=places[name])
            for name, spec in specs.items()
        }
        if scheme := config.model.base_quantization:
            parameters |= {
                name: quantized_like(spec, scheme, mesh)
                for name, spec in specs.items()
                if is_target(name)
            }
        trained, frozen = split_trained(self.trains, parameters)
        self.functions = step_functions(config, model_config, settings, trained, mesh, _STEPS)
        self.shapes = _shapes(self.functions, config, trained, frozen, mesh)

    def compile(self, name: str, runs_per_step: int) -> CompiledProgram:
        """Compiles the program `name` and reads what it needs."""
        _, arguments, untouched = self._program(name)
        resident = sum(map(device_bytes, untouched))
        try:
            compiled, hlo = self.executable(name)
        except jax.errors.JaxRuntimeError as error:
            temporaries = _refused_bytes(str(error))
            if temporaries is None:
                raise
            needs = temporaries + device_bytes(arguments) + resident
            return CompiledProgram(name, runs_per_step, None, needs, None)
        stats = compiled.memory_analysis()
        memory = Memory(
            arguments=stats.argument_size_in_bytes,
            outputs=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
            resident=resident,
        )
        shown = communication(hlo) if hlo else None
        return CompiledProgram(name, runs_per_step, memory, memory.peak, shown)

    def executable(self, name: str) -> tuple[Any, str | None]:
        """Compiles a program for the mesh's devices; returns it, and its optimised HLO if shown."""
        function, arguments, _ = self._program(name)
        device = self.mesh.devices.flat[0]
        # Both say which devices to compile for: the lowering, and kernels that ask for the default
        # device. Otherwise jax takes the devices of this process.
        platform = "cuda" if device.platform == "gpu" else device.platform
        with jax.set_mesh(self.mesh), jax.default_device(device):
            lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
            if platform != "tpu":
                compiled = lowered.compile()
                return compiled, compiled.as_text()
            # libtpu does not return the text of some programs, but writes all of them to files.
            with tempfile.TemporaryDirectory() as directory:
                dump = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
                compiled = lowered.compile(compiler_options=dump)
                files = list(Path(directory).glob("*.after_optimizations.txt"))
                return compiled, files[0].read_text() if files else None

    def _program(self, name: str) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
        """Returns a jitted function, its arguments, and the run's arrays that it leaves alone."""
        functions, shapes = self.functions, self.shapes
        # The state without the trained weights, which are arguments of their own.
        moments = shapes.state._replace(parameters={})
        weights, micro_batch = (shapes.trained, shapes.frozen), (shapes.batch, shapes.position)
        # The gradients of the step before are still in memory.
        untouched = (moments, shapes.accumulated.gradients)
        holders = {name: value for name, value in shapes.frozen.items() if name in HOLDERS}
        tuned = {name: value for name, value in shapes.trained.items() if name.startswith("tuned.")}
        others = shapes.trained | shapes.frozen
        others = {n: v for n, v in others.items() if n not in holders and n not in tuned}
        return {
            "expert_load": (functions.expert_load, (*weights, *micro_batch), untouched),
            "accumulate": (
                functions.accumulate,
                (*weights, shapes.accumulated, *micro_batch),
                (moments,),
            ),
            "update": (functions.update, (shapes.state, shapes.accumulated), (shapes.frozen,)),
            "hold_tuned": (functions.hold_tuned, (holders, tuned), (*untouched, others)),
            "evaluate": (functions.evaluate, (*weights, shapes.batch), untouched),
        }[name]


def device_bytes(tree: Any) -> int:
    """Returns the bytes that arrays, or shapes with shardings, take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _shapes(
    functions: StepFunctions, config: Config, trained: Parameters, frozen: Parameters, mesh: Mesh
) -> Shapes:
    """Returns the shapes and shardings of everything that a step reads or writes."""
    by_device, everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())
    rows = (config.train.rows_per_device * mesh.size, config.data.max_seq_length)
    integers = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=by_device)
    weights = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=by_device)
    return Shapes(
        trained=trained,
        frozen=frozen,
        state=functions.initial.eval_shape(trained),
        accumulated=functions.zero_sums.eval_shape(),
        batch=DeviceBatch(*[integers] * 4, weights),
        position=jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere),
    )


def _refused_bytes(message: str) -> int | None:
    """Returns the bytes of temporaries of a program that the TPU compiler refuses as too large.

    None for an error of another kind.
    """
    size = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return size and int(float(size[1]) * 2 ** (10 * " KMGT".index(size[2] or " ")))
