"""`plan`: compiles a configuration's training step for a topology and adds up what it takes."""

import dataclasses
import math
import time
from pathlib import Path

from olmoe_jax.checkpoints.expert_config import ExpertConfig
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY, read_model_config
from olmoe_jax.config import Config, validate
from olmoe_jax.errors import UserError
from olmoe_jax.methods.experts import given_experts
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.decoder import parameter_specs
from olmoe_jax.model.flops import StepFlops, step_flops_per_token
from olmoe_jax.model.parameters import count_parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.costs import Roofline, microbatch_traffic, roofline, update_traffic
from olmoe_jax.plan.devices import Topology, open_devices, parse_topology
from olmoe_jax.plan.known import KNOWN, known_config
from olmoe_jax.plan.programs import CompiledProgram, StepPrograms, device_bytes
from olmoe_jax.training.setup import model_settings, with_backends

ESFT_EXPERTS = 4
"""Selected experts per layer that a plan assumes of an ESFT run without an expert config."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a configuration takes on a topology. Bytes are those of one device.

    `peak` is the largest need of the run's programs: arguments + outputs - donated +
    temporaries + code, and the arrays that stay resident while it runs (the moments during
    `accumulate`, the frozen weights during `update`). Each buffer counts once. What no compiler
    knows (CUDA context, workspaces, NCCL) is in the topology's reserve, not in the peak.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    settings: ModelSettings
    experts_assumed: int | None  # ESFT without an expert config: experts per layer
    trained: int
    frozen: int
    rows_per_step: int
    microbatches: int  # of a step
    programs: tuple[CompiledProgram, ...]
    divided: int  # bytes that halve on twice as many devices
    flops: StepFlops  # per token
    roofline: Roofline | None
    seconds: float  # that planning took

    @property
    def peak(self) -> int:
        return self.largest.needs

    @property
    def largest(self) -> CompiledProgram:
        """The program with the largest need."""
        return max(self.programs, key=lambda program: program.needs)

    @property
    def available(self) -> int:
        """Bytes of a device that the run's programs can have."""
        return self.topology.capacity - self.topology.kind.reserve

    @property
    def fits(self) -> bool:
        return all(program.memory for program in self.programs) and self.peak <= self.available

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.config.data.max_seq_length

    def times(self, program: CompiledProgram) -> int:
        """How often a step runs a program."""
        return {"accumulate": self.microbatches, "update": 1}.get(program.name, 0)


def plan(
    config: Config,
    topology: str,
    *,
    rows_per_step: int | None = None,
    esft_experts: int = ESFT_EXPERTS,
) -> Plan:
    """Plans a run; neither weights, data nor devices are needed.

    An adapter to start from (method.adapter_path) is not read: its sizes are the config's.

    Args:
      config: of the run.
      topology: KIND:COUNT or KIND:SHAPE, e.g. "h100:8", "v5e:2x4", "cpu:8".
      rows_per_step: rows of data.max_seq_length tokens that the train.batch_size examples of a
        step fill; None: one micro-batch, train.rows_per_device on every device.
      esft_experts: experts per layer of an ESFT run that selects them itself.

    Raises:
      UserError: a mistake in the configuration, an unknown topology, an architecture that is not
        known here, or the compiler for the devices is missing.
    """
    start = time.monotonic()
    config, where = validate(config), parse_topology(topology)
    model_config = _architecture(config)
    experts, assumed = _experts(config, model_config, esft_experts)
    settings = with_backends(
        dataclasses.replace(model_settings(config), tuned_experts=experts and experts.experts),
        model_config,
        where.kind.platform,
    )
    sharding.check_experts(config.mesh.expert, model_config.num_experts)
    axes = config.mesh.data, config.mesh.fsdp, config.mesh.expert
    mesh = sharding.make_mesh(*axes, devices=open_devices(where))
    rows = config.train.rows_per_device * where.count
    rows_per_step = rows_per_step or rows
    microbatches = math.ceil(rows_per_step / rows)
    step = StepPrograms(config, model_config, settings, experts, mesh)
    names = ["accumulate", "update"]
    if config.data.eval_path or config.data.eval_fraction:
        names.append("evaluate")
    programs = tuple(map(step.compile, names))
    length = config.data.max_seq_length
    flops = step_flops_per_token(model_config, settings, step.trains, length / 2)
    shapes = step.shapes
    counts = count_parameters(shapes.trained | shapes.frozen)
    trained = sum(counts[name] for name in shapes.trained)
    return Plan(
        config,
        where,
        dict(mesh.shape),
        settings,
        assumed,
        trained,
        sum(counts.values()) - trained,
        rows_per_step,
        microbatches,
        programs,
        device_bytes((shapes.state, shapes.frozen, shapes.accumulated.gradients)),
        flops,
        _roofline(
            where, model_config, settings, step, programs, flops, rows * length, microbatches
        ),
        time.monotonic() - start,
    )


def _architecture(config: Config) -> ModelConfig:
    """The base model's, from its config.json alone or from the table of published models."""
    options = config.model
    name = options.path if options.init == "pretrained" else options.config_path
    path = Path(name).expanduser()
    path = path.parent if path.name == "config.json" else path
    if path.is_dir():
        inner = path / MODEL_DIRECTORY  # of a converted checkpoint or a run
        return read_model_config(inner if inner.is_dir() else path)
    if known := known_config(name):
        return known
    published = ", ".join(f"{beginning}*" for beginning in KNOWN)
    raise UserError(
        f"{name}: no such directory, and the architecture of this hub id is not known here (only "
        f"that of {published}); write a directory that holds the model's config.json"
    )


def _experts(
    config: Config, model_config: ModelConfig, number: int
) -> tuple[ExpertConfig | None, int | None]:
    """What an ESFT run trains, and how many experts per layer of that are an assumption."""
    if not config.method.name.startswith("esft_"):
        return None, None
    if given := given_experts(config, model_config):
        return given, None
    number = min(number, model_config.num_experts)
    return ExpertConfig((tuple(range(number)),) * model_config.num_layers), number


def _roofline(
    topology: Topology,
    model_config: ModelConfig,
    settings: ModelSettings,
    step: StepPrograms,
    programs: tuple[CompiledProgram, ...],
    flops: StepFlops,
    tokens: int,
    microbatches: int,
) -> Roofline | None:
    """`tokens`: of one micro-batch on all devices."""
    gradients = {name: device_bytes(value) for name, value in step.shapes.trained.items()}
    specs, own = parameter_specs(model_config, settings), tokens / topology.count
    wire = sum(
        (microbatches if program.name == "accumulate" else 1) * program.communication.wire_bytes
        for program in programs[:2]
        if program.communication
    )
    traffic = microbatches * microbatch_traffic(model_config, settings, specs, gradients, own)
    traffic += update_traffic(sum(gradients.values()), device_bytes(step.shapes.state))
    return roofline(topology, microbatches * own * flops.executed, traffic, wire)
