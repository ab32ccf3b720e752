"""Right bias correction for Adam's moments of different ages in one optimizer.

Adam divides its moments by `1 - beta^t`, where t counts the steps since they were zero. torch keeps one t per
parameter, Transformer Engine and Apex one per group, so experts stacked in one tensor, or the rows of a router, share
it. Moments that are set to zero under a large t are then not corrected, without anything telling: the first update is
3.2 times too long with betas 0.9 and 0.999, and 2.2 times too short with 0.9 and 0.95.

`OptimizerAges` records which rows began anew at which of Adam's steps. It knows layers and global expert ids, no
tensors and no layout, and goes through a checkpoint's manifest as JSON. `correct_updates` installs a hook that runs
after each step of an inner optimizer. The moments are right by then, because their recursion does not know t; only the
update was divided wrongly. It follows from the moments, so the hook adds the difference to the masters of the young
rows:

    p += lr * m * (1 / (bc1(t) * (sqrt(v / bc2(t)) + eps)) - rate / (bc1(a_m) * (sqrt(v / bc2(a_v)) + eps)))

with `bc_i(n) = 1 - beta_i^n` and a_m, a_v the ages of the two moments (Kingma and Ba, arXiv 1412.6980, algorithm 1;
decoupled weight decay, arXiv 1711.05101, is in p already and is not touched). No copy of the old masters is needed and
nothing else is written, so all other rows keep the bits they would have had. A step that mcore skips runs no hook and
ages nothing. Once both corrections equal those of the shared t to fp32 rounding, the rows leave the hook.

`upcycle/optimizer_rules.py` makes ages from a plan and finds the ranges of a rank.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from parallel.errors import CheckpointError, ExpansionError
from parallel.optimizer_state import adam_betas, adam_step

# Adam's step count when each of the two moments was last set to zero by a rule; None: never, so as old as the count.
Begun = tuple[int | None, int | None]
NEVER: Begun = (None, None)
# Corrections closer than this are equal once rounded to fp32 (24 bits of mantissa).
MATURE = 2.0**-25
# Elements corrected at a time: on CPU what stays in the cache, on GPU what keeps temporaries at 64 MiB.
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 23}


@dataclass(frozen=True)
class Restart:
    """Experts of one layer, with their router rows, whose moments began anew.

    Attributes:
        layer: number of the layer, from 1; 0 for every parameter that is neither expert nor router.
        experts: global ids, ascending; empty for layer 0.
        exp_avg: Adam's step count when the first moment was set to zero; None if it was not.
        exp_avg_sq: the same for the second moment.
    """

    layer: int
    experts: tuple[int, ...]
    exp_avg: int | None
    exp_avg_sq: int | None


@dataclass(frozen=True)
class RateFactor:
    """A learning rate of their own for some rows after a switch: `factor` at first, moving linearly to 1.

    Attributes:
        layer: number of the layer, from 1.
        kind: `expert` or `router`.
        experts: global ids.
        factor: of the first update; weight decay stays at the group's rate.
        begins: Adam's step count at the switch.
        steps: updates until the factor is 1.
    """

    layer: int
    kind: str
    experts: tuple[int, ...]
    factor: float
    begins: int
    steps: int

    def at(self, step: int) -> float:
        """The factor of the update that makes Adam's step count `step`."""
        done = step - self.begins - 1
        return self.factor + (1.0 - self.factor) * done / self.steps if 0 <= done < self.steps else 1.0


class RowState(NamedTuple):
    """What sets a row's update apart from the optimizer's own."""

    begun: Begun
    rates: tuple[RateFactor, ...] = ()


