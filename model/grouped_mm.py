"""Matrix products of many experts at once, on CPU and GPU: the arithmetic below `GroupedExperts`.

Why: one product per expert costs a launch (GPU) or a dispatch (CPU) each, and Megatron's sequence of experts adds a
dozen more operations per expert around it. Here all experts of a rank share one call per product, and the activation
runs once over all tokens.

Two layouts of the tokens, chosen by `group_tokens`:

- ragged `[T, width]`, rows sorted by expert: `torch.nn.functional.grouped_mm`. GPU always, CPU in general.
- padded `[e, capacity, width]`: batched products. CPU in bf16 when the loads are even enough, because each bf16 product
  costs about 25 microseconds of set-up there, more than the product itself for small experts.

Both compute the same products with fp32 accumulation; no function here waits for the GPU.

Shapes: `e` local experts, `T` tokens (all local experts together), `H` hidden, `F` expert ffn, `K`/`N` in/out width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# Multiply-adds spent on padding, per expert and product, up to which batched products win over products one by one.
# Measured on a Xeon with AMX: they win at 1.5 million, lose at 5.5 million.
_PADDING_BUDGET = 3_000_000
# Elements of weight gradients that are made and added up at a time on CPU.
_PRODUCT_ELEMENTS = 262_144


@dataclass(frozen=True)
class TokenGroups:
    """Which rows belong to which expert.

    Attributes:
        counts_e: rows of each expert, int64, on the rows' device.
        ends_e: where each expert's rows end, int32, on the rows' device (what grouped_mm calls `offs`).
        capacity: rows per expert of the padded layout; None for ragged.
        slots_T: row of each token in the flattened padded layout; None for ragged.
    """

    counts_e: torch.Tensor
    ends_e: torch.Tensor
    capacity: int | None = None
    slots_T: torch.Tensor | None = None


def group_tokens(tokens_per_expert: torch.Tensor, rows: torch.Tensor, macs_per_row: int) -> TokenGroups:
    """Describes the tokens' groups and chooses their layout.

    Args:
        tokens_per_expert: `[e]`, integers, on the CPU or on the rows' device.
        rows: `[T, K]`, the tokens, sorted by expert.
        macs_per_row: multiply-adds of one product for one row (K * N), the largest one of the caller.
    """
    # From pageable memory this copy is staged, so it does not wait for the GPU's queue.
    counts_e = tokens_per_expert.to(device=rows.device, dtype=torch.int64, non_blocking=True)
    ends_e = counts_e.cumsum(0)
    ragged = TokenGroups(counts_e, ends_e.to(torch.int32))
    if rows.is_cuda or rows.dtype != torch.bfloat16 or len(counts_e) == 1 or not len(rows):
        return ragged
    capacity = int(counts_e.max())
    if (capacity - len(rows) / len(counts_e)) * macs_per_row > _PADDING_BUDGET:
        return ragged
    starts_e = ends_e - counts_e
    shift_e = torch.arange(len(counts_e)) * capacity - starts_e
    slots_T = torch.arange(len(rows)) + torch.repeat_interleave(shift_e, counts_e)
    return TokenGroups(counts_e, ragged.ends_e, capacity, slots_T)


def spread(rows: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """Rows `[T, ...]` in the groups' layout; padding is zero. Free where the layout is ragged."""
    return rows if groups.slots_T is None else _Spread.apply(rows, groups)


