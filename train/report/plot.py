"""The drawing tools of a report: style, canvases, curves thinned without losing a spike, marks at each switch.

Drawn with matplotlib's Agg canvas: no display, no global state, the same bytes every time. Each figure is drawn twice,
wide for a desktop and narrow for a phone, so that its text is readable on both. Every distinction is made by line
style, marker or lightness as well as by colour: the page survives a black-and-white printer.
"""

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.report.columns import Floats
from train.report.data import Expansion, RunRecord

INK, RAW, SMOOTH, SECOND = "#22272b", "#b9c6bd", "#1d4d38", "#c06a2b"
ARROW = "\N{RIGHTWARDS ARROW}"
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": "#5b636a",
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6e8",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "white",
    "savefig.facecolor": "white",
    "hatch.linewidth": 0.5,
}
DPI = 180
# Curves of more points than this are drawn as bins, from the minimum to the maximum of each.
MAX_POINTS, BINS = 2400, 800
# The smoothing window as a share of the run, and its longest in steps.
SMOOTH_SHARE, SMOOTH_STEPS = 0.02, 2000
# matplotlib's settings are one set per process; a tracker draws on a thread of its own.
_STYLE_LOCK = threading.Lock()


@dataclass(frozen=True)
class Canvas:
    """The page a figure is drawn for. Width in inches."""

    width: float
    narrow: bool


WIDE, NARROW = Canvas(8.2, narrow=False), Canvas(4.1, narrow=True)


@dataclass(frozen=True)
class ReportFigure:
    """One drawn figure with what a reader needs beside it. Title and caption are plain text."""

    name: str
    title: str
    caption: str
    wide_png: bytes
    narrow_png: bytes


def draw_figure(name: str, title: str, caption: str, draw: Callable[[Canvas], Any]) -> ReportFigure:
    """Draw one figure for both kinds of page.

    Args:
        name: of its PNG file, and its address in the page.
        title: plain text.
        caption: plain text.
        draw: makes the matplotlib figure for a canvas.
    """
    return ReportFigure(name, title, caption, render(draw, WIDE), render(draw, NARROW))


