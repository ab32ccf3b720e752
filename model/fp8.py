"""What 8-bit floats ask of a network, a layout and a device; refused before anything is built.

FP8 is Transformer Engine's: matrix products take their operands in 8 bits, weights stay bf16 with fp32 masters. Scales and
amax histories belong to a stage that runs: they are neither in checkpoints nor carried over a switch, where replicas, and
experts on other ranks, would bring those of other tensors; a new stage finds its own within a few steps.
"""

from collections.abc import Mapping
from typing import Any

from model.alignment import Cut, refuse_unaligned
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

# Least compute capability of each recipe (Ada has 8.9, Hopper 9.0, Blackwell 10.0).
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
FP8_FORMATS = ("none", "hybrid", "e4m3")
FP8_RECIPES = tuple(_CAPABILITY)


def alignment(recipe: str) -> int:
    """What every size in a product must be a multiple of (mcore's `get_fp8_align_size`)."""
    return 32 if recipe == "mxfp8" else 16


def check_sizes(model: Any, parallel: ParallelConfig, precision: str, keys: Mapping[str, str]) -> None:
    """Refuse what FP8 products cannot be made of; nothing to say where FP8 is off.

    Args:
        model: a `ModelConfig`.
        parallel: sizes that cut matrices.
        precision: of the run.
        keys: where the sizes of the layout are set, by name.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if model.fp8 == "none":
        return
    if precision != "bf16":
        raise ConfigError(f"model.fp8={model.fp8} needs run.precision=bf16, not {precision}: weights are kept in bf16")
    unit = alignment(model.fp8_recipe)
    cuts: list[Cut] = [("hidden_size", "tensor"), ("ffn_hidden_size", "tensor")]
    if model.num_experts:
        cuts += [("expert_ffn_hidden_size", "expert_tensor"), ("shared_expert_ffn_hidden_size", "tensor")]
    refuse_unaligned(model, parallel, keys, cuts, unit, f"model.fp8_recipe={model.fp8_recipe}", "model.fp8=none")


def check_device(fmt: str, recipe: str, capability: tuple[int, int], name: str) -> None:
    """Refuse a recipe that a device cannot compute.

    Args:
        fmt: `model.fp8`.
        recipe: `model.fp8_recipe`.
        capability: compute capability of the device.
        name: of the device.

    Raises:
        ConfigError: naming the device and what it can do.
    """
    if fmt == "none" or capability >= _CAPABILITY[recipe]:
        return
    able = [other for other, least in _CAPABILITY.items() if capability >= least]
    remedy = f"use model.fp8_recipe={able[0]}, or model.fp8=none" if able else "use model.fp8=none"
    least = ".".join(map(str, _CAPABILITY[recipe]))
    raise ConfigError(
        f"model.fp8={fmt} with model.fp8_recipe={recipe} needs compute capability {least}, and {name} has "
        f"{'.'.join(map(str, capability))}: {remedy}"
    )


def mcore_fields(model: Any) -> dict[str, Any]:
    """mcore's fields for the keys of a `ModelConfig`; none where FP8 is off."""
    if model.fp8 == "none":
        return {}
    fields: dict[str, Any] = {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
    if model.num_experts and model.dispatcher != "allgather" and model.capacity_factor is None:
        # Experts get any number of tokens; the router sends some more, so that each number is one that products take. Under
        # allgather mcore refuses that, and with a capacity it writes so into what autograd keeps of the tokens that it
        # dropped: there its experts add rows of zeros by themselves.
        fields["moe_router_padding_for_quantization"] = True
    return fields
