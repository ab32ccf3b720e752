"""Moments of different ages in one Adam: the update of every row is that of its own age, and nobody else's changes."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError, ExpansionError
from parallel.optimizer_ages import (
    OptimizerAges,
    RateFactor,
    Restart,
    RowState,
    YoungRange,
    correct_updates,
    is_over,
)
from parallel.optimizer_state import OptimizerView

_LR, _EPS, _DECAY, _STEPS = 1e-2, 1e-8, 0.1, 10
# Rows of the master, and how far Adam had counted when some of them began anew.
_ROWS, _WIDTH, _BEFORE = 6, 70, 500


class GroupStepAdam(torch.optim.Optimizer):
    """Adam as Transformer Engine's and Apex's kernels compute it: a count per group, betas rounded to fp32."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = torch.tensor(group["betas"], dtype=torch.float32)
            correction1, correction2 = 1 - beta1.double() ** group["step"], 1 - beta2.double() ** group["step"]
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("exp_avg", torch.zeros_like(p))
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                m.copy_(beta1 * m + (1 - beta1) * p.grad)
                v.copy_(beta2 * v + (1 - beta2) * p.grad * p.grad)
                update = m / correction1.float() / ((v / correction2.float()).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


_KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "loop": lambda *a, **k: torch.optim.AdamW(*a, **k, foreach=False),
    "foreach": lambda *a, **k: torch.optim.AdamW(*a, **k, foreach=True),
    "fused": lambda *a, **k: torch.optim.AdamW(*a, **k, fused=True),
    "step per group": GroupStepAdam,
}


def _noise(name: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(name))


def _gradient(step: int) -> torch.Tensor:
    # Rows of very different size; below 1e-8 the epsilon counts.
    sizes = torch.tensor([1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1.0])[:, None]
    return (_noise(100 + step, _ROWS, _WIDTH) * sizes).flatten()


