"""What a configuration field is: its declaration, type, range, and the words of its errors."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from olmoe_jax.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, in words and as a test, with a value that does."""

    requirement: str
    test: Callable[[Any], bool]
    example: str


def at_least(minimum: float) -> Rule:
    return Rule(f"must be {minimum} or more", lambda value: value >= minimum, str(minimum))


def not_empty(example: str = "PATH") -> Rule:
    return Rule("must not be empty", bool, example)


POSITIVE = Rule("must be positive", lambda value: value > 0, "1")
SHARE = Rule("must be from 0 to 1", lambda value: 0 <= value <= 1, "0")
UINT32 = Rule("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32, "0")
LORA_TARGETS = Rule(
    "must be some of q,k,v,o,gate,up,down, separated by commas",
    lambda value: set(value.split(",")) <= {"q", "k", "v", "o", "gate", "up", "down"},
    "q,k,v,o",
)
SHARE_BELOW_ONE = Rule("must be 0 or more and below 1", lambda value: 0 <= value < 1, "0")


def option(default: Any, help: str, rule: Rule | None = None) -> Any:
    """A dataclass field with its description (unit and default rule) and range."""
    return field(default=default, metadata={"help": help, "rule": rule})


@dataclass(frozen=True)
class Field:
    """One entry of the schema that is read off the dataclasses above."""

    path: str
    kind: type  # bool, int, float or str
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    rule: Rule | None

    @property
    def type_name(self) -> str:
        name = f"one of {', '.join(self.choices)}" if self.choices else self.kind.__name__
        return f"{name} or none" if self.optional else name

    @property
    def example(self) -> str:
        """A valid value: the default, where there is one."""
        if self.rule and self.default in (None, ""):
            return f"{self.rule.example} or none" if self.optional else self.rule.example
        return show(self.default)

    def parse(self, text: str) -> Any:
        """The value that `text` means on a command line."""
        if self.optional and text.lower() == "none":
            return None
        value: Any = text
        if self.kind is bool:
            value = {"true": True, "false": False}.get(text.lower(), text)
        elif self.kind is not str:
            try:
                value = self.kind(text)
            except ValueError:
                raise self._wrong_type(text) from None
        return self.check_type(value, shown=text)

    def check_type(self, value: Any, shown: str | None = None) -> Any:
        """`value`, if its type is the declared one; an int is good for a float."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise self._wrong_type(repr(value) if shown is None else shown)
        return value

    def check_range(self, value: Any) -> None:
        finite = not isinstance(value, float) or math.isfinite(value)
        if finite and (value is None or self.rule is None or self.rule.test(value)):
            return
        requirement = self.rule.requirement if finite and self.rule else "must be finite"
        raise UserError(f"{self.path}={show(value)}: {requirement}; write e.g. {self.example}")

    def _wrong_type(self, shown: str) -> UserError:
        instead = "" if self.choices else f"; write e.g. {self.example}"
        return UserError(f"{self.path}={shown}: expected {self.type_name}{instead}")


def read_schema(sections: Mapping[str, type]) -> dict[str, Field]:
    """{dotted path: Field} of the sections' dataclasses."""
    schema = {}
    for section, cls in sections.items():
        annotations = typing.get_type_hints(cls)
        for declared in dataclasses.fields(cls):
            path = f"{section}.{declared.name}"
            kind, choices, optional = _read_annotation(annotations[declared.name])
            schema[path] = Field(
                path, kind, choices, optional, declared.default, **declared.metadata
            )
    return schema


def _read_annotation(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """kind, choices, optional of `T`, `Literal[...]`, and either `| None`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner, _ = typing.get_args(annotation)
        kind, choices, _ = _read_annotation(inner)
        return kind, choices, True
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), False
    return annotation, (), False


def show(value: Any) -> str:
    """`value` as it is written on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def nearest(given: str, candidates: Iterable[str]) -> str:
    """The candidate most like `given`, as a whole or in its part after the last dot."""

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(given, candidate)
        return max(whole, _ratio(given.rpartition(".")[2], candidate.rpartition(".")[2])), whole

    return max(candidates, key=likeness)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
