"""Holds values that a user gave against the typed schema: what is wrong is told by the full key, the value and what to use.

OmegaConf types values as well, after this. It knows a key inside an element of a list by its last word alone, and takes
numbers that are none (nan), endless, or beyond 64 bits, and true for text. The fields of `model.mcore` it does not know at
all: they are held against what mcore declares of them, as they stand.
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from parallel.errors import ConfigError, nearest, shown

_SWITCHES = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
_WORDS = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a mapping",
    list: "a list",
    types.NoneType: "null",
}
_MANY = {int: "whole numbers", float: "finite numbers", str: "words"}
# Names of keys that a message shows.
_NAMES = 6


def declared(cls: type, key: str) -> Any:
    """The declared type of a dotted key of a schema.

    Args:
        cls: dataclass of the schema's root.
        key: dotted, without places in lists.

    Returns:
        Its annotation; None where the schema has no such key, or leaves open what is there.
    """
    kind: Any = cls
    for name in key.split("."):
        fields = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        kind = fields.get(name)
    return kind


def check_value(key: str, value: Any, kind: Any, *, exact: bool = False) -> None:
    """Check that a value has the shape and type of its key, and so on inside lists and mappings.

    Args:
        key: dotted, for messages; empty for the root of a schema.
        value: plain: numbers, text, lists, mappings, None.
        kind: the declared type.
        exact: whether the value is used as it stands; else OmegaConf makes one of its type out of it.

    Raises:
        ConfigError: naming the key, the value and what it must be, or an unknown key and the nearest known one.
    """
    if isinstance(value, str) and "${" in value and not exact:
        # Stands for the value of another key, which OmegaConf looks up.
        return
    members = _members(kind)
    # OmegaConf takes one of several types as it stands, and makes the only one out of what it gets.
    as_it_stands = exact or len({*members} - {types.NoneType}) > 1
    for member in members:
        elements = _elements(value, member)
        if elements is not None:
            for i, (element, inner) in enumerate(elements):
                check_value(f"{key}[{i}]", element, inner, exact=exact)
            return
        if dataclasses.is_dataclass(member) and isinstance(value, Mapping) and not exact:
            _check_mapping(key, value, member)
            return
        if _is(value, member) if as_it_stands else _fits(value, typing.get_origin(member) or member):
            return
    raise ConfigError(f"{key}={shown(value)} must be {words(kind)}")


def _elements(value: Any, kind: Any) -> list[tuple[Any, Any]] | None:
    """The elements of a list, each with its type; None if the type is that of no list, or of one of another length."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if not isinstance(value, list) or origin not in (list, tuple) or (origin is tuple and len(inner) != len(value)):
        return None
    return [(element, inner[i if origin is tuple else 0]) for i, element in enumerate(value)]


def _check_mapping(key: str, values: Mapping[Any, Any], cls: Any) -> None:
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in values.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in kinds:
            near = nearest(str(name), list(kinds)) or "; see docs/configuration.md for all keys"
            raise ConfigError(f"unknown key {inner}{near}")
        check_value(inner, value, kinds[name])


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def can_be_given(kind: Any) -> bool:
    """Whether YAML has a value of a type, null aside; it has none of functions and other objects."""
    return any(_can_be(member) for member in _members(kind) if member is not types.NoneType)


def _can_be(kind: Any) -> bool:
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple):
        return all(can_be_given(inner) for inner in typing.get_args(kind))
    return origin in (Any, bool, typing.Literal, *_WORDS) or _is_enum(kind) or dataclasses.is_dataclass(kind)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, enum.EnumMeta)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as it stands; a whole number is any number, and text stands for a member of an enum."""
    if kind is Any:
        return True
    if typing.get_origin(kind) is typing.Literal:
        return any(type(value) is type(word) and value == word for word in typing.get_args(kind))
    if _is_enum(kind):
        return isinstance(value, str) and value in kind.__members__
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and _is_number(value, kind)
    return kind in (bool, *_WORDS) and isinstance(value, kind)


def _fits(value: Any, kind: Any) -> bool:
    """Whether OmegaConf makes a sensible value of this type out of it."""
    if kind is Any:
        return True
    if value == "???":
        return False
    if kind is types.NoneType:
        return value is None
    if kind is dict:
        return isinstance(value, Mapping)
    if kind is bool:
        return str(value).lower() in _SWITCHES and isinstance(value, bool | int | str)
    if kind is str:
        # A number may be a name; true and false are slips.
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _is_number(value, kind)
    return False


def _is_number(value: int | float | str, kind: type) -> bool:
    if kind is int and isinstance(value, float):
        return False
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return False
    return math.isfinite(number) and (kind is float or abs(number) < 2**63)


def words(kind: Any) -> str:
    """What a value of a type must be, for messages."""
    members = sorted(_members(kind), key=lambda member: member is types.NoneType)
    found = [word for member in members if member is types.NoneType or _can_be(member) for word in _words(member)]
    return " or ".join((", ".join(found[:-1]), found[-1])) if found[:-1] else found[0]


def _words(kind: Any) -> tuple[str, ...]:
    if kind is bool:
        return ("true", "false")
    if typing.get_origin(kind) is typing.Literal:
        return tuple(map(str, typing.get_args(kind)))
    return tuple(kind.__members__) if _is_enum(kind) else (_word(kind),)


def _word(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, tuple):
        count = f"{len(inner)} " if origin is tuple else ""
        many = _MANY.get(
            inner[0], f"mappings of {_names(inner[0])}" if dataclasses.is_dataclass(inner[0]) else "values"
        )
        return f"a list of {count}{many}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {_names(kind)}"
    return _WORDS[origin or kind]


def _names(cls: Any) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")
