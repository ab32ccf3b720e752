"""Layer norms for mcore's layer specs where Transformer Engine is not in use.

Why: MoE under tensor parallelism forces sequence parallelism in mcore, and mcore's wrapper of torch's norms refuses it.
All that is missing is a mark on the parameters: each rank sees a part of the sequence, so their gradients have to be
summed over the tensor-parallel ranks, which mcore does for marked parameters.

How to use: put `CoppiceNorm` wherever a spec names a norm; it follows `config.normalization`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from parallel.errors import ConfigError


def _prepare(norm: torch.nn.Module, config: TransformerConfig) -> None:
    """Refuses what torch's norms do not compute, and marks the parameters for sequence parallelism."""
    if config.layernorm_zero_centered_gamma:
        raise ConfigError(
            "layernorm_zero_centered_gamma=True needs Transformer Engine's norms: remove it, or install and use those"
        )
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _placement(config: TransformerConfig) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and not config.use_cpu_initialization
    return {"dtype": config.params_dtype, "device": "cuda" if on_gpu else "cpu"}


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` (bf16 input is normalised in fp32) with an mcore constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        """Args: config: of the model; hidden_size: of the last axis; unused: hints that mcore passes to other norms."""
        super().__init__(hidden_size, eps=eps, **_placement(config))
        _prepare(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with an mcore constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        """Args: config: of the model; hidden_size: of the last axis; unused: hints that mcore passes to other norms."""
        super().__init__(hidden_size, eps=eps, **_placement(config))
        _prepare(self, config)


class CoppiceNorm:
    """Builds the norm that `config.normalization` names. A class, because specs of mcore 0.16 take no functions."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> RMSNorm | LayerNorm:
        """Builds the norm.

        Args:
            config: of the model.
            hidden_size: of the last axis.
            eps: added to the mean square (or variance).
            **unused: hints that mcore passes to other norms (persist_layer_norm, has_residual, ...).

        Raises:
            ConfigError: `config.normalization` is neither RMSNorm nor LayerNorm.
        """
        kinds: dict[str, type[RMSNorm] | type[LayerNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
        if config.normalization not in kinds:
            raise ConfigError(f"normalization={config.normalization!r} is not supported: use RMSNorm or LayerNorm")
        return kinds[config.normalization](config, hidden_size, eps)


class _AllHeadsNorm(RMSNorm):
    """Normalises all heads of queries or keys together, where mcore's norm takes each by itself; for one tensor rank.

    mcore hands over `[sequence, batch, heads, head_dim]` and builds the norm for one head.
    """

    @staticmethod
    def _heads(config: TransformerConfig) -> int:
        raise NotImplementedError

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        """Args: config: of the model; hidden_size: of one head; eps: of the mean square; unused: as in `RMSNorm`."""
        super().__init__(config, self._heads(config) * hidden_size, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., heads, head_dim]` -> the same shape."""
        normed: torch.Tensor = super().forward(x.flatten(-2))
        return normed.view(x.shape)


class AllQueriesNorm(_AllHeadsNorm):
    """Over all query heads."""

    @staticmethod
    def _heads(config: TransformerConfig) -> int:
        return int(config.num_attention_heads)


class AllKeysNorm(_AllHeadsNorm):
    """Over all key heads."""

    @staticmethod
    def _heads(config: TransformerConfig) -> int:
        return int(config.num_query_groups)
