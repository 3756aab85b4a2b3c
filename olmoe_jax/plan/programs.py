"""Compiles the programs of a training step for devices that need not exist.

They are training's own (`olmoe_jax.training.setup.step_functions`), called with shapes.
"""

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.loading import quantized_like
from olmoe_jax.config import Config
from olmoe_jax.methods.trained import method_trains, split_trained
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.lora import is_target
from olmoe_jax.model.parameters import Parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.collectives import Communication, communication
from olmoe_jax.training.setup import StepFunctions, kept_dtype, step_functions
from olmoe_jax.training.step import Accumulated, DeviceBatch, TrainState, initial_state

_STEPS = 1000
"""Of the learning rate schedule, which changes no shape."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device while a program runs.

    Attributes:
      arguments, outputs, temporaries, code: what the compiler allocates for the program.
      aliased: outputs that take the place of arguments (donated), and so count once.
      resident: arrays of the run that the program does not touch but that stay where they are.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    resident: int

    @property
    def peak(self) -> int:
        allocated = self.arguments + self.outputs - self.aliased + self.temporaries + self.code
        return allocated + self.resident


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program; memory is None when the compiler refused it for its size."""

    name: str
    memory: Memory | None
    needs: int  # bytes at the peak, also when refused
    communication: Communication | None  # None: the compiler does not show it


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
        experts: ExpertConfig | None,
        mesh: Mesh,
    ):
        self.mesh, self.settings = mesh, settings
        self.trains = method_trains(config.method, model_config, experts)
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

    def compile(self, name: str) -> CompiledProgram:
        """Compiles "accumulate", "update" or "evaluate"."""
        shapes = self.shapes
        moments = device_bytes(shapes.state) - device_bytes(shapes.trained)
        function, arguments, resident = {
            "accumulate": (
                self.functions.accumulate,
                (shapes.trained, shapes.frozen, shapes.accumulated, shapes.batch, shapes.position),
                moments,
            ),
            "update": (
                self.functions.update,
                (shapes.state, shapes.accumulated),
                device_bytes(shapes.frozen),
            ),
            # The gradients of the step before are still there.
            "evaluate": (
                self.functions.evaluate,
                (shapes.trained, shapes.frozen, shapes.batch),
                moments + device_bytes(shapes.accumulated.gradients),
            ),
        }[name]
        try:
            compiled, hlo = _compile(function, arguments, self.mesh)
        except jax.errors.JaxRuntimeError as error:
            temporaries = _refused(str(error))
            if temporaries is None:
                raise
            needs = temporaries + device_bytes(arguments) + resident
            return CompiledProgram(name, None, needs, None)
        stats = compiled.memory_analysis()
        memory = Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.generated_code_size_in_bytes,
            resident,
        )
        return CompiledProgram(name, memory, memory.peak, hlo and communication(hlo))


def device_bytes(tree: Any) -> int:
    """Returns the bytes that arrays, or shapes with shardings, take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _shapes(
    functions: StepFunctions, config: Config, trained: Parameters, frozen: Parameters, mesh: Mesh
) -> Shapes:
    trainer = functions.trainer
    by_device, everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, P())
    rows = (config.train.rows_per_device * mesh.size, config.data.max_seq_length)
    integers = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=by_device)
    batch = DeviceBatch(
        *[integers] * 4, jax.ShapeDtypeStruct(rows, jnp.float32, sharding=by_device)
    )

    def place(shape, where):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    state = jax.eval_shape(lambda p: initial_state(p, trainer.optimizer), trained)
    _, *sums = jax.eval_shape(trainer.zero_sums, trained)
    sums = jax.tree.map(lambda shape: place(shape, everywhere), sums)
    return Shapes(
        trained,
        frozen,
        jax.tree.map(place, state, functions.state_shardings),
        Accumulated(trained, *sums),
        batch,
        jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=everywhere),
    )


def _compile(function, arguments, mesh: Mesh) -> tuple[Any, str | None]:
    """A jitted function compiled for the mesh's devices, and its optimised HLO."""
    device = mesh.devices.flat[0]
    # As jax calls it where it chooses what to emit; kernels ask the default device.
    platform = "cuda" if device.platform == "gpu" else device.platform
    with jax.set_mesh(mesh), jax.default_device(device):
        lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))
        if platform != "tpu":
            compiled = lowered.compile()
            return compiled, compiled.as_text()
        # libtpu fails to hand out some programs as text, but dumps them all.
        with tempfile.TemporaryDirectory() as directory:
            dump = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(compiler_options=dump)
            files = list(Path(directory).glob("*.after_optimizations.txt"))
            return compiled, files[0].read_text() if files else None


def _refused(message: str) -> int | None:
    """Bytes of temporaries for which the TPU compiler refuses a program, from its error.

    None: an error of another kind.
    """
    size = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return size and int(float(size[1]) * 2 ** (10 * " KMGT".index(size[2] or " ")))
