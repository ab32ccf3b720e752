"""What a comparison of runs says, computed from their directories: cost of each step, losses at equal cost, gap closure.

Runs are held against each other at equal tokens and at equal compute. Nothing is extrapolated: a run has no loss at a cost
it did not reach. Runs that do not share tokenizer or validation data are compared all the same, and `doubts` says so.
Shape suffix: S recorded steps.

Usage: `comparison = compare_runs([Path("runs/a"), Path("runs/b")], labels=None, roles=None)`
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel.errors import ConfigError, DataError
from train.compare.facts import alike, doubts_about
from train.report.columns import Floats
from train.report.data import RunRecord, load_run

# Line styles are told apart in black and white up to this many.
MAX_RUNS = 8
# Training loss at a token count is the mean over this share of the tokens before it: the same tokens in every run.
WINDOW = 0.02
TOKENS, COMPUTE = "tokens", "compute"
ROLES = ("small", "grown", "large")


@dataclass(frozen=True)
class Arm:
    """One run of a comparison.

    Attributes:
        label: names it in the page.
        record: of the run.
        costs: what it had cost up to and with each step, [S]: TOKENS trained, and COMPUTE in FLOPs unless it is unknown.
    """

    label: str
    record: RunRecord
    costs: Mapping[str, Floats]

    def cost_at(self, axis: str, position: float) -> float:
        """Cost at a position on the step axis; the outcome of a switch costs what the step before it did."""
        step, steps_S, cost_S = float(np.floor(position)), self.record.steps_S, self.costs[axis]
        if step < steps_S[0]:
            # Before the first recorded step: as if all steps up to it had cost the same.
            return float(cost_S[0]) * step / float(steps_S[0])
        return float(cost_S[int(np.searchsorted(steps_S, step, side="right")) - 1])

    def validations(self, axis: str, name: str | None = None) -> list[tuple[float, float]]:
        """Cost and validation loss of each evaluation, or of a named set in it; both sides of a switch cost the same."""
        losses = [
            (e.position, e.sets.get(name, {}).get("loss") if name else e.valid_loss) for e in self.record.evaluations
        ]
        return [(self.cost_at(axis, position), loss) for position, loss in losses if loss is not None]

    @property
    def experts(self) -> tuple[int, ...]:
        """Expert counts of its stages; changes of layout are left out."""
        counts = [stage.num_experts for stage in self.record.stages]
        # A run that grew when it took up the checkpoint of another has no step of its first stage.
        counts = [e.from_experts for e in self.record.expansions if e.step < self.record.steps_S[0]][:1] + counts
        return tuple(count for count, _ in itertools.groupby(counts))

    @property
    def pause_seconds(self) -> float | None:
        """All its expansions together; None where one did not record it."""
        pauses = [expansion.pause_seconds for expansion in self.record.expansions]
        known = [pause for pause in pauses if pause is not None]
        return sum(known) if len(known) == len(pauses) else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the timed steps over their seconds: pauses, evaluations and saves are left out."""
        seconds_S = self.record.columns["step_seconds"]
        rate_S = self.record.columns["tokens_per_second"]
        timed = np.isfinite(seconds_S) & np.isfinite(rate_S)
        total = float(seconds_S[timed].sum())
        return float((seconds_S * rate_S)[timed].sum()) / total if total else None


@dataclass(frozen=True)
class Reading:
    """A loss at a given cost.

    Attributes:
        loss: nats per token; None where the run has none there.
        between: the costs of the two evaluations it lies between, if it is interpolated.
    """

    loss: float | None
    between: tuple[float, float] | None = None


