"""Figures of the loss: the whole run with a zoom at each switch, and validation per named set."""

from typing import Any

import numpy as np

from train.report.columns import Floats
from train.report.data import Expansion, RunRecord
from train.report.plot import (
    ARROW,
    INK,
    SECOND,
    Canvas,
    curve,
    mark_expansions,
    new_figure,
    set_limits,
    share_steps,
    smooth_window,
    step_axis,
    step_ticks,
    token_axis,
)

MAX_ZOOMS = 3


def draw_loss(record: RunRecord, canvas: Canvas) -> Any:
    """Training and validation loss, with a zoom around each of the first expansions."""
    zooms = record.expansions[:MAX_ZOOMS]
    columns = 1 if canvas.narrow else max(1, len(zooms))
    rows = -(-len(zooms) // columns)
    figure = new_figure(canvas, 3.4 + 2.5 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.4] + [2.5] * rows)
    axis = figure.add_subplot(grid[0, :])
    smooth = curve(axis, record, "lm_loss", "training")
    valid_x, valid_y = _validations(record)
    if len(valid_x):
        line = {"color": SECOND, "linestyle": (0, (1, 1.5)), "linewidth": 1.0, "zorder": 4}
        marker = {"marker": "s", "markersize": 4, "markerfacecolor": "white", "markeredgewidth": 1.1}
        # Squares that touch would hide the curve: at most forty.
        marker["markevery"] = max(1, len(valid_x) // 40)
        axis.plot(valid_x, valid_y, label="validation", **line, **marker)
    set_limits(axis, smooth, valid_y)
    axis.set_ylabel("loss (nats per token)")
    step_axis(axis, record, canvas)
    mark_expansions(axis, record.expansions, labels=True)
    token_axis(axis, record, canvas)
    if axis.get_legend_handles_labels()[0]:
        # Outside the axes, where no curve and no label of a switch can lie under it.
        figure.legend(
            *axis.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=2 if canvas.narrow else 3,
            handlelength=1.6,
            columnspacing=1.4,
        )
    for i, expansion in enumerate(zooms):
        place = figure.add_subplot(grid[1 + i // columns, i % columns])
        _zoom(place, record, expansion, columns > 1 or canvas.narrow, i % columns == 0)
    return figure


def _validations(record: RunRecord) -> tuple[Floats, Floats]:
    """Validation losses with a gap at each switch, so that no line joins two models."""
    points = [(e.position, e.valid_loss) for e in record.evaluations if e.valid_loss is not None]
    if points:
        points += [(expansion.position, float("nan")) for expansion in record.expansions]
    points.sort(key=lambda point: point[0])
    return np.array([x for x, _ in points]), np.array([y for _, y in points], dtype=np.float64)


def _zoom(axis: Any, record: RunRecord, expansion: Expansion, small: bool, first_in_row: bool) -> None:
    half, window = _zoom_size(record)
    low = max(expansion.position - half, float(record.steps_S[0]) - 0.75)
    high = max(min(expansion.position + half, float(record.steps_S[-1]) + 0.75), expansion.position + 0.75)
    smooth = curve(axis, record, "lm_loss", inside=(low, high), window=window)
    before, after = expansion.loss_before, expansion.loss_after
    hollow = {"color": SECOND, "markerfacecolor": "white", "markersize": 7.5, "markeredgewidth": 1.5, "zorder": 6}
    if before is not None:
        axis.plot(expansion.position, before, "o", label="validation, before", **hollow)
    if after is not None:
        axis.plot(expansion.position, after, "x", color=INK, markersize=6, label="validation, right after", zorder=7)
    mark_expansions(axis, [expansion])
    seen = (record.steps_S >= low) & (record.steps_S <= high)
    raw = record.columns["lm_loss"][seen]
    raw = raw[np.isfinite(raw)]
    known = np.array([value for value in (before, after) if value is not None])
    set_limits(axis, smooth[seen], np.quantile(raw, [0.01, 0.99]) if len(raw) else raw, known)
    axis.set_xlim(low, high)
    step_ticks(axis, 4 if small else 8)
    axis.set_xlabel("step")
    if first_in_row:
        axis.set_ylabel("loss (nats per token)")
    axis.set_title(f"{expansion.from_experts} {ARROW} {expansion.to_experts} experts after step {expansion.step:,}")
    if len(known):
        axis.legend(loc="best")


def _zoom_size(record: RunRecord) -> tuple[float, int]:
    """Steps shown on each side of a switch in its zoom panel, and in the moving mean there."""
    half = float(min(400.0, max(12.0, 0.06 * (record.steps_S[-1] - record.steps_S[0]))))
    return half, max(1, min(smooth_window(record), round(half / 8)))


def loss_caption(record: RunRecord) -> str:
    """What the figure of the loss shows."""
    window = smooth_window(record)
    text = "Loss is the mean cross-entropy in nats per token; lower is better. "
    if window > 1:
        text += f"Training loss of every step (pale) and its centred mean over {window:,} steps (dark)"
    else:
        text += "Training loss of every step (dark)"
    text += ", never averaged across a switch"
    if any(evaluation.valid_loss is not None for evaluation in record.evaluations):
        text += "; squares are the loss on held-out validation batches"
    text += "."
    if record.expansions:
        half, zoom_window = _zoom_size(record)
        text += (
            " Dashed lines mark expansions, with the number of experts per layer before and after. "
            f"Below: up to {half:.0f} steps on each side of the switch, with the validation loss measured on the same "
            "batches just before it (circle) and just after it (cross)"
            + (f"; the dark curve is the mean over {zoom_window} steps. " if zoom_window > 1 else ". ")
            + "Axes are cut to the range of the dark curve."
        )
        if len(record.expansions) > MAX_ZOOMS:
            text += f" Zooms are drawn for the first {MAX_ZOOMS} expansions."
    return text


def set_names(record: RunRecord) -> list[str]:
    """The named validation sets of a run, in the order of their first appearance."""
    return list(dict.fromkeys(name for evaluation in record.evaluations for name in evaluation.sets))


def set_points(record: RunRecord, name: str, figure: str = "loss") -> list[tuple[float, float]]:
    """Position on the step axis and value of one figure of a validation set, by rising position."""
    return [(e.position, e.sets[name][figure]) for e in record.evaluations if figure in e.sets.get(name, {})]


def loss_before(record: RunRecord, name: str) -> float | None:
    """The loss of a set that later ones are held against: the last before the first switch, else the first of all."""
    points = set_points(record, name)
    first = record.expansions[0].position if record.expansions else -np.inf
    before = [loss for position, loss in points if position < first]
    return before[-1] if before else points[0][1] if points else None


def draw_sets(record: RunRecord, canvas: Canvas) -> Any:
    """A panel per validation set."""
    names = set_names(record)
    columns = 1 if canvas.narrow else 2
    rows = -(-len(names) // columns)
    figure = new_figure(canvas, 0.3 + 2.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.ravel(), names, strict=False):
        gaps = [(expansion.position, float("nan")) for expansion in record.expansions]
        points = sorted(set_points(record, name) + gaps, key=lambda point: point[0])
        losses = np.array([loss for _, loss in points])
        marker = {"marker": "s", "markersize": 3.5, "markerfacecolor": "white", "markevery": max(1, len(points) // 40)}
        axis.plot([position for position, _ in points], losses, color=SECOND, linewidth=1.2, **marker)
        before = loss_before(record, name)
        if before is not None:
            axis.axhline(before, color=INK, linewidth=0.8, linestyle=":", zorder=2)
        set_limits(axis, losses)
        step_axis(axis, record, canvas, ticks=5)
        mark_expansions(axis, record.expansions, labels=True)
        axis.set_title(name)
        axis.set_ylabel("nats per token")
    for axis in axes.ravel()[len(names) :]:
        axis.set_visible(False)
    if len(names) % columns == 0:
        share_steps(axes, rows)
    return figure


def sets_caption(record: RunRecord) -> str:
    """What the panels of the validation sets show."""
    since = "just before the first switch" if record.expansions else "at the first evaluation"
    return (
        "Loss on each validation set: mean cross-entropy in nats per token; lower is better. Each panel has its own "
        f"range. Dotted: the loss {since}; a curve that stays above it has forgotten some of what that set asks for. "
        "Dashed lines mark expansions; no line joins two models."
    )
