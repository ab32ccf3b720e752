"""Process groups and layouts, the CPU runtime, and the seam to megatron-core versions."""
