"""Which family a config.json is of. This folder goes between published models (Hugging Face's folders) and ours:

    mapping.py   what a family is: fields of config.json, names of tensors
    llama.py, qwen.py, mixtral.py, olmoe.py, deepseek.py    the families, a page each
    logical.py   our tensors by key and global shape, and which blocks of published tensors each is made of
    source.py    a folder on disk: config.json, and slices of its safetensors
    read.py      boxes of our tensors out of a folder
    fill.py      fills the model of a rank
    write.py     safetensors in shards, written as a stream

Imports and exports of checkpoints are in `train/hf/command.py`: `python -m model.hf`.
"""

from collections.abc import Mapping
from typing import Any

from model.hf.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from model.hf.llama import LLAMA
from model.hf.mapping import Family
from model.hf.mixtral import MIXTRAL
from model.hf.olmoe import OLMOE
from model.hf.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from parallel.errors import ConfigError

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3)
}
# Families that are asked for and cannot be had, with the reason.
_IMPOSSIBLE = {
    "gpt_oss": "its weights are published in MXFP4 blocks, and mcore computes its attention sinks and alternating windows "
    "with Transformer Engine only",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model.

    Args:
        config: config.json.

    Raises:
        ConfigError: naming a model_type or an architecture that is not known.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"config.json has model_type={kind}: use a complete folder of a published model")
    if kind in _IMPOSSIBLE:
        raise ConfigError(f"config.json has model_type={kind}, which cannot be imported: {_IMPOSSIBLE[kind]}")
    if kind not in FAMILIES:
        raise ConfigError(
            f"config.json has model_type={kind}, which is not known: one of {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    named = config.get("architectures") or [family.architecture]
    if named != [family.architecture]:
        shown = ", ".join(map(str, named)) if isinstance(named, list) else named
        raise ConfigError(
            f"config.json has architectures={shown}: of model_type={kind} only {family.architecture} is known"
        )
    return family
