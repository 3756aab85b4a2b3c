"""A plan in words and numbers: a table for people, one JSON object for programs."""

import math
from typing import Any

from olmoe_jax.config import Config
from olmoe_jax.parallel.sharding import describe
from olmoe_jax.plan.devices import GIB
from olmoe_jax.plan.planning import Plan
from olmoe_jax.plan.programs import CompiledProgram


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything that `to_text` shows. Bytes and GiB are those of one device."""
    flops, bounds, settings = plan.flops, plan.roofline, plan.settings
    return {
        "topology": plan.topology.name,
        "device": plan.topology.kind.name,
        "devices": plan.topology.count,
        "mesh": plan.mesh,
        "method": plan.config.method.name,
        "lora_rank": plan.config.method.lora_rank,
        "compute_dtype": plan.config.model.compute_dtype,
        "remat": plan.config.model.remat,
        "grouped_matmul": settings.grouped_matmul,
        "attention": plan.settings.attention,
        "parameters_trained": plan.trained,
        "parameters_frozen": plan.frozen,
        "rows_per_microbatch": plan.config.train.rows_per_device * plan.topology.count,
        "rows_per_step": plan.rows_per_step,
        "microbatches_per_step": plan.microbatches,
        "tokens_per_step": plan.tokens_per_step,
        "assumptions": assumptions(plan),
        "memory": {program.name: _memory(program) for program in plan.programs},
        "peak_gib_per_device": plan.peak / GIB,
        "peak_program": plan.largest.name,
        "capacity_gib": plan.topology.capacity / GIB,
        "reserve_gib": plan.topology.kind.reserve / GIB,
        "headroom_gib": (plan.available - plan.peak) / GIB,
        "fits": plan.fits,
        "advice": advice(plan),
        "collectives": _collectives(plan),
        "collective_bytes_per_step": collective_bytes(plan),
        "flops_per_token": flops.model,
        "flops_per_token_executed": flops.executed,
        "flops_per_token_parts": flops._asdict(),
        "flops_per_step": flops.model * plan.tokens_per_step,
        "flops_per_step_executed": flops.executed * plan.tokens_per_step,
        "roofline": bounds
        and {
            "compute_seconds": bounds.compute,
            "memory_seconds": bounds.memory,
            "network_seconds": bounds.network,
            "seconds_per_step": bounds.seconds,
            "bound": bounds.bound,
            "tokens_per_second": plan.tokens_per_step / bounds.seconds,
        },
        "planning_seconds": round(plan.seconds, 1),
    }


def _memory(program: CompiledProgram) -> dict[str, Any]:
    return {**(vars(program.memory) if program.memory else {}), "peak": program.needs}


def _collectives(plan: Plan) -> list[dict[str, Any]]:
    """Per program, kind and dtype: of one run of the program, and how often a step runs it."""
    return [
        {"program": program.name, "runs_per_step": plan.times(program), **collective._asdict()}
        for program in plan.programs
        if program.communication
        for collective in program.communication.collectives
    ]


def collective_bytes(plan: Plan) -> int | None:
    """Bytes per step and device, as `Collective.bytes` counts; None: the compiler hides them."""
    running = [program for program in plan.programs if plan.times(program)]
    if any(program.communication is None for program in running):
        return None
    return sum(plan.times(program) * program.communication.bytes for program in running)


def assumptions(plan: Plan) -> list[str]:
    """What the plan cannot know, in words."""
    config, rows = plan.config, plan.config.train.rows_per_device * plan.topology.count
    lines = [
        f"a step is {plan.rows_per_step} rows of {config.data.max_seq_length} tokens = "
        f"{plan.microbatches} micro-batches of {rows} rows; how many rows the "
        f"{config.train.batch_size} examples of a step fill depends on the data: --rows_per_step"
    ]
    if plan.experts_assumed:
        lines.append(
            f"{plan.experts_assumed} selected experts in each layer (--esft_experts, or "
            "method.experts_path)"
        )
    return lines


def advice(plan: Plan) -> list[str]:
    """What to change so that it fits, the most effective first; nothing when it does."""
    if plan.fits:
        return []
    config, count = plan.config, plan.topology.count
    rest = max(0, plan.peak - plan.divided)
    to_state, to_activations = [], []
    if config.mesh.data > 1:
        to_state.append("mesh.data=1 (every group holds a full copy of the state)")
    elif rest < plan.available:
        needed = 2 ** math.ceil(math.log2(count * plan.divided / (plan.available - rest)))
        to_state.append(f"more devices: about {max(needed, 2 * count)} of this kind")
    if config.method.lora_rank is None and not config.method.name.startswith("esft_"):
        to_state.append("method.lora_rank=64 (trains adapters: 9% of the state)")
    elif config.method.lora_rank and not config.model.base_quantization:
        to_state.append("model.base_quantization=nf4 (the frozen matrices in 4 bits)")
    elif (config.method.lora_rank or 0) > 8:
        to_state.append(f"method.lora_rank={config.method.lora_rank // 2}")
    if leaner := _leaner_state(config):
        to_state.append(f"{leaner} (see docs/training.md for what it costs in accuracy)")
    if config.model.remat != "full":
        to_activations.append("model.remat=full")
    if config.train.rows_per_device > 1:
        to_activations.append(f"train.rows_per_device={config.train.rows_per_device // 2}")
    if config.data.max_seq_length > 1024:
        to_activations.append(f"data.max_seq_length={config.data.max_seq_length // 2}")
    if rest > plan.divided:
        return to_activations + to_state
    return to_state + to_activations


def _leaner_state(config: Config) -> str:
    """The next fields to set for a smaller state; empty when there are none."""
    options, in_bfloat16 = config.optimizer, config.model.compute_dtype == "bfloat16"
    names = ["moments_dtype", *(["gradients_dtype"] if in_bfloat16 else [])]
    names = [name for name in names if getattr(options, name) == "float32"]
    if not names and in_bfloat16 and options.master_dtype == "float32":
        names = ["master_dtype"]
    return " ".join(f"optimizer.{name}=bfloat16" for name in names)


def to_text(plan: Plan) -> str:
    """The plan for a person."""
    sections = (_head(plan), _memory_table(plan), _network_table(plan), _speed(plan))
    lines = [line for section in sections for line in [*section, ""]]
    return "\n".join([*lines, *_verdict(plan)])


def _head(plan: Plan) -> list[str]:
    config, settings = plan.config, plan.settings
    lora = f", LoRA rank {config.method.lora_rank}" if config.method.lora_rank else ""
    lora += f" on {scheme}" if (scheme := config.model.base_quantization) else ""
    total = plan.trained + plan.frozen
    return [
        f"{config.method.name}{lora} on {plan.topology.count} x {plan.topology.kind.name} "
        f"(mesh {describe(plan.mesh)})",
        f"compute {config.model.compute_dtype}, remat {config.model.remat}, grouped matmul "
        f"{settings.grouped_matmul}, attention {settings.attention}",
        f"parameters: {plan.trained:,} trained, {plan.frozen:,} frozen, {total:,} in all",
        *(f"assumed: {line}" for line in assumptions(plan)),
    ]


_COLUMNS = ("arguments", "temporaries", "outputs", "aliased", "code", "resident")


def _memory_table(plan: Plan) -> list[str]:
    lines = [f"{'GiB per device':16}" + "".join(f"{name:>12}" for name in (*_COLUMNS, "peak"))]
    for program in plan.programs:
        values = [
            f"{getattr(program.memory, name) / GIB:12.2f}" if program.memory else f"{'-':>12}"
            for name in _COLUMNS
        ]
        lines.append(f"  {program.name:14}" + "".join(values) + f"{program.needs / GIB:12.2f}")
    return lines


def _network_table(plan: Plan) -> list[str]:
    header = f"{'collectives':16}{'kind':>20}{'dtype':>8}{'count':>10}{'GiB':>10}{'sent GiB':>10}"
    lines = [f"{header}   (per device and run)"]
    for program in plan.programs:
        if program.communication is None:
            lines.append(f"  {program.name:14} not shown by this compiler")
            continue
        name = program.name
        for kind, dtype, count, size, wire in program.communication.collectives:
            lines.append(
                f"  {name:14}{kind:>20}{dtype:>8}{count:10,}{size / GIB:10.3f}{wire / GIB:10.3f}"
            )
            name = ""
        if not program.communication.exact:
            lines.append("                 (in a loop of unknown length: counted once)")
    return lines if len(lines) > 1 else ["collectives: none"]


def _speed(plan: Plan) -> list[str]:
    flops, bounds, tokens = plan.flops, plan.roofline, plan.tokens_per_step
    total = collective_bytes(plan)
    lines = [
        f"FLOPs per token: {flops.model / 1e9:.2f} G ({flops.executed / 1e9:.2f} G with what is "
        f"computed twice); per step of {tokens:,} tokens: {flops.executed * tokens / 1e12:,.1f} T",
        "collectives per step: "
        + ("unknown" if total is None else f"{total / GIB:.2f} GiB on each device"),
    ]
    if bounds is None:
        return [*lines, f"roofline: no figures for a {plan.topology.kind.name}"]
    return [
        *lines,
        f"roofline: {bounds.seconds:.3f} s per step, bound by {bounds.bound} (compute "
        f"{bounds.compute:.3f}, memory {bounds.memory:.3f}, network {bounds.network:.3f}); at most "
        f"{tokens / bounds.seconds:,.0f} tokens/s",
    ]


def _verdict(plan: Plan) -> list[str]:
    kind = plan.topology.kind
    reserve = f" - {kind.reserve / GIB:.1f} for the driver" if kind.reserve else ""
    room = f"{plan.topology.capacity / GIB:.1f} GiB{reserve}"
    needs = f"peak {plan.peak / GIB:.1f} GiB in {plan.largest.name}, each device has {room}"
    if plan.fits:
        return [f"fits: {needs}; {(plan.available - plan.peak) / GIB:.1f} GiB to spare"]
    return [
        f"does not fit: {needs}; change one or more of",
        *(f"  {line}" for line in advice(plan)),
    ]
