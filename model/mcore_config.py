"""mcore's config class of a network: what it declares of each field, values in the form it declares, what it refuses.

`model.mcore` passes fields on by mcore's own names. They are typed when the settings are read (`train/settings.py`), by
`declared_fields`; what they mean together with the others only mcore knows, which is asked by making its config. That
touches no device and no process group.
"""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from model.config import ModelConfig
from model.mcore_fields import KEYS
from parallel.compat import make_transformer_config
from parallel.errors import ConfigError, shown


def config_class(model: ModelConfig) -> type[TransformerConfig]:
    """mcore's class of configs for a network."""
    return MLATransformerConfig if model.attention == "mla" else TransformerConfig


def declared_fields(model: ModelConfig) -> dict[str, Any]:
    """The type of every field that mcore's config of a network may be told, by name."""
    cls = config_class(model)
    kinds = typing.get_type_hints(cls)
    # Some say null by their default alone.
    return {
        field.name: typing.Optional[kinds[field.name]] if field.default is None else kinds[field.name]  # noqa: UP045
        for field in dataclasses.fields(cls)
        if field.init
    }


def passed_values(model: ModelConfig) -> dict[str, Any]:
    """`model.mcore` in the form that mcore declares: members of enums for their names, tuples for lists.

    Lists are copies: mcore writes into those of its config.
    """
    kinds = declared_fields(model) if model.mcore else {}
    return {name: _as_declared(value, kinds.get(name)) for name, value in model.mcore.items()}


def _as_declared(value: Any, kind: Any) -> Any:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    for member in typing.get_args(kind) if union else (kind,):
        if isinstance(member, enum.EnumMeta) and isinstance(value, str):
            return member[value]
        if typing.get_origin(member) is tuple and isinstance(value, list):
            return tuple(value)
    return list(value) if isinstance(value, list) else value


def make_config(model: ModelConfig, ours: Mapping[str, Any]) -> TransformerConfig:
    """Make mcore's config of a network; what is passed on goes before fields of ours.

    Args:
        model: the network.
        ours: fields that its keys, the layout and the machine decide.

    Raises:
        ConfigError: if mcore refuses the combination, in its words, with the fields that were passed on and are to blame,
            and the keys of those that it names.
    """
    cls, passed = config_class(model), passed_values(model)
    try:
        return make_transformer_config(cls, **{**ours, **passed})
    except ConfigError as e:
        told: Exception = e
    except Exception as e:
        # mcore trips over values that it takes for granted; without any it would be a defect of ours.
        if not passed:
            raise
        told = e
    blamed = _blamed(cls, ours, passed)
    text = str(told)
    if not isinstance(told, ConfigError):
        text = f"megatron-core can make nothing of it ({type(told).__name__}: {' '.join(text.split())})"
    fields = ", ".join(f"model.mcore.{name}={shown(model.mcore[name])}" for name in blamed)
    keys = _keys_of(text)
    remedy = "change it or leave it out" if fields else "change one of these keys" if keys else "change the network"
    raise ConfigError(f"{fields}{': ' if fields else ''}{text.rstrip('.')}{keys}: {remedy}") from told


def _blamed(cls: type[TransformerConfig], ours: Mapping[str, Any], passed: Mapping[str, Any]) -> list[str]:
    """The fields passed on without which mcore makes its config: each alone if one will do, all if none has to go alone."""
    alone = [
        name for name in passed if _makes(cls, {**ours, **{other: passed[other] for other in passed if other != name}})
    ]
    return alone or (list(passed) if _makes(cls, ours) else [])


def _makes(cls: type[TransformerConfig], fields: Mapping[str, Any]) -> bool:
    try:
        cls(**fields)
    except Exception:
        return False
    return True


def _keys_of(text: str) -> str:
    """The keys of fields that a text of mcore's names, in brackets; nothing where it names none that have one."""
    words = [word.replace("-", "_").strip("_") for word in re.findall(r"[\w-]+", text)]
    named = [f"{word} is {KEYS[word]}" for word in dict.fromkeys(words) if word in KEYS]
    return f" ({', '.join(named)})" if named else ""
