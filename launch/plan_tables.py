"""The tables of `python -m launch plan`, from its document; plain text of at most 100 columns."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from train.data.blends import table_lines

_KINDS = ("weights", "gradients", "masters", "moments", "activations", "total")
_WIDTH = 100
# Rows of the table of experts before the middle is left out.
_ROWS = 8


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as runs and steps: 0-3, or 0, 8 .. 56 (by 8)."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    if len(words) <= 4:
        return ", ".join(words)
    apart = {b[0] - a[0] for a, b in pairwise(runs)}
    by = f" (by {apart.pop()})" if len(apart) == 1 else ""
    return f"{words[0]}, {words[1]} .. {words[-1]}{by}"


def size(count: float) -> str:
    """Bytes with a unit of their own size."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def amount(count: float) -> str:
    """A number with a metric unit."""
    for unit in ("", " K", " M", " B"):
        if count < 1000:
            return f"{count:,.0f}" if not unit else f"{count:,.2f}{unit}"
        count /= 1000
    return f"{count:,.2f} T"


def as_text(document: dict[str, Any]) -> Iterator[str]:
    """The whole plan, line by line."""
    words = document["vocabulary"]
    tokens = document["tokens_per_step"]
    yield f"processes {document['processes']}, vocabulary {words['size']} padded to {words['padded']} ({words['from']})"
    yield (
        f"{tokens:,} tokens per step x {document['steps']:,} steps = {amount(document['tokens'])} tokens, "
        f"{document['flops']:.3g} model FLOPs (6 N + attention)"
    )
    yield from table_lines(document["data"] or ())
    for index, stage in enumerate(document["stages"]):
        if index:
            yield from _switch(document["switches"][index - 1], document["links"])
        yield from _stage(stage)
        if document["gpu"]:
            before = document["stages"][index - 1]["choices"] if index else ()
            yield from _choices(document["gpu"], document["installed"], stage["choices"], before)
    yield from _judgement(document)
    yield ""
    for text in document["assumptions"]:
        yield from _wrapped("note: ", text)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def _table(rows: list[list[str]]) -> Iterator[str]:
    """Columns as wide as they must be; the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def _stage(stage: dict[str, Any]) -> Iterator[str]:
    layout = stage["layout"]
    sizes = ", ".join(f"{k} {v}" for k, v in layout.items() if k != "world" and v > 1) or "one rank"
    experts = f"{stage['experts']} experts, top {stage['top_k']}" if stage["experts"] else "dense"
    yield ""
    yield f"STAGE {stage['number']}  steps {stage['first_step']:,} to {stage['last_step']:,}: {experts}; {sizes}"
    active = f" ({stage['active_share']:.1%})"
    yield (
        f"  parameters {amount(stage['parameters_total'])}, active {amount(stage['parameters_active'])}{active}"
        + (f", experts active {stage['experts_active_share']:.2%}" if stage["experts"] else "")
    )
    yield (
        f"  {amount(stage['tokens'])} tokens ({stage['tokens_per_parameter']:.3g} per parameter), gradient accumulation "
        f"{stage['accumulation']}"
    )
    yield (
        f"  {amount(stage['flops_per_token'])} FLOPs per token, {stage['flops']:.3g} in this stage; checkpoint "
        f"{size(stage['checkpoint_bytes'])} per save"
    )
    memory = stage["memory"]
    rows = [["memory per rank", *_KINDS]]
    rows.append([f"most (rank {memory['largest_rank']})", *(size(memory["largest"][k]) for k in _KINDS)])
    rows.append([f"least (rank {memory['smallest_rank']})", *(size(memory["smallest"][k]) for k in _KINDS)])
    if layout["pipeline"] > 1:
        each = layout["world"] // layout["pipeline"]
        shown = list(enumerate(memory["by_pipeline_rank"]))
        for i, held in shown if len(shown) <= _ROWS else [*shown[:3], *shown[-2:]]:
            rows.append([f"pipeline {i} (rank {i * each})", *(size(held[k]) for k in _KINDS)])
    yield from _table(rows)
    held = stage["experts_by_rank"]
    if held:
        rows = [["expert rank", "experts", "ranks"]]
        for row in held if len(held) <= _ROWS else [*held[: _ROWS - 2], held[-1]]:
            if row is held[-1] and len(held) > _ROWS:
                rows.append(["...", "", ""])
            rows.append([str(row["expert_rank"]), spans(range(row["first"], row["last"] + 1)), row["ranks"]])
        yield from _table(rows)


def _choices(
    gpu: str, installed: Sequence[str], choices: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """What makes a step fast on a machine, and why; of a later stage what differs from the one before it."""
    head = f"  on {gpu} with {', '.join(installed) or 'nothing else'} installed"
    if before:
        choices = [c for c in choices if c not in before]
        head += " as before" + (", but" if choices else "")
    yield head + (":" if choices else "")
    if not choices:
        return
    key, value = (max(len(str(c[name])) for c in choices) for name in ("key", "value"))
    for c in choices:
        yield from _wrapped(f"    {c['key']:<{key}}  {str(c['value']).lower():<{value}}  ", c["why"])


def _switch(switch: dict[str, Any], links: dict[str, Any]) -> Iterator[str]:
    before, after = switch["experts"]
    what = f"{before} -> {after} experts" if before != after else "layout alone"
    yield ""
    yield f"SWITCH after step {switch['after_step']:,}: {what}, path {switch['path']}"
    if switch["warning"]:
        yield from _wrapped("  warning: ", switch["warning"])
    yield (
        f"  memory at its peak {size(switch['peak_bytes'])} (rank {switch['peak_rank']}); aim: at most "
        f"{size(switch['peak_bound_bytes'])}"
    )
    if switch["host_bytes"]:
        yield f"  host memory while the old stage is offloaded: at most {size(switch['host_bytes'])} per rank"
    saves = switch["saves"]
    yield f"  checkpoints written: {' and '.join(size(n) for n in saves) if saves else 'none'}"
    if switch["path"] != "live":
        yield "  the state goes through the disk; in memory it would be:"
    yield (
        f"  between ranks {size(switch['moved_bytes'])} over {switch['pairs']:,} pairs, between nodes "
        f"{size(switch['moved_between_nodes_bytes'])}; one rank sends at most"
    )
    yield (
        f"  {size(switch['largest_sent_bytes'])} and receives at most {size(switch['largest_received_bytes'])}; predicted "
        f"{switch['predicted_seconds']:.3f} s at {links['network']:g} GB/s"
    )
    yield f"  between nodes of {links['ranks_per_node']} ranks and {links['node']:g} GB/s inside (moving alone)"
    if switch["busiest"]:
        pairs = ", ".join(f"{p['from']} -> {p['to']} {size(p['bytes'])}" for p in switch["busiest"][:4])
        yield from _wrapped("  busiest: ", pairs)
    for note in switch["notes"]:
        yield from _wrapped("  note: ", note)


def _judgement(document: dict[str, Any]) -> Iterator[str]:
    yield ""
    needed, limit = document["needed_bytes"], document["gpu_memory_bytes"]
    if limit is None:
        yield f"the fullest rank needs {size(needed)}; --gpu-memory-gib says whether that fits"
        return
    if document["fits"]:
        yield f"FITS: the fullest rank needs {size(needed)} of {size(limit)} ({needed / limit:.0%})"
        return
    yield f"DOES NOT FIT: the fullest rank needs {size(needed)}, a GPU has {size(limit)}"
    rows = [["one change", "needs", ""]]
    for hint in sorted(document["hints"], key=lambda h: (not h["fits"], h["needed_bytes"])):
        rows.append([hint["change"], size(hint["needed_bytes"]), "fits" if hint["fits"] else "not enough"])
    yield from _table(rows)
