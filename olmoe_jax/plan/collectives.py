"""The communication of a compiled program, read from its optimised HLO.

XLA prints one computation after the other and a loop's body once: the body counts as often as the
loop's trip count says. All bytes are those of one device and one run of the program.
"""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from olmoe_jax.plan.hlo import Computation, Instruction, arrays, calls, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_KERNELS = ("convolution", "custom-call", "dot")
_NO_KERNELS = re.compile(r'custom_call_target="(AllocateBuffer|Sharding)"')


class Collective(NamedTuple):
    """All collectives of one kind and dtype in a program.

    A transfer is hidden if the compiler's schedule has a matmul or a kernel between its start and
    its end.
    """

    kind: str
    dtype: str
    count: int
    bytes: int  # of the whole array on a device: an all-gather's result, the others' operand
    # Sent by a device in the ring algorithm among n devices: (n-1)/n of `bytes` for all-gather,
    # reduce-scatter and all-to-all, twice that for all-reduce, `bytes` for permute and broadcast.
    wire_bytes: float
    hidden_bytes: int  # the part of `bytes` whose transfer is hidden
    exposed_wire_bytes: float  # the part of `wire_bytes` whose transfer is not


class Communication(NamedTuple):
    """The communication of a program; `exact` is False if a loop's trip count is unknown."""

    collectives: tuple[Collective, ...]
    exact: bool

    def total(self, part: str) -> float:
        """Returns the sum of a field, such as "wire_bytes", over all collectives."""
        return sum(getattr(collective, part) for collective in self.collectives)


def communication(hlo: str) -> Communication:
    """Returns the collectives of an optimised HLO module (`compiled.as_text()`)."""
    computations, entry = parse(hlo)
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo)))
    exact, chains = True, set()

    @functools.cache
    def has_kernel(name: str) -> bool:
        return any(map(computes, computations[name].values()))

    def computes(instruction: Instruction) -> bool:
        if instruction.opcode in _KERNELS:
            return not _NO_KERNELS.search(instruction.attributes)
        return any(has_kernel(called) for called, _ in calls(instruction, computations))

    # Several instructions may call one computation: count what runs inside it once.
    @functools.cache
    def inside(name: str, caller_hides: bool = False) -> Counter[Collective]:
        nonlocal exact
        found: Counter[Collective] = Counter()
        for instruction in computations[name].values():
            kind = _kind(instruction, name)
            hidden = caller_hides or any(map(computes, _beside(instruction, computations[name])))
            # A TPU's compiler spreads one collective over several fusions: one chain id for all.
            chain = _CHAIN.search(instruction.attributes)
            if kind in KINDS and not (chain and chain[1] in chains):
                hidden = hidden or bool(chain and has_kernel(name))
                found.update(_of_each_dtype(kind, instruction, computations[name], devices, hidden))
                chains.update(chain.groups() if chain else ())
            for called, times in calls(instruction, computations):
                below = inside(called, hidden and instruction.opcode == "async-start")
                if below and times is None:
                    exact = False
                for collective, count in below.items():
                    found[collective] += count * (1 if times is None else times)
        return found

    totals: dict[tuple[str, str], Collective] = {}
    for (kind, dtype, *numbers), times in inside(entry).items():
        _, _, *sums = totals.get((kind, dtype), (kind, dtype, 0, 0, 0.0, 0, 0.0))
        added = (old + times * number for old, number in zip(sums, numbers, strict=True))
        totals[kind, dtype] = Collective(kind, dtype, *added)
    return Communication(tuple(totals[key] for key in sorted(totals)), exact)


def _beside(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    """Yields the instructions between an asynchronous one's start and its end."""
    if not instruction.opcode.endswith("-start"):
        return
    names, between = {instruction.name}, []
    after = itertools.dropwhile(lambda other: other is not instruction, computation.values())
    for other in itertools.islice(after, 1, None):
        if names.isdisjoint(re.findall(r"%([\w.\-]+)", other.operands)):
            between.append(other)
        elif other.opcode.endswith("-done"):
            yield from between
            return
        elif other.opcode.endswith("-update"):
            names.add(other.name)


def _kind(instruction: Instruction, computation: str) -> str:
    """Returns the opcode without the "-start" of its asynchronous form."""
    # TPUs: a fusion of an all-reduce and a slice, whose computation has this name.
    if instruction.opcode == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return instruction.opcode.removesuffix("-start")


# --- Sizes ---


def _of_each_dtype(
    kind: str, instruction: Instruction, computation: Computation, devices: int, hidden: bool
) -> Iterator[Collective]:
    """Yields one collective for each dtype among an instruction's operands."""
    permuted = kind in ("collective-permute", "collective-broadcast")
    members = devices if permuted else _group_size(instruction.attributes, devices)
    if members == 1:
        return
    # An operand may be printed as a name alone: its own instruction has the shape.
    names = re.findall(r"%([\w.\-]+)", instruction.operands)
    shapes = [computation[name].shape for name in names if name in computation]
    if kind == "ragged-all-to-all":
        # Its other operands are the output's buffer and the positions of the rows.
        shapes = shapes[:1]
    by_dtype: Counter[str] = Counter()
    for shape in shapes:
        for dtype, size in arrays(shape):
            by_dtype[dtype] += size
    for dtype, size in by_dtype.items():
        whole = size * members if kind == "all-gather" else size
        sent = 1.0 if permuted else (members - 1) / members
        wire_bytes = whole * sent * (2 if kind == "all-reduce" else 1)
        yield Collective(
            kind, dtype, 1, whole, wire_bytes, whole * hidden, wire_bytes * (not hidden)
        )


def _group_size(attributes: str, devices: int) -> int:
    """Returns how many devices exchange data with each other in one collective."""
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed[1]))
        # A part of an axis may stand for it: 'x':(2)4 are 4 of the axis's devices.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else devices
