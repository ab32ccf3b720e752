"""Figures of what a run costs: tokens per second and FLOPs, where a step's time goes, memory."""

from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.report.columns import step_parts
from train.report.data import RunRecord
from train.report.plot import (
    BINS,
    INK,
    MAX_POINTS,
    SECOND,
    SMOOTH,
    Canvas,
    count_text,
    curve,
    envelope,
    mark_expansions,
    new_figure,
    set_limits,
    share_steps,
    step_axis,
)

# Lightness and hatch of each part of a step, from the bottom of the stack: told apart in black and white.
PART_STYLES = {
    "forward, backward": ("#2f5d48", ""),
    "all-to-all": ("#8fb3a0", "/////"),
    "optimizer": ("#e5c19d", "...."),
    "data": ("#f2e3d3", "xxxxx"),
    "other": ("#f7f8f8", ""),
}
# Columns of the stack over a whole run; each is a mean.
STACK_BINS = 80


# Metric and title of the panels of the throughput figure.
SPEEDS = {
    "tokens_per_second": "trained tokens per second",
    "tflops_per_device": "model TFLOP per second and device",
    "mfu": "share of the device's peak (MFU)",
}


def draw_throughput(record: RunRecord, canvas: Canvas) -> Any:
    """Tokens per second, and what they are in FLOPs where the run recorded it."""
    panels = [column for column in SPEEDS if record.has(column)]
    figure = new_figure(canvas, 0.5 + (2.0 if len(panels) == 1 else 1.75 * len(panels)))
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, column in zip(axes.ravel(), panels, strict=True):
        _speed_panel(axis, record, column)
        step_axis(axis, record, canvas)
        mark_expansions(axis, record.expansions, labels=axis is axes[0, 0])
    share_steps(axes, len(panels))
    return figure


