"""The figures of a report. Each caption says what one sees, and the definition and unit of its metric."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.report_data import Expansion, Floats, RunRecord
from train.report_load_map import draw_load_map, load_map_caption
from train.report_plot import (
    ARROW,
    INK,
    NARROW,
    SECOND,
    SMOOTH,
    WIDE,
    Canvas,
    count_text,
    curve,
    mark_expansions,
    new_figure,
    render,
    set_limits,
    smooth_window,
    step_axis,
    step_ticks,
    token_axis,
)
from train.report_tree import draw_tree, has_tree, tree_caption

MAX_ZOOMS = 3


@dataclass(frozen=True)
class ReportFigure:
    """One drawn figure with what a reader needs beside it. Title and caption are plain text."""

    name: str
    title: str
    caption: str
    wide_png: bytes
    narrow_png: bytes


def draw_all(record: RunRecord) -> list[ReportFigure]:
    """Draw every figure the run has data for, in the order of the page."""
    optimizer = record.has("learning_rate") or record.has("grad_norm")
    diverges = any(evaluation.divergence for evaluation in record.evaluations)
    wanted: list[tuple[str, str, bool, Callable[[RunRecord, Canvas], Any], Callable[[RunRecord], str]]] = [
        ("loss", "Loss", True, _loss, _loss_caption),
        ("family_tree", "Family tree of the experts", has_tree(record), draw_tree, tree_caption),
        ("expert_load_map", "Expert load over time", bool(record.loads), draw_load_map, load_map_caption),
        ("expert_load", "Balance of the experts", record.has("expert_load_max"), _balance, _balance_caption),
        ("divergence", "Sibling divergence", diverges, _divergence, _divergence_caption),
        ("optimizer", "Learning rate and gradient norm", optimizer, _optimizer, _optimizer_caption),
        ("throughput", "Throughput", record.has("tokens_per_second"), _throughput, _throughput_caption),
    ]
    return [
        ReportFigure(name, title, caption(record), render(record, WIDE, draw), render(record, NARROW, draw))
        for name, title, has_data, draw, caption in wanted
        if has_data
    ]


# ---- loss -----------------------------------------------------------------------------------------------------------


def _loss(record: RunRecord, canvas: Canvas) -> Any:
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


def _loss_caption(record: RunRecord) -> str:
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


# ---- balance, divergence, optimizer, throughput ---------------------------------------------------------------------


def _balance(record: RunRecord, canvas: Canvas) -> Any:
    panels = [
        ("expert_load_max", "busiest expert (max / mean)", 1.0),
        ("expert_load_min", "idlest expert (min / mean)", 1.0),
        ("expert_load_entropy", "entropy of the load / log E", 1.0),
        ("dead_experts", "dead experts (layer, expert)", 0.0),
    ]
    panels = [panel for panel in panels if record.has(panel[0])]
    columns = 1 if canvas.narrow or len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(canvas, 0.2 + 1.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (column, title, neutral) in zip(axes, panels, strict=False):
        smooth = curve(axis, record, column)
        axis.axhline(neutral, color=INK, linewidth=0.8, linestyle=":", zorder=2)
        set_limits(axis, smooth, np.array([neutral]))
        step_axis(axis, record, canvas, ticks=5)
        mark_expansions(axis, record.expansions)
        axis.set_title(title)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _balance_caption(record: RunRecord) -> str:
    return (
        "Load is the number of top-K choices that fell on an expert in one step. Busiest and idlest: the highest and "
        "the lowest load of any expert in any layer, divided by the mean load of its layer (no unit; 1 = even). "
        "Entropy: that of the shares of a layer divided by log E, mean over layers (no unit; 1 = even, 0 = all on one "
        "expert). Dead experts: how many (layer, expert) pairs got no token in the step. Dotted: the neutral value."
    )


def _divergence(record: RunRecord, canvas: Canvas) -> Any:
    figure = new_figure(canvas, 2.5)
    axis = figure.subplots()
    # A gap at each switch: no line should join new families to the old ones.
    points: list[tuple[float, dict[str, float]]] = [(expansion.position, {}) for expansion in record.expansions]
    points += [(e.position, e.divergence) for e in record.evaluations if e.divergence]
    points.sort(key=lambda point: point[0])
    steps = np.array([step for step, _ in points])
    lows, means, highs = (
        np.array([values.get(key, np.nan) for _, values in points], dtype=np.float64) for key in ("min", "mean", "max")
    )
    axis.fill_between(steps, lows, highs, color="#dfe6e1", linewidth=0)
    axis.plot(steps, highs, color=INK, linewidth=0.8, linestyle="--", label="largest")
    axis.plot(steps, means, color=SMOOTH, marker="o", markersize=3.5, linewidth=1.4, label="mean")
    axis.plot(steps, lows, color=INK, linewidth=0.8, linestyle=":", label="smallest")
    axis.set_ylim(bottom=0.0)
    axis.set_ylabel("divergence")
    step_axis(axis, record, canvas)
    mark_expansions(axis, record.expansions, labels=True)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.8, columnspacing=1.4)
    return figure


def _divergence_caption(record: RunRecord) -> str:
    return (
        "How far replicas have moved apart, at each evaluation: 1 - cosine between the weights of a replica and of the "
        "first expert of its family, estimated on a fixed random sample of coordinates; mean over all replicas of all "
        "layers (line with dots), smallest (dotted) and largest (dashed). No unit; 0 means still exact copies: a curve "
        "that leaves 0 shows that new experts learn something of their own."
    )


def _optimizer(record: RunRecord, canvas: Canvas) -> Any:
    panels = [c for c in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")) if record.has(c[0])]
    figure = new_figure(canvas, 0.2 + 1.9 * len(panels))
    for axis, (column, title) in zip(figure.subplots(len(panels), 1, squeeze=False).ravel(), panels, strict=True):
        means = curve(axis, record, column, window=None if column == "grad_norm" else 1)
        values = record.columns[column]
        # Room for ordinary noise; a lone spike leaves the axis rather than flatten it.
        set_limits(axis, means, np.array([0.0, np.quantile(values[np.isfinite(values)], 0.995)]))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_major_formatter(FuncFormatter(_small_text))
        axis.set_title(title)
        step_axis(axis, record, canvas)
        mark_expansions(axis, record.expansions)
    return figure


def _small_text(value: float, _: object) -> str:
    """A tick of an axis whose values may be far below one."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def _optimizer_caption(record: RunRecord) -> str:
    return (
        "Learning rate of the step (no unit), and L2 norm of the gradient of all parameters before clipping (nats per "
        "token per unit of weight; the highest 0.5 % of steps may leave the axis). A switch should leave the schedule "
        "as it was; a jump of the norm that stays is a sign of trouble."
    )


