"""What context parallelism asks of a network: Transformer Engine's attention refuses the rest, in its first forward pass."""

from collections.abc import Mapping
from typing import Any

from model.config import divides
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

# How keys and values travel: mcore's `cp_comm_type`. Its a2a+p2p needs groups on two levels, which no layout here has.
WAYS = ("p2p", "all_gather", "a2a")
_FIELD = "model.mcore.cp_comm_type"


def check_context(model: Any, parallel: ParallelConfig, precision: str, keys: Mapping[str, str]) -> None:
    """Refuse what attention over several ranks cannot be computed of; nothing to say for one rank.

    Args:
        model: a `ModelConfig`.
        parallel: sizes of a stage.
        precision: of the run.
        keys: where the sizes of the layout are set, by name.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if parallel.context == 1:
        return
    size = f"{keys['context']}={parallel.context}"
    if model.transformer_impl == "local":
        raise ConfigError(
            f"{size} needs the attention of Transformer Engine, which model.transformer_impl=local keeps out: use "
            f"model.transformer_impl=auto on GPUs that have it, or {keys['context']}=1"
        )
    if precision != "bf16":
        raise ConfigError(
            f"{size} needs run.precision=bf16, not {precision}: attention over several ranks is 16 bits wide"
        )
    told = model.mcore.get("cp_comm_type") or "p2p"
    ways = set(told) if isinstance(told, list | tuple) else {told}
    for way in sorted(ways):
        if way not in WAYS:
            raise ConfigError(f"{_FIELD} has {way}, which {size} cannot use: use one of {', '.join(WAYS)}")
        if way != "p2p" and model.attention == "mla":
            raise ConfigError(f"{_FIELD} has {way}, but latent attention travels by p2p only with {size}: use that")
    if "a2a" in ways:
        heads = f"{keys['tensor']} x {keys['context']}, as {_FIELD} has a2a,"
        ranks = parallel.tensor * parallel.context
        divides("model.attention_heads", model.attention_heads, heads, ranks)
        divides("model.kv_heads", model.kv_heads or model.attention_heads, heads, ranks)
    if model.mcore.get("window_size") and "p2p" in ways:
        raise ConfigError(
            f"model.mcore.window_size={model.mcore['window_size']} cannot be combined with {size} while keys travel by "
            f"p2p: use {_FIELD}=all_gather or a2a"
        )
    softmax = model.mcore.get("softmax_type") or "vanilla"
    if softmax != "vanilla" and ways != {"a2a"}:
        raise ConfigError(f"model.mcore.softmax_type={softmax} needs {_FIELD}=a2a with {size}")
