"""Core attention for multi-head latent attention where Transformer Engine is not in use.

Why: mcore builds MLA's core attention with widths of its own for keys and values, which only Transformer Engine's class
takes. The arithmetic of mcore's torch attention does not care; only the shape of its result does.
"""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig


class LatentDotProductAttention(DotProductAttention):
    """mcore's dot-product attention with separate widths of keys and values per head."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the attention.

        Args:
            config: of the model.
            k_channels: width of a query and key head; None where mcore builds a first version that it replaces.
            v_channels: width of a value head, and so of the result.
        """
        super().__init__(config, *args, **kwargs)
        if k_channels is not None and v_channels is not None:
            self.hidden_size_per_attention_head = k_channels
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
