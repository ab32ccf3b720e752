"""The page of a comparison of runs, and the same results as plain text."""

from html import escape

from train.compare.data import COMPUTE, TOKENS, WINDOW, Arm, Closure, Comparison, training_at, validation_at
from train.report.loss import set_names
from train.report.parts import document, figure_of, header, note, table, tiles_of
from train.report.plot import ReportFigure
from train.report.text import (
    MISSING,
    change_text,
    experts_text,
    flops_text,
    large_text,
    loss_text,
    percent_text,
    seconds_text,
    whole_text,
)

ARROW, DOT = "\N{RIGHTWARDS ARROW}", " \N{MIDDLE DOT} "


def comparison_page(comparison: Comparison, figures: list[ReportFigure]) -> str:
    """The whole page.

    Args:
        comparison: of the runs.
        figures: what `draw_comparison` made of it.
    """
    drawn = [figure_of(figure) for figure in figures]
    title = f"{len(comparison.arms)} runs"
    facts = [f"all reached {large_text(comparison.common[TOKENS])} tokens"]
    if COMPUTE in comparison.common:
        facts.append(f"and {flops_text(comparison.common[COMPUTE])}")
    names = [arm.label for arm in comparison.arms]
    body = [
        header("Coppice comparison", title, f"{', '.join(names)}{DOT}{' '.join(facts)}"),
        _doubts(comparison),
        *drawn[:1],
        _losses(comparison),
        _sets(comparison),
        *[_gap(closure, comparison) for closure in comparison.closures],
        *drawn[1:],
        _runs(comparison),
    ]
    return document(f"{', '.join(names)}: Coppice comparison", body)


def _doubts(comparison: Comparison) -> str:
    if not comparison.doubts:
        return ""
    items = "".join(f"<li>{escape(doubt)}</li>" for doubt in comparison.doubts)
    return f'<div class="warn"><p>Read with care:</p><ul>{items}</ul></div>'


