"""The page of a report: one self-contained HTML file without scripts or links, readable on a phone and in print.

Every text from the run is escaped, whatever it holds. The page has no date of its own: one run gives one page, byte for
byte.
"""

from html import escape

from train.report.data import Expansion, RunRecord, selection_text
from train.report.events import Event
from train.report.loss import loss_before, set_names, set_points
from train.report.parts import bars, document, figure_of, header, note, pairs, table, tiles_of
from train.report.plot import ReportFigure
from train.report.text import (
    MISSING,
    bytes_text,
    change_text,
    copies_histogram,
    details_text,
    experts_text,
    large_text,
    largest_families,
    loss_text,
    percent_text,
    seconds_text,
    short_text,
    whole_text,
)

ARROW, DOT = "\N{RIGHTWARDS ARROW}", " \N{MIDDLE DOT} "
# Events shown at each end of a longer list.
MAX_EVENTS = 150


def page(record: RunRecord, figures: list[ReportFigure]) -> str:
    """The whole page.

    Args:
        record: the run.
        figures: what `draw_all` made of it.
    """
    drawn = [figure_of(figure) for figure in figures]
    body = [
        _header(record),
        _tiles(record),
        *drawn[:1],  # the loss: what one opens a report for
        _stages(record),
        _step_time(record),
        _sets(record),
        *[_expansion(expansion) for expansion in record.expansions],
        *drawn[1:],
        _run(record),
        _checkpoints(record),
        _events(record),
        _config(record),
    ]
    return document(f"{record.name}: Coppice run report", body)


def _header(record: RunRecord) -> str:
    tokens = float(record.columns["tokens"][-1])
    facts = [record.status, experts_text(record, ARROW)]
    if tokens == tokens:
        facts.append(f"{large_text(tokens)} tokens")
    return header("Coppice run report", record.name, DOT.join(facts))


def _tiles(record: RunRecord) -> str:
    """The few numbers one opens a report for."""
    tiles: list[tuple[str, str, str]] = []
    if record.expansions:
        # Of several switches the last: it made the model the run ends with.
        last = record.expansions[-1]
        which = f"after step {last.step:,}"
        change = f"{change_text(last.loss_before, last.loss_after)} at the switch"
        switch = "the switch" if len(record.expansions) == 1 else "the last switch"
        tiles.append((f"Validation loss before {switch}", loss_text(last.loss_before), which))
        tiles.append(("Validation loss right after", loss_text(last.loss_after), change))
    value, step, kind = record.end_loss
    end_note = (
        f"step {step:,}" if kind == "validation" else f"mean of the last {record.stages[-1].end_loss_steps} steps"
    )
    tiles.append((f"{kind.capitalize()} loss at the end", loss_text(value), end_note))
    if record.expansions:
        last = record.expansions[-1]
        tiles.append(
            (
                f"Pause at {switch}",
                seconds_text(last.pause_seconds),
                f"{last.from_experts} {ARROW} {last.to_experts} experts",
            )
        )
    first, final = record.stages[0], record.stages[-1]
    if len(record.stages) > 1:
        both = f"{whole_text(first.tokens_per_second)} {ARROW} {whole_text(final.tokens_per_second)}"
        tiles.append(("Tokens per second", both, "median of the first and the last stage"))
    else:
        tiles.append(("Tokens per second", whole_text(first.tokens_per_second), "median over all steps"))
    tiles.append(("Steps", f"{record.last_step:,}", f"{len(record.steps_S):,} recorded"))
    return tiles_of(tiles) + note("Losses in nats per token; lower is better.")


