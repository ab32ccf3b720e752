"""Typed schema of the `parallel` group and the arithmetic of a layout, without any process group.

The order of ranks and the folding of expert parallelism over data parallelism are mcore's: dense parameters are split
tensor x context x data x pipeline, expert parameters expert-tensor x expert x expert-data x pipeline over the same ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from parallel.errors import ConfigError

_NO_KEYS: Mapping[str, str] = MappingProxyType({})


@dataclass
class ParallelConfig:
    """Sizes of the parallel dimensions, in ranks. The data-parallel size is derived from the number of processes."""

    # Ranks that share each dense matrix.
    tensor: int = 1
    # Ranks that share the stack of layers.
    pipeline: int = 1
    # Model chunks per pipeline rank (interleaved schedule); null means one.
    virtual_pipeline: int | None = None
    # Ranks that share each sequence.
    context: int = 1
    # Ranks that share the experts of each MoE layer.
    expert: int = 1
    # Ranks that share each expert's matrices.
    expert_tensor: int = 1
    # Seconds after which a collective that a rank never joined ends the job.
    timeout_seconds: int = 600

    def __post_init__(self) -> None:
        """Refuse sizes below one.

        Raises:
            ConfigError: naming the key and the value.
        """
        for key in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "timeout_seconds"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"parallel.{key}={value} must be 1 or more")
        if self.virtual_pipeline is not None and self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ConfigError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline of 2 or more: "
                "raise parallel.pipeline or drop parallel.virtual_pipeline"
            )

    def data(self, world_size: int, keys: Mapping[str, str] = _NO_KEYS) -> int:
        """Data-parallel size of the dense parameters for a number of processes.

        Args:
            world_size: processes of the job.
            keys: for the message, where a size was set if not at `parallel.SIZE`.

        Raises:
            ConfigError: if either family of parameters does not fit the number of processes.
        """
        dense = self._product(world_size, ("tensor", "pipeline", "context"), keys)
        self._product(world_size, ("expert", "expert_tensor", "pipeline"), keys)
        return world_size // dense

    def _product(self, world_size: int, sizes: tuple[str, ...], keys: Mapping[str, str]) -> int:
        """Ranks that hold one copy of a family of parameters, which must divide the processes."""
        product = prod(getattr(self, name) for name in sizes)
        if world_size % product:
            factors = " x ".join(f"{keys.get(name, f'parallel.{name}')}={getattr(self, name)}" for name in sizes)
            raise ConfigError(
                f"{factors} = {product} does not divide the {world_size} processes: start a multiple of {product} "
                "processes, or lower one of them"
            )
        return product

    def expert_data(self, world_size: int) -> int:
        """Ranks that hold the same experts (expert-data-parallel size)."""
        self.data(world_size)
        return world_size // (self.expert_tensor * self.expert * self.pipeline)

    def chunks(self) -> int:
        """Model chunks each rank holds."""
        return self.virtual_pipeline or 1

    def interleaved(self) -> int | None:
        """mcore's virtual pipeline size: None where each rank holds one chunk."""
        return self.chunks() if self.chunks() > 1 else None

    def describe(self, world_size: int) -> dict[str, int]:
        """The layout as plain numbers, for logs, events and checkpoints."""
        return {
            "world": world_size,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.chunks(),
            "context": self.context,
            "data": self.data(world_size),
            "expert": self.expert,
            "expert_tensor": self.expert_tensor,
            "expert_data": self.expert_data(world_size),
        }
