"""CUDA graphs: why a run has none, and what is refused in their place.

mcore can record the work of a layer once and replay it. A graph holds the addresses of everything it touches, so it must be
dropped before a stage is given back and recorded again after a switch, its random streams must be of a kind that replays,
and which of this mcore does by itself differs by kind: `local` records during the schedule, `transformer_engine` only when a
helper is called that no loop of ours calls. None of this can be seen to work without a GPU, so fields that would switch it
on half-way are refused.
"""

from collections.abc import Mapping
from typing import Any

from parallel.errors import ConfigError

_OFF = (None, False, "none")


def refuse_graphs(fields: Mapping[str, Any]) -> None:
    """Refuse what would switch CUDA graphs on.

    Args:
        fields: `model.mcore`, passed to mcore's TransformerConfig.

    Raises:
        ConfigError: naming the field.
    """
    for name, value in fields.items():
        if "cuda_graph" in name and value not in _OFF:
            raise ConfigError(
                f"model.mcore.{name}={value}: CUDA graphs are not supported, because a run neither records them nor drops "
                f"them before a switch (docs/gpu.md): leave model.mcore.{name} out"
            )
