"""Optimizer rules on real stages: mcore's DDP and optimizers, experts in every form, layouts, against AdamW in fp64."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError, ConfigError
from parallel.optimizer_ages import NEVER, OptimizerAges, RateFactor, Restart
from tests.distributed import run_distributed
from tests.train.trainer import SMALL
from upcycle.optimizer_rules import (
    OptimizerRule,
    ages_after,
    ages_from_plan,
    other_factors,
    rates_after,
    rewarm_factor,
    row_factors,
    rule_tensor,
    scale_by,
)
from upcycle.plan import ExpansionPlan, LayerPlan

# Adam's step count at the expansion, the updates compared after it, and its numbers.
_BEFORE, _STEPS, _LR, _BETAS, _EPS, _DECAY = 40, 10, 1e-2, (0.9, 0.95), 1e-8, 0.1
# 4 -> 8 experts, families of 1, 4, 2 and 1, in layer 2 not side by side; first occurrences are the originals.
_PLAN = ExpansionPlan(
    step=_BEFORE,
    stage=1,
    experts_before=4,
    experts_after=8,
    layers=(
        LayerPlan(1, (0, 1, 1, 1, 1, 2, 2, 3), (1, 4, 2, 1)),
        LayerPlan(2, (0, 0, 1, 2, 2, 2, 3, 3), (2, 1, 3, 2)),
    ),
)
_REPLICAS = {1: (2, 3, 4, 6), 2: (1, 4, 5, 7)}
_GROWN = {1: (1, 2, 3, 4, 5, 6), 2: (0, 1, 3, 4, 5, 6, 7)}


# ---- pure ---------------------------------------------------------------------------------------------------------------


def test_factors_follow_rule_and_scope() -> None:
    one = _PLAN.layers[0]
    assert row_factors(one, OptimizerRule())["exp_avg"] == [1.0] * 8
    reset = row_factors(one, OptimizerRule("reset"))
    assert reset["exp_avg"] == reset["exp_avg_sq"] == [1, 1, 0, 0, 0, 1, 0, 1]
    momentum = row_factors(one, OptimizerRule("reset_momentum", "family"))
    assert momentum["exp_avg"] == [1, 0, 0, 0, 0, 0, 0, 1] and momentum["exp_avg_sq"] == [1.0] * 8
    scaled = row_factors(one, OptimizerRule("scale", "all"))
    root = 0.5**0.5
    assert scaled["exp_avg"] == pytest.approx([1, 0.5, 0.5, 0.5, 0.5, root, root, 1])
    assert scaled["exp_avg_sq"] == pytest.approx([1, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1])
    given = row_factors(one, OptimizerRule("scale", scale=0.5))
    assert (given["exp_avg"][2], given["exp_avg_sq"][2], given["exp_avg"][1]) == (0.5, 0.25, 1.0)
    assert other_factors(OptimizerRule("reset", "family")) == {"exp_avg": 1, "exp_avg_sq": 1}
    assert other_factors(OptimizerRule("reset_momentum", "all")) == {"exp_avg": 0, "exp_avg_sq": 1}
    assert other_factors(OptimizerRule("scale", "all")) == {"exp_avg": 1, "exp_avg_sq": 1}


def test_a_reset_moment_is_zero_whatever_it_was() -> None:
    moment = torch.tensor([-1.0, 2.0, float("inf"), float("nan")])
    scale_by(moment, 0.0)
    assert torch.equal(moment.view(torch.int32), torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (OptimizerRule("forget"), r"x\.optimizer_rule=forget is unknown: use one of copy, reset"),
        (OptimizerRule("reset", "some"), r"x\.optimizer_scope=some is unknown"),
        (OptimizerRule("reset", scale=0.5), r"x\.optimizer_scale=0.5 has no effect with x\.optimizer_rule=reset"),
        (OptimizerRule("scale", scale=0.0), r"x\.optimizer_scale=0.0 must be above 0"),
        (OptimizerRule("scale", scale=1.5), r"x\.optimizer_scale=1.5 must be above 0 and at most 1"),
    ],
)
def test_a_wrong_rule_names_its_key(rule: OptimizerRule, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule.check("x")
    OptimizerRule("scale", "family", 0.5).check("x")


def test_ages_come_from_rules_and_pass_on_to_copies() -> None:
    assert not ages_from_plan(_PLAN, OptimizerRule("copy"), 40) and not ages_from_plan(
        _PLAN, OptimizerRule("scale"), 40
    )
    first = ages_from_plan(_PLAN, OptimizerRule("reset"), 40)
    assert first.begun() == {layer: dict.fromkeys(ids, (40, 40)) for layer, ids in _REPLICAS.items()}
    assert ages_from_plan(_PLAN, OptimizerRule("reset_momentum", "all"), 40).others == (40, None)
    # 8 -> 16, every expert twice: under copy a replica of a young expert is as young.
    twice = LayerPlan(1, tuple(j // 2 for j in range(16)), (2,) * 8)
    again = dataclasses.replace(_PLAN, layers=(twice, dataclasses.replace(twice, layer=2)))
    carried = ages_after(first, again, OptimizerRule("copy"), 60).begun()
    assert carried[1] == dict.fromkeys((4, 5, 6, 7, 8, 9, 12, 13), (40, 40))
    # Under reset_momentum the second moment keeps the age it had.
    anew = ages_after(first, again, OptimizerRule("reset_momentum"), 60).begun()
    assert anew[1][4] == (40, 40) and anew[1][5] == (60, 40) and anew[1][1] == (60, None) and 0 not in anew[1]


def test_a_change_of_layout_resets_nothing() -> None:
    moved = LayerPlan(1, (2, 3, 0, 1), (1,) * 4)
    plan = dataclasses.replace(
        _PLAN, experts_before=4, experts_after=4, layers=(moved, dataclasses.replace(moved, layer=2))
    )
    rule = OptimizerRule("reset", "all")
    young = OptimizerAges((Restart(1, (0, 3), 20, 20),))
    assert ages_after(young, plan, rule, 40) == OptimizerAges((Restart(1, (1, 2), 20, 20),))
    moment = torch.ones(4, 3)
    rule_tensor("exp_avg", moment, plan, 1, rule)
    rule_tensor("exp_avg", moment, plan, None, rule)
    assert torch.equal(moment, torch.ones(4, 3))


def test_rates_are_for_routers_and_replicas() -> None:
    rates = rates_after(OptimizerAges(), _PLAN, 40, router=0.5, replicas=2.0, steps=10).rates
    assert rates[0] == RateFactor(1, "router", tuple(range(8)), 0.5, 40, 10)
    assert rates[1] == RateFactor(1, "expert", _REPLICAS[1], 2.0, 40, 10)
    assert len(rates) == 4 and not rates_after(OptimizerAges(), _PLAN, 40, router=0.5)


def test_rewarming_rises_to_one() -> None:
    assert [rewarm_factor(done, 3) for done in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rewarm_factor(0, 0) == 1.0


# ---- on real stages -----------------------------------------------------------------------------------------------------


def _stage(overrides: Sequence[str]) -> tuple[Any, Any]:
    """A stage of 8 experts per layer on this rank, and its layout."""
    from parallel.compat import prepare_megatron
    from parallel.layout import Layout
    from train.settings import load_settings
    from train.stage import build_stage

    prepare_megatron()
    settings = load_settings(
        [*SMALL, "model.num_experts=8", "upcycle.stages=[]", "schedule=constant", "schedule.warmup_steps=0",
         f"schedule.learning_rate={_LR}", "optimizer.clip_grad=0", *overrides]
    )  # fmt: skip
    layout = Layout.create(settings.parallel, 1)
    return build_stage(settings, 0, layout, 300), layout


def _noise(name: str, *shape: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _rows(stage: Any, layout: Any) -> Iterator[tuple[torch.nn.Parameter, str, int, range]]:
    """Every parameter with a name, its layer (0 for what is neither expert nor router) and its global expert ids.

    Found by the names of the modules, apart from the code under test.
    """
    held = 8 // layout.groups.ep.size()
    for chunk in stage.chunks:
        for name, p in chunk.named_parameters():
            words = name.split(".")
            layer, ids = (int(words[2]) + 1 if words[1] == "layers" else 0), range(0)
            if ".local_experts." in name:
                where = words.index("local_experts") + 1
                first = layout.groups.ep.rank() * held + int(words[where])
                ids, words[where] = range(first, first + 1), "each"
            elif ".experts." in name:
                ids = range(layout.groups.ep.rank() * held, (layout.groups.ep.rank() + 1) * held)
            elif ".router." in name:
                ids = range(8)
            else:
                layer = 0
            yield p, ".".join(words), layer, ids


def _fill(stage: Any, layout: Any, what: str, write: Callable[[torch.nn.Parameter, torch.Tensor], None]) -> None:
    """Give every parameter noise named by parameter and expert, the same in every layout without tensor parallelism."""
    for p, name, _, ids in _rows(stage, layout):
        shape = (p[0].shape if len(ids) == p.shape[0] and ids else p.shape) if ids else p.shape
        noise = torch.cat([_noise(f"{what}/{name}/{e}", *shape) for e in ids or (0,)]).view(p.shape)
        write(p, noise)


def _step(stage: Any, layout: Any, number: int) -> bool:
    """One update with gradients of very different sizes, the same on every data rank."""
    _fill(stage, layout, f"gradient {number}", lambda p, noise: p.main_grad.copy_(noise * 1e-3))
    updated, _, _ = stage.optimizer.step()
    return bool(updated)


def _expanded(overrides: Sequence[str]) -> tuple[Any, Any]:
    """A stage as an expansion leaves it before any rule: moments everywhere, Adam at step `_BEFORE`."""
    from parallel.optimizer_state import optimizer_views, set_step

    stage, layout = _stage(overrides)
    _fill(stage, layout, "weight", lambda p, noise: p.data.copy_(noise * 1e-3))
    stage.optimizer.reload_model_params()
    _step(stage, layout, 0)
    for view in optimizer_views(stage.optimizer):
        # After one step they are a tenth of the gradient and a twentieth of its square; make them of one history.
        view.tensors["exp_avg_sq"].mul_(10.0)
    set_step(stage.optimizer, _BEFORE)
    return stage, layout


def _begun_of(stage: Any, layout: Any, rule: OptimizerRule) -> dict[int, torch.Tensor]:
    """id of a parameter -> for each element, 1 where the rule reaches it: the test's own account of the scope."""
    reached = {}
    for p, _, layer, ids in _rows(stage, layout):
        mask = torch.full(p.shape, float(rule.scope == "all"))
        if ids and rule.scope != "all":
            mine = (_REPLICAS if rule.scope == "replicas" else _GROWN)[layer]
            for row, expert in enumerate(ids):
                (mask[row] if len(ids) == p.shape[0] else mask).fill_(float(expert in mine))
        reached[id(p)] = mask.flatten().bool()
    return reached


