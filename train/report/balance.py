"""Figures of what happens inside the model: balance of the experts, divergence of siblings, gradients and norms."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, ScalarFormatter

from train.report.columns import NORM_GROUPS
from train.report.data import RunRecord
from train.report.plot import (
    INK,
    SMOOTH,
    Canvas,
    curve,
    mark_expansions,
    mean_line,
    new_figure,
    set_limits,
    share_steps,
    step_axis,
)


@dataclass(frozen=True)
class Panel:
    """One panel of the balance figure: a metric, or the range that several of them span."""

    columns: tuple[str, ...]
    title: str
    neutral: float
    caption: str


BALANCE = (
    Panel(("expert_load_max",), "busiest expert (max / mean)", 1.0, ""),
    Panel(("expert_load_min",), "idlest expert (min / mean)", 1.0, ""),
    Panel(
        ("expert_load_p90", "expert_load_p50", "expert_load_p10"),
        "90 %, 50 %, 10 % of the experts (load / mean)",
        1.0,
        "Dashed, solid and dotted: the load that 90 %, 50 % and 10 % of the experts stay below. ",
    ),
    Panel(
        ("expert_load_entropy",),
        "entropy of the load / log E",
        1.0,
        "Entropy of the load: that of the shares of a layer divided by log E, mean over layers (no unit; 1 = even, "
        "0 = all on one expert). ",
    ),
    Panel(
        ("router_entropy",),
        "entropy of the router / log E",
        1.0,
        "Entropy of the router: that of its scores for a token divided by log E, mean over tokens and layers (no unit; "
        "1 = undecided, 0 = certain); it falls as experts specialise. ",
    ),
    Panel(
        ("dead_experts",),
        "dead experts (layer, expert)",
        0.0,
        "Dead experts: how many (layer, expert) pairs got no token in the step. ",
    ),
    Panel(
        ("bias_max", "bias_min"),
        "selection bias, largest and smallest",
        0.0,
        "Selection bias: the largest (dashed) and smallest (dotted) that load balancing has given an expert of any "
        "layer, to be added to its score. ",
    ),
)
_RANGE_STYLES = {
    "expert_load_p90": "--",
    "expert_load_p50": "-",
    "expert_load_p10": ":",
    "bias_max": "--",
    "bias_min": ":",
}


def balance_panels(record: RunRecord) -> list[Panel]:
    """The panels of the balance figure that the run has data for."""
    return [panel for panel in BALANCE if any(record.has(column) for column in panel.columns)]


def draw_balance(record: RunRecord, canvas: Canvas) -> Any:
    """A panel per measure of balance."""
    panels = balance_panels(record)
    columns = 1 if canvas.narrow or len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(canvas, 0.2 + 1.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        if len(panel.columns) == 1:
            drawn = [curve(axis, record, panel.columns[0])]
        else:
            drawn = [
                mean_line(axis, record, column, color=SMOOTH, linewidth=1.3, linestyle=_RANGE_STYLES[column])
                for column in panel.columns
            ]
        axis.axhline(panel.neutral, color=INK, linewidth=0.8, linestyle=":", zorder=2)
        set_limits(axis, *drawn, np.array([panel.neutral]))
        step_axis(axis, record, canvas, ticks=5)
        mark_expansions(axis, record.expansions)
        axis.set_title(panel.title)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if columns == 1:
        share_steps(axes, rows)
    return figure


def balance_caption(record: RunRecord) -> str:
    """What the balance figure shows."""
    return (
        "Load is the number of top-K choices that fell on an expert in one step. Busiest and idlest: the highest and "
        "the lowest load of any expert in any layer, divided by the mean load of its layer (no unit; 1 = even). "
        + "".join(panel.caption for panel in balance_panels(record))
        + "Thin dotted line: the neutral value."
    )


_SPREADS = {
    "sibling_divergence": (
        "weights: 1 - cosine to the first of the family",
        0.0,
        "How far replicas have moved apart, at each evaluation: 1 - cosine between the weights of a replica and of the "
        "first expert of its family, estimated on a fixed random sample of coordinates. No unit; 0 means still exact "
        "copies: a curve that leaves 0 shows that new experts learn something of their own. ",
    ),
    "sibling_moment_divergence": (
        "first moments: 1 - cosine to the first of the family",
        0.0,
        "The same of Adam's first moments: above 0 siblings are pulled in different directions, at 1 in unrelated ones. ",
    ),
    "routing_agreement": (
        "router rows: cosine of siblings",
        1.0,
        "Agreement of the routing: cosine between the router rows of siblings; 1 means that the router scores them alike. ",
    ),
}


def draw_divergence(record: RunRecord, canvas: Canvas) -> Any:
    """Mean, least and largest over replicas of each measure between siblings that the run recorded."""
    names = _spread_names(record)
    figure = new_figure(canvas, 0.6 + 1.9 * len(names))
    axes = figure.subplots(len(names), 1, squeeze=False)
    for axis, name in zip(axes.ravel(), names, strict=True):
        title, neutral, _ = _SPREADS[name]
        # A gap at each switch: no line should join new families to the old ones.
        points: list[tuple[float, dict[str, float]]] = [(expansion.position, {}) for expansion in record.expansions]
        points += [(e.position, e.spreads[name]) for e in record.evaluations if name in e.spreads]
        points.sort(key=lambda point: point[0])
        steps = np.array([step for step, _ in points])
        lows, means, highs = (
            np.array([values.get(key, np.nan) for _, values in points], dtype=np.float64)
            for key in ("min", "mean", "max")
        )
        named = axis is axes[0, 0]
        axis.fill_between(steps, lows, highs, color="#dfe6e1", linewidth=0)
        high = {"label": "largest" if named else None, "linestyle": "--"}
        mean = {"label": "mean" if named else None, "marker": "o", "markersize": 3.5}
        low = {"label": "smallest" if named else None, "linestyle": ":"}
        axis.plot(steps, highs, color=INK, linewidth=0.8, **high)
        axis.plot(steps, means, color=SMOOTH, linewidth=1.4, **mean)
        axis.plot(steps, lows, color=INK, linewidth=0.8, **low)
        if neutral:
            set_limits(axis, lows, highs, np.array([neutral]))
        else:
            axis.set_ylim(bottom=0.0)
        axis.set_title(title)
        step_axis(axis, record, canvas)
        mark_expansions(axis, record.expansions, labels=named)
    share_steps(axes, len(names))
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)
    return figure


def divergence_caption(record: RunRecord) -> str:
    """What the divergence figure shows."""
    return (
        "".join(_SPREADS[name][2] for name in _spread_names(record))
        + "Mean over all replicas of all layers (line with dots), smallest (dotted) and largest (dashed)."
    )


def _spread_names(record: RunRecord) -> list[str]:
    return [name for name in _SPREADS if any(name in evaluation.spreads for evaluation in record.evaluations)]


def draw_optimizer(record: RunRecord, canvas: Canvas) -> Any:
    """Learning rate and gradient norm over the run."""
    panels = [c for c in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")) if record.has(c[0])]
    figure = new_figure(canvas, 0.2 + 1.9 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (column, title) in zip(axes.ravel(), panels, strict=True):
        means = curve(axis, record, column, window=None if column == "grad_norm" else 1)
        values = record.columns[column]
        # Room for ordinary noise; a lone spike leaves the axis rather than flatten it.
        set_limits(axis, means, np.array([0.0, np.quantile(values[np.isfinite(values)], 0.995)]))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_major_formatter(FuncFormatter(_small_text))
        axis.set_title(title)
        step_axis(axis, record, canvas)
        mark_expansions(axis, record.expansions)
    share_steps(axes, len(panels))
    return figure


def _small_text(value: float, _: object) -> str:
    """A tick of an axis whose values may be far below one."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def optimizer_caption(record: RunRecord) -> str:
    """What the figure of the optimizer shows."""
    return (
        "Learning rate of the step (no unit), and L2 norm of the gradient of all parameters before clipping (nats per "
        "token per unit of weight; the highest 0.5 % of steps may leave the axis). A switch should leave the schedule "
        "as it was; a jump of the norm that stays is a sign of trouble."
    )


