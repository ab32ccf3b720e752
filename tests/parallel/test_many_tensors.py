"""One pass over all gradients gives the bits of mcore's walk over them one by one."""

import pytest
import torch

from parallel.compat import prepare_megatron
from parallel.many_tensors import scale, total_norm

prepare_megatron()


def _gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 20_000, (count,), generator=generator).tolist()
    return [torch.randn(size, generator=generator) * 10.0 ** (i % 5 - 2) for i, size in enumerate(sizes)]


def test_they_stand_in_mcores_place() -> None:
    from megatron.core.optimizer import clip_grads, optimizer

    assert clip_grads.l2_norm_impl is total_norm
    assert clip_grads.multi_tensor_scale_impl is scale and optimizer.multi_tensor_scale_impl is scale


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_bits_are_those_of_mcore(count: int) -> None:
    from megatron.core import utils

    gradients, flag = _gradients(count), torch.zeros(1)
    theirs, _ = utils.local_multi_tensor_l2_norm(0, flag, [gradients], False)
    assert torch.equal(total_norm(0, flag, [gradients], False)[0], theirs)
    ours, mcores = [[g.clone() for g in gradients] for _ in range(2)]
    scale(0, flag, [ours, ours], 0.3337)
    utils.local_multi_tensor_scale(0, flag, [mcores, mcores], 0.3337)
    assert all(torch.equal(a, b) for a, b in zip(ours, mcores, strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.3337])
def test_into_another_type(factor: float) -> None:
    from megatron.core import utils

    gradients, flag = _gradients(5), torch.zeros(1)
    ours, mcores = [[torch.empty_like(g, dtype=torch.bfloat16) for g in gradients] for _ in range(2)]
    scale(0, flag, [gradients, ours], factor)
    utils.local_multi_tensor_scale(0, flag, [gradients, mcores], factor)
    assert all(torch.equal(a, b) for a, b in zip(ours, mcores, strict=True))
