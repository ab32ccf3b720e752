"""The GPT-MoE model built from megatron-core specs, and its expert modules."""
