"""The gradient buffers of mcore's DistributedDataParallel: none until they are needed, freed, and brought back.

mcore allocates them with the weights: 4 bytes per parameter that a stage which is built for a switch has no use for while
the old stage is still there. It cannot be told to wait, so `NoGradientsYet` answers its request with a stand-in, one number
seen as a whole buffer. `restore` puts memory behind it, and behind every view of it, as mcore lays them out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from parallel.errors import LaunchError


def buffers_of(wrapped: Any) -> list[Any]:
    """The parameter and gradient buffers of a wrapped chunk, dense and expert."""
    return [*wrapped.buffers, *wrapped.expert_parallel_buffers]


class NoGradientsYet(TorchFunctionMode):
    """A block in which DistributedDataParallel, when built, gets stand-ins for its gradient buffers.

    mcore 0.16 and 0.19 ask `torch.zeros(numel, ..., requires_grad=False)` once per buffer for weights, if the optimizer is
    distributed, and then once for gradients; they ask for nothing else in this way. `require_stand_ins` looks whether it
    still is so.

    Args:
        distributed: whether the optimizer is.
    """

    def __init__(self, distributed: bool) -> None:
        super().__init__()
        self._distributed, self._asked = distributed, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("requires_grad") is False:
            self._asked += 1
            if not self._distributed or self._asked % 2 == 0:
                return func(1, *args[1:], **kwargs).expand(*args[:1])
        return func(*args, **kwargs)


def _is_stand_in(gradients: torch.Tensor) -> bool:
    return gradients.stride() == (0,) and gradients.numel() > 1


def require_stand_ins(wrapped: Any) -> None:
    """Make sure that `NoGradientsYet` has seen what it is made for.

    Raises:
        LaunchError: this version of mcore allocates in another way.
    """
    for buffer in buffers_of(wrapped):
        weights = buffer.param_data
        if not _is_stand_in(buffer.grad_data) or (weights is not None and _is_stand_in(weights)):
            raise LaunchError(
                "the installed megatron-core allocates gradients in a way that is not known here: use a version that "
                "constraints/ names, or upcycle.path=checkpoint"
            )


def release(wrapped: Any) -> None:
    """Free the gradients of a chunk; what refers to them stays, and `restore` brings it back to life."""
    for buffer in buffers_of(wrapped):
        if not _is_stand_in(buffer.grad_data):
            buffer.offload_to_cpu(move_params=False)


def restore(wrapped: Any) -> None:
    """Allocate the gradients of a chunk, zeroed, where it has none."""
    for buffer in buffers_of(wrapped):
        if _is_stand_in(buffer.grad_data):
            _allocate(buffer)
        else:
            buffer.reload_from_cpu(move_params=False)


def _allocate(buffer: Any) -> None:
    whole = torch.zeros(buffer.numel, dtype=buffer.grad_dtype, device=buffer.grad_data.device)
    buffer.grad_data = whole
    for bucket in buffer.buckets:
        bucket.grad_data = whole[bucket.offset : bucket.offset + bucket.grad_data.numel()]
    for param, (begin, end, _) in buffer.param_index_map.items():
        param.main_grad = whole[begin:end].view(param.shape)
