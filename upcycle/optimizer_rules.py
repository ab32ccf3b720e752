"""What an expansion does to the optimizer state of replicas, and how that state ages afterwards.

The executors copy everything, so a replica arrives with its parent's moments. Then a rule changes those of some rows:

    copy            nothing
    reset           both moments zero (arXiv 2604.19835, section 6; the paper resets the whole optimizer: scope `all`)
    reset_momentum  the first moment zero, the second kept
    scale           the first moment times s, the second times s^2, as if all past gradients had been s times as large

A reset moment is younger than Adam's shared step count, which `parallel/optimizer_ages.py` makes up for. Rows are
experts and their rows in the router; the scope says which: replicas, families of two or more, or every parameter.

How to use, on a stage that has just been expanded and verified:

    apply_rule(plan, rule, stage.chunks, stage.optimizer, layout)        # or rule_tensor per tensor of a checkpoint
    ages = ages_after(ages, plan, rule, get_step(stage.optimizer))       # into the manifest: ages.to_dict()
    attach(ages, stage.optimizer, stage.chunks, layout)

and on a stage that was loaded, after its optimizer state, `attach(OptimizerAges.from_dict(...), ...)` alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from torch.utils.hooks import RemovableHandle

from model.build import expert_rows, moe_parts
from parallel.layout import Layout
from parallel.optimizer_ages import NEVER, OptimizerAges, RateFactor, RowState, YoungRange, correct_updates
from parallel.optimizer_state import MOMENTS, OptimizerView, optimizer_views
from upcycle.plan import ExpansionPlan, LayerPlan
from upcycle.stage_config import OptimizerRule

__all__ = ["OptimizerRule"]


def rows_in_scope(layer: LayerPlan, scope: str) -> list[int]:
    """New ids that a rule applies to, ascending."""
    if scope == "replicas":
        return sorted(layer.replicas())
    return [j for j, parent in enumerate(layer.parents) if scope == "all" or layer.copies[parent] > 1]


def row_factors(layer: LayerPlan, rule: OptimizerRule) -> dict[str, list[float]]:
    """What the moments of every new expert and its router row are multiplied by, [M] per moment.

    `scale`: a replica in a family of r sees 1/r of the parent's tokens while the loss is still averaged over all. So the
    mean of its gradient shrinks by r and the standard deviation of its noise by sqrt(r). The second moment follows
    E[g^2], which falls by r where noise dominates and by r^2 where there is none; measured, by r^1.1 to r^1.5
    (docs/optimizer-rules.md). s = 1/sqrt(r) errs towards short steps, s = 1/r towards long ones. The ratio of the
    moments is the copy's whatever s is; s sets their weight against new gradients. A family of one keeps its state.

    Args:
        layer: plan of one layer.
        rule: the rule.
    """
    factors = {name: [1.0] * len(layer.parents) for name in MOMENTS}
    for row in rows_in_scope(layer, rule.scope):
        copies = layer.copies[layer.parents[row]]
        if rule.rule == "scale" and copies > 1:
            s = copies**-0.5 if rule.scale is None else rule.scale
            factors["exp_avg"][row], factors["exp_avg_sq"][row] = s, s * s
        for name, restarts in zip(MOMENTS, rule.restarts, strict=True):
            if restarts:
                factors[name][row] = 0.0
    return factors


def other_factors(rule: OptimizerRule) -> dict[str, float]:
    """The same for parameters that are neither expert nor router: only a reset of scope `all` reaches them."""
    return {name: float(not (r and rule.scope == "all")) for name, r in zip(MOMENTS, rule.restarts, strict=True)}


def scale_by(tensor: torch.Tensor, factor: float) -> None:
    """Multiply in place; a factor of 0 gives +0 whatever was there, 1 touches nothing."""
    if factor == 0.0:
        tensor.zero_()
    elif factor != 1.0:
        tensor.mul_(factor)


def _rule_for(plan: ExpansionPlan, rule: OptimizerRule) -> OptimizerRule:
    """The rule, or `copy` for a stage that begins without new experts: a change of layout resets nothing."""
    return rule if plan.experts_after > plan.experts_before else OptimizerRule()


def rule_tensor(
    moment: str, tensor: torch.Tensor, plan: ExpansionPlan, layer: int | None, rule: OptimizerRule, first: int = 0
) -> None:
    """Apply a rule to a tensor of an expanded checkpoint, or rows of it, in place; bit for bit what `apply_rule` does.

    Args:
        moment: `exp_avg` or `exp_avg_sq`.
        tensor: [M, ...] where it runs over experts, or some consecutive rows, or a part of one.
        plan: the expansion.
        layer: number of the layer; None for a tensor that does not run over experts.
        rule: the rule.
        first: new id of the tensor's first row.
    """
    rule = _rule_for(plan, rule)
    if layer is None:
        scale_by(tensor, other_factors(rule)[moment])
        return
    factors = row_factors(plan.layer(layer), rule)[moment][first : first + tensor.shape[0]]
    for row, factor in enumerate(factors):
        scale_by(tensor[row], factor)


class _Rows(NamedTuple):
    """What the first axis of a parameter means."""

    layer: int
    kind: str
    first: int
    number: int


def _rows_of(chunks: list[GPTModel], layout: Layout) -> dict[int, _Rows]:
    """id of a parameter -> its rows, for experts and routers of this rank."""
    found = {}
    for part in moe_parts(chunks):
        for p, first, count in expert_rows(part, layout):
            found[id(p)] = _Rows(part.number, "expert", first, count)
        for p in part.layer.router.parameters():
            found[id(p)] = _Rows(part.number, "router", 0, p.shape[0])
    return found


def apply_rule(
    plan: ExpansionPlan, rule: OptimizerRule, chunks: list[GPTModel], optimizer: Any, layout: Layout
) -> None:
    """Change the moments of a stage that was expanded by copying, in place; each rank its own part.

    Args:
        plan: the expansion that made the stage.
        rule: the rule.
        chunks: bare model chunks of the new stage.
        optimizer: mcore's, with moments.
        layout: of the new stage.
    """
    rule, rows = _rule_for(plan, rule), _rows_of(chunks, layout)
    factors = {layer.layer: row_factors(layer, rule) for layer in plan.layers}
    for view in optimizer_views(optimizer):
        of = rows.get(id(view.param))
        for name in MOMENTS:
            if name not in view.tensors:
                continue
            flat = view.tensors[name].view(-1)
            if of is None:
                scale_by(flat, other_factors(rule)[name])
                continue
            for row, begin, end in view.rows(of.number):
                scale_by(flat[begin:end], factors[of.layer][name][of.first + row])


def ages_after(ages: OptimizerAges, plan: ExpansionPlan, rule: OptimizerRule, adam_step: int) -> OptimizerAges:
    """The ages of optimizer state after an expansion.

    Args:
        ages: of the state before it.
        plan: the expansion.
        rule: what was done to the copied state.
        adam_step: Adam's step count at the expansion.
    """
    carried = ages.through({layer.layer: layer.parents for layer in plan.layers})
    rule = _rule_for(plan, rule)
    first, second = rule.restarts
    if not first:
        return carried
    scope = {layer.layer: rows_in_scope(layer, rule.scope) for layer in plan.layers}
    return carried.restarted(scope, adam_step, second=second, others=rule.scope == "all")


def ages_from_plan(plan: ExpansionPlan, rule: OptimizerRule, adam_step: int) -> OptimizerAges:
    """The ages after a first expansion: `ages_after` of state that is all of one age."""
    return ages_after(OptimizerAges(), plan, rule, adam_step)


def rates_after(
    ages: OptimizerAges,
    plan: ExpansionPlan,
    adam_step: int,
    *,
    router: float = 1.0,
    replicas: float = 1.0,
    steps: int = 0,
) -> OptimizerAges:
    """With learning rates of their own for the routers and the replicas of an expansion, moving back to 1 linearly.

    Args:
        ages: after the expansion (`ages_after`).
        plan: the expansion.
        adam_step: Adam's step count at the expansion.
        router: factor on the learning rate of all router rows at the first update.
        replicas: factor on that of the replicas' weights.
        steps: updates until both are 1.
    """
    rates = list(ages.rates)
    for layer in plan.layers if steps else ():
        every, new = tuple(range(len(layer.parents))), tuple(sorted(layer.replicas()))
        for kind, experts, factor in (("router", every, router), ("expert", new, replicas)):
            if factor != 1.0:
                rates.append(RateFactor(layer.layer, kind, experts, factor, adam_step, steps))
    return OptimizerAges(ages.restarts, tuple(rates), ages.routers)


def rewarm_factor(done: int, steps: int) -> float:
    """Factor on the whole learning rate during a re-warm-up after an expansion: linear, 1 from update `steps` + 1 on.

    Args:
        done: optimizer steps made since the expansion.
        steps: length of the re-warm-up; 0 for none.
    """
    return min(1.0, (done + 1) / (steps + 1))


def _young(view: OptimizerView, number: int, states: Mapping[int, RowState]) -> Iterator[YoungRange]:
    """The ranges of one master whose state differs from the optimizer's own; neighbours of equal state are one.

    Args:
        view: of the parameter.
        number: rows of the parameter.
        states: row of the parameter -> its state.
    """
    key, last = view.key, None
    for row, begin, end in view.rows(number):
        state = states.get(row)
        if last is not None and last.state == state:
            last = YoungRange(key, last.begin, end, state)
            continue
        if last is not None:
            yield last
        last = None if state is None else YoungRange(key, begin, end, state)
    if last is not None:
        yield last


def attach(ages: OptimizerAges, optimizer: Any, chunks: list[GPTModel], layout: Layout) -> Sequence[RemovableHandle]:
    """Let a stage's optimizer update young rows by their own ages and rates, from the next step on; collective.

    Call it when the optimizer's state and step count are in place, once per stage.

    Args:
        ages: of that state.
        optimizer: mcore's.
        chunks: bare model chunks of the stage.
        layout: of the stage.

    Returns:
        A handle per inner optimizer that has young rows on this rank; `remove` ends the correction.

    Raises:
        CheckpointError: if the ages are of another optimizer state.
    """
    if not ages:
        return []
    handles = []
    with layout.together("correcting for the ages of optimizer state"):
        rows, states = _rows_of(chunks, layout), ages.states()
        others = {} if ages.others == NEVER else {0: RowState(ages.others)}
        ranges: dict[int, tuple[torch.optim.Optimizer, list[YoungRange]]] = {}
        for view in optimizer_views(optimizer):
            found = ranges.setdefault(id(view.inner), (view.inner, []))[1]
            of = rows.get(id(view.param))
            if of is None:
                found += _young(view, 1, others)
            else:
                known = states.get((of.layer, of.kind), {})
                here = {row: known[of.first + row] for row in range(of.number) if of.first + row in known}
                found += _young(view, of.number, here)
        handles = [correct_updates(inner, found) for inner, found in ranges.values() if found]
    return handles