def _snapshot(stage: Any) -> list[dict[str, torch.Tensor]]:
    from parallel.optimizer_state import optimizer_views

    return [
        {name: t.detach().flatten().clone() for name, t in v.tensors.items()} for v in optimizer_views(stage.optimizer)
    ]


def _check_rule(overrides: Sequence[str], rule: OptimizerRule) -> float:
    """The ten updates after a rule, on this rank's part of every parameter; returns the largest error over its bound."""
    from parallel.optimizer_state import optimizer_views
    from upcycle.optimizer_rules import apply_rule, attach

    plain, layout = _expanded(overrides)
    stage, layout = _expanded(overrides)
    reached = _begun_of(stage, layout, rule)
    copied = _snapshot(stage)
    apply_rule(_PLAN, rule, stage.chunks, stage.optimizer, layout)
    ages = OptimizerAges.from_dict(ages_from_plan(_PLAN, rule, _BEFORE).to_dict())
    attach(ages, stage.optimizer, stage.chunks, layout)

    views = list(optimizer_views(stage.optimizer))
    # AdamW in fp64 (arXiv 1711.05101, algorithm 2); elements that the rule reaches start at the rule's moments and ages.
    states, ages_of = [], []
    for view, tensors in zip(views, copied, strict=True):
        mask = reached[id(view.param)][view.start : view.start + view.key.numel()]
        p, m, v = (tensors[name].double() for name in ("param", "exp_avg", "exp_avg_sq"))
        restart_first, restart_second = rule.rule in ("reset", "reset_momentum"), rule.rule == "reset"
        m = torch.where(mask & restart_first, 0.0, m)
        v = torch.where(mask & restart_second, 0.0, v)
        if rule.rule == "scale":  # given here, so the same for all rows in scope
            assert rule.scale is not None
            m, v = torch.where(mask, m * rule.scale, m), torch.where(mask, v * rule.scale**2, v)
        states.append((p, m, v))
        ages_of.append([torch.where(mask & on, 0, _BEFORE) for on in (restart_first, restart_second)])
    worst, touched = 0.0, 0
    for number in range(1, _STEPS + 1):
        assert _step(stage, layout, number) and _step(plain, layout, number)
        for i, view in enumerate(views):
            own = slice(view.start, view.start + view.key.numel())
            g = view.param.main_grad.detach().flatten()[own].double()
            p, m, v = states[i]
            decay = next(g["weight_decay"] for g in view.inner.param_groups if any(k is view.key for k in g["params"]))
            m, v = _BETAS[0] * m + (1 - _BETAS[0]) * g, _BETAS[1] * v + (1 - _BETAS[1]) * g * g
            mean, square = (x / (1 - b ** (a + number)) for x, b, a in zip((m, v), _BETAS, ages_of[i], strict=True))
            update = _LR * mean / (square.sqrt() + _EPS)
            states[i] = (p * (1 - _LR * decay) - update, m, v)
            error = (view.key.detach().flatten().double() - states[i][0]).abs()
            # At first 1e-5 of the update itself; later the moments are sums that nearly cancel here and there, and it
            # is 1e-5 of Adam's usual update. The master's own resolution: three roundings a step, half a unit each.
            size = update.abs() if number == 1 else torch.full_like(error, _LR * number)
            resolution = 1.5 * number * torch.finfo(torch.float32).eps * states[i][0].abs()
            worst = max(worst, (error / (1e-5 * size + resolution)).max().item())
            touched += int(reached[id(view.param)][own].sum())
            # mcore copies masters to weights after the correction.
            weight = view.param.detach().flatten()[own]
            assert torch.equal(weight, view.key.detach().flatten().to(weight.dtype))
    # Everything that the rule does not reach has the bits of a stage without it.
    for view, mine, other in zip(views, _snapshot(stage), _snapshot(plain), strict=True):
        mask = reached[id(view.param)][view.start : view.start + view.key.numel()]
        for name in mine:
            assert torch.equal(mine[name][~mask], other[name][~mask]), name
            kept = name == "exp_avg_sq" and rule.rule == "reset_momentum"
            assert not mask.any() or torch.equal(mine[name][mask], other[name][mask]) == kept
    assert touched > 0, "this rank holds nothing that the rule reaches: the test compares nothing"
    return worst