@dataclass(frozen=True)
class OptimizerAges:
    """Ages of Adam's moments, and learning rates, that differ from the optimizer's own; empty where nothing does.

    Attributes:
        restarts: experts with their router rows.
        rates: learning rates.
        routers: router rows that are younger than their experts, as after a dense model whose moments the experts took on.
    """

    restarts: tuple[Restart, ...] = ()
    rates: tuple[RateFactor, ...] = ()
    routers: tuple[Restart, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.restarts or self.rates or self.routers)

    def begun(self) -> dict[int, dict[int, Begun]]:
        """Layer -> expert -> when the youngest of its moments, router row included, began; the others are left out."""
        return self._begun("router")

    def _begun(self, kind: str) -> dict[int, dict[int, Begun]]:
        """The same of experts' weights or of router rows alone."""
        table = _table(self.restarts)
        for layer, known in _table(self.routers).items() if kind == "router" else ():
            table.setdefault(layer, {}).update(known)
        return table

    @property
    def others(self) -> Begun:
        """When the moments of everything outside experts and routers began."""
        return next(((r.exp_avg, r.exp_avg_sq) for r in self.restarts if r.layer == 0), NEVER)

    def states(self) -> dict[tuple[int, str], dict[int, RowState]]:
        """(layer, `expert` or `router`) -> global expert id -> state, for all rows that have one of their own."""
        found: dict[tuple[int, str], dict[int, RowState]] = {}
        for kind in ("expert", "router"):
            for layer, known in self._begun(kind).items():
                if layer:
                    found[layer, kind] = {expert: RowState(begun) for expert, begun in known.items()}
        for rate in self.rates:
            states = found.setdefault((rate.layer, rate.kind), {})
            for expert in rate.experts:
                state = states.get(expert, RowState(NEVER))
                states[expert] = RowState(state.begun, (*state.rates, rate))
        return found

    def through(self, parents: Mapping[int, Sequence[int]]) -> "OptimizerAges":
        """The same after an expansion: every new expert has the age and the rate of its parent, whose state it copies.

        Args:
            parents: parent of each new expert, [M], per layer.

        Raises:
            ExpansionError: if the expansion does not know a layer that has ages.
        """
        with_ages = {r.layer for r in (*self.restarts, *self.routers)} | {r.layer for r in self.rates}
        for layer in with_ages - {0}:
            if layer not in parents:
                raise ExpansionError(f"optimizer ages have layer {layer}, the plan has not: it is of another model")
        table, routers = (
            {
                layer: {new: known[parent] for new, parent in enumerate(parents[layer]) if parent in known}
                for layer, known in _table(restarts).items()
                if layer
            }
            for restarts in (self.restarts, self.routers)
        )
        rates = tuple(
            dataclasses.replace(r, experts=tuple(n for n, parent in enumerate(parents[r.layer]) if parent in r.experts))
            for r in self.rates
        )
        return _ages(table, self.others, rates, routers)

    def restarted(
        self,
        experts: Mapping[int, Iterable[int]],
        step: int,
        *,
        first: bool = True,
        second: bool = True,
        others: bool = False,
    ) -> "OptimizerAges":
        """With moments of some rows set to zero at Adam's step `step`.

        Args:
            experts: global ids per layer.
            step: Adam's step count, that is updates made before.
            first: whether the first moment was set to zero.
            second: whether the second was.
            others: whether this holds for everything outside experts and routers too.
        """

        def anew(begun: Begun) -> Begun:
            return step if first else begun[0], step if second else begun[1]

        table, routers = _table(self.restarts), _table(self.routers)
        for layer, ids in experts.items():
            known, young = table.setdefault(layer, {}), routers.get(layer, {})
            known.update({expert: anew(known.get(expert, NEVER)) for expert in ids})
            young.update({expert: anew(young[expert]) for expert in ids if expert in young})
        return _ages(table, anew(self.others) if others else self.others, self.rates, routers)

    def with_new_routers(self, experts: Mapping[int, Iterable[int]], step: int) -> "OptimizerAges":
        """With router rows that are new at Adam's step `step`, their moments zero.

        Args:
            experts: global ids per layer.
            step: Adam's step count, that is updates made before.
        """
        routers = _table(self.routers)
        for layer, ids in experts.items():
            routers.setdefault(layer, {}).update(dict.fromkeys(ids, (step, step)))
        return _ages(_table(self.restarts), self.others, self.rates, routers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for a manifest."""
        routers = {"routers": [_plain(r) for r in self.routers]} if self.routers else {}
        return {"restarts": [_plain(r) for r in self.restarts], "rates": [_plain(r) for r in self.rates], **routers}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "OptimizerAges":
        """Read back what `to_dict` gave; an empty mapping means that nothing differs.

        Raises:
            CheckpointError: if the record has another form.
        """
        try:
            unknown = value.keys() - {"restarts", "rates", "routers"}
            if unknown:
                raise KeyError(min(unknown))
            return cls(
                tuple(Restart(**(r | {"experts": tuple(r["experts"])})) for r in value.get("restarts", ())),
                tuple(RateFactor(**(r | {"experts": tuple(r["experts"])})) for r in value.get("rates", ())),
                tuple(Restart(**(r | {"experts": tuple(r["experts"])})) for r in value.get("routers", ())),
            )
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"the record of optimizer ages is not one this version reads ({e})") from None


def _plain(entry: Restart | RateFactor) -> dict[str, Any]:
    return dataclasses.asdict(entry) | {"experts": list(entry.experts)}


def _table(restarts: Iterable[Restart]) -> dict[int, dict[int, Begun]]:
    """Layer -> expert -> when its moments began."""
    table: dict[int, dict[int, Begun]] = {}
    for r in restarts:
        table.setdefault(r.layer, {}).update(dict.fromkeys(r.experts, (r.exp_avg, r.exp_avg_sq)))
    return table


def _grouped(table: Mapping[int, Mapping[int, Begun]]) -> list[Restart]:
    """The normal form: experts of equal age together, so that equal ages compare equal."""
    groups: dict[tuple[int, Begun], list[int]] = {}
    for layer, known in table.items():
        for expert, begun in known.items():
            if layer and begun != NEVER:
                groups.setdefault((layer, begun), []).append(expert)
    # Step counts are not negative, so -1 puts "never" first.
    order = sorted(groups, key=lambda g: (g[0], *(-1 if b is None else b for b in g[1])))
    return [Restart(layer, tuple(sorted(groups[layer, begun])), *begun) for layer, begun in order]


def _ages(
    table: Mapping[int, Mapping[int, Begun]],
    others: Begun,
    rates: tuple[RateFactor, ...],
    routers: Mapping[int, Mapping[int, Begun]],
) -> OptimizerAges:
    """Ages in their normal form; a router row as young as its expert is none of its own."""
    restarts = _grouped(table)
    if others != NEVER:
        restarts.insert(0, Restart(0, (), *others))
    own = {
        layer: {expert: begun for expert, begun in known.items() if table.get(layer, {}).get(expert) != begun}
        for layer, known in routers.items()
    }
    return OptimizerAges(tuple(restarts), tuple(r for r in rates if r.experts), tuple(_grouped(own)))


@dataclass(frozen=True)
class YoungRange:
    """Rows of one master that share a state and lie next to each other.

    Attributes:
        key: the master, [numel of this rank's part] fp32, under which the optimizer keeps the moments.
        begin: first element.
        end: one past the last element.
        state: ages and rates of these rows.
    """

    key: torch.Tensor
    begin: int
    end: int
    state: RowState


def corrections(beta: float, step: int, begun: int | None) -> tuple[float, float]:
    """Bias corrections `1 - beta^n` of one moment: for the shared step count, and for the moment's own age."""
    return 1.0 - beta**step, 1.0 - beta ** (step - (begun or 0))


def is_over(state: RowState, betas: tuple[float, float], step: int) -> bool:
    """Whether updates after `step` are the optimizer's own to fp32 rounding."""
    if any(step < r.begins + r.steps for r in state.rates):
        return False
    pairs = [corrections(beta, step, begun) for beta, begun in zip(betas, state.begun, strict=True)]
    return all(abs(own - shared) <= MATURE * shared for shared, own in pairs)


def correct_updates(inner: torch.optim.Optimizer, ranges: Iterable[YoungRange]) -> RemovableHandle:
    """From now on, make the updates of some ranges those of moments of their own age.

    Args:
        inner: torch's, Transformer Engine's or Apex's Adam with fp32 masters and moments, its state in place.
        ranges: do not overlap; their masters are parameters of `inner`.

    Returns:
        A handle whose `remove` ends it. Not removing it costs nothing once the ranges are mature.

    Raises:
        CheckpointError: if a moment began after the optimizer's last step.
        TypeError: for a variant of Adam whose update is another.
    """
    hook = _Correction(ranges)
    hook.check(inner)
    return inner.register_step_post_hook(hook)


class _Correction:
    """The hook. It holds masters only: the optimizer holds the hook, and a circle would keep a released stage alive."""

    def __init__(self, ranges: Iterable[YoungRange]) -> None:
        self.ranges: dict[int, list[YoungRange]] = {}
        for r in ranges:
            self.ranges.setdefault(id(r.key), []).append(r)

    def _found(self, inner: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.Tensor, list[YoungRange]]]:
        missing = len(self.ranges)
        for group in inner.param_groups:
            for key in group["params"]:
                if id(key) in self.ranges:
                    missing -= 1
                    yield group, key, self.ranges[id(key)]
        if missing:
            raise RuntimeError(
                f"{missing} masters with young moments are no longer parameters of {type(inner).__name__}"
            )

    def check(self, inner: torch.optim.Optimizer) -> None:
        for group, key, ranges in self._found(inner):
            other = group.get("amsgrad") or not group.get("bias_correction", True) or "betas" not in group
            kinds = {key.dtype, *(t.dtype for name, t in inner.state[key].items() if name.startswith("exp_avg"))}
            if other or kinds != {torch.float32}:
                raise TypeError(f"optimizer ages are for Adam with bias correction in fp32, not {type(inner).__name__}")
            step = adam_step(inner, group, key)
            latest = max((b or 0 for r in ranges for b in r.state.begun), default=0)
            if latest > step:
                raise CheckpointError(
                    f"optimizer ages say that moments began anew at Adam's step {latest}, but the optimizer has made "
                    f"{step} steps: the record is of another optimizer state"
                )

    @torch.no_grad()
    def __call__(self, inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, key, ranges in self._found(inner):
            # Adam passes over a parameter without a gradient.
            if key.grad is None:
                continue
            step, betas = adam_step(inner, group, key), adam_betas(inner, group)
            for r in ranges:
                correct_range(r, inner.state[key], group, betas, step)
            self.ranges[id(key)] = [r for r in ranges if not is_over(r.state, betas, step)]
        self.ranges = {key: ranges for key, ranges in self.ranges.items() if ranges}


def correct_range(
    r: YoungRange, state: Mapping[str, torch.Tensor], group: Mapping[str, Any], betas: tuple[float, float], step: int
) -> None:
    """Turn the update that Adam has just made on a range into the one that the range's own ages ask for.

    Args:
        r: the range.
        state: `exp_avg` and `exp_avg_sq` of the master, after the step.
        group: with `lr` and `eps` of this step.
        betas: as the optimizer used them.
        step: Adam's step count, this step included.
    """
    rate = 1.0
    for factor in r.state.rates:
        rate *= factor.at(step)
    (shared_1, own_1), (shared_2, own_2) = (
        corrections(*x) for x in zip(betas, (step, step), r.state.begun, strict=True)
    )
    lr, eps = float(group["lr"]), float(group["eps"])
    # m / bc1 / (sqrt(v / bc2) + eps) = m * (sqrt(bc2) / bc1) / (sqrt(v) + eps * sqrt(bc2)): one root serves both.
    root_shared, root_own = shared_2**0.5, own_2**0.5
    master, first, second = (t.view(-1)[r.begin : r.end] for t in (r.key, state["exp_avg"], state["exp_avg_sq"]))
    size = _CHUNK.get(master.device.type, _CHUNK["cuda"])
    for p, m, v in zip(master.split(size), first.split(size), second.split(size), strict=True):
        own = v.sqrt()
        shared = own.add(eps * root_shared)
        torch.div(m, shared, out=shared).mul_(lr * root_shared / shared_1)
        shared.addcdiv_(m, own.add_(eps * root_own), value=-rate * lr * root_own / own_1)
        p.add_(shared)