def _throughput(record: RunRecord, canvas: Canvas) -> Any:
    figure = new_figure(canvas, 2.5)
    axis = figure.subplots()
    smooth = curve(axis, record, "tokens_per_second")
    for stage in record.stages:
        if stage.tokens_per_second is not None:
            ends = (stage.first_step - 0.5, stage.last_step + 0.5)
            axis.plot(ends, [stage.tokens_per_second] * 2, color=SECOND, linewidth=1.3, linestyle=(0, (4, 2)), zorder=4)
            # Where the label fits inside its stage; the caption has all of them.
            if ends[1] - ends[0] > 0.2 * (record.steps_S[-1] - record.steps_S[0]):
                text = f"median {stage.tokens_per_second:,.0f}"
                place = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 8}
                axis.annotate(text, (sum(ends) / 2, 0.06), **place)
    known = [stage.tokens_per_second for stage in record.stages if stage.tokens_per_second is not None]
    set_limits(axis, np.array([0.0, 1.25 * max(known)]), np.minimum(smooth, 2 * max(known)))
    axis.set_ylim(bottom=0.0)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axis.set_ylabel("tokens per second")
    step_axis(axis, record, canvas)
    mark_expansions(axis, record.expansions, labels=True)
    return figure


def _throughput_caption(record: RunRecord) -> str:
    medians = "; ".join(
        f"{stage.tokens_per_second:,.0f}" + (f" with {stage.num_experts} experts" if stage.num_experts else "")
        for stage in record.stages
        if stage.tokens_per_second is not None
    )
    return (
        "Trained tokens per second of the whole job in each optimizer step, data loading included; evaluation, "
        f"checkpoints and the pause at a switch are not counted. Dashes: the median of each stage ({medians})."
    )
