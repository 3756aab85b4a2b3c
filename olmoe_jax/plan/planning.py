"""`plan`: compiles a configuration's training step for a topology and adds up what it takes."""

import dataclasses
import math
import time
from pathlib import Path

from olmoe_jax import methods
from olmoe_jax.checkpoints.source import MODEL_DIRECTORY, read_model_config
from olmoe_jax.config import Config, validate
from olmoe_jax.errors import UserError
from olmoe_jax.model.config import ModelConfig, ModelSettings
from olmoe_jax.model.flops import StepFlops, step_flops_per_token
from olmoe_jax.model.parameters import count_parameters
from olmoe_jax.parallel import sharding
from olmoe_jax.plan.costs import Roofline, microbatch_traffic, roofline
from olmoe_jax.plan.devices import Topology, open_devices, parse_topology
from olmoe_jax.plan.programs import CompiledProgram, StepPrograms, device_bytes
from olmoe_jax.training.base_model import check_positions, compute_settings, with_backends

OLMOE_1B_7B = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    intermediate_size=1024,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    num_experts_per_token=8,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    pad_token_id=1,
)
"""The architecture of all releases of OLMoE-1B-7B, known without a network."""
_PUBLISHED = "allenai/OLMoE-1B-7B-"
"""The beginning of these releases' hub ids."""

TUNED_EXPERTS = 4
"""Tuned experts per layer that a plan assumes for a run whose data decide which they are."""


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The needs of a configuration on a topology. Bytes are those of one device.

    The needs of the programs include arrays that stay resident. What no compiler knows (CUDA
    context, workspaces, NCCL) is in the topology's reserve.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    settings: ModelSettings  # with the backends of the topology's platform
    experts_assumed: int | None  # tuned experts per layer; None: nothing had to be assumed
    trained: int  # parameters that the model computes with (`count_parameters`)
    frozen: int
    rows_per_step: int
    microbatches: int
    programs: tuple[CompiledProgram, ...]  # those of a step; "evaluate" if the run evaluates
    divided: int  # bytes of the arrays that shrink by half on twice as many devices
    flops: StepFlops  # per token
    roofline: Roofline | None  # None: the devices have no figures
    seconds: float  # that planning took

    @property
    def largest(self) -> CompiledProgram:
        """The program with the largest need."""
        return max(self.programs, key=lambda program: program.needs)

    @property
    def peak(self) -> int:
        """The largest need of a program, each buffer counted once."""
        return self.largest.needs

    @property
    def available(self) -> int:
        """Bytes of a device that the run's programs can have."""
        return self.topology.capacity - self.topology.kind.reserve

    @property
    def fits(self) -> bool:
        """True if the compiler accepts every program and the peak is available."""
        return all(program.memory for program in self.programs) and self.peak <= self.available

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step's rows, padding included."""
        return self.rows_per_step * self.config.data.max_seq_length


def plan(
    config: Config,
    topology: str,
    *,
    rows_per_step: int | None = None,
    tuned_experts: int | None = None,
) -> RunPlan:
    """Plans a run; reads neither weights nor data, and needs no devices.

    The plan takes an adapter's sizes from the config and does not read method.adapter_path.
    `topology` is KIND:COUNT or KIND:SHAPE, e.g. "h100:8", "v5e:2x4", "cpu:8". `rows_per_step` are
    the rows of data.max_seq_length tokens that the train.batch_size examples of a step fill; None:
    one micro-batch, train.rows_per_device on every device. `tuned_experts` are those per layer to
    assume of a run whose data decide which they are; None: TUNED_EXPERTS.

    Raises:
      UserError: a mistake in the configuration, an unknown topology or architecture, or the
        compiler for the devices is missing.
    """
    start = time.monotonic()
    config, where = validate(config), parse_topology(topology)

    # The model, as training would set it up on these devices.
    model_config = _architecture(config)
    check_positions(config, model_config)
    method, assumed = methods.build(config.method, model_config).for_plan(
        config.train.seed, tuned_experts or TUNED_EXPERTS
    )
    if tuned_experts and assumed is None:
        raise UserError(
            f"--tuned_experts={tuned_experts}: {config.method.name} needs no assumption about its "
            "tuned experts; leave the flag out"
        )
    compute = with_backends(compute_settings(config), model_config, where.kind.platform)
    settings = method.model_settings(compute)
    sharding.check_experts(config.mesh.expert, model_config.num_experts)
    axes = config.mesh.data, config.mesh.fsdp, config.mesh.expert
    mesh = sharding.make_mesh(*axes, devices=open_devices(where))

    # The programs, and how often a step runs them.
    rows, length = config.train.rows_per_device * where.count, config.data.max_seq_length
    rows_per_step = rows_per_step or rows
    microbatches = math.ceil(rows_per_step / rows)
    step = StepPrograms(config, model_config, settings, method, mesh)
    programs = [step.compile("accumulate", microbatches), step.compile("update", 1)]
    counts_first = config.method.router_aux_loss_coefficient > 0 and microbatches > 1
    if counts_first:
        programs.append(step.compile("expert_load", microbatches))
    if step.functions.hold_tuned:
        programs.append(step.compile("hold_tuned", 1))
    if config.data.eval_path or config.data.eval_fraction:
        programs.append(step.compile("evaluate", 0))

    # What one device computes, moves and sends in a step.
    shapes = step.shapes
    flops = step_flops_per_token(model_config, settings, step.trains, length / 2)
    if counts_first:
        flops = flops._replace(recomputed=flops.recomputed + flops.forward)
    gradients = {name: device_bytes(value) for name, value in shapes.trained.items()}
    tokens = rows * length / where.count
    traffic = microbatches * microbatch_traffic(model_config, settings, gradients, tokens)
    # The update reads gradients, weights and moments, and writes weights and moments.
    traffic += sum(gradients.values()) + 2 * device_bytes(shapes.state)
    sent = [(p.runs_per_step, p.communication) for p in programs if p.communication]
    wire = sum(runs * found.total("wire_bytes") for runs, found in sent)
    exposed = sum(runs * found.total("exposed_wire_bytes") for runs, found in sent)

    counts = count_parameters(shapes.trained | shapes.frozen)
    trained = sum(counts[name] for name in shapes.trained)
    return RunPlan(
        config=config,
        topology=where,
        mesh=dict(mesh.shape),
        settings=settings,
        experts_assumed=assumed,
        trained=trained,
        frozen=sum(counts.values()) - trained,
        rows_per_step=rows_per_step,
        microbatches=microbatches,
        programs=tuple(programs),
        divided=device_bytes((shapes.state, shapes.frozen, shapes.accumulated.gradients)),
        flops=flops,
        roofline=roofline(where, microbatches * tokens * flops.executed, traffic, wire, exposed),
        seconds=time.monotonic() - start,
    )


def _architecture(config: Config) -> ModelConfig:
    """Returns the base model's architecture, from its config.json or the published models."""
    options = config.model
    name = options.path if options.init == "pretrained" else options.config_path
    path = Path(name).expanduser()
    path = path.parent if path.name == "config.json" else path
    if path.is_dir():
        # A converted checkpoint or a run keeps the model's files in a directory of its own.
        inner = path / MODEL_DIRECTORY
        return read_model_config(inner if inner.is_dir() else path)
    if name.startswith(_PUBLISHED):
        return OLMOE_1B_7B
    raise UserError(
        f"{name}: no such directory, and the architecture of this hub id is not known here (only "
        f"that of {_PUBLISHED}*); write a directory that holds the model's config.json"
    )
