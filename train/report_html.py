"""The page of a report: one self-contained HTML file without scripts or links, readable on a phone and in print.

Every text from the run is escaped, whatever it holds. The page has no date of its own: one run gives one page, byte for
byte.
"""

import base64
from html import escape

from train.report_data import Event, Expansion, RunRecord, selection_text
from train.report_figures import ReportFigure
from train.report_text import (
    MISSING,
    bytes_text,
    change_text,
    copies_histogram,
    details_text,
    experts_text,
    large_text,
    largest_families,
    loss_text,
    seconds_text,
    whole_text,
)

ARROW, DOT = "\N{RIGHTWARDS ARROW}", " \N{MIDDLE DOT} "
# Events shown at each end of a longer list.
MAX_EVENTS = 150

CSS = """
:root{--ink:#22272b;--soft:#5b636a;--line:#dde1e4;--accent:#1d4d38;--tint:#f4f6f5}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:2.2rem 1.2rem 4rem;max-width:54rem;color:var(--ink);background:#fff;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
header{border-bottom:2px solid var(--accent);padding-bottom:.9rem;margin-bottom:1.4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0;font-weight:650;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .7rem;font-weight:650;color:var(--accent)}
h3{font-size:1rem;margin:1.6rem 0 .5rem;font-weight:650}
p{margin:.4rem 0}
.kicker{color:var(--accent);font-weight:600;font-size:.8rem;letter-spacing:.06em;text-transform:uppercase;
margin:0 0 .2rem}
.status,.note{color:var(--soft)}
.note{font-size:.86rem}
.tiles{display:grid;grid-template-columns:repeat(3,1fr);gap:1px;padding:1px;margin:0}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:.75rem .9rem}
.tiles dt{font-size:.8rem;color:var(--soft)}
.tiles dd{margin:.1rem 0 0;font-size:1.35rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:.8rem;font-weight:400;color:var(--soft);line-height:1.35}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.34rem .9rem .34rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-weight:600;color:var(--soft);font-size:.8rem;vertical-align:bottom;border-bottom:1px solid var(--ink)}
tbody th{font-weight:400;color:var(--soft);white-space:nowrap;width:13rem}
td.n,th.n{text-align:right;white-space:nowrap}
td.t{white-space:nowrap}
td{overflow-wrap:break-word}
.bar{display:inline-block;height:.62em;background:var(--accent);min-width:1px}
td.b{width:45%;min-width:6rem;vertical-align:middle}
.two{display:grid;grid-template-columns:1fr 1fr;gap:0 2.5rem}
.two h3{margin-top:1rem}
tr.old td{color:var(--soft);text-decoration:line-through}
figure{margin:1rem 0 2rem}
figure img{display:block;width:100%;height:auto}
figcaption{font-size:.86rem;color:var(--soft);margin-top:.5rem;max-width:46rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent);font-weight:600}
pre{background:var(--tint);padding:.8rem 1rem;overflow-x:auto;
font:12.5px/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
code{font:.92em ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
@media (max-width:600px){body{padding:1.3rem 1rem 3rem;font-size:15px}h1{font-size:1.4rem}
tbody th{white-space:normal;width:40%}
.tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:1.15rem}.two{grid-template-columns:1fr}}
@media print{body{max-width:none;padding:0;font-size:11pt}h2,h3{break-after:avoid}figure,tr{break-inside:avoid}
.scroll{overflow:visible}}
""".strip()


def page(record: RunRecord, figures: list[ReportFigure]) -> str:
    """The whole page.

    Args:
        record: the run.
        figures: what `draw_all` made of it.
    """
    drawn = [_figure(figure) for figure in figures]
    body = [
        _header(record),
        _tiles(record),
        *drawn[:1],  # the loss: what one opens a report for
        _stages(record),
        *[_expansion(expansion) for expansion in record.expansions],
        *drawn[1:],
        _run(record),
        _checkpoints(record),
        _events(record),
        _config(record),
    ]
    title = escape(f"{record.name}: Coppice run report")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _header(record: RunRecord) -> str:
    tokens = float(record.columns["tokens"][-1])
    facts = [record.status, experts_text(record, ARROW)]
    if tokens == tokens:
        facts.append(f"{large_text(tokens)} tokens")
    return (
        f'<header><p class="kicker">Coppice run report</p><h1>{escape(record.name)}</h1>'
        f'<p class="status">{escape(DOT.join(facts))}</p></header>'
    )


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
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{cells}</dl><p class="note">Losses in nats per token; lower is better.</p>'


