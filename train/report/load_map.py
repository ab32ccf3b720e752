"""The map of expert load over time: a panel per stage and layer, a family at the same height before and after a switch.

Legend of shape suffixes: R recorded steps, E experts of one stage.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from train.report.data import RunRecord, load_run
from train.report.load import Bands, LoadHistory, family_bands, plan_parents
from train.report.plot import WIDE, Canvas, new_figure, render, step_ticks

MAX_LAYERS = 4


def load_map_png(run_dir: Path) -> bytes | None:
    """The map of a run so far as PNG; None where nothing of it was recorded.

    Raises:
        DataError: as `load_run`.
    """
    record = load_run(run_dir)
    return render(partial(draw_load_map, record), WIDE) if record.loads else None


def draw_load_map(record: RunRecord, canvas: Canvas) -> Any:
    """A heat map per layer (rows) and stage (columns)."""
    histories = record.loads
    layers = _map_layers(record)
    lengths = [max(1.0, float(history.steps_R[-1] - history.steps_R[0])) for history in histories]
    # A very short stage keeps a panel one can see.
    widths = [max(length, 0.16 * max(lengths)) for length in lengths]
    figure = new_figure(canvas, 1.1 + (1.55 if len(layers) > 1 else 3.0) * len(layers))
    axes = figure.subplots(len(layers), len(histories), squeeze=False, width_ratios=widths)
    top = _map_ceiling(record)
    mesh = None
    for row, layer in enumerate(layers):
        bands = family_bands([history.num_experts for history in histories], _parents(record, layer))
        for column, (history, band) in enumerate(zip(histories, bands, strict=True)):
            axis = axes[row][column]
            mesh = _map_panel(axis, record, history, layer, band, top)
            if column == 0:
                _expert_ticks(axis, band)
                axis.set_ylabel(f"layer {layer}\nexpert" if len(layers) > 1 else "expert")
            else:
                axis.set_yticks([])
                if len(bands[0].experts) <= 32:
                    axis.hlines(bands[0].edges[1:-1], *axis.get_xlim(), color="white", linewidth=0.35)
            if row == 0:
                axis.set_title(f"{history.num_experts} experts")
            # Labels stay clear of those of the neighbouring panel.
            step_ticks(axis, 3 if canvas.narrow or len(histories) > 3 else 5, inset=0.08)
            axis.tick_params(labelbottom=row == len(layers) - 1)
            if row == len(layers) - 1:
                axis.set_xlabel("step")
    figure.colorbar(
        mesh,
        ax=axes.ravel().tolist(),
        location="bottom",
        shrink=0.7,
        aspect=40,
        extend="max",
        label="load / even load (1 = even, 0 = no token)",
    )
    return figure


def _map_panel(axis: Any, record: RunRecord, history: LoadHistory, layer: int, band: Bands, top: float) -> Any:
    """One stage of one layer: time along x, the experts' bands along y."""
    steps_R = history.steps_R
    inner = (steps_R[1:] + steps_R[:-1]) / 2
    half = float(np.median(np.diff(steps_R))) / 2 if len(steps_R) > 1 else 0.5
    x_edges = np.concatenate([[steps_R[0] - half], inner, [steps_R[-1] + half]])
    for stage in record.stages:
        if stage.index == history.stage:
            x_edges = np.clip(x_edges, stage.first_step - 0.5, stage.last_step + 0.5)
    load_ER = history.share_RLE[:, history.layers.index(layer), :].T * history.num_experts
    axis.grid(False)
    mesh = axis.pcolormesh(
        x_edges, band.edges, load_ER[band.experts], cmap="cividis", vmin=0.0, vmax=top, edgecolors="none"
    )
    axis.set_xlim(x_edges[0], x_edges[-1])
    # The first expert on top, as in a table.
    axis.set_ylim(1.0, 0.0)
    return mesh


def _expert_ticks(axis: Any, band: Bands) -> None:
    count = len(band.experts)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, count) if count / step <= 8)
    centres = (band.edges[:-1] + band.edges[1:]) / 2
    axis.set_yticks(centres[::every], [str(expert) for expert in band.experts[::every]])


def _map_layers(record: RunRecord) -> list[int]:
    """The layers drawn: all that every stage has if few, else evenly spaced ones from the first to the last."""
    common = [layer for layer in record.loads[0].layers if all(layer in history.layers for history in record.loads)]
    if len(common) <= MAX_LAYERS:
        return common
    rows = np.linspace(0, len(common) - 1, MAX_LAYERS).round().astype(int)
    return [common[row] for row in rows]


def _map_ceiling(record: RunRecord) -> float:
    """The load drawn brightest: nearly the highest of the run, so that a single spike does not darken the map."""
    loads = np.concatenate([(history.share_RLE * history.num_experts).ravel() for history in record.loads])
    loads = loads[np.isfinite(loads)]
    return float(max(1.5, np.quantile(loads, 0.995))) if len(loads) else 1.5


def _parents(record: RunRecord, layer: int) -> list[list[int] | None]:
    """For each recorded stage but the first, the parents of its experts in this layer, where a plan tells them."""
    found: list[list[int] | None] = []
    for before, after in zip(record.loads[:-1], record.loads[1:], strict=True):
        between = [e for e in record.expansions if before.steps_R[-1] <= e.position <= after.steps_R[0]]
        found.append(plan_parents(between[0].plan, layer) if len(between) == 1 else None)
    return found


def load_map_caption(record: RunRecord) -> str:
    """What the map shows, with what was left out of it."""
    histories, layers = record.loads, _map_layers(record)
    text = (
        "Each row is an expert, each column a recorded step, side by side for each stage. Colour is the expert's share "
        "of the top-K choices made in its layer, divided by an even share (1/E): 1 is even, 0 means that no token "
        "chose it; lightness alone carries the value. "
    )
    if len(histories) > 1:
        if all(_parents(record, layer).count(None) == 0 for layer in layers):
            text += (
                "After a switch the replicas of an expert share the band their parent had, so the same height on the "
                "page is the same family (white lines; numbers at the left are the experts of the first stage). "
            )
        else:
            text += "Without the plan of the switch the rows after it are in order of expert number. "
    if len(layers) < len(histories[0].layers):
        text += f"Shown: {len(layers)} of {len(histories[0].layers)} layers, evenly spaced. "
    stride = max(history.stride for history in histories)
    if stride > 1:
        text += f"At most one recorded step in {stride} is drawn. "
    return text.strip()
