"""A plan as facts. `facts` is the JSON object, `to_text` prints the same facts for a person."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from olmoe_jax.plan.advice import advice
from olmoe_jax.plan.devices import GIB
from olmoe_jax.plan.planning import RunPlan
from olmoe_jax.plan.programs import CompiledProgram, Memory


def facts(plan: RunPlan) -> dict[str, Any]:
    """Returns everything that is known of a plan, each fact once, as JSON values.

    Bytes and GiB are those of one device. None: not applicable, or the compiler does not show it.
    """
    config, topology, settings = plan.config, plan.topology, plan.settings
    flops, bounds, tokens = plan.flops, plan.roofline, plan.tokens_per_step
    return {
        "topology": topology.name,
        "device": topology.kind.name,
        "devices": topology.count,
        "mesh": plan.mesh,
        "method": config.method.name,
        "lora_rank": config.method.lora_rank,
        "base_quantization": config.model.base_quantization,
        "compute_dtype": config.model.compute_dtype,
        "remat": config.model.remat,
        "grouped_matmul": settings.grouped_matmul,
        "attention": settings.attention,
        "parameters_trained": plan.trained,
        "parameters_frozen": plan.frozen,
        "rows_per_microbatch": config.train.rows_per_device * topology.count,
        "rows_per_step": plan.rows_per_step,
        "microbatches_per_step": plan.microbatches,
        "tokens_per_step": tokens,
        "collective_bytes_per_step": _collective_bytes(plan, "bytes"),
        "collective_bytes_hidden_per_step": _collective_bytes(plan, "hidden_bytes"),
        "flops_per_token": flops.model,
        "flops_per_token_executed": flops.executed,
        "flops_per_token_parts": flops._asdict(),
        "flops_per_step": flops.model * tokens,
        "flops_per_step_executed": flops.executed * tokens,
        "roofline": bounds
        and {
            "compute_seconds": bounds.compute,
            "memory_seconds": bounds.memory,
            "network_seconds": bounds.network,
            "exposed_network_seconds": bounds.exposed,
            "seconds_per_step": bounds.seconds,
            "bound": bounds.bound,
            "tokens_per_second": tokens / bounds.seconds,
        },
        "planning_seconds": round(plan.seconds, 1),
        "assumptions": list(_assumptions(plan)),
        "memory": {program.name: _memory(program) for program in plan.programs},
        "collectives": [
            {"program": program.name, "runs_per_step": program.runs_per_step, **found._asdict()}
            for program in plan.programs
            if program.communication
            for found in program.communication.collectives
        ],
        "peak_gib_per_device": plan.peak / GIB,
        "peak_program": plan.largest.name,
        "capacity_gib": topology.capacity / GIB,
        "reserve_gib": topology.kind.reserve / GIB,
        "headroom_gib": (plan.available - plan.peak) / GIB,
        "fits": plan.fits,
        "advice": advice(plan),
    }


def _memory(program: CompiledProgram) -> dict[str, int]:
    """Returns the bytes that a program takes; only the peak if the compiler refused it."""
    return {**(vars(program.memory) if program.memory else {}), "peak": program.needs}


def _collective_bytes(plan: RunPlan, part: str) -> float | None:
    """Returns bytes of a step's collectives; None if the compiler does not show some of them."""
    running = [program for program in plan.programs if program.runs_per_step]
    if any(program.communication is None for program in running):
        return None
    return sum(program.runs_per_step * program.communication.total(part) for program in running)


def _assumptions(plan: RunPlan) -> Iterator[str]:
    """Yields sentences about what the plan cannot know."""
    config = plan.config
    rows = config.train.rows_per_device * plan.topology.count
    yield (
        f"a step is {plan.rows_per_step} rows of {config.data.max_seq_length} tokens = "
        f"{plan.microbatches} micro-batches of {rows} rows; how many rows the "
        f"{config.train.batch_size} examples of a step fill depends on the data: --rows_per_step"
    )
    if plan.experts_assumed:
        yield (
            f"{plan.experts_assumed} tuned experts in each layer (--tuned_experts, or "
            "method.experts_path)"
        )
    for program in plan.programs:
        if program.communication is None:
            yield f"{program.name}: the compiler does not show what it communicates"
        elif not program.communication.exact:
            yield f"{program.name}: a collective in a loop of unknown length counts once"


def to_text(facts: Mapping[str, Any]) -> str:
    """Returns the facts for a person: a line or a table for each, the verdict last."""
    shown = [name for name in facts if name not in _IN_VERDICT]
    lines = [line for name in shown for line in _lines(name, facts[name])]
    return "\n".join([*lines, "", *_verdict(facts)])


_IN_VERDICT = (
    "peak_gib_per_device",
    "peak_program",
    "capacity_gib",
    "reserve_gib",
    "headroom_gib",
    "fits",
    "advice",
)
_MEMORY = {"peak", *(field.name for field in dataclasses.fields(Memory))}
"""Columns of the table `memory`, all in bytes."""


def _lines(name: str, value: Any) -> Iterator[str]:
    """Yields the lines of one fact; its type decides how it looks."""
    label = name.replace("_", " ")
    if name == "memory":
        yield from _table(label, [{"program": key, **row} for key, row in value.items()])
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _table(label, value)
    elif isinstance(value, list):
        yield from (f"{label:34}{item}" for item in value or ["none"])
    elif isinstance(value, dict):
        parts = (f"{key.replace('_', ' ')} {_cell(key, part)}" for key, part in value.items())
        yield f"{label:34}{', '.join(parts)}"
    else:
        yield f"{label:34}{_cell(name, value)}"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields an empty line, the title, the names of the columns and a line for each row."""
    # A program that the compiler refused has fewer columns than the others.
    columns = list(max(rows, key=len))
    cells = [[name.replace("_", " ") for name in columns]]
    cells += [[_cell(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    yield from ("", title)
    for line in cells:
        yield "  " + "  ".join(map(str.rjust, line, widths))


def _cell(name: str, value: Any) -> str:
    """Returns one value of a fact as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in _MEMORY or "bytes" in name:
        return f"{value / GIB:.3f} GiB"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value


def _verdict(facts: Mapping[str, Any]) -> list[str]:
    """Returns whether the run fits, in words, and what to change if it does not."""
    reserve = facts["reserve_gib"]
    needs = (
        f"peak {facts['peak_gib_per_device']:.1f} GiB in {facts['peak_program']}, each device has "
        f"{facts['capacity_gib']:.1f} GiB"
    ) + (f" - {reserve:.1f} for the driver" if reserve else "")
    if facts["fits"]:
        return [f"fits: {needs}; {facts['headroom_gib']:.1f} GiB to spare"]
    changes = [f"  {line}" for line in facts["advice"]]
    return [f"does not fit: {needs}; change one or more of", *changes]
