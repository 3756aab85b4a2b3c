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

    `bytes` is the size of the whole array on a device: the result of an all-gather, the operand of
    the others. `wire_bytes` is what a device sends in the ring algorithm among n devices:
    (n-1)/n of `bytes` for all-gather, reduce-scatter and all-to-all, twice that for all-reduce,
    and `bytes` for a permute or a broadcast. `hidden_bytes` is the part of `bytes` whose transfer
    has at least one matmul or kernel between its start and its end in the compiler's schedule;
    `exposed_wire_bytes` is the part of `wire_bytes` that has none.
    """

    kind: str
    dtype: str
    count: int
    bytes: int
    wire_bytes: float
    hidden_bytes: int
    exposed_wire_bytes: float


class Communication(NamedTuple):
    """The communication of a program; `exact` is False if a loop's trip count is unknown."""

    collectives: tuple[Collective, ...]
    exact: bool

    @property
    def bytes(self) -> int:
        """The bytes of all collectives."""
        return sum(collective.bytes for collective in self.collectives)

    @property
    def hidden_bytes(self) -> int:
        """The bytes whose transfer has a matmul or a kernel beside it."""
        return sum(collective.hidden_bytes for collective in self.collectives)

    @property
    def wire_bytes(self) -> float:
        """The bytes that a device sends."""
        return sum(collective.wire_bytes for collective in self.collectives)

    @property
    def exposed_wire_bytes(self) -> float:
        """The bytes that a device sends while it computes nothing."""
        return sum(collective.exposed_wire_bytes for collective in self.collectives)


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
    def inside(name: str, caller_hides: bool = False) -> Counter[_Transfer]:
        nonlocal exact
        found: Counter[_Transfer] = Counter()
        for instruction in computations[name].values():
            kind = _kind(instruction, name)
            hidden = caller_hides or any(map(computes, _beside(instruction, computations[name])))
            # A TPU's compiler spreads one collective over several fusions: one chain id for all.
            chain = _CHAIN.search(instruction.attributes)
            if kind in KINDS and not (chain and chain[1] in chains):
                hidden = hidden or bool(chain and has_kernel(name))
                found.update(_transfers(kind, instruction, computations[name], devices, hidden))
                chains.update(chain.groups() if chain else ())
            for called, times in calls(instruction, computations):
                below = inside(called, hidden and instruction.opcode == "async-start")
                if below and times is None:
                    exact = False
                for transfer, count in below.items():
                    found[transfer] += count * (1 if times is None else times)
        return found

    totals: dict[tuple[str, str], Collective] = {}
    for (kind, dtype, size, wire, hidden), count in inside(entry).items():
        old = totals.get((kind, dtype), Collective(kind, dtype, 0, 0, 0.0, 0, 0.0))
        totals[kind, dtype] = old._replace(
            count=old.count + count,
            bytes=old.bytes + count * size,
            wire_bytes=old.wire_bytes + count * wire,
            hidden_bytes=old.hidden_bytes + count * size * hidden,
            exposed_wire_bytes=old.exposed_wire_bytes + count * wire * (not hidden),
        )
    return Communication(tuple(totals[key] for key in sorted(totals)), exact)


class _Transfer(NamedTuple):
    """One collective's arrays of one dtype."""

    kind: str
    dtype: str
    bytes: int
    wire_bytes: float
    hidden: bool


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


def _transfers(
    kind: str, instruction: Instruction, computation: Computation, devices: int, hidden: bool
) -> Iterator[_Transfer]:
    """Yields a collective's transfer for each dtype among its operands."""
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
        yield _Transfer(kind, dtype, whole, wire_bytes, hidden)


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