def _table(head: list[str], rows: list[list[str]], kinds: str, old: list[bool] | None = None) -> str:
    """A table of escaped cells. `kinds` has a letter per column: n number, t text on one line, space other text."""
    classes = [f' class="{kind}"' if kind in "nt" else "" for kind in kinds]
    header = "".join(f"<th{css}>{escape(name)}</th>" for name, css in zip(head, classes, strict=True))
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(f"<td{css}>{escape(cell)}</td>" for cell, css in zip(row, classes, strict=True))
        lines.append(f"<tr{' class=' + chr(34) + 'old' + chr(34) if old and old[i] else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _pairs(rows: list[tuple[str, str]]) -> str:
    """A table of names and values, both escaped."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>'


def _stages(record: RunRecord) -> str:
    head = ["stage", "experts", "steps", "tokens", "loss at its end", "tokens/s", "s/step", "parameters", "active"]
    rows = [
        [
            str(stage.index),
            str(stage.num_experts) if stage.num_experts else "dense",
            f"{stage.first_step:,}" + (f"\N{EN DASH}{stage.last_step:,}" if stage.stop - stage.start > 1 else ""),
            large_text(stage.tokens),
            loss_text(stage.end_loss),
            whole_text(stage.tokens_per_second),
            MISSING if stage.step_seconds is None else f"{stage.step_seconds:.3g}",
            large_text(stage.parameters_total),
            large_text(stage.parameters_active),
        ]
        for stage in record.stages
    ]
    note = (
        "Parameters: all, and those one token passes through. Loss at its end: training loss in nats per token, mean "
        f"over the last 5 % of the stage (at most 100 steps). Tokens/s and s/step: medians. "
        f"{MISSING} means not recorded."
    )
    return f'<h2>Stages</h2>{_table(head, rows, "nnnnnnnnn")}<p class="note">{escape(note)}</p>'


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
    return f"<h2>{title}</h2>{_pairs(rows)}{_pause_and_copies(expansion)}"


def _bars(head: tuple[str, str], rows: list[tuple[str, str, float]]) -> str:
    """Rows of name, value and a bar from 0 to 1; name and value are escaped."""
    lines = "".join(
        f'<tr><td class="t">{escape(name)}</td><td class="n">{escape(value)}</td>'
        f'<td class="b"><span class="bar" style="width:{100 * share:.1f}%"></span></td></tr>'
        for name, value, share in rows
    )
    header = f'<th>{escape(head[0])}</th><th class="n">{escape(head[1])}</th><th></th>'
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table></div>'


def _pause_and_copies(expansion: Expansion) -> str:
    """Two small bar charts side by side, with the largest families below."""
    histogram = copies_histogram(expansion)
    charts = [chart for chart in (_pause(expansion), _copies(histogram)) if chart]
    text = f'<div class="two">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>' if charts else ""
    if not histogram:
        return text + f'<p class="note">{escape(expansion.plan_problem)}</p>'
    if len(histogram) == 1:
        return text
    families, total = largest_families(expansion)
    names = ", ".join(
        f"layer {layer} expert {expert}" + (f" ({score:.3g})" if score is not None else "")
        for layer, expert, score in families
    )
    more = f" and {total - len(families)} more" if total > len(families) else ""
    note = f"Largest families, {histogram[-1][0]} copies each (utility in brackets): {names}{more}."
    return text + f'<p class="note">{escape(note)}</p>'


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
    return f"<h3>Where the pause went</h3>{_bars(('part', 'time'), rows)}"


def _copies(histogram: list[tuple[int, int]]) -> str:
    if not histogram:
        return ""
    title = "<h3>Copies per expert, itself included</h3>"
    if len(histogram) == 1:
        return f"{title}<p>Every expert of every layer has {histogram[0][0]} copies.</p>"
    most = max(experts for _, experts in histogram)
    rows = [(str(size), f"{experts:,}", experts / most) for size, experts in histogram]
    return f"{title}{_bars(('copies', 'experts, all layers'), rows)}"


def _figure(figure: ReportFigure) -> str:
    wide, narrow = (base64.b64encode(png).decode("ascii") for png in (figure.wide_png, figure.narrow_png))
    return (
        f'<h2 id="{escape(figure.name)}">{escape(figure.title)}</h2>\n<figure><picture>'
        f'<source media="(max-width:600px)" srcset="data:image/png;base64,{narrow}">'
        f'<img src="data:image/png;base64,{wide}" alt="{escape(figure.title)}: see the text below the figure">'
        f"</picture><figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


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
    return f"<h2>Run</h2>{_pairs(rows)}"


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
    return "<h2>Checkpoints</h2>" + _table(
        ["step", "path in the run directory", "size", "time", "on disk"], rows, "n nnn"
    )


def _events(record: RunRecord) -> str:
    events = record.events
    if not events:
        return '<h2>Events</h2><p class="note">None recorded.</p>'
    shown: list[Event] = events if len(events) <= 2 * MAX_EVENTS else events[:MAX_EVENTS] + events[-MAX_EVENTS:]
    rows = [[event.time, whole_text(event.step), event.name, details_text(event.details)] for event in shown]
    text = _table(["time (UTC)", "step", "event", "details"], rows, "tnt ", [event.superseded for event in shown])
    notes = []
    if len(shown) < len(events):
        notes.append(f"The first and last {MAX_EVENTS} of {len(events):,} events; events.jsonl has all.")
    if any(event.superseded for event in events):
        notes.append(
            "Struck through: taken back by a resume or a return to an earlier step, and left out of everything above."
        )
    note = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    return f"<h2>Events</h2><details><summary>{len(events):,} events</summary>{note}{text}</details>"


def _config(record: RunRecord) -> str:
    if not record.config_text:
        return ""
    return (
        "<h2>Configuration</h2><details><summary>config.yaml, as resolved at the start</summary>"
        f"<pre>{escape(record.config_text)}</pre></details>"
    )
