"""What mcore's experts ask of a layout where linear layers have biases: it refuses the rest late, or in its first step."""

from collections.abc import Mapping
from typing import Any

from parallel.config import ParallelConfig
from parallel.errors import ConfigError

_KEY = "model.linear_bias=true"


def check_biases(model: Any, parallel: ParallelConfig, keys: Mapping[str, str]) -> None:
    """Refuse experts whose biases cannot be computed in a layout.

    Args:
        model: a `ModelConfig`.
        parallel: sizes of a stage.
        keys: where the sizes of the layout are set, by name.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not model.num_experts or not model.linear_bias:
        return
    if parallel.expert_tensor > 1:
        # Each rank would add the whole bias, and the ranks are summed.
        raise ConfigError(
            f"{_KEY} cannot be combined with {keys['expert_tensor']}={parallel.expert_tensor}: experts that are split have "
            f"no biases; use {keys['expert_tensor']}=1 or no biases"
        )
    if model.experts == "sequential" and parallel.expert == 1:
        # mcore adds the bias in place to what autograd knows as a view, unless experts are spread over ranks.
        raise ConfigError(
            f"{_KEY} with model.experts=sequential needs experts on several ranks, not {keys['expert']}=1: mcore's experts "
            "have no gradient there; use model.experts=grouped"
        )
