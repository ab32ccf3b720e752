"""Transformer Engine's variables of the environment against `model.mcore.attention_backend`.

mcore sets them by that field when it builds a network, whatever its layers are, and asserts that none says otherwise.
"""

import os

from model.config import ModelConfig
from parallel.errors import ConfigError

_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
# What each of them is set to (mcore's `LanguageModule._set_attention_backend`).
_VALUES = {
    backend: dict(zip(_VARIABLES, values, strict=True))
    for backend, values in {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}.items()
}


def refuse_other_attention(model: ModelConfig) -> None:
    """Refuse an environment in which mcore would not build a network.

    Raises:
        ConfigError: naming the variable, the key and the remedy.
    """
    backend = model.mcore.get("attention_backend") or "auto"
    told = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    meant = _VALUES[backend]
    odd = next((name for name, value in told.items() if value != meant[name]), None)
    if odd is None:
        return
    fitting = [other for other, values in _VALUES.items() if told.items() <= values.items()]
    use = f", or use model.mcore.attention_backend={' or '.join(fitting)}" if fitting else ""
    raise ConfigError(
        f"{odd}={told[odd]} in the environment contradicts model.mcore.attention_backend={backend}, for which megatron-core "
        f"sets it to {meant[odd]}: unset {', '.join(told)}{use}"
    )
