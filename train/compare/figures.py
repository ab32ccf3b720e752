"""The figures of a comparison: losses over equal tokens and equal compute, and what happens around the switches."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.compare.data import COMPUTE, TOKENS, Arm, Comparison
from train.report.data import Expansion
from train.report.plot import (
    ARROW,
    BINS,
    INK,
    Canvas,
    ReportFigure,
    count_text,
    draw_figure,
    envelope,
    new_figure,
    set_limits,
    share_steps,
    smooth_window,
    stage_means,
)

# Colour with its lightness, dashes and marker of each run: any one of them tells the runs apart.
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#1d4d38", "-", "o"),
    ("#c06a2b", (0, (5, 1.5)), "s"),
    ("#22272b", (0, (1, 1.2)), "^"),
    ("#7a9fc4", (0, (6, 1.5, 1, 1.5)), "D"),
    ("#8d5a97", (0, (3, 1, 1, 1, 1, 1)), "v"),
    ("#9aa58f", "-", "P"),
    ("#5b636a", (0, (8, 3)), "X"),
    ("#d3a24b", (0, (2, 3)), "*"),
)
MAX_ZOOMS = 3
# Tokens on each side of a switch in its zoom, as a share of the run that has it, and at least so many of its steps.
ZOOM_SHARE, ZOOM_STEPS = 0.06, 12
# The first part of the common cost may leave the axis: it falls so far that the rest would be flat.
STEEP_SHARE = 0.1
LABEL_LENGTH = 26


@dataclass(frozen=True)
class _Switch:
    arm: Arm
    expansion: Expansion
    tokens: float
    half: float


def draw_comparison(comparison: Comparison) -> list[ReportFigure]:
    """Draw every figure of a comparison, in the order of the page."""
    figures = [
        draw_figure(
            "loss_at_equal_tokens",
            "Loss at equal tokens",
            _loss_caption(comparison, TOKENS),
            partial(_draw_loss, comparison, TOKENS),
        )
    ]
    if COMPUTE in comparison.common:
        figures.append(
            draw_figure(
                "loss_at_equal_compute",
                "Loss at equal compute",
                _loss_caption(comparison, COMPUTE),
                partial(_draw_loss, comparison, COMPUTE),
            )
        )
    if _switches(comparison):
        figures.append(
            draw_figure("switches", "Around the switches", _zoom_caption(comparison), partial(_draw_zooms, comparison))
        )
    return figures


# ---- losses over the whole runs -------------------------------------------------------------------------------------


def _draw_loss(comparison: Comparison, axis: str, canvas: Canvas) -> Any:
    """Training loss above, validation loss below, of all runs over one kind of cost."""
    validated = any(arm.validations(axis) for arm in comparison.arms)
    panels = 2 if validated else 1
    figure = new_figure(canvas, 0.6 + 2.7 * panels)
    axes = figure.subplots(panels, 1, squeeze=False)
    steep = STEEP_SHARE * comparison.common[axis]
    limits: list[list[Any]] = [[], []]
    for arm, style in zip(comparison.arms, STYLES, strict=False):
        means = stage_means(arm.record, arm.record.columns["lm_loss"], smooth_window(arm.record))
        _training(axes[0, 0], arm, axis, means, style)
        limits[0].append(means[arm.costs[axis] >= steep])
        if validated:
            _validation(axes[1, 0], arm, axis, style)
            limits[1].append(np.array([loss for cost, loss in arm.validations(axis) if cost >= steep]))
    highest = max(float(arm.costs[axis][-1]) for arm in comparison.arms)
    for place, title, shown in zip(axes.ravel(), ("training loss", "validation loss"), limits, strict=False):
        place.axvline(comparison.common[axis], color=INK, linewidth=0.8, linestyle=":", zorder=1)
        set_limits(place, *shown)
        place.set_xlim(0.0, 1.01 * highest)
        place.set_title(title)
        place.set_ylabel("nats per token")
        _cost_ticks(place, axis, highest, canvas)
    share_steps(axes, panels)
    _legend(figure, axes[-1, 0] if validated else axes[0, 0], canvas)
    return figure


def _training(place: Any, arm: Arm, axis: str, means: Any, style: tuple[str, Any, str]) -> None:
    """The moving mean of one run, broken at each switch; a triangle where it switched."""
    colour, dashes, _ = style
    cost_S = arm.costs[axis]
    for i, stage in enumerate(arm.record.stages):
        rows = slice(stage.start, stage.stop)
        x, low, high = envelope(cost_S[rows], means[rows], max(10, BINS * (stage.stop - stage.start) // len(cost_S)))
        label = _label(arm) if i == 0 else None
        place.plot(x, (low + high) / 2, color=colour, linestyle=dashes, linewidth=1.4, label=label, zorder=2)
    for expansion in arm.record.expansions:
        _triangle(place, arm.cost_at(axis, expansion.position), colour)


def _triangle(place: Any, cost: float, colour: str) -> None:
    """Marks a switch on the lower edge of a panel."""
    marker = {"marker": "^", "markersize": 7, "markeredgecolor": "white", "clip_on": False}
    place.plot([cost], [0.0], color=colour, transform=place.get_xaxis_transform(), linestyle="", zorder=6, **marker)


def _validation(place: Any, arm: Arm, axis: str, style: tuple[str, Any, str]) -> None:
    colour, dashes, marker = style
    points = [(e.position, e.valid_loss) for e in arm.record.evaluations if e.valid_loss is not None]
    every = max(1, len(points) // 25)
    # A gap at each switch: no line joins two models.
    points += [(expansion.position, float("nan")) for expansion in arm.record.expansions]
    points.sort(key=lambda point: point[0])
    face = {"marker": marker, "markersize": 4, "markerfacecolor": "white", "markevery": every}
    costs = [arm.cost_at(axis, position) for position, _ in points]
    losses = [loss for _, loss in points]
    place.plot(costs, losses, color=colour, linestyle=dashes, linewidth=1.2, label=_label(arm), **face)
    for expansion in arm.record.expansions:
        _triangle(place, arm.cost_at(axis, expansion.position), colour)


def _label(arm: Arm) -> str:
    """A run in a legend, with its expert counts."""
    name = arm.label if len(arm.label) <= LABEL_LENGTH else f"{arm.label[: LABEL_LENGTH - 1]}\N{HORIZONTAL ELLIPSIS}"
    experts = f" {ARROW} ".join(str(count) for count in arm.experts)
    return f"{name} ({experts} experts)" if any(arm.experts) else f"{name} (dense)"


def _legend(figure: Any, place: Any, canvas: Canvas) -> None:
    columns = 1 if canvas.narrow else 3
    figure.legend(*place.get_legend_handles_labels(), loc="outside upper left", ncols=columns, handlelength=3.2)


def _cost_ticks(place: Any, axis: str, highest: float, canvas: Canvas) -> None:
    place.xaxis.set_major_locator(MaxNLocator(4 if canvas.narrow else 7))
    if axis == TOKENS:
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
        place.set_xlabel("trained tokens")
        return
    power = 3 * math.floor(math.log10(highest) / 3) if highest > 0 else 0
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10.0**power:.4g}"))
    place.set_xlabel(f"training compute ($10^{{{power}}}$ FLOPs)")


def _loss_caption(comparison: Comparison, axis: str) -> str:
    windows = sorted({smooth_window(arm.record) for arm in comparison.arms})
    window = " to ".join(f"{steps:,}" for steps in dict.fromkeys((windows[0], windows[-1])))
    text = f"Training loss is the centred mean over {window} steps (2 % of each run), never across a switch. "
    if any(arm.validations(axis) for arm in comparison.arms):
        text += "Validation loss has a mark at evaluations (at most about 25 a run). "
    if any(arm.record.expansions for arm in comparison.arms):
        text += "Triangles on the lower edge mark expansions. "
    text += "Thin dotted line: the largest cost that all runs reached, where the table compares them. "
    text += f"The first {100 * STEEP_SHARE:.0f} % of it may leave the axis."
    return text + (f" {comparison.flops_source}" if axis == COMPUTE else "")


# ---- around the switches --------------------------------------------------------------------------------------------


def _switches(comparison: Comparison) -> list[_Switch]:
    """The switches that are zoomed in on; one that lies in the range of another shares its panel."""
    found: list[_Switch] = []
    for arm in comparison.arms:
        tokens_S = arm.costs[TOKENS]
        step = float(tokens_S[-1]) / float(arm.record.steps_S[-1])
        half = max(ZOOM_SHARE * float(tokens_S[-1]), ZOOM_STEPS * step)
        for expansion in arm.record.expansions:
            tokens = arm.cost_at(TOKENS, expansion.position)
            if all(abs(tokens - other.tokens) > 0.5 * other.half for other in found):
                found.append(_Switch(arm, expansion, tokens, half))
    return sorted(found[:MAX_ZOOMS], key=lambda switch: switch.tokens)


def _draw_zooms(comparison: Comparison, canvas: Canvas) -> Any:
    switches = _switches(comparison)
    columns = 1 if canvas.narrow else len(switches)
    rows = -(-len(switches) // columns)
    figure = new_figure(canvas, 0.7 + 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, (place, switch) in enumerate(zip(axes.ravel(), switches, strict=True)):
        _zoom(place, comparison, switch)
        place.xaxis.set_major_locator(MaxNLocator(4 if columns > 1 or canvas.narrow else 7))
        place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
        place.set_xlabel("trained tokens")
        if i % columns == 0:
            place.set_ylabel("loss (nats per token)")
    _legend(figure, axes[0, 0], canvas)
    return figure


def _zoom(place: Any, comparison: Comparison, switch: _Switch) -> None:
    """All runs within the tokens around one switch, with the validation losses of the switches that lie there."""
    low, high = max(0.0, switch.tokens - switch.half), switch.tokens + switch.half
    shown: list[Any] = []
    for arm, (colour, dashes, _) in zip(comparison.arms, STYLES, strict=False):
        tokens_S = arm.costs[TOKENS]
        inside = (tokens_S >= low) & (tokens_S <= high)
        window = max(1, min(smooth_window(arm.record), int(inside.sum()) // 16))
        means = stage_means(arm.record, arm.record.columns["lm_loss"], window)
        # Every run is in the legend, also one that has no step here.
        place.plot([], [], color=colour, linestyle=dashes, linewidth=1.4, label=_label(arm))
        for stage in arm.record.stages:
            rows = stage.start + np.flatnonzero(inside[stage.start : stage.stop])
            place.plot(tokens_S[rows], means[rows], color=colour, linestyle=dashes, linewidth=1.4, zorder=2)
        shown.append(means[inside])
        for expansion in arm.record.expansions:
            at = arm.cost_at(TOKENS, expansion.position)
            if low <= at <= high:
                _outcome(place, at, expansion, colour)
                shown.append(np.array([x for x in (expansion.loss_before, expansion.loss_after) if x is not None]))
    set_limits(place, *shown)
    place.set_xlim(low, high)
    expansion = switch.expansion
    place.set_title(
        f"{expansion.from_experts} {ARROW} {expansion.to_experts} experts at {count_text(float(switch.tokens))} tokens"
    )


def _outcome(place: Any, tokens: float, expansion: Expansion, colour: str) -> None:
    """The validation loss just before a switch (circle) and right after it (cross), and the switch itself."""
    place.axvline(tokens, color=colour, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)
    if expansion.loss_before is not None:
        hollow = {"markerfacecolor": "white", "markersize": 7.5, "markeredgewidth": 1.5}
        place.plot(tokens, expansion.loss_before, "o", color=colour, zorder=6, **hollow)
    if expansion.loss_after is not None:
        place.plot(tokens, expansion.loss_after, "x", color=INK, markersize=6, zorder=7)


def _zoom_caption(comparison: Comparison) -> str:
    switches = sum(len(arm.record.expansions) for arm in comparison.arms)
    text = (
        "Training loss of every run in the tokens around a switch (lines; a short moving mean), and the validation loss of "
        "the run that switched, on the same batches just before it (circle) and just after it (cross). Dashed line: the "
        "switch."
    )
    if switches > len(_switches(comparison)):
        text += f" {len(_switches(comparison))} panels for {switches} switches: those close to another share its panel"
        text += f", and there are at most {MAX_ZOOMS}."
    return text
