"""The text of an optimised HLO module, taken apart: computations, instructions and their calls.

A line of the text is `  ROOT %name = SHAPE opcode(OPERANDS), ATTRIBUTES`.
"""

import dataclasses
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction's text, taken apart."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


Computation = dict[str, Instruction]
"""Instructions by name, in the order of the text."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|called_computations|branch_computations|true_computation|"
    r"false_computation)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_TRIP_COUNT = re.compile(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)')


def parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    """Returns the instruction on a line, or None if the line holds none."""
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
    return Instruction(
        name[1], line[start:end], opcode[1], line[opcode.end() : last], line[last + 1 :]
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return len(text)


def arrays(shape: str) -> Iterator[tuple[str, int]]:
    """Yields dtype and bytes of each array in a shape; tokens and the like have no size."""
    for dtype, dimensions in _ARRAY.findall(shape):
        digits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
        bits = 8 if dtype == "pred" else int(digits[1]) if digits else None
        if bits is not None:
            # "<=4" is a dimension of at most 4.
            sizes = [int(size.removeprefix("<=")) for size in dimensions.split(",") if size]
            yield dtype, math.ceil(math.prod(sizes) * bits / 8)


def calls(
    instruction: Instruction, computations: dict[str, Computation]
) -> Iterator[tuple[str, int | None]]:
    """Yields the computations that an instruction runs, and how often; None if unknown.

    Every branch of a conditional counts.
    """
    if instruction.opcode == "while":
        body = re.search(r"\bbody=%?([\w.\-]+)", instruction.attributes)[1]
        condition = re.search(r"\bcondition=%?([\w.\-]+)", instruction.attributes)[1]
        known = _TRIP_COUNT.search(instruction.attributes)
        yield body, int(known[1]) if known else _limit(computations[condition])
        return
    # Both name the computation of their async-start, which counts already.
    if instruction.opcode in ("async-update", "async-done"):
        return
    for several, one in _CALLED.findall(instruction.attributes):
        for name in re.findall(r"[\w.\-]+", several) if several else [one]:
            if name in computations:
                yield name, 1


def _limit(condition: Computation) -> int | None:
    """Returns N of a loop's condition `i < N`, or None for another condition.

    The condition qualifies if N is its only constant; XLA's counters start at 0.
    """
    limits = [
        int(instruction.operands)
        for instruction in condition.values()
        if instruction.opcode == "constant" and instruction.operands.isdigit()
    ]
    less = any("direction=LT" in instruction.attributes for instruction in condition.values())
    fused = any(instruction.opcode == "fusion" for instruction in condition.values())
    return limits[0] if len(limits) == 1 and (less or fused) else None
