"""The tensors of a dense feed-forward in a checkpoint: their keys there and as experts, and the numbers experts have.

Shapes: M experts, G shards, F units of the dense feed-forward, f = F / G of an expert, H hidden. First projection
[2 F, H] where the activation has a gate (gates first), else [F, H]; second projection [H, F].
"""

import re
from typing import NamedTuple

import torch

from model.sharded_state import MASTER_PREFIX, parameter_of
from parallel.stream_files import StoredTensors
from upcycle.slices import DenseOrigin

_FEED_FORWARD = re.compile(
    r"decoder\.layers\.(\d+)\.mlp\.linear_(?:fc1\.(layer_norm)_(weight|bias)|(fc[12])\.(weight|bias))$"
)


class Place(NamedTuple):
    """Which tensor of a dense feed-forward a key is of: fc1, fc2 or norm; weight or bias."""

    layer: int
    module: str
    name: str


def place_of(parameter: str) -> Place | None:
    """Read a parameter's checkpoint key; None outside of feed-forwards and the norms before them."""
    match = _FEED_FORWARD.match(parameter)
    if match is None:
        return None
    index, norm, norm_name, linear, linear_name = match.groups()
    return Place(int(index) + 1, "norm" if norm else linear, norm_name or linear_name)


def moe_key(place: Place) -> str:
    """The checkpoint key in a layer that has experts."""
    prefix = f"decoder.layers.{place.layer - 1}"
    if place.module == "norm":
        return f"{prefix}.pre_mlp_layernorm.{place.name}"
    return f"{prefix}.mlp.experts.experts.linear_{place.module}.{place.name}"


def unit_axis(place: Place) -> int | None:
    """Which axis of a dense tensor runs over intermediate units; None for the bias of the output."""
    if place.module == "fc1":
        return 0
    return 1 if place.name == "weight" else None


def factor_of(origin: DenseOrigin, state: str, matrix: str) -> float:
    """What values of a matrix, its master or its moments are multiplied by.

    With w' = a w the gradient of the same loss is g' = g / a: the first moment goes with 1 / a, the second with 1 / a^2.
    That a copy sees a share of the tokens is left out, as in the rule `copy` of an expansion (docs/optimizer-rules.md).
    """
    scale = origin.scales[matrix]
    return {"exp_avg": 1 / scale, "exp_avg_sq": 1 / scale**2}.get(state, scale)


def scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    """The values times a factor, in their own type; themselves where it is 1."""
    return values if factor == 1.0 else (values.float() * factor).to(values.dtype)


def changed_source(stored: StoredTensors, origin: DenseOrigin, key: str, place: Place) -> str:
    """Where the values of an expert's tensor are read: a weight that is changed follows from its master, if it has one."""
    state, parameter = parameter_of(key)
    if state != "weight" or not is_changed(origin, place) or MASTER_PREFIX + parameter not in stored.tensors:
        return key
    return MASTER_PREFIX + parameter


def is_changed(origin: DenseOrigin, place: Place) -> bool:
    """Whether experts hold other numbers than the feed-forward in this tensor, and not only some of them."""
    matrices = [m for m in origin.matrices if m != "down"] if place.module == "fc1" else ["down"]
    if place.module == "fc2" and place.name == "bias":
        matrices = ["down_bias"]
    drawn = origin.method == "drop" and place.name == "weight"
    return drawn or any(origin.scales[matrix] != 1 for matrix in matrices)