def collect(spread_rows: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """The inverse of `spread`: `[T, ...]` without the padding."""
    return spread_rows if groups.slots_T is None else _Collect.apply(spread_rows, groups)


def grouped_linear(rows: torch.Tensor, weight_eNK: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """Each expert's rows times its own matrix: `rows_i @ weight_i.T`.

    Args:
        rows: in the groups' layout, width K.
        weight_eNK: `[e, N, K]`; rows of it must be a multiple of 16 bytes long.
        groups: of these rows.

    Returns:
        Same layout, width N. Experts without rows get zero gradients, not None.
    """
    return _GroupedLinear.apply(rows, weight_eNK, groups)


def activated_linear(
    activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    probs: torch.Tensor,
    weight_eNK: torch.Tensor,
    groups: TokenGroups,
) -> torch.Tensor:
    """`grouped_linear` of an activation that is computed again in the backward pass instead of kept; the same bits.

    Args:
        activation: of rows and probabilities, to width K; without randomness.
        rows: in the groups' layout, any width.
        probs: one per row, in the same layout.
        weight_eNK: as in `grouped_linear`.
        groups: of these rows.
    """
    return _ActivatedLinear.apply(activation, rows, probs, weight_eNK, groups)


def per_token(values_eN: torch.Tensor, groups: TokenGroups, num_tokens: int) -> torch.Tensor:
    """Each expert's vector (a bias) repeated for its tokens: `[T, N]`, always ragged."""
    return _PerToken.apply(values_eN, groups, num_tokens)


def weighted_swiglu(gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """SwiGLU times the routing probability: `silu(gate) * up * probs`, rounded where Megatron's unfused MLP rounds.

    Args:
        gate_up: `[..., 2F]`, gate first.
        probs: `[...]`, one per row, any floating dtype; the product is taken in the wider of the two dtypes.

    Returns:
        `[..., F]` in the dtype of `gate_up`.
    """
    return _WeightedSwiGLU.apply(gate_up, probs)


def _products(rows: torch.Tensor, matrix_eKN: torch.Tensor, ends_e: torch.Tensor) -> torch.Tensor:
    if rows.dim() == 3:
        return torch.bmm(rows, matrix_eKN)
    if not len(rows):
        return rows.new_empty(0, matrix_eKN.shape[-1])
    return F.grouped_mm(rows, matrix_eKN, offs=ends_e)


def _outer_products(left: torch.Tensor, right: torch.Tensor, ends_e: torch.Tensor) -> torch.Tensor:
    """`left_i.T @ right_i` for each expert i: `[e, left width, right width]`, zero for experts without rows."""
    if left.dim() == 3:
        return torch.bmm(left.transpose(1, 2), right)
    if not len(left):
        return left.new_zeros(len(ends_e), left.shape[1], right.shape[1])
    # This orientation (left transposed, right not) is the one in which GPU kernels take groups of any size, empty too.
    return F.grouped_mm(left.t(), right, offs=ends_e)


def _add_outer_products(total_eNK: torch.Tensor, left: torch.Tensor, right: torch.Tensor, ends_e: torch.Tensor) -> None:
    """Adds `_outer_products` to `total_eNK`, a few experts at a time so that their products stay in the cache."""
    experts = len(total_eNK)
    step = max(1, _PRODUCT_ELEMENTS // total_eNK[0].numel())
    bounds = [0, *ends_e.tolist()]
    for first in range(0, experts, step):
        last = min(first + step, experts)
        begin, end = bounds[first], bounds[last]
        if begin == end:
            continue
        some = slice(first, last) if left.dim() == 3 else slice(begin, end)
        total_eNK[first:last].add_(_outer_products(left[some], right[some], ends_e[first:last] - begin))


class _GroupedLinear(torch.autograd.Function):
    """grouped_mm with a backward that accepts any gradient layout and both layouts of tokens.

    On CPU it adds weight gradients to the buffers of mcore's DDP itself, a few experts at a time. Left to DDP, adding
    a bf16 gradient to an fp32 buffer first writes an fp32 copy of the whole stack, which costs more than the product.
    As with mcore's own fused accumulation, `torch.autograd.grad` must not be asked for the gradient of such a weight.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight_eNK: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        ctx.save_for_backward(rows, weight_eNK)
        ctx.ends_e = groups.ends_e
        return _products(rows, weight_eNK.transpose(1, 2), groups.ends_e)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, weight_eNK = ctx.saved_tensors
        grad = _row_by_row(grad)
        grad_rows = _products(grad, weight_eNK, ctx.ends_e) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(weight_eNK, grad, rows, ctx.ends_e) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


class _ActivatedLinear(torch.autograd.Function):
    """`_GroupedLinear` that keeps the input of the activation before it, and not its output or what led there."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        rows: torch.Tensor,
        probs: torch.Tensor,
        weight_eNK: torch.Tensor,
        groups: TokenGroups,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, probs, weight_eNK)
        ctx.activation, ctx.ends_e = activation, groups.ends_e
        return _products(activation(rows, probs), weight_eNK.transpose(1, 2), groups.ends_e)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows, probs, weight_eNK = ctx.saved_tensors
        grad = _row_by_row(grad)
        wanted = ctx.needs_input_grad[1:3]
        inputs = [t.detach().requires_grad_(want) for t, want in zip((rows, probs), wanted, strict=True)]
        with torch.enable_grad():
            activated = ctx.activation(*inputs)
        grad_weight = None
        if ctx.needs_input_grad[3]:
            grad_weight = _weight_gradient(weight_eNK, grad, activated.detach(), ctx.ends_e)
        grads: list[torch.Tensor | None] = [None, None]
        if any(wanted):
            differentiable = [t for t, want in zip(inputs, wanted, strict=True) if want]
            found = iter(torch.autograd.grad(activated, differentiable, _products(grad, weight_eNK, ctx.ends_e)))
            grads = [next(found) if want else None for want in wanted]
        return None, *grads, grad_weight, None


def _row_by_row(grad: torch.Tensor) -> torch.Tensor:
    """A gradient as grouped_mm takes it: expanded ones, as those of a sum are, it refuses.

    `contiguous` leaves a single row's stride as it is, which may be that of a column, and is refused as well.
    """
    return grad.contiguous().view(-1).view(grad.shape)


def _weight_gradient(
    weight_eNK: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor, ends_e: torch.Tensor
) -> torch.Tensor:
    """The gradient of a stack, added to DDP's buffer where that is ours to do."""
    if not _adds_to_buffer(weight_eNK):
        return _outer_products(grad, rows, ends_e)
    _add_outer_products(weight_eNK.main_grad, grad, rows, ends_e)  # type: ignore[attr-defined]
    weight_eNK.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # Never read, as no gradient is there that autograd would add it to: DDP wants to see that there is one.
    return torch.empty_like(weight_eNK)


def _adds_to_buffer(weight: torch.Tensor) -> bool:
    """Whether DDP manages this weight, by the marks that mcore's linear layers go by for fused accumulation.

    A gradient that somebody left is DDP's and autograd's affair: autograd adds to it what we return.
    """
    managed = hasattr(weight, "main_grad") and hasattr(weight, "grad_added_to_main_grad")
    return managed and weight.grad is None and not weight.is_cuda and not getattr(weight, "zero_out_wgrad", False)


def _to_slots(rows: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    assert groups.capacity is not None and groups.slots_T is not None
    experts = len(groups.counts_e)
    padded = rows.new_zeros(experts * groups.capacity, *rows.shape[1:])
    return padded.index_copy_(0, groups.slots_T, rows).unflatten(0, (experts, groups.capacity))


def _from_slots(padded: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    assert groups.slots_T is not None
    return padded.flatten(0, 1).index_select(0, groups.slots_T)


class _Spread(torch.autograd.Function):
    """Copies rows to their slots. Every slot has at most one row, so the gradient is a copy back and not a sum."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        ctx.groups = groups
        return _to_slots(rows, groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _from_slots(grad, ctx.groups), None


class _Collect(torch.autograd.Function):
    """Copies rows from their slots: the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
        ctx.groups = groups
        return _from_slots(padded, groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _to_slots(grad, ctx.groups), None


class _PerToken(torch.autograd.Function):
    """Repeats rows; the gradient sums them by a product with ones, in fp32 inside the product."""

    @staticmethod
    def forward(ctx: Any, values_eN: torch.Tensor, groups: TokenGroups, num_tokens: int) -> torch.Tensor:
        ctx.groups = groups
        return torch.repeat_interleave(values_eN, groups.counts_e, dim=0, output_size=num_tokens)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        ones = grad.new_ones(len(grad), 16 // grad.element_size())  # the narrowest row that grouped_mm takes
        return _outer_products(ones, _row_by_row(grad), ctx.groups.ends_e)[:, 0], None, None


class _WeightedSwiGLU(torch.autograd.Function):
    """The activation in fewer passes over memory than autograd makes; every rounding is the same."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        silu = F.silu(gate)
        activated = silu * up
        ctx.save_for_backward(gate_up, probs, silu, activated)
        return _times(activated, probs.unsqueeze(-1)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate_up, probs, silu, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        wide = torch.promote_types(gate_up.dtype, probs.dtype)
        grad_probs = _times(activated, grad.to(wide)).sum(-1)
        grad_activated = _times(grad, probs.unsqueeze(-1)).to(gate_up.dtype)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, -1)
        torch.mul(grad_activated, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_activated.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_probs.to(probs.dtype)


def _times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left * right` in a new tensor of the wider dtype. Where `left` must be widened, the copy takes the product."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return left * right if left.dtype == wide else left.to(wide).mul_(right)