def draw_norms(record: RunRecord, canvas: Canvas) -> Any:
    """A row per group of parameters: the norm of its gradient and of its weights."""
    groups, kinds = _norm_groups(record)
    figure = new_figure(canvas, 0.5 + 0.95 * len(groups))
    axes = figure.subplots(len(groups), len(kinds), squeeze=False)
    for row, group in enumerate(groups):
        for axis, kind in zip(axes[row], kinds, strict=True):
            column = f"{kind}_norm_{group}"
            if not record.has(column):
                axis.set_visible(False)
                continue
            values = record.columns[column]
            means = mean_line(axis, record, column, color=SMOOTH, linewidth=1.3)
            # A lone spike of a gradient leaves the axis rather than flatten it.
            set_limits(axis, means, np.quantile(values[np.isfinite(values)], [0.005, 0.995]))
            axis.yaxis.set_major_locator(MaxNLocator(3))
            # Weights change by little: every digit that tells ticks apart, and no offset to add in one's head.
            digits = ScalarFormatter(useOffset=False)
            digits.set_powerlimits((-4, 5))
            axis.yaxis.set_major_formatter(digits)
            axis.set_title(f"{group.replace('_', ' ')}: {_NORM_WORDS[kind]}", fontsize=8)
            step_axis(axis, record, canvas, ticks=5)
            mark_expansions(axis, record.expansions)
    share_steps(axes, len(groups))
    return figure


_NORM_WORDS = {"grad": "gradient", "param": "weights"}


def _norm_groups(record: RunRecord) -> tuple[list[str], list[str]]:
    """The groups, and of gradient and parameter norms those, that the run recorded."""
    kinds = [kind for kind in _NORM_WORDS if any(record.has(f"{kind}_norm_{group}") for group in NORM_GROUPS)]
    groups = [group for group in NORM_GROUPS if any(record.has(f"{kind}_norm_{group}") for kind in kinds)]
    return groups, kinds


def norms_caption(record: RunRecord) -> str:
    """What the figure of the norms shows."""
    return (
        "L2 norm of the gradient (before clipping) and of the weights of each group of parameters, over all layers and "
        "ranks, on the steps that recorded it; moving mean, each panel with its own range. An expansion multiplies the "
        "experts and the rows of the router, so the norms of their weights step up by about the square root of the "
        "factor; those of all other groups go on."
    )