def _stages(record: RunRecord) -> str:
    columns: list[tuple[str, list[str]]] = [
        ("stage", [str(stage.index) for stage in record.stages]),
        ("experts", [str(stage.num_experts) if stage.num_experts else "dense" for stage in record.stages]),
        (
            "steps",
            [
                f"{stage.first_step:,}" + (f"\N{EN DASH}{stage.last_step:,}" if stage.stop - stage.start > 1 else "")
                for stage in record.stages
            ],
        ),
        ("tokens", [large_text(stage.tokens) for stage in record.stages]),
        ("loss at its end", [loss_text(stage.end_loss) for stage in record.stages]),
        ("tokens/s", [whole_text(stage.tokens_per_second) for stage in record.stages]),
        ("s/step", [short_text(stage.step_seconds) for stage in record.stages]),
        ("parameters", [large_text(stage.parameters_total) for stage in record.stages]),
        ("active", [large_text(stage.parameters_active) for stage in record.stages]),
    ]
    text = (
        "Parameters: all, and those one token passes through. Loss at its end: training loss in nats per token, mean "
        "over the last 5 % of the stage (at most 100 steps). Tokens/s and s/step: medians. "
    )
    if record.has("tflops_per_device"):
        columns.append(("TFLOP/s", [short_text(stage.tflops_per_device) for stage in record.stages]))
        columns.append(("MFU", [percent_text(stage.mfu) for stage in record.stages]))
        text += (
            "TFLOP/s: per device, median; MFU: their share of the device's peak, not known for every device (never for "
            "a CPU). "
        )
    if record.has("memory_bytes"):
        columns.append(("peak memory", [bytes_text(stage.memory_bytes) for stage in record.stages]))
        text += "Peak memory: of the fullest rank. "
    head, rows = (
        [name for name, _ in columns],
        [list(row) for row in zip(*(cells for _, cells in columns), strict=True)],
    )
    return f"<h2>Stages</h2>{table(head, rows, 'n' * len(head))}{note(f'{text}{MISSING} means not recorded.')}"


def _step_time(record: RunRecord) -> str:
    """Parts of a step per stage, in seconds and as shares."""
    names = list(dict.fromkeys(name for stage in record.stages for name in stage.part_seconds))
    if not names:
        return ""
    rows = []
    for stage in record.stages:
        total = sum(stage.part_seconds.values())
        cells = [f"{stage.index}", f"{stage.num_experts or 'dense'}", seconds_text(total) if total else MISSING]
        for name in names:
            seconds = stage.part_seconds.get(name)
            share = percent_text(seconds / total) if seconds is not None and total else MISSING
            cells.append(share if seconds is None else f"{share} ({seconds_text(seconds)})")
        rows.append(cells)
    text = "Means over all steps of the stage whose parts were timed; shares of the step."
    if "all-to-all" in names:
        text += " All-to-all is part of the forward and backward pass, and left out of their time here."
    title = "<h3>Where a step's time goes, by stage</h3>"
    return title + table(["stage", "experts", "step", *names], rows, "n" * (3 + len(names))) + note(text)


def _sets(record: RunRecord) -> str:
    """Each validation set before and after the last switch, and at the end."""
    names = set_names(record)
    if not names:
        return ""
    last = record.expansions[-1].position if record.expansions else None
    rows = []
    for name in names:
        points = set_points(record, name)
        final = next(e.sets[name] for e in reversed(record.evaluations) if name in e.sets)
        before = next((loss for position, loss in reversed(points) if last is not None and position < last), None)
        after = next((loss for position, loss in points if last is not None and position > last), None)
        end = points[-1][1] if points else None
        cells = [name, loss_text(before), loss_text(after), loss_text(end), change_text(loss_before(record, name), end)]
        cells += [short_text(final.get("perplexity")), short_text(final.get("bits_per_byte"), 4)]
        rows.append([*cells, large_text(final.get("tokens"))])
    head = ["set", "before", "right after", "end", "change", "perplexity", "bits per byte", "tokens"]
    since = "since just before the first switch" if record.expansions else "since the first evaluation"
    text = (
        "Losses in nats per token: at the last evaluation before the last switch, at the first one after it, at the "
        f"end. Change: of the loss {since}; above 0 the set is forgotten. Perplexity, bits per byte of text and tokens "
        "read: at the end."
    )
    return f"<h2>Validation sets</h2>{table(head, rows, 't' + 'n' * 7)}{note(text)}"


def _expansion(expansion: Expansion) -> str:
    plan = expansion.plan or {}
    # The plan has the settings of the selection too, where the event may only name it.
    selection = selection_text(plan["selection"]) if plan.get("selection") else expansion.selection
    rows = [
        ("Experts per layer", f"{expansion.from_experts} {ARROW} {expansion.to_experts}"),
        ("Selection", selection),
        (
            "Validation loss",
            f"{loss_text(expansion.loss_before)} before, {loss_text(expansion.loss_after)} right after "
            f"({change_text(expansion.loss_before, expansion.loss_after)} nats per token, same batches)",
        ),
        ("Pause", seconds_text(expansion.pause_seconds)),
    ]
    for key, name in (
        ("optimizer_rule", "Optimizer rule"),
        ("bias_noise", "Bias noise"),
        ("seed", "Seed"),
        ("placement", "Placement"),
        ("digest", "Plan digest"),
    ):
        value = plan.get(key)
        if value is not None:
            rows.append((name, selection_text(value) if isinstance(value, dict) else details_text(value)))
    title = f"Expansion after step {expansion.step:,}"
    return f"<h2>{title}</h2>{pairs(rows)}{_pause_and_copies(expansion)}"


