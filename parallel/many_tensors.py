"""What mcore does to all gradients at once where neither Transformer Engine nor Apex is installed.

Why: its stand-ins for their kernels walk the tensors one by one. The norm reads each tensor's norm on the host, so on a GPU
every step waits once per parameter for everything in its queue. torch does the same in a few launches and reads nothing.
"""

from typing import Any

import torch


def total_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *rest: Any
) -> tuple[torch.Tensor, None]:
    """Square root of the sum of squares over all tensors, on their device; the signature is Apex's.

    Args:
        chunk_size: ignored.
        noop_flag: ignored.
        tensor_lists: fp32, at least one tensor.
        per_tensor: ignored; mcore asks for no norms of single tensors.
        *rest: ignored.

    Returns:
        [1] fp32, and None.
    """
    flat = [tensor for tensors in tensor_lists for tensor in tensors]
    return torch.nn.utils.get_total_norm(flat).reshape(1), None


def scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], factor: float) -> None:
    """Set each tensor of the second list to that of the first, times a factor; the signature is Apex's.

    Args:
        chunk_size: ignored.
        noop_flag: ignored.
        tensor_lists: sources and destinations, which may be the same.
        factor: of all.
    """
    sources, destinations = tensor_lists
    if all(source is destination for source, destination in zip(sources, destinations, strict=True)):
        torch._foreach_mul_(destinations, factor)
    elif factor == 1.0:
        torch._foreach_copy_(destinations, sources)
    else:
        # Multiplied before it is rounded to the destination's type.
        torch._foreach_copy_(destinations, torch._foreach_mul(sources, factor))


def use_many_at_once() -> None:
    """Put these in the place of mcore's stand-ins; does nothing where it has found real kernels."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = total_norm
    for module in (clip_grads, optimizer):
        if module.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = scale
