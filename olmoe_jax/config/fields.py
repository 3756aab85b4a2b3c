"""A field of the configuration: its declaration, type and range, and the errors about its value."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from olmoe_jax import files, sources
from olmoe_jax.errors import UserError, text_of

_LIMIT = 2**32
"""A bound of all numbers, since no field means one so large."""


@dataclass(frozen=True)
class Rule:
    """The range of a field's values.

    A value that is a place (a path, a hub id, sources of rows) has the two last functions.
    """

    requirement: str  # the range in words: "must be ..."
    test: Callable[[Any], bool]  # whether a value lies in the range
    example: str  # a value in the range, as the command line spells it
    expand: Callable[[str], str] | None = None  # returns the place with ~ replaced
    absolute: Callable[[str], str] | None = None  # returns the place with absolute paths


def at_least(minimum: int) -> Rule:
    """Returns the rule of numbers from `minimum` on."""
    return Rule(f"must be {minimum} or more", lambda value: value >= minimum, str(minimum))


def between(minimum: int, maximum: int) -> Rule:
    """Returns the rule of numbers from `minimum` to `maximum`."""
    words = f"must be from {minimum} to {maximum}"
    return Rule(words, lambda value: minimum <= value <= maximum, str(minimum))


def path_or_id(example: str = "PATH") -> Rule:
    """Returns the rule of paths, and of hub ids where the field accepts them."""
    return Rule("must not be empty", bool, example, files.expand, files.absolute)


SOURCES = Rule(
    "must not be empty",
    bool,
    "RoxanneWsyw/gsm:train.jsonl",
    sources.expand,
    sources.absolute,
)


NAME = Rule("must be a name", lambda value: value.strip() and value.isprintable(), "olmoe")
HUB_CONFIG = dataclasses.replace(NAME, example="main")
SPLIT = dataclasses.replace(NAME, example="train[:10%]")
POSITIVE = Rule("must be positive", lambda value: value > 0, "1")
SHARE = between(0, 1)
SHARE_ABOVE_ZERO = Rule("must be above 0 and at most 1", lambda value: 0 < value <= 1, "0.2")
SHARE_BELOW_ONE = Rule("must be 0 or more and below 1", lambda value: 0 <= value < 1, "0")
UINT32 = between(0, 2**32 - 1)
AXIS_OR_REST = Rule("must be positive, or -1", lambda value: value == -1 or value > 0, "-1")
LORA_TARGETS = Rule(
    "must be some of q,k,v,o,gate,up,down, separated by commas",
    lambda value: set(value.split(",")) <= {"q", "k", "v", "o", "gate", "up", "down"},
    "q,k,v,o",
)


def option(default: Any, help: str, rule: Rule | None = None, choices: Collection[str] = ()) -> Any:
    """Returns a dataclass field with a default, a description (unit, default rule) and a range.

    `choices` are the values of a str field that accepts only these, if its annotation is no
    `Literal`.
    """
    metadata = {"help": help, "rule": rule, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Field:
    """A field as its dataclass declares it."""

    path: str  # SECTION.NAME
    kind: type  # bool, int, float or str
    choices: Collection[str]  # the values of a str field that accepts only these
    optional: bool  # None is a value
    default: Any
    help: str
    rule: Rule | None

    @property
    def type_name(self) -> str:
        """The type, in words."""
        name = f"one of {', '.join(self.choices)}" if self.choices else self.kind.__name__
        return f"{name} or none" if self.optional else name

    @property
    def example(self) -> str:
        """A valid value: the default if there is one."""
        if self.rule and self.default in (None, ""):
            return f"{self.rule.example} or none" if self.optional else self.rule.example
        return show(self.default)

    @property
    def is_place(self) -> bool:
        """Returns whether the value says where an input or output lies."""
        return self.rule is not None and self.rule.expand is not None

    def absolute(self, place: str) -> str:
        """Returns the value of a field that is a place, with absolute paths."""
        change = self.rule and self.rule.absolute
        return change(place) if change else place

    def parse(self, text: str) -> Any:
        """Returns the value that `text` means on a command line."""
        if self._is_none(text):
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
        """Returns `value`, an int of a float field as a float, "none" as None, a path without ~.

        Raises:
          UserError: the value has another type, or is a place that cannot be.
        """
        if self._is_none(value):
            return None
        if self.rule is SOURCES and isinstance(value, list | tuple):
            value = ", ".join(map(str, value))
        if self.kind is float and type(value) is int and abs(value) < _LIMIT:
            value = float(value)
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise self._wrong_type(text_of(value, repr) if shown is None else shown)
        if self.rule and self.rule.expand and value:
            try:
                return self.rule.expand(value)
            except UserError as error:
                raise UserError(f"{self.path}={error}") from None
        return value

    def check_range(self, value: Any) -> None:
        """Raises a `UserError` if `value`, of the right type, is out of range."""
        if isinstance(value, float) and not math.isfinite(value):
            requirement = "must be finite"
        elif value is not None and self.rule and not self.rule.test(value):
            requirement = self.rule.requirement
        elif isinstance(value, int) and abs(value) >= _LIMIT:
            requirement = f"must be below {_LIMIT}"
        else:
            return
        raise UserError(f"{self.path}={show(value)}: {requirement}; write e.g. {self.example}")

    def _is_none(self, value: Any) -> bool:
        """Returns whether the value is none, as Python or as the command line spells it."""
        spelt = isinstance(value, str) and value.lower() == "none"
        return self.optional and (value is None or spelt)

    def _wrong_type(self, shown: str) -> UserError:
        instead = "" if self.choices else f"; write e.g. {self.example}"
        return UserError(f"{self.path}={shown}: expected {self.type_name}{instead}")


def read_fields(sections: Mapping[str, type]) -> dict[str, Field]:
    """Returns {SECTION.NAME: Field} of the sections' dataclasses."""
    fields = {}
    for section, cls in sections.items():
        annotations = typing.get_type_hints(cls)
        for declared in dataclasses.fields(cls):
            path, annotation = f"{section}.{declared.name}", annotations[declared.name]
            kind, choices, optional = _read_annotation(annotation)
            fields[path] = Field(
                path=path,
                kind=kind,
                choices=choices or declared.metadata["choices"],
                optional=optional,
                default=declared.default,
                help=declared.metadata["help"],
                rule=declared.metadata["rule"],
            )
    return fields


def _read_annotation(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """Returns (kind, choices, optional) of T or Literal[...], either with `| None` or without."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        # typing makes one object of equal unions, with the choices in the order of the first: a
        # module that annotates the same union in another order changes the order in messages.
        kind, choices, _ = _read_annotation(typing.get_args(annotation)[0])
        return kind, choices, True
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation), False
    return annotation, (), False


def show(value: Any) -> str:
    """Returns `value` as the command line spells it."""
    text = text_of(value)
    return text.lower() if value is None or isinstance(value, bool) else text


def nearest(given: str, candidates: Iterable[str]) -> str:
    """Returns the candidate that is most like `given`, as a whole or in its last dotted part."""
    given = given[:200]

    def likeness(candidate: str) -> tuple[float, float]:
        whole = _ratio(given, candidate)
        return max(whole, _ratio(given.rpartition(".")[2], candidate.rpartition(".")[2])), whole

    return max(candidates, key=likeness)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