def _pause_and_copies(expansion: Expansion) -> str:
    """Two small bar charts side by side, with the largest families below."""
    histogram = copies_histogram(expansion)
    charts = [chart for chart in (_pause(expansion), _copies(histogram)) if chart]
    text = f'<div class="two">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>' if charts else ""
    if not histogram:
        return text + note(expansion.plan_problem)
    if len(histogram) == 1:
        return text
    families, total = largest_families(expansion)
    names = ", ".join(
        f"layer {layer} expert {expert}" + (f" ({score:.3g})" if score is not None else "")
        for layer, expert, score in families
    )
    more = f" and {total - len(families)} more" if total > len(families) else ""
    largest = f"Largest families, {histogram[-1][0]} copies each (utility in brackets): {names}{more}."
    return text + note(largest)


def _pause(expansion: Expansion) -> str:
    if not expansion.seconds:
        return ""
    parts = dict(expansion.seconds)
    total = expansion.pause_seconds or sum(parts.values())
    if total - sum(parts.values()) > 0.01 * total:
        parts["other"] = total - sum(parts.values())
    longest = max(parts.values()) or 1.0
    rows = [
        (
            name,
            f"{seconds_text(value)} ({100 * value / total:.0f} %)" if total else seconds_text(value),
            value / longest,
        )
        for name, value in parts.items()
    ]
    return f"<h3>Where the pause went</h3>{bars(('part', 'time'), rows)}"


def _copies(histogram: list[tuple[int, int]]) -> str:
    if not histogram:
        return ""
    title = "<h3>Copies per expert, itself included</h3>"
    if len(histogram) == 1:
        return f"{title}<p>Every expert of every layer has {histogram[0][0]} copies.</p>"
    most = max(experts for _, experts in histogram)
    rows = [(str(size), f"{experts:,}", experts / most) for size, experts in histogram]
    return f"{title}{bars(('copies', 'experts, all layers'), rows)}"


def _run(record: RunRecord) -> str:
    """Layout and versions of the last start."""
    start = record.start
    if not start:
        return '<h2>Run</h2><p class="note">No start event: layout and versions are not recorded.</p>'
    rows = [("Processes", details_text(start.get("world_size")))]
    for key, name in (("layout", "Layout"), ("versions", "Versions")):
        value = start.get(key)
        if value:
            rows.append((name, details_text(value)))
    known = ("num_experts", "parameters_total", "parameters_active", "world_size", "layout", "versions")
    rows += [(key, details_text(value)) for key, value in start.items() if key not in known]
    return f"<h2>Run</h2>{pairs(rows)}"


def _checkpoints(record: RunRecord) -> str:
    if not record.checkpoints:
        return '<h2>Checkpoints</h2><p class="note">None recorded.</p>'
    rows = [
        [
            whole_text(event.step),
            str(event.details.get("path", MISSING)),
            bytes_text(event.details.get("bytes")),
            seconds_text(event.details.get("seconds")),
            "yes" if (record.files.run_dir / str(event.details.get("path", ""))).exists() else "no",
        ]
        for event in record.checkpoints
    ]
    return "<h2>Checkpoints</h2>" + table(
        ["step", "path in the run directory", "size", "time", "on disk"], rows, "n nnn"
    )


def _events(record: RunRecord) -> str:
    events = record.events
    if not events:
        return '<h2>Events</h2><p class="note">None recorded.</p>'
    shown: list[Event] = events if len(events) <= 2 * MAX_EVENTS else events[:MAX_EVENTS] + events[-MAX_EVENTS:]
    rows = [[event.time, whole_text(event.step), event.name, details_text(event.details)] for event in shown]
    text = table(["time (UTC)", "step", "event", "details"], rows, "tnt ", [event.superseded for event in shown])
    notes = []
    if len(shown) < len(events):
        notes.append(f"The first and last {MAX_EVENTS} of {len(events):,} events; events.jsonl has all.")
    if any(event.superseded for event in events):
        notes.append(
            "Struck through: taken back by a resume or a return to an earlier step, and left out of everything above."
        )
    small = note(" ".join(notes)) if notes else ""
    return f"<h2>Events</h2><details><summary>{len(events):,} events</summary>{small}{text}</details>"


def _config(record: RunRecord) -> str:
    if not record.config_text:
        return ""
    return (
        "<h2>Configuration</h2><details><summary>config.yaml, as resolved at the start</summary>"
        f"<pre>{escape(record.config_text)}</pre></details>"
    )
