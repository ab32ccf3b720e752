"""Which activations are computed again in the backward pass instead of kept, and what no network has of it.

Three kinds, mcore's: `full` keeps the inputs of layers alone, `selective` leaves out parts of every layer by name, `none`
keeps everything. The same bits come out, except where a norm is computed again: its gradient is then summed in another
order.
"""

from collections.abc import Sequence
from typing import Any

from parallel.config import ParallelConfig
from parallel.errors import ConfigError

RECOMPUTE = ("none", "selective", "full")
METHODS = ("uniform", "block")
# Parts of a layer, by the names that mcore has for them. Its `gdn_norm_out` belongs to a network that is none of ours.
MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
# Their second pass would move the histories that delayed scales come from.
_NOT_DELAYED = ("layernorm", "moe_act")
_INSIDE_MOE = ("moe_act", "shared_experts")


def modules_of(model: Any) -> tuple[str, ...]:
    """The parts that a `ModelConfig` computes again under `selective`; none under another kind."""
    if model.recompute != "selective":
        return ()
    return tuple(model.recompute_modules) or ("core_attn",)


def check_recompute(model: Any) -> None:
    """Refuse combinations of the recompute keys of a `ModelConfig` that have no meaning, or no effect.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if model.recompute_modules and model.recompute != "selective":
        raise ConfigError(
            f"model.recompute_modules={_listed(model.recompute_modules)} goes with model.recompute=selective, not "
            f"{model.recompute}: set that, or leave the modules out"
        )
    if model.recompute != "full" and (model.recompute_method != "uniform" or model.recompute_layers != 1):
        raise ConfigError(
            f"model.recompute_method={model.recompute_method} and model.recompute_layers={model.recompute_layers} go with "
            f"model.recompute=full, not {model.recompute}: set that, or leave them out"
        )
    if len(set(model.recompute_modules)) != len(model.recompute_modules):
        raise ConfigError(f"model.recompute_modules={_listed(model.recompute_modules)} names one of them twice")
    for name in model.recompute_modules:
        if name not in MODULES:
            raise ConfigError(f"model.recompute_modules has {name}, which is unknown: use some of {', '.join(MODULES)}")
        missing = _missing(model, name)
        if missing:
            raise ConfigError(f"model.recompute_modules has {name}, but {missing}: leave it out")
    if "moe_act" in model.recompute_modules and model.experts == "sequential":
        raise ConfigError(
            "model.recompute_modules has moe_act, which model.experts=sequential cannot compute again alone: use "
            "model.experts=grouped, or moe in place of moe_act"
        )
    scaled = [name for name in _NOT_DELAYED if name in model.recompute_modules]
    if scaled and model.fp8 != "none" and model.fp8_recipe == "delayed":
        raise ConfigError(
            f"model.recompute_modules has {scaled[0]}, which cannot be computed again under model.fp8_recipe=delayed: use "
            "model.fp8_recipe=tensorwise, or leave it out"
        )
    inside = [name for name in _INSIDE_MOE if name in model.recompute_modules]
    if inside and "moe" in model.recompute_modules:
        raise ConfigError(
            f"model.recompute_modules has moe, which computes {' and '.join(inside)} again as well: leave out one or the "
            "other"
        )


def _missing(model: Any, name: str) -> str | None:
    """Why a network has no such part; None where it has."""
    dense_layers = model.layers - len(model.moe_layer_numbers())
    reasons = {
        "mla_up_proj": (model.attention != "mla", f"model.attention={model.attention} has no such projection"),
        "mlp": (not dense_layers, "every layer holds experts"),
        "moe": (not model.num_experts, "model.num_experts=0 is a dense model"),
        "moe_act": (not model.num_experts, "model.num_experts=0 is a dense model"),
        "shared_experts": (
            not (model.num_experts and model.shared_expert_ffn_hidden_size),
            "model.shared_expert_ffn_hidden_size gives it none",
        ),
    }
    absent, reason = reasons.get(name, (False, ""))
    return reason if absent else None


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def check_layers(model: Any, parallel: ParallelConfig, key: str) -> None:
    """Refuse units of layers that a chunk of the pipeline cannot be cut into.

    Args:
        model: a `ModelConfig`.
        parallel: sizes of a stage; its chunks hold equally many layers.
        key: where the pipeline's size is set.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    chunks = parallel.pipeline * parallel.chunks()
    if model.recompute != "full" or model.layers % chunks:
        # Layers that cannot be shared out evenly are refused elsewhere.
        return
    layers, unit = model.layers // chunks, model.recompute_layers
    near = [n for n in range(1, layers + 1) if layers % n == 0 or model.recompute_method == "block"]
    if unit not in near:
        closest = min(near, key=lambda n: abs(n - unit))
        what = "does not divide" if model.recompute_method == "uniform" else "is more than"
        raise ConfigError(
            f"model.recompute_layers={unit} {what} the {layers} layers that {key}={parallel.pipeline} gives each chunk of "
            f"the pipeline: use model.recompute_layers={closest}"
        )


def check_modules(model: Any, experts: str, discards: bool) -> None:
    """Refuse parts that the modules of this machine cannot compute again.

    Args:
        model: a `ModelConfig`.
        experts: the expert module in use: te, grouped or sequential.
        discards: whether mcore can free an output and bring it back here (`parallel.compat.can_discard_outputs`).

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    modules = modules_of(model)
    freed = [name for name in ("layernorm", "mla_up_proj", *["moe_act"] * (experts == "te")) if name in modules]
    if freed and not discards:
        raise ConfigError(
            f"model.recompute_modules has {freed[0]}, for which this version of mcore compiles a function at its first "
            "use: install ninja and a C++ compiler, or leave it out"
        )


def mcore_fields(model: Any, experts: str) -> dict[str, Any]:
    """mcore's fields for the recompute keys of a `ModelConfig`; none where nothing is computed again.

    `moe_act` is left out for experts of our own: mcore refuses the name without Transformer Engine's. `GroupedExperts`
    finds it once `tell_experts` has put it back.
    """
    if model.recompute == "none":
        return {}
    if model.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": model.recompute_method,
            "recompute_num_layers": model.recompute_layers,
        }
    ours = experts != "te"
    names = [name for name in modules_of(model) if not (ours and name == "moe_act")]
    return {"recompute_granularity": "selective", "recompute_modules": names}


def tell_experts(config: Any, model: Any) -> None:
    """Complete the list of parts in an mcore config that `mcore_fields` has left one out of."""
    for name in modules_of(model):
        if name not in config.recompute_modules:
            config.recompute_modules.append(name)