@dataclass(frozen=True)
class Closure:
    """How much of the gap between two fixed runs a grown one closes; `reason` says why it means nothing."""

    small: str
    grown: str
    large: str
    closed: float | None
    losses: tuple[float | None, float | None, float | None]
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything a page of comparison shows.

    Attributes:
        arms: the runs, in the order given.
        common: the largest TOKENS, and COMPUTE if it is known of all, that all of them reached.
        flops_source: how compute was counted, or why it was not: a sentence.
        doubts: what makes the losses of these runs hard to compare, a sentence each.
        closures: one per grown run, if the two fixed ones are known.
    """

    arms: list[Arm]
    common: Mapping[str, float]
    flops_source: str
    doubts: list[str]
    closures: list[Closure]


def compare_runs(
    run_dirs: Sequence[Path], labels: Sequence[str] | None = None, roles: Mapping[str, str] | None = None
) -> Comparison:
    """Read the runs and hold them against each other.

    Args:
        run_dirs: two runs or more.
        labels: a name for each; the names of their folders by default.
        roles: the label or folder of the `small`, `grown` and `large` run of the gap closure; found by expert counts if
            none is given.

    Raises:
        ConfigError: too few or too many runs, labels that do not fit, a role that names no run.
        DataError: a run that cannot be read, or did not record its tokens.
    """
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise ConfigError(f"compare: {len(run_dirs)} runs: name 2 to {MAX_RUNS} run directories")
    names = _labels(run_dirs, labels)
    records = [load_run(path) for path in run_dirs]
    for path, record in zip(run_dirs, records, strict=True):
        tokens_S = record.columns["tokens"]
        if not np.isfinite(tokens_S).all() or not (np.diff(tokens_S) >= 0).all():
            raise DataError(f"{path}: metrics.jsonl has steps without a rising token count: it cannot be compared")
    flops, source = _all_flops(names, records)
    arms = [
        Arm(name, record, {TOKENS: record.columns["tokens"], **({COMPUTE: flops[name]} if flops else {})})
        for name, record in zip(names, records, strict=True)
    ]
    common = {axis: min(float(arm.costs[axis][-1]) for arm in arms) for axis in arms[0].costs}
    return Comparison(
        arms=arms,
        common=common,
        flops_source=source,
        doubts=doubts_about({arm.label: arm.record for arm in arms}),
        closures=[_closure(trio, common[TOKENS]) for trio in _trios(arms, run_dirs, roles)],
    )


def validation_at(arm: Arm, axis: str, cost: float, name: str | None = None) -> Reading:
    """Validation loss at a cost: of the evaluation there, else on the straight line between its two neighbours.

    At the very cost of a switch the outcome of the switch counts. No line joins the two sides of a switch, since both have
    the same cost.
    """
    points = arm.validations(axis, name)
    before = [point for point in points if point[0] <= cost]
    after = [point for point in points if point[0] > cost]
    if before and before[-1][0] == cost:
        return Reading(before[-1][1])
    if not before or not after:
        return Reading(None)
    (x0, y0), (x1, y1) = before[-1], after[0]
    return Reading(y0 + (y1 - y0) * (cost - x0) / (x1 - x0), (x0, x1))


def training_at(arm: Arm, axis: str, cost: float) -> float | None:
    """Mean training loss over the last WINDOW of a cost; never over more than the stage it ends in."""
    cost_S = arm.costs[axis]
    stop = int(np.searchsorted(cost_S, cost, side="right"))
    if not stop:
        return None
    stage = next(stage for stage in arm.record.stages if stage.start < stop <= stage.stop)
    start = min(stop - 1, max(stage.start, int(np.searchsorted(cost_S, cost * (1 - WINDOW), side="right"))))
    losses = arm.record.columns["lm_loss"][start:stop]
    losses = losses[np.isfinite(losses)]
    return float(losses.mean()) if len(losses) else None


def _labels(run_dirs: Sequence[Path], labels: Sequence[str] | None) -> list[str]:
    if labels is not None and len(labels) != len(run_dirs):
        raise ConfigError(
            f"--labels has {len(labels)} names for {len(run_dirs)} runs: give one per run, in their order"
        )
    names = list(labels) if labels is not None else [path.resolve().name for path in run_dirs]
    if labels is None and len(set(names)) < len(names):
        # Such as a/run and b/run.
        names = [str(path) for path in run_dirs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice!r} names two of the runs: give each once, or a name of its own with --labels")
    return names


# ---- compute --------------------------------------------------------------------------------------------------------


def _all_flops(names: list[str], records: list[RunRecord]) -> tuple[dict[str, Floats], str]:
    """Cumulative FLOPs of each run by label, counted in one way for all of them, and in words which way."""
    missing = [n for n, r in zip(names, records, strict=True) if not np.isfinite(r.columns["step_flops"]).all()]
    if not missing:
        each = [record.columns["step_flops"] * np.diff(record.steps_S, prepend=0.0) for record in records]
        sums = [np.cumsum(flops_S) for flops_S in each]
        return dict(zip(names, sums, strict=True)), "Compute is the sum of step_flops, which every run recorded."
    estimates = [_estimate(record) for record in records]
    unknown = [name for name, flops_S in zip(names, estimates, strict=True) if flops_S is None]
    if unknown:
        return {}, (
            "Compute is not compared: there are neither step_flops nor active parameters for every step of "
            f"{', '.join(unknown)}."
        )
    return {name: flops_S for name, flops_S in zip(names, estimates, strict=True) if flops_S is not None}, (
        "Compute is 6 x active parameters of the stage x tokens, for every run alike, since step_flops is not recorded for "
        f"all steps of {', '.join(missing)}. This leaves out attention over the sequence."
    )


def _estimate(record: RunRecord) -> Floats | None:
    """6 x active parameters x tokens, summed; what came before the first recorded step has the size of its stage."""
    active_S = np.full(len(record.steps_S), np.nan)
    for stage in record.stages:
        active_S[stage.start : stage.stop] = np.nan if stage.parameters_active is None else stage.parameters_active
    flops_S = np.cumsum(6.0 * active_S * np.diff(record.columns["tokens"], prepend=0.0))
    return flops_S if np.isfinite(flops_S).all() else None


# ---- gap closure ----------------------------------------------------------------------------------------------------


def _trios(arms: list[Arm], run_dirs: Sequence[Path], roles: Mapping[str, str] | None) -> list[tuple[Arm, Arm, Arm]]:
    """Small, grown and large runs: those named, or by expert counts where that leaves no choice of the fixed ones."""
    if roles:
        absent = [role for role in ROLES if role not in roles]
        if absent:
            raise ConfigError(f"gap closure needs --small, --grown and --large: add --{absent[0]}")
        small, grown, large = (_named(roles[role], role, arms, run_dirs) for role in ROLES)
        if len({small.label, grown.label, large.label}) < 3:
            raise ConfigError("--small, --grown and --large must name three different runs")
        return [(small, grown, large)]
    fixed = {arm.experts[0]: arm for arm in arms if len(arm.experts) == 1}
    unique = {count: arm for count, arm in fixed.items() if sum(other.experts == (count,) for other in arms) == 1}
    grown_arms = [arm for arm in arms if arm.experts[0] < arm.experts[-1]]
    return [
        (unique[arm.experts[0]], arm, unique[arm.experts[-1]])
        for arm in grown_arms
        if arm.experts[0] in unique and arm.experts[-1] in unique
    ]


def _named(name: str, role: str, arms: list[Arm], run_dirs: Sequence[Path]) -> Arm:
    for arm, path in zip(arms, run_dirs, strict=True):
        if name == arm.label or Path(name).resolve() == path.resolve():
            return arm
    raise ConfigError(f"--{role} {name}: not among the runs: use one of {', '.join(arm.label for arm in arms)}")


def _closure(trio: tuple[Arm, Arm, Arm], tokens: float) -> Closure:
    """(L_small - L_grown) / (L_small - L_large) at equal tokens (arXiv 2604.19835 v2, section 5)."""
    kind = "validation"
    losses = [validation_at(arm, TOKENS, tokens).loss for arm in trio]
    if None in losses:
        kind = "training"
        losses = [training_at(arm, TOKENS, tokens) for arm in trio]
    small, grown, large = losses
    closed, reason = None, ""
    if small is None or grown is None or large is None:
        reason = "not all three runs have a loss there"
    elif not alike([arm.record for arm in trio]):
        reason = "their losses are not of the same tokens (see above)"
    elif small <= large:
        reason = f"the larger fixed run is not ahead of the small one ({large:.4f} and {small:.4f})"
    else:
        closed = (small - grown) / (small - large)
    return Closure(trio[0].label, trio[1].label, trio[2].label, closed, (small, grown, large), kind, reason)
