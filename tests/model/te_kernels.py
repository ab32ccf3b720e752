"""Stand-ins on CPU for the kernels that Transformer Engine's layers start in a step in bf16; all of its Python is its own.

So its autograd functions run beside mcore's DDP without a GPU. Seen with 2.11.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F


def _product(
    a: torch.Tensor, b: torch.Tensor, layout: str, out: torch.Tensor | None, accumulate: bool, dtype: torch.dtype
) -> torch.Tensor:
    """cuBLAS's order of axes: the second factor comes first."""
    a, b = a.reshape(-1, a.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
    product = (b.T if layout[1] == "T" else b) @ (a.T if layout[0] == "T" else a)
    if out is None:
        return product.to(dtype)
    return out.add_(product) if accumulate else out.copy_(product)


def _gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    layout: str = "TN",
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor | None, ...]:
    assert bias is None
    found = _product(a, b, layout, out, accumulate, out_dtype or a.dtype)
    return found.view(*b.shape[:-1], -1) if layout[1] == "N" else found, None, None, None


def _grouped_gemm(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    quantization_params: Any,
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: Sequence[int] = (),
    accumulate: bool = False,
    single_output: bool = False,
    **others: Any,
) -> tuple[Any, ...]:
    places = out[0].split(list(m_splits)) if single_output else out
    for left, right, place in zip(a, b, places, strict=True):
        _product(left, right, layout, place, accumulate, out_dtype)
    return out, [None] * len(a), None


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x.float() * rsigma * weight.float()).to(x.dtype), rsigma


def _norm(x: torch.Tensor, out: Any, weight: torch.Tensor, bias: Any, eps: float, *others: Any) -> tuple[Any, ...]:
    normalised, rsigma = _normalised(x, weight, eps)
    return normalised, None, rsigma


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, rsigma: torch.Tensor, weight: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    unit, wide = x.float() * rsigma, grad.view(x.shape).float()
    inner = wide * weight.float()
    back = rsigma * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    return back.to(grad.dtype), (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)


def _norm_module(self: Any, x: torch.Tensor) -> torch.Tensor:
    return _normalised(x, self.weight, self.eps)[0]


def _attention(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **more: Any
) -> Any:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return found.permute(2, 0, 1, 3).flatten(2)


@contextlib.contextmanager
def _prepared(self: Any, rows: torch.Tensor, num_gemms: int = 1, **others: Any) -> Iterator[torch.Tensor]:
    """Its own asks whether the rows are on a GPU."""
    self.allow_different_data_and_param_types = False
    self.set_activation_dtype(rows)
    self.init_fp8_metadata(num_gemms=num_gemms)
    yield rows.contiguous()


def _never_read(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """What stands for a gradient that is in the buffer already: memory as it comes, here the worst of it."""
    return torch.full(tuple(shape), 0.0 if zero else float("nan"), dtype=dtype)


@contextlib.contextmanager
def its_layers_run() -> Iterator[None]:
    """Its linear layers, norms and attention run forward and backward on CPU inside."""
    import transformer_engine.pytorch as engine
    import transformer_engine_torch as kernels
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.module import base, grouped_linear, layernorm_linear, linear

    with contextlib.ExitStack() as stack:
        for module in (linear, layernorm_linear, grouped_linear):
            stack.enter_context(mock.patch.object(module, "get_dummy_wgrad", _never_read))
        for owner, name, stand_in in (
            (base.TransformerEngineBaseModule, "prepare_forward", _prepared),
            (linear, "general_gemm", _gemm),
            (layernorm_linear, "general_gemm", _gemm),
            (grouped_linear, "general_grouped_gemm", _grouped_gemm),
            (layernorm_linear, "apply_normalization", _norm),
            (kernels, "rmsnorm_bwd", _norm_backward),
            (engine.RMSNorm, "forward", _norm_module),
            (TEDotProductAttention, "forward", _attention),
            (utils, "_empty_tensor", lambda: torch.empty(0)),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield
