"""Holds values that a user gave against the typed schema: what is wrong is told by the full key, the value and what to use.

OmegaConf types values as well, after this. It knows a key inside an element of a list by its last word alone, and takes
numbers that are none (nan), endless, or beyond 64 bits.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from parallel.errors import ConfigError

_SWITCHES = ("true", "false", "yes", "no", "on", "off", "y", "n", "1", "0")
_WORDS = {int: "a whole number", float: "a finite number", str: "text", dict: "a mapping", types.NoneType: "null"}
_MANY = {int: "whole numbers", str: "words"}
# Names of keys, and letters of a value, that a message shows.
_NAMES, _LETTERS = 6, 80


def nearest(word: str, words: Sequence[str]) -> str:
    """The end of a message about an unknown word: the known one that was meant, if any is close."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


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


def check_value(key: str, value: Any, kind: Any) -> None:
    """Check that a value has the shape and type of its key, and so on inside lists and mappings.

    Args:
        key: dotted, for messages; empty for the root of a schema.
        value: plain: numbers, text, lists, mappings, None.
        kind: the declared type.

    Raises:
        ConfigError: naming the key, the value and what it must be, or an unknown key and the nearest known one.
    """
    if isinstance(value, str) and "${" in value:
        # Stands for the value of another key, which OmegaConf looks up.
        return
    members = _members(kind)
    # OmegaConf takes one of several types as it stands, and makes the only one out of what it gets.
    as_it_stands = len({*members} - {types.NoneType}) > 1
    for member in members:
        origin = typing.get_origin(member) or member
        if origin is list and isinstance(value, list):
            for i, element in enumerate(value):
                check_value(f"{key}[{i}]", element, *typing.get_args(member))
            return
        if dataclasses.is_dataclass(member) and isinstance(value, Mapping):
            _check_mapping(key, value, member)
            return
        if isinstance(value, member) if as_it_stands else _fits(value, origin):
            return
    raise ConfigError(f"{key}={shown(value)} must be {words(kind)}")


def _check_mapping(key: str, values: Mapping[Any, Any], cls: Any) -> None:
    kinds = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in values.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in kinds:
            near = nearest(str(name), list(kinds)) or "; see docs/configuration.md for all keys"
            raise ConfigError(f"unknown key {inner}{near}")
        check_value(inner, value, kinds[name])


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


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
        return isinstance(value, str | int | float)
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
    found = [word for member in members for word in (("true", "false") if member is bool else (_word(member),))]
    return " or ".join((", ".join(found[:-1]), found[-1])) if found[:-1] else found[0]


def _word(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return f"a list of {_MANY.get(inner) or f'mappings of {_names(inner)}'}"
    if dataclasses.is_dataclass(kind):
        return f"a mapping of {_names(kind)}"
    return _WORDS[typing.get_origin(kind) or kind]


def _names(cls: Any) -> str:
    names = [f.name for f in dataclasses.fields(cls)]
    return ", ".join(names[:_NAMES]) + (", ..." if len(names) > _NAMES else "")


def shown(value: Any) -> str:
    """A value as a message shows it, on one line."""
    if value is None:
        return "null"
    text = " ".join((str(value).lower() if isinstance(value, bool) else str(value)).split())
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]}..."
