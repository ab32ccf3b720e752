"""Which figures a report has, in the order of the page; each is drawn where the run recorded something for it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from train.report.balance import (
    balance_caption,
    balance_panels,
    divergence_caption,
    draw_balance,
    draw_divergence,
    draw_norms,
    draw_optimizer,
    norms_caption,
    optimizer_caption,
)
from train.report.columns import NORM_GROUPS
from train.report.data import RunRecord
from train.report.load_map import draw_load_map, load_map_caption
from train.report.loss import draw_loss, draw_sets, loss_caption, set_names, sets_caption
from train.report.plot import Canvas, ReportFigure, draw_figure
from train.report.speed import (
    draw_memory,
    draw_step_time,
    draw_throughput,
    memory_caption,
    step_time_caption,
    throughput_caption,
)
from train.report.tree import draw_tree, has_tree, tree_caption

Draw = Callable[[RunRecord, Canvas], Any]
Caption = Callable[[RunRecord], str]


def draw_all(record: RunRecord) -> list[ReportFigure]:
    """Draw every figure the run has data for, in the order of the page."""
    optimizer = record.has("learning_rate") or record.has("grad_norm")
    norms = any(record.has(f"{kind}_norm_{group}") for kind in ("grad", "param") for group in NORM_GROUPS)
    diverges = any(evaluation.spreads for evaluation in record.evaluations)
    timed = any(stage.part_seconds for stage in record.stages)
    several = len(set_names(record)) > 1
    wanted: list[tuple[str, str, bool, Draw, Caption]] = [
        ("loss", "Loss", True, draw_loss, loss_caption),
        ("validation_sets", "Validation loss per set", several, draw_sets, sets_caption),
        ("family_tree", "Family tree of the experts", has_tree(record), draw_tree, tree_caption),
        ("expert_load_map", "Expert load over time", bool(record.loads), draw_load_map, load_map_caption),
        ("expert_load", "Balance of the experts", bool(balance_panels(record)), draw_balance, balance_caption),
        ("divergence", "Sibling divergence", diverges, draw_divergence, divergence_caption),
        ("optimizer", "Learning rate and gradient norm", optimizer, draw_optimizer, optimizer_caption),
        ("norms", "Norms per group of parameters", norms, draw_norms, norms_caption),
        ("throughput", "Throughput", record.has("tokens_per_second"), draw_throughput, throughput_caption),
        ("step_time", "Where a step's time goes", timed, draw_step_time, step_time_caption),
        ("memory", "Memory", record.has("memory_bytes"), draw_memory, memory_caption),
    ]
    return [
        draw_figure(name, title, caption(record), partial(draw, record))
        for name, title, has_data, draw, caption in wanted
        if has_data
    ]
