"""What a compiled program communicates, read from its optimised HLO.

XLA prints one computation after the other; a loop's body is printed once and runs as often as the
loop's trip count says. Bytes are those of one device and one run of the program.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Collective(NamedTuple):
    """All collectives of one kind and dtype in a program.

    `bytes` is the size of the whole array on a device: the result of an all-gather, the operand of
    the others. `wire_bytes` is what a device sends in the ring algorithm among n devices:
    (n-1)/n of `bytes` for all-gather, reduce-scatter and all-to-all, twice that for all-reduce,
    all of them for a permute or broadcast.
    """

    kind: str
    dtype: str
    count: int
    bytes: int
    wire_bytes: float


class Communication(NamedTuple):
    """What a program communicates; `exact` is False when a loop's trip count is not known."""

    collectives: tuple[Collective, ...]
    exact: bool

    @property
    def bytes(self) -> int:
        return sum(collective.bytes for collective in self.collectives)

    @property
    def wire_bytes(self) -> float:
        return sum(collective.wire_bytes for collective in self.collectives)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


_Computation = dict[str, _Instruction]

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)')


def communication(hlo: str) -> Communication:
    """The collectives of an optimised HLO module (`compiled.as_text()`)."""
    computations, entry = _parse(hlo)
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", hlo)))
    counts, sizes, wires = Counter(), Counter(), Counter()
    exact, chains = True, set()

    @functools.cache
    def inside(name: str) -> tuple[tuple[tuple[str, str, int, float], int], ...]:
        """((kind, dtype, bytes, wire bytes), times) of everything that a computation runs."""
        nonlocal exact
        found: Counter = Counter()
        for instruction in computations[name].values():
            kind = _kind(instruction, name)
            # TPUs spread one collective over several fusions; all its parts name the same chain.
            chain = _CHAIN.search(instruction.attributes)
            if kind in KINDS and not (chain and chain[1] in chains):
                found.update(_collectives(kind, instruction, computations[name], devices))
                chains.update(chain.groups() if chain else ())
            for called, times in _calls(instruction, computations):
                below = inside(called)
                if below and times is None:
                    exact = False
                for collective, count in below:
                    found[collective] += count * (1 if times is None else times)
        return tuple(found.items())

    for (kind, dtype, size, wire), count in inside(entry):
        counts[kind, dtype] += count
        sizes[kind, dtype] += count * size
        wires[kind, dtype] += count * wire
    return Communication(
        tuple(Collective(*key, counts[key], sizes[key], wires[key]) for key in sorted(counts)),
        exact,
    )


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """Name -> computation, and the entry's name."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    """`  ROOT %name = SHAPE opcode(OPERANDS), ATTRIBUTES`, taken apart."""
    name = _NAME.match(line)
    if not name:
        return None
    start = name.end()
    # Only a tuple's shape has spaces.
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    last = _closing(line, opcode.end() - 1)
    return _Instruction(
        name[1], line[start:end], opcode[1], line[opcode.end() : last], line[last + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def _kind(instruction: _Instruction, computation: str) -> str:
    """The opcode without the "-start" of its asynchronous form.

    TPUs write a reduce-scatter as a fusion of this name, of an all-reduce and a slice.
    """
    if instruction.opcode == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return instruction.opcode.removesuffix("-start")


def _collectives(
    kind: str, instruction: _Instruction, computation: _Computation, devices: int
) -> Iterator[tuple[str, str, int, float]]:
    """(kind, dtype, bytes, wire bytes) for each dtype among the operands of a collective."""
    permuted = kind in ("collective-permute", "collective-broadcast")
    members = devices if permuted else _group_size(instruction.attributes, devices)
    if members == 1:
        return
    by_dtype: Counter = Counter()
    # The ragged kind's other operands are the output's buffer and where the rows lie.
    operands = _operands(instruction, computation)
    for shape in operands[:1] if kind == "ragged-all-to-all" else operands:
        for dtype, size in _arrays(shape):
            by_dtype[dtype] += size
    for dtype, size in by_dtype.items():
        whole = size * members if kind == "all-gather" else size
        ring = 1.0 if permuted else (members - 1) / members
        yield kind, dtype, whole, whole * ring * (2 if kind == "all-reduce" else 1)


def _operands(instruction: _Instruction, computation: _Computation) -> list[str]:
    """The shapes of an instruction's operands, which may be printed as names alone."""
    names = re.findall(r"%([\w.\-]+)", instruction.operands)
    return [computation[name].shape for name in names if name in computation]


def _arrays(shape: str) -> Iterator[tuple[str, int]]:
    """(dtype, bytes) of each array in a shape."""
    for dtype, dimensions in _ARRAY.findall(shape):
        if (bits := _bits(dtype)) is not None:
            sizes = [int(size.removeprefix("<=")) for size in dimensions.split(",") if size]
            yield dtype, math.ceil(math.prod(sizes) * bits / 8)


def _bits(dtype: str) -> int | None:
    """Size of an element; None for tokens and the like."""
    if dtype == "pred":
        return 8
    digits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(digits[1]) if digits else None


def _group_size(attributes: str, devices: int) -> int:
    """How many devices take part in one group of a collective."""
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}", attributes
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed[1]))
        # An axis may stand with a part of itself: 'x':(2)4 are 4 of its devices.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else devices


def _calls(
    instruction: _Instruction, computations: dict[str, _Computation]
) -> Iterator[tuple[str, int | None]]:
    """(computation, times) that an instruction runs; times is None when only the run tells.

    Of a conditional's branches all are counted.
    """
    if instruction.opcode == "while":
        body = re.search(r"\bbody=%?([\w.\-]+)", instruction.attributes)[1]
        condition = re.search(r"\bcondition=%?([\w.\-]+)", instruction.attributes)[1]
        known = _TRIP_COUNT.search(instruction.attributes)
        yield body, int(known[1]) if known else _limit(computations[condition])
        return
    if instruction.opcode in ("async-update", "async-done"):  # run what their async-start runs
        return
    for several, one in _CALLED.findall(instruction.attributes):
        for name in re.findall(r"[\w.\-]+", several) if several else [one]:
            if name in computations:
                yield name, 1


def _limit(condition: _Computation) -> int | None:
    """N of a condition `i < N`, where N is the only constant; a counter starts at 0."""
    limits = [
        int(instruction.operands)
        for instruction in condition.values()
        if instruction.opcode == "constant" and instruction.operands.isdigit()
    ]
    less = any("direction=LT" in instruction.attributes for instruction in condition.values())
    fused = any(instruction.opcode == "fusion" for instruction in condition.values())
    return limits[0] if len(limits) == 1 and (less or fused) else None