def _optimizer(kind: str, betas: tuple[float, float], weights: float = 1e-3) -> torch.optim.Optimizer:
    """An Adam that has made `_BEFORE` steps, by its own count; [_ROWS * _WIDTH] in one master."""
    master = torch.nn.Parameter(_noise(1, _ROWS * _WIDTH) * weights)
    optimizer = _KINDS[kind]([master], lr=_LR, betas=betas, eps=_EPS, weight_decay=_DECAY)
    master.grad = _gradient(0)
    optimizer.step()
    if kind == "step per group":
        optimizer.param_groups[0]["step"] = _BEFORE
    else:
        optimizer.state[master]["step"].fill_(_BEFORE)
    return optimizer


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Views of master and moments, [_ROWS, _WIDTH] each."""
    master = optimizer.param_groups[0]["params"][0]
    state = optimizer.state[master]
    return [t.detach().view(_ROWS, _WIDTH) for t in (master, state["exp_avg"], state["exp_avg_sq"])]


def _run(optimizer: torch.optim.Optimizer, steps: int = _STEPS) -> list[torch.Tensor]:
    """The master after each step, [steps][_ROWS, _WIDTH]."""
    master = optimizer.param_groups[0]["params"][0]
    history = []
    for step in range(1, steps + 1):
        master.grad = _gradient(step)
        optimizer.step()
        history.append(_state(optimizer)[0].clone())
    return history


def _reference(
    state: Sequence[torch.Tensor], betas: tuple[float, float], ages: tuple[int, int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """AdamW in fp64 (arXiv 1711.05101, algorithm 2) from moments of given ages: masters and updates after each step."""
    p, m, v = (t.double() for t in state)
    beta1, beta2 = betas
    masters, updates = [], []
    for step in range(1, _STEPS + 1):
        g = _gradient(step).view(_ROWS, _WIDTH).double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        mean, square = m / (1 - beta1 ** (ages[0] + step)), v / (1 - beta2 ** (ages[1] + step))
        updates.append(_LR * mean / (square.sqrt() + _EPS))
        p = p * (1 - _LR * _DECAY) - updates[-1]
        masters.append(p)
    return masters, updates


def _young(optimizer: torch.optim.Optimizer, *rows: tuple[int, RowState]) -> list[YoungRange]:
    master = optimizer.param_groups[0]["params"][0]
    return [YoungRange(master, row * _WIDTH, (row + 1) * _WIDTH, state) for row, state in rows]


@pytest.mark.parametrize("weights", [1e-3, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("kind", list(_KINDS))
def test_young_rows_step_as_a_fresh_adam_and_old_rows_as_ever(
    kind: str, betas: tuple[float, float], weights: float
) -> None:
    plain, mixed = _optimizer(kind, betas, weights), _optimizer(kind, betas, weights)
    # Rows 1 and 4 lose both moments, row 3 the first; rows 0, 2 and 5 go on.
    for row, moments in ((1, (1, 2)), (4, (1, 2)), (3, (1,))):
        for moment in moments:
            _state(mixed)[moment][row].zero_()
    start = [t.clone() for t in _state(mixed)]
    both, first = RowState((_BEFORE, _BEFORE)), RowState((_BEFORE, None))
    correct_updates(mixed, _young(mixed, (1, both), (3, first), (4, both)))
    expected, found = _run(plain), _run(mixed)

    # fp32 betas are other betas: 1 - 0.999 differs by 1.3e-5, and so would a second moment that is kept.
    used = tuple(torch.tensor(betas, dtype=torch.float32).tolist()) if kind == "step per group" else betas
    for ages, rows in (((0, 0), (1, 4)), ((0, _BEFORE), (3,))):
        masters, updates = _reference(start, used, ages)
        for row in rows:
            for step in range(_STEPS):
                error = (found[step][row].double() - masters[step][row]).abs()
                # A step rounds the master three times (decay, update, correction), each by half a unit in the last
                # place; the rest is 1e-5 of the update. Later the moments are sums that nearly cancel here and there, so
                # it is 1e-5 of Adam's usual update, the learning rate.
                resolution = 1.5 * (step + 1) * torch.finfo(torch.float32).eps * masters[step][row].abs()
                size = updates[0][row].abs() if step == 0 else torch.full_like(error, _LR * (step + 1))
                # With small weights the resolution is nothing, and the bound is on the update itself.
                allowed = 1e-5 * size + (resolution if weights > 0.1 else 0)
                assert (error <= allowed).all(), (row, step, (error / allowed).max())
    for row in (0, 2, 5):
        assert all(torch.equal(found[step][row], expected[step][row]) for step in range(_STEPS))
        assert all(torch.equal(a[row], b[row]) for a, b in zip(_state(mixed), _state(plain), strict=True))


def test_rows_of_a_part_of_a_parameter() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 5))
    inner = torch.optim.AdamW([param])

    def rows(start: int, numel: int) -> list[tuple[int, int, int]]:
        master = torch.zeros(numel)
        return list(OptimizerView(param, start, {"param": master}, True, inner, master).rows(4))

    assert rows(0, 20) == [(0, 0, 5), (1, 5, 10), (2, 10, 15), (3, 15, 20)]
    assert rows(7, 6) == [(1, 0, 3), (2, 3, 6)]
    assert rows(10, 2) == [(2, 0, 2)] and rows(10, 0) == []


@pytest.mark.parametrize("kind", ["fused", "step per group"])
def test_the_first_update_of_reset_rows_is_that_of_a_new_optimizer(kind: str) -> None:
    optimizer = _optimizer(kind, (0.9, 0.999))
    for moment in _state(optimizer)[1:]:
        moment.zero_()
    fresh = _KINDS[kind](
        [torch.nn.Parameter(_state(optimizer)[0].flatten().clone())],
        lr=_LR, betas=(0.9, 0.999), eps=_EPS, weight_decay=_DECAY,
    )  # fmt: skip
    before = _state(optimizer)[0].clone()
    correct_updates(optimizer, _young(optimizer, *((row, RowState((_BEFORE, _BEFORE))) for row in range(_ROWS))))
    updates = [_run(o, 1)[0] - before for o in (optimizer, fresh)]
    # Each side by itself is within 1e-5 of the truth; here they are compared with each other.
    torch.testing.assert_close(*updates, rtol=1e-5, atol=0)


def test_without_the_correction_the_first_update_is_three_times_too_long() -> None:
    """What is repaired here, and that these tests would see it."""
    optimizer = _optimizer("fused", (0.9, 0.999))
    for moment in _state(optimizer)[1:]:
        moment.zero_()
    before = _state(optimizer)[0].clone()
    ratio = (_run(optimizer, 1)[0] - before)[0].abs().mean() / _LR
    # 0.1 / sqrt(0.001), and the shared correction of the second moment at step 501.
    assert ratio == pytest.approx(0.1 / math.sqrt(0.001 / (1 - 0.999**501)), rel=1e-2)


@pytest.mark.parametrize(("betas", "steps"), [((0.9, 0.95), 338), ((0.9, 0.999), 17_321), ((0.9, 0.9), 165)])
def test_rows_leave_once_their_correction_is_the_shared_one(betas: tuple[float, float], steps: int) -> None:
    state = RowState((10**6, 10**6))
    assert is_over(state, betas, 10**6 + steps) and not is_over(state, betas, 10**6 + steps - 1)
    # Only the second moment's age counts where only it is young.
    assert is_over(RowState((0, None)), betas, 1)


def test_a_mature_range_costs_nothing_and_changes_nothing() -> None:
    plain, mixed = (_optimizer("fused", (0.5, 0.5)) for _ in range(2))
    hook_ranges = _young(mixed, (2, RowState((_BEFORE, _BEFORE))))
    correct_updates(mixed, hook_ranges)
    (hook,) = mixed._optimizer_step_post_hooks.values()
    for optimizer in (plain, mixed):
        _run(optimizer, 24)
    assert hook.ranges  # type: ignore[attr-defined]
    for optimizer in (plain, mixed):
        _run(optimizer, 1)
    assert not hook.ranges  # type: ignore[attr-defined]
    # From here on the two differ by nothing but what the masters are.
    start = _state(plain)[0][2] - _state(mixed)[0][2]
    with torch.no_grad():
        _state(mixed)[0][2].add_(start)
        _state(mixed)[0].copy_(_state(plain)[0])
    assert torch.equal(_run(plain, 3)[-1], _run(mixed, 3)[-1])


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    optimizer = _optimizer("fused", (0.9, 0.95))
    correct_updates(optimizer, _young(optimizer, (1, RowState((_BEFORE - 3, _BEFORE - 3)))))
    before = _state(optimizer)[0].clone()
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    assert torch.equal(_state(optimizer)[0], before)


def test_a_removed_hook_ends_the_correction() -> None:
    plain, mixed = (_optimizer("fused", (0.9, 0.95)) for _ in range(2))
    correct_updates(mixed, _young(mixed, (1, RowState((_BEFORE, _BEFORE))))).remove()
    assert torch.equal(_run(plain, 2)[-1], _run(mixed, 2)[-1])


def test_a_rate_of_their_own_scales_the_updates_of_some_rows() -> None:
    rate = RateFactor(1, "router", (0,), factor=0.25, begins=_BEFORE, steps=3)
    assert [rate.at(_BEFORE + k) for k in (0, 1, 2, 3, 4)] == [1.0, 0.25, 0.5, 0.75, 1.0]
    optimizer = _optimizer("fused", (0.9, 0.95))
    start = [t.clone() for t in _state(optimizer)]
    correct_updates(optimizer, _young(optimizer, (2, RowState((None, None), (rate,)))))
    found = _run(optimizer, 4)
    _, updates = _reference(start, (0.9, 0.95), (_BEFORE, _BEFORE))
    p = start[0][2].double()
    for step, factor in enumerate((0.25, 0.5, 0.75, 1.0)):
        # Weight decay stays at the optimizer's own rate.
        p = p * (1 - _LR * _DECAY) - factor * updates[step][2]
        torch.testing.assert_close(found[step][2].double(), p, rtol=0, atol=1e-5 * _LR * (step + 1))


def test_ages_survive_json_and_say_the_same() -> None:
    ages = OptimizerAges().restarted({2: [5, 1], 1: [3]}, 40).restarted({2: [5]}, 60, second=False, others=True)
    assert ages.restarts == (
        Restart(0, (), 60, None), Restart(1, (3,), 40, 40), Restart(2, (1,), 40, 40), Restart(2, (5,), 60, 40),
    )  # fmt: skip
    rated = OptimizerAges(ages.restarts, (RateFactor(1, "router", (0, 1), 0.5, 60, 10),))
    assert OptimizerAges.from_dict(json.loads(json.dumps(rated.to_dict()))) == rated
    assert OptimizerAges.from_dict({}) == OptimizerAges() and not OptimizerAges()
    assert rated.states()[1, "router"][0] == RowState((None, None), rated.rates)
    assert rated.states()[2, "expert"] == {1: RowState((40, 40)), 5: RowState((60, 40))}
    with pytest.raises(CheckpointError, match="ages"):
        OptimizerAges.from_dict({"restarts": [{"layer": 1}]})
    with pytest.raises(CheckpointError, match="epochs"):
        OptimizerAges.from_dict({"epochs": []})


def test_ages_follow_their_experts_through_an_expansion() -> None:
    ages = OptimizerAges().restarted({1: [1], 2: [0, 1]}, 40, others=True)
    ages = OptimizerAges(ages.restarts, (RateFactor(1, "expert", (1,), 2.0, 40, 100),))
    after = ages.through({1: (1, 0, 1, 0), 2: (0, 1, 1, 0)})
    assert after.begun() == {0: {}, 1: {0: (40, 40), 2: (40, 40)}, 2: dict.fromkeys(range(4), (40, 40))}
    assert after.others == (40, 40)
    assert after.rates[0].experts == (0, 2)
    with pytest.raises(ExpansionError, match="layer 1"):
        ages.through({2: (0, 1)})


def test_what_cannot_be_corrected_is_refused() -> None:
    optimizer = _optimizer("fused", (0.9, 0.95))
    with pytest.raises(CheckpointError, match="step 501, but the optimizer has made 500"):
        correct_updates(optimizer, _young(optimizer, (0, RowState((501, None)))))
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(TypeError, match="AdamW"):
        correct_updates(optimizer, _young(optimizer, (0, RowState((1, 1)))))
    stranger = YoungRange(torch.zeros(3), 0, 3, RowState((1, 1)))
    with pytest.raises(RuntimeError, match="no longer parameters"):
        correct_updates(_optimizer("fused", (0.9, 0.95)), [stranger])