def _speed_panel(axis: Any, record: RunRecord, column: str) -> None:
    """A speed over the run, with the median of each stage."""
    smooth = curve(axis, record, column)
    medians = [(stage, getattr(stage, column)) for stage in record.stages]
    known = [(stage, median) for stage, median in medians if median is not None]
    text = _percent_text if column == "mfu" else count_text
    for stage, median in known:
        ends = (stage.first_step - 0.5, stage.last_step + 0.5)
        axis.plot(ends, [median] * 2, color=SECOND, linewidth=1.3, linestyle=(0, (4, 2)), zorder=4)
        # Where the label fits inside its stage; the table of the stages has all of them.
        if ends[1] - ends[0] > 0.2 * (record.steps_S[-1] - record.steps_S[0]):
            label = f"median {median:,.0f}" if column == "tokens_per_second" else f"median {text(median)}"
            axis.annotate(label, (sum(ends) / 2, 0.06), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
    highest = max(median for _, median in known)
    set_limits(axis, np.array([0.0, 1.25 * highest]), np.minimum(smooth, 2 * highest))
    axis.set_ylim(bottom=0.0)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_title(SPEEDS[column])


def _percent_text(value: float) -> str:
    return f"{100 * value:.3g} %"


def throughput_caption(record: RunRecord) -> str:
    """What the throughput figure shows."""
    medians = "; ".join(
        f"{stage.tokens_per_second:,.0f}" + (f" with {stage.num_experts} experts" if stage.num_experts else "")
        for stage in record.stages
        if stage.tokens_per_second is not None
    )
    text = (
        "Trained tokens per second of the whole job in each optimizer step, data loading included; evaluation, "
        f"checkpoints and the pause at a switch are not counted. Dashes: the median of each stage ({medians})."
    )
    if record.has("tflops_per_device"):
        text += (
            " FLOPs are those the model needs for its forward and backward pass, per device; recomputation is not "
            "counted."
        )
    if record.has("mfu"):
        text += " MFU: their share of what the device could do at its peak."
    return text


# ---- where a step's time goes ---------------------------------------------------------------------------------------


def draw_step_time(record: RunRecord, canvas: Canvas) -> Any:
    """A stack of the parts of a step: means over bins of steps, none of which spans a switch."""
    parts = step_parts(record.columns)
    names = [name for name in PART_STYLES if name in parts]
    figure = new_figure(canvas, 3.1)
    axis = figure.subplots()
    for stage in record.stages:
        timed = stage.start + np.flatnonzero(np.isfinite(parts["other"][stage.start : stage.stop]))
        if not len(timed):
            continue
        bins = min(len(timed), max(4, STACK_BINS * len(timed) // len(record.steps_S)))
        starts = np.linspace(0, len(timed), bins + 1).astype(int)
        edges = np.append(record.steps_S[timed[starts[:-1]]] - 0.5, record.steps_S[timed[-1]] + 0.5)
        below = np.zeros(bins)
        for name in names:
            colour, hatch = PART_STYLES[name]
            top = below + np.add.reduceat(parts[name][timed], starts[:-1]) / np.diff(starts)
            label = name if stage is record.stages[0] else None
            style = {"facecolor": colour, "edgecolor": INK, "hatch": hatch, "linewidth": 0.4}
            axis.stairs(top, edges, baseline=below, fill=True, label=label, zorder=2, **style)
            below = top
    # Ordinary steps fill the axis; one that waited for a compiler or a disk leaves it.
    axis.set_ylim(0.0, 1.35 * max(stage.step_seconds or 0.0 for stage in record.stages))
    axis.set_ylabel("seconds per step")
    step_axis(axis, record, canvas)
    mark_expansions(axis, record.expansions, labels=True)
    ncols = 3 if canvas.narrow else 5
    figure.legend(loc="outside upper left", ncols=ncols, handlelength=1.8, columnspacing=1.2)
    return figure


def step_time_caption(record: RunRecord) -> str:
    """What the stack shows."""
    parts = step_parts(record.columns)
    words = {
        "forward, backward": "forward and backward pass"
        + (" without the exchange of tokens" if "all-to-all" in parts else ""),
        "all-to-all": "exchange of tokens between expert-parallel ranks, within the forward and backward pass",
        "optimizer": "optimizer: clipping, update, gathering the new weights",
        "data": "waiting for the batch",
        "other": "the rest of the step",
    }
    listed = "; ".join(words[name] for name in PART_STYLES if name in parts)
    return (
        f"Seconds of an optimizer step by part, from the bottom: {listed}. Each column is the mean over neighbouring "
        "steps; steps far slower than usual leave the axis. Shares per stage are in the table of the stages."
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


def draw_memory(record: RunRecord, canvas: Canvas) -> Any:
    """Peak memory over the run: the highest of each bin of steps, so that no peak is lost."""
    figure = new_figure(canvas, 2.4)
    axis = figure.subplots()
    values = record.columns["memory_bytes"] / 1e9
    for stage in record.stages:
        rows = stage.start + np.flatnonzero(np.isfinite(values[stage.start : stage.stop]))
        bins = max(10, BINS * len(rows) // len(values)) if len(values) > MAX_POINTS else max(1, len(rows))
        steps, _, peaks = envelope(record.steps_S[rows], values[rows], bins)
        axis.plot(steps, peaks, color=SMOOTH, linewidth=1.3, marker="." if len(rows) <= 12 else "")
    axis.set_ylim(0.0, 1.15 * float(np.nanmax(values)))
    axis.set_ylabel("GB (10\N{SUPERSCRIPT NINE} bytes)")
    step_axis(axis, record, canvas)
    mark_expansions(axis, record.expansions, labels=True)
    return figure


def memory_caption(record: RunRecord) -> str:
    """What the memory figure shows."""
    return (
        "Memory of the fullest rank: on a GPU the most that was held since the measurement before, on CPU what its process "
        "holds. A switch raises it with the parameters, gradients and optimizer state of the new "
        "experts, unless the new stage spreads them over more ranks."
    )