def loss_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the losses: at the end, at equal tokens, at equal compute. A tilde marks an interpolated value."""
    head = ["run", "end", "of"]
    for axis in comparison.common:
        head += [f"validation, equal {axis}", "change", f"training, equal {axis}"]
    rows, first = [], comparison.arms[0]
    for arm in comparison.arms:
        end, step, kind = arm.record.end_loss
        row = [arm.label, loss_text(end), f"{kind}, step {step:,}"]
        for axis, cost in comparison.common.items():
            reading = validation_at(arm, axis, cost)
            base = validation_at(first, axis, cost).loss
            row.append(f"{'~' if reading.between else ''}{loss_text(reading.loss)}")
            row.append(MISSING if arm is first else change_text(base, reading.loss))
            row.append(loss_text(training_at(arm, axis, cost)))
        rows.append(row)
    return head, rows


def _losses(comparison: Comparison) -> str:
    head, rows = loss_rows(comparison)
    costs = f"Equal tokens: {large_text(comparison.common[TOKENS])}, the most that all runs trained. "
    if COMPUTE in comparison.common:
        costs += f"Equal compute: {flops_text(comparison.common[COMPUTE])}, the most that all runs spent. "
    text = (
        f"Nats per token; lower is better. {costs}{comparison.flops_source} Validation: of the evaluation at that cost; ~ "
        "marks one interpolated on the straight line between the evaluations before and after it, never across a switch; "
        f"{MISSING} where there is none on both sides: nothing is extrapolated. Change: against the first run. Training: "
        f"mean of the steps in the last {100 * WINDOW:.0f} % of that cost, not before the last switch."
    )
    return f"<h2>Losses</h2>{table(head, rows, 'tnt' + 'n' * (len(head) - 3))}{note(text)}"


def _sets(comparison: Comparison) -> str:
    """Loss on each named validation set at equal tokens."""
    names = list(dict.fromkeys(name for arm in comparison.arms for name in set_names(arm.record)))
    if not names:
        return ""
    rows = []
    for arm in comparison.arms:
        readings = [validation_at(arm, TOKENS, comparison.common[TOKENS], name) for name in names]
        rows.append([arm.label, *(f"{'~' if r.between else ''}{loss_text(r.loss)}" for r in readings)])
    text = f"Nats per token at {large_text(comparison.common[TOKENS])} tokens; ~ marks an interpolated value."
    return f"<h3>Validation sets, equal tokens</h3>{table(['run', *names], rows, 't' + 'n' * len(names))}{note(text)}"


def _gap(closure: Closure, comparison: Comparison) -> str:
    value = MISSING if closure.closed is None else percent_text(closure.closed)
    tiles = [(f"Gap closed by {closure.grown}", value, closure.reason or f"{closure.kind} loss at equal tokens")]
    trio = zip(("small", "grown", "large"), (closure.small, closure.grown, closure.large), closure.losses, strict=True)
    tiles += [(f"{role}: {label}", loss_text(loss), "nats per token") for role, label, loss in trio]
    text = (
        "Gap closure = (loss of the small run - loss of the grown run) / (loss of the small run - loss of the large run) "
        f"at {large_text(comparison.common[TOKENS])} tokens: 0 % is the small model throughout, 100 % the large one "
        "throughout. One seed of each cannot tell a small gap from noise."
    )
    return f"<h2>Gap closure</h2>{tiles_of(tiles)}{note(text)}"


def _runs(comparison: Comparison) -> str:
    head = ["run", "experts", "status", "steps", "tokens", "FLOPs", "tokens/s", "pause", "active parameters", "folder"]
    rows = [
        [
            arm.label,
            experts_text(arm.record, ARROW).removesuffix(" experts"),
            arm.record.status,
            f"{arm.record.last_step:,}",
            large_text(float(arm.costs[TOKENS][-1])),
            flops_text(float(arm.costs[COMPUTE][-1]) if COMPUTE in arm.costs else None),
            whole_text(arm.tokens_per_second),
            seconds_text(arm.pause_seconds) if arm.record.expansions else MISSING,
            f" {ARROW} ".join(large_text(stage.parameters_active) for stage in arm.record.stages),
            str(arm.record.files.run_dir),
        ]
        for arm in comparison.arms
    ]
    text = (
        "Tokens/s: mean over all steps, without pauses, evaluations and saves. Pause: all expansions of the run together. "
        f"{MISSING} means none, or not recorded."
    )
    return f"<h2>Runs</h2>{table(head, rows, 'tt nnnnnn ')}{note(text)}"


def comparison_lines(comparison: Comparison) -> list[str]:
    """The results as plain text."""
    lines = [f"doubt: {doubt}" for doubt in comparison.doubts]
    costs = [f"{large_text(comparison.common[TOKENS])} tokens"]
    if COMPUTE in comparison.common:
        costs.append(flops_text(comparison.common[COMPUTE]))
    lines.append(f"{len(comparison.arms)} runs; all reached {' and '.join(costs)}")
    width = max(len(arm.label) for arm in comparison.arms)
    lines += [_line(arm, comparison, width) for arm in comparison.arms]
    for closure in comparison.closures:
        value = closure.reason if closure.closed is None else percent_text(closure.closed)
        trio = f"{closure.small} / {closure.grown} / {closure.large}"
        lines.append(f"gap closure ({trio}, {closure.kind} loss at equal tokens): {value}")
    return lines


def _line(arm: Arm, comparison: Comparison, width: int) -> str:
    end, step, kind = arm.record.end_loss
    text = f"  {arm.label:<{width}}  {kind} {loss_text(end)} at the end (step {step:,})"
    for axis, cost in comparison.common.items():
        reading = validation_at(arm, axis, cost)
        text += f"   equal {axis} {'~' if reading.between else ''}{loss_text(reading.loss)}"
    return text