_RULES = [
    OptimizerRule("reset"),
    OptimizerRule("reset_momentum", "family"),
    OptimizerRule("scale", "family", 0.25),
    OptimizerRule("reset", "all"),
]


def _check_rules(overrides: Sequence[str], rules: Sequence[OptimizerRule]) -> list[float]:
    return [_check_rule(overrides, rule) for rule in rules]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.experts=grouped", "run.precision=bf16"],
        ["model.experts=grouped", "run.precision=fp32", "parallel.expert=2"],
        pytest.param(["model.experts=sequential", "run.precision=bf16", "parallel.expert=2"], marks=pytest.mark.slow),
        pytest.param(
            ["model.experts=sequential", "run.precision=fp32", "optimizer.distributed=false"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["model.experts=grouped", "run.precision=bf16", "optimizer.distributed=false", "parallel.expert=2"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model.experts=grouped", "run.precision=bf16", "parallel.tensor=2", "parallel.expert_tensor=2"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: " ".join(o.partition(".")[2] for o in overrides),
)
def test_every_rule_steps_as_adamw_would(overrides: list[str]) -> None:
    for errors in run_distributed(_check_rules, 2, overrides, _RULES):
        assert max(errors) <= 1.0, errors


def _masters_by_expert(overrides: Sequence[str]) -> dict[tuple[int, str, int], tuple[int, torch.Tensor]]:
    """(layer, parameter, expert) -> (first element, this rank's part of the master) after a rule and three updates."""
    from parallel.optimizer_state import optimizer_views
    from upcycle.optimizer_rules import apply_rule, attach

    stage, layout = _expanded(overrides)
    rule = OptimizerRule("reset_momentum", "family")
    apply_rule(_PLAN, rule, stage.chunks, stage.optimizer, layout)
    ages = rates_after(ages_from_plan(_PLAN, rule, _BEFORE), _PLAN, _BEFORE, router=0.5, replicas=2.0, steps=2)
    attach(ages, stage.optimizer, stage.chunks, layout)
    for number in range(1, 4):
        _step(stage, layout, number)
    names = {id(p): (layer, name, ids) for p, name, layer, ids in _rows(stage, layout)}
    found = {}
    for view in optimizer_views(stage.optimizer):
        layer, name, ids = names[id(view.param)]
        for row, begin, end in view.rows(len(ids) or 1):
            size = view.param.numel() // (len(ids) or 1)
            at = view.start + begin - row * size
            found[layer, name, ids[row] if ids else 0] = (at, view.key.detach().flatten()[begin:end].clone())
    return found


def _whole(parts: list[dict[Any, tuple[int, torch.Tensor]]]) -> dict[Any, torch.Tensor]:
    """Put the ranks' parts of every row together."""
    rows: dict[Any, dict[int, torch.Tensor]] = {}
    for part in parts:
        for key, (at, values) in part.items():
            rows.setdefault(key, {})[at] = values
    return {key: torch.cat([found[at] for at in sorted(found)]) for key, found in rows.items()}


def test_the_layout_does_not_matter() -> None:
    alone = _whole(run_distributed(_masters_by_expert, 1, ["model.experts=grouped"]))
    for overrides in (["model.experts=grouped"], ["model.experts=grouped", "parallel.expert=2"]):
        spread = _whole(run_distributed(_masters_by_expert, 2, overrides))
        assert spread.keys() == alone.keys()
        for key, master in alone.items():
            assert torch.equal(spread[key], master), key


def _check_tensor_path() -> None:
    """`rule_tensor`, which the checkpoint path uses, and `apply_rule` give the same bits, signs of zeros included."""
    from parallel.optimizer_state import optimizer_views
    from upcycle.optimizer_rules import apply_rule

    for rule in (OptimizerRule("reset", "all"), OptimizerRule("reset_momentum"), OptimizerRule("scale", "family")):
        stage, layout = _expanded(["model.experts=grouped"])
        copied = _snapshot(stage)
        apply_rule(_PLAN, rule, stage.chunks, stage.optimizer, layout)
        of = {id(p): (layer, ids) for p, _, layer, ids in _rows(stage, layout)}
        changed = 0
        for view, before, after in zip(optimizer_views(stage.optimizer), copied, _snapshot(stage), strict=True):
            layer, ids = of[id(view.param)]
            for moment in ("exp_avg", "exp_avg_sq"):
                whole = before[moment].view(view.param.shape)
                rule_tensor(moment, whole, _PLAN, layer if ids else None, rule)
                assert torch.equal(whole.flatten().view(torch.int32), after[moment].view(torch.int32))
                changed += int(rule.scope == "all" or bool(ids))
        assert changed


def test_a_checkpoint_gets_the_bits_of_the_live_stage() -> None:
    run_distributed(_check_tensor_path, 1)


def _check_skipped_step() -> None:
    """A step that mcore skips for a gradient that is not finite ages nothing."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from upcycle.optimizer_rules import apply_rule, attach

    states = []
    for skip in (False, True):
        stage, layout = _stage(["model.experts=grouped"])
        _fill(stage, layout, "weight", lambda p, noise: p.data.copy_(noise * 1e-3))
        config = OptimizerConfig(
            optimizer="adam", lr=_LR, weight_decay=_DECAY, adam_beta1=_BETAS[0], adam_beta2=_BETAS[1], bf16=True,
            params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0, loss_scale=1.0,
        )  # fmt: skip
        stage.optimizer = get_megatron_optimizer(config, stage.wrapped)
        for number in range(3):
            assert _step(stage, layout, number)
        rule = OptimizerRule("reset")
        apply_rule(_PLAN, rule, stage.chunks, stage.optimizer, layout)
        attach(ages_from_plan(_PLAN, rule, 3), stage.optimizer, stage.chunks, layout)
        if skip:
            before = _snapshot(stage)
            for p in stage.chunks[0].parameters():
                p.main_grad.fill_(float("nan"))
            assert not stage.optimizer.step()[0]
            assert all(torch.equal(a[n], b[n]) for a, b in zip(before, _snapshot(stage), strict=True) for n in a)
        for number in range(3, 6):
            assert _step(stage, layout, number)
        states.append(_snapshot(stage))
    for a, b in zip(*states, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_skipped_step_ages_nothing() -> None:
    run_distributed(_check_skipped_step, 1)


def _check_resume() -> None:
    """Ages that went through a manifest, on a stage whose state was saved and loaded, go on to the same bits."""
    import tempfile
    from pathlib import Path

    from model.sharded_state import load_tensors, save_tensors
    from parallel.optimizer_state import get_step
    from upcycle.optimizer_rules import apply_rule, attach

    rule = OptimizerRule("reset")
    stage, layout = _expanded(["model.experts=grouped", "parallel.expert=2"])
    apply_rule(_PLAN, rule, stage.chunks, stage.optimizer, layout)
    ages = ages_from_plan(_PLAN, rule, _BEFORE)
    attach(ages, stage.optimizer, stage.chunks, layout)
    for number in range(1, 3):
        _step(stage, layout, number)
    folder = Path(layout.from_rank_zero(tempfile.mkdtemp()))
    save_tensors(folder, stage.chunks, stage.optimizer, layout)
    step = get_step(stage.optimizer)

    loaded, layout = _stage(["model.experts=grouped", "parallel.expert=2"])
    load_tensors(folder, loaded.chunks, loaded.optimizer, layout, step=step)
    attach(OptimizerAges.from_dict(ages.to_dict()), loaded.optimizer, loaded.chunks, layout)
    for number in range(3, 6):
        _step(stage, layout, number)
        _step(loaded, layout, number)
    for a, b in zip(_snapshot(stage), _snapshot(loaded), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_ages_go_on_after_a_resume() -> None:
    run_distributed(_check_resume, 2)


def _check_foreign_ages() -> None:
    from upcycle.optimizer_rules import attach

    stage, layout = _expanded(["model.experts=grouped", "parallel.expert=2"])
    # Experts 0 to 3 live on rank 0; rank 1 has nothing to object to and must fail all the same.
    ages = OptimizerAges((Restart(1, (0,), _BEFORE + 1, None),))
    with pytest.raises(CheckpointError, match="step 41"):
        attach(ages, stage.optimizer, stage.chunks, layout)
    assert attach(OptimizerAges(), stage.optimizer, stage.chunks, layout) == []
    assert ages.others == NEVER


def test_ages_of_another_state_are_refused_on_every_rank() -> None:
    run_distributed(_check_foreign_ages, 2)
