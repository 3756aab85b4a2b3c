"""Configs from values and from text: building, checking and comparing them."""

import operator
from collections.abc import Collection, Mapping
from typing import Any

from olmoe_jax.config.conflicts import conflicts
from olmoe_jax.config.fields import Field, nearest, show
from olmoe_jax.config.options import FIELDS, REMOVED, SECTIONS, Config
from olmoe_jax.errors import UserError, text_of


def get_field(path: str) -> Field:
    """Returns the field SECTION.NAME, or raises `unknown_field`."""
    if path not in FIELDS:
        raise unknown_field(path)
    return FIELDS[path]


def unknown_field(path: str) -> UserError:
    """Returns the error about a `path` that is no field: what to write instead."""
    if path in REMOVED:
        return UserError(f"config field {path} is gone: {REMOVED[path].instead}")
    if path in SECTIONS:
        inside = ", ".join(name for name in FIELDS if name.startswith(f"{path}."))
        return UserError(f"{path} is a section, not a field: set one of {inside}")
    return UserError(f"unknown config field {path}: did you mean {nearest(path, FIELDS)}?")


def apply_overrides(config: Config, overrides: Mapping[str, str]) -> Config:
    """Returns `config` with the fields {SECTION.NAME: text} replaced, after `validate`."""
    values = to_dict(check_types(config))
    for path, text in overrides.items():
        value = get_field(path).parse(text)
        section, name = path.split(".")
        values[section][name] = value
    return validate(from_dict(values))


def validate(config: Config) -> Config:
    """Returns `config` with the ints of float fields as floats.

    Raises:
      UserError: a value has the wrong type, is out of range, or conflicts with another.
    """
    config = check_types(config)
    for path, field in FIELDS.items():
        field.check_range(operator.attrgetter(path)(config))
    for conflict in conflicts(config):
        raise UserError(conflict)
    return config


def check_types(config: Config) -> Config:
    """Returns `config` after a check of every value's type; `validate` checks ranges too."""
    for name, cls in SECTIONS.items():
        if not isinstance(getattr(config, name), cls):
            shown = text_of(getattr(config, name), repr)
            raise UserError(f"{name}={shown}: expected a {cls.__name__}")
    return from_dict(to_dict(config))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Returns {section: {field: value}}, which JSON can hold."""
    # dataclasses.asdict would copy values, which may be of any type before `check_types`.
    return {section: dict(vars(getattr(config, section))) for section in SECTIONS}


def from_dict(values: Mapping[str, Mapping[str, Any]]) -> Config:
    """Returns the Config of a `to_dict` result; what is absent gets its default.

    Raises:
      UserError: a section or field is unknown, or a value has the wrong type.
    """
    sections = {}
    for section, inside in values.items():
        if section not in SECTIONS:
            get_field(section)
        if not isinstance(inside, Mapping):
            raise UserError(f"{section}={text_of(inside, repr)}: expected a section with fields")
        checked = {n: get_field(f"{section}.{n}").check_type(value) for n, value in inside.items()}
        sections[section] = SECTIONS[section](**checked)
    return Config(**sections)


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: Collection[str] = ()
) -> str | None:
    """Returns, in words, how two `to_dict` results first differ outside the fields `ignore`.

    Returns None if they agree. A field that `old` lacks had its default: the run started before
    the field existed.
    """
    had = {path: field.default for path, field in FIELDS.items()} | flatten(old)
    says = flatten(new)
    for path, value in had.items():
        if (gone := REMOVED.get(path)) and (gone.free or value == gone.default):
            continue
        if gone:
            return f"{path}: the run has {show(value)}; the field is gone: {gone.instead}"
        if path not in ignore and says.get(path) != value:
            return f"{path}: the run has {show(value)}, this command says {show(says.get(path))}"
    return None


def flatten(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a `to_dict` result as {"section.field": value}."""
    return {
        f"{section}.{name}": v for section, inside in values.items() for name, v in inside.items()
    }