def render(draw: Callable[[Canvas], Any], canvas: Canvas) -> bytes:
    """Draw one figure and return it as PNG."""
    with _STYLE_LOCK, matplotlib.rc_context():
        # A user's matplotlibrc must not change a report.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        buffer = io.BytesIO()
        # Nothing in the file but the picture: no date, no version.
        draw(canvas).savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(canvas: Canvas, height: float) -> Any:
    """An empty figure of the canvas' width, `height` inches high."""
    figure = Figure(figsize=(canvas.width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def smooth_window(record: RunRecord) -> int:
    """Steps in the moving mean of all training curves."""
    return int(max(1, min(SMOOTH_STEPS, round(SMOOTH_SHARE * len(record.steps_S)))))


def moving_mean(values: Floats, window: int) -> Floats:
    """Centred mean over `window` values that shrinks at the ends and skips NaN."""
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    rows = np.arange(len(values))
    low = np.maximum(0, rows - (window - 1) // 2)
    high = np.minimum(len(values), rows + window // 2 + 1)
    count = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, (sums[high] - sums[low]) / count, np.nan)


def envelope(steps: Floats, values: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Step, minimum and maximum of each of `bins` bins of equal count: thinning that loses no spike."""
    if len(values) <= bins:
        return steps, values, values
    starts = np.linspace(0, len(values), bins + 1).astype(int)[:-1]
    return steps[starts], np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)


def count_text(value: float) -> str:
    """A count for an axis: 12,000 as 12k, 3,200,000 as 3.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def step_ticks(axis: Any, ticks: int, inset: float = 0.0) -> None:
    """Whole steps with thousands separators, short from 100k on, none in the outer `inset` share of the axis."""
    low, high = axis.get_xlim()
    margin = inset * (high - low)
    found = MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    # A range below one step is cut into fractions, which would all be labelled with the same step.
    axis.set_xticks([tick for tick in found if low + margin <= tick <= high - margin and tick == round(tick)])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count_text(x) if high >= 1e5 else f"{x:,.0f}"))


def step_axis(axis: Any, record: RunRecord, canvas: Canvas, ticks: int = 8) -> None:
    """The whole run along the x axis, in optimizer steps."""
    first, last = float(record.steps_S[0]), float(record.steps_S[-1])
    margin = max(0.75, 0.01 * (last - first))
    axis.set_xlim(first - margin, last + margin)
    step_ticks(axis, 5 if canvas.narrow else ticks)
    axis.set_xlabel("step")


def mark_expansions(axis: Any, expansions: list[Expansion], labels: bool = False) -> None:
    """A dashed line at each switch; with labels, the expert counts beside it."""
    for expansion in expansions:
        axis.axvline(expansion.position, color=INK, linewidth=0.9, linestyle=(0, (5, 3)), zorder=3)
        if labels:
            axis.annotate(
                f"{expansion.from_experts} {ARROW} {expansion.to_experts}",
                (expansion.position, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                fontsize=8,
                va="top",
                bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
                zorder=5,
            )


def curve(
    axis: Any,
    record: RunRecord,
    column: str,
    label: str = "",
    inside: tuple[float, float] | None = None,
    window: int | None = None,
) -> Floats:
    """Draw a column: raw values faint, their moving mean strong, nothing averaged or joined across a switch.

    Args:
        axis: where to draw.
        record: the run.
        column: which metric.
        label: names the curve in a legend; empty for none.
        inside: only the steps between these two, for a zoom.
        window: steps in the moving mean, 1 for a metric without noise; `smooth_window` by default.

    Returns:
        The moving mean of every step, for the limits of the axis.
    """
    values = record.columns[column]
    window = smooth_window(record) if window is None else window
    means = stage_means(record, values, window)
    for i, stage in enumerate(record.stages):
        # Steps without a value are passed over: some metrics are recorded now and then only.
        rows = stage.start + np.flatnonzero(np.isfinite(values[stage.start : stage.stop]))
        if inside is not None:
            rows = rows[(record.steps_S[rows] >= inside[0]) & (record.steps_S[rows] <= inside[1])]
        if not len(rows):
            continue
        steps = record.steps_S[rows]
        thin = inside is None and len(values) > MAX_POINTS
        bins = max(10, BINS * len(rows) // len(values)) if thin else len(rows)
        named = label if i == 0 else ""
        if window > 1:
            x, low, high = envelope(steps, values[rows], bins)
            raw_label = f"{named}, every step" if named else None
            if thin:
                axis.fill_between(x, low, high, color=RAW, linewidth=0, label=raw_label, zorder=1)
            else:
                axis.plot(x, low, color=RAW, linewidth=0.9, label=raw_label, zorder=1)
            named = f"{named}, mean of {window:,} steps" if named else ""
        x, low, high = envelope(steps, means[rows], bins)
        # A line needs two points: few steps are drawn as dots as well.
        marker = "." if len(steps) <= 12 else ""
        axis.plot(x, (low + high) / 2, color=SMOOTH, linewidth=1.5, marker=marker, label=named or None, zorder=2)
    return means


def stage_means(record: RunRecord, values: Floats, window: int) -> Floats:
    """The moving mean of a column, never across a switch."""
    means = np.full(len(values), np.nan)
    for stage in record.stages:
        means[stage.start : stage.stop] = moving_mean(values[stage.start : stage.stop], window)
    return means


def mean_line(axis: Any, record: RunRecord, column: str, label: str = "", **style: Any) -> Floats:
    """Draw the moving mean of a column alone, broken at each switch; it may be recorded at some steps only.

    Returns:
        The means that are drawn, for the limits of the axis.
    """
    values = record.columns[column]
    means = np.where(np.isfinite(values), stage_means(record, values, smooth_window(record)), np.nan)
    for i, stage in enumerate(record.stages):
        rows = stage.start + np.flatnonzero(np.isfinite(means[stage.start : stage.stop]))
        x, low, high = envelope(record.steps_S[rows], means[rows], max(10, BINS * len(rows) // len(values)))
        marker = "." if len(rows) <= 12 else ""
        axis.plot(x, (low + high) / 2, label=label if i == 0 else None, **{"marker": marker, **style})
    return means


def share_steps(axes: Any, rows: int) -> None:
    """Labels of the x axis under the lowest panels only, of a grid of `rows` rows whose panels share their steps."""
    for axis in np.asarray(axes).reshape(rows, -1)[:-1].ravel():
        axis.set_xlabel("")
        axis.tick_params(labelbottom=False)


def set_limits(axis: Any, *series: Floats) -> None:
    """A range that shows these values with a margin; single spikes of a raw curve may leave it."""
    values = np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in series])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.06 * (high - low) or max(0.01, 0.02 * abs(high))
        axis.set_ylim(low - margin, high + margin)


def token_axis(axis: Any, record: RunRecord, canvas: Canvas) -> None:
    """Trained tokens along the top, where the run recorded an increasing count."""
    tokens = record.columns["tokens"]
    if len(tokens) < 2 or not np.isfinite(tokens).all() or not (np.diff(tokens) > 0).all():
        return
    ticks = MaxNLocator(4 if canvas.narrow else 7).tick_values(float(tokens[0]), float(tokens[-1]))
    ticks = [float(tick) for tick in ticks if tokens[0] <= tick <= tokens[-1]]
    top = axis.secondary_xaxis("top")
    top.set_ticks([float(np.interp(tick, tokens, record.steps_S)) for tick in ticks], [count_text(t) for t in ticks])
    top.set_xlabel("trained tokens")
