"""The words and numbers of a report: one format per kind of quantity, and the plain-text summary of a run."""

from typing import Any

from train.report.data import Expansion, RunRecord
from train.report.events import number

MISSING = "\N{EN DASH}"
ARROW = "->"
# Families named one by one before the rest is only counted.
MAX_FAMILIES = 12


def loss_text(value: float | None) -> str:
    """Nats per token, four decimals."""
    return MISSING if value is None else f"{value:.4f}"


def change_text(before: float | None, after: float | None) -> str:
    """Difference of two losses, always signed."""
    return MISSING if before is None or after is None else f"{after - before:+.4f}"


def whole_text(value: float | None) -> str:
    """A count in full, with thousands separators."""
    return MISSING if value is None else f"{value:,.0f}"


def large_text(value: float | None) -> str:
    """A count that may be huge: in full below ten million, then in M, B or T."""
    if value is None or abs(value) < 1e7:
        return whole_text(value)
    limit, unit = next((pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if abs(value) >= pair[0]), (1.0, ""))
    return f"{value / limit:.2f} {unit}"


def short_text(value: float | None, digits: int = 3) -> str:
    """A number with the digits that matter."""
    return MISSING if value is None else f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def flops_text(value: float | None) -> str:
    """A sum of floating-point operations, as people in the field write it: 3.1e21 FLOPs."""
    return MISSING if value is None else f"{value:.2e}".replace("e+", "e") + " FLOPs"


def percent_text(share: float | None) -> str:
    """A share in per cent."""
    return MISSING if share is None else f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def seconds_text(value: float | None) -> str:
    """Seconds with the digits that matter; milliseconds, minutes or hours where seconds say little."""
    if value is None:
        return MISSING
    if value < 0.1:
        return f"{1000 * value:.2g} ms" if value else "0 s"
    if value < 120:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.2f} h"


def bytes_text(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None:
        return MISSING
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def details_text(value: Any) -> str:
    """Nested details on one line: keys and values, numbers short."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {details_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(details_text(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return MISSING if value is None else f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)


def experts_text(record: RunRecord, arrow: str = ARROW) -> str:
    """4 -> 8 -> 16 experts; or dense."""
    counts = [stage.num_experts for stage in record.stages]
    if not any(counts):
        return "dense"
    return f" {arrow} ".join(f"{count}" for count in counts) + " experts"


def copies_histogram(expansion: Expansion) -> list[tuple[int, int]]:
    """How many experts, over all layers, have r_e copies: (r_e, experts), by rising r_e; empty without a plan."""
    counts: dict[int, int] = {}
    for _, copies, _ in _plan_layers(expansion):
        for size in copies:
            counts[size] = counts.get(size, 0) + 1
    return sorted(counts.items())


def largest_families(expansion: Expansion) -> tuple[list[tuple[int, int, float | None]], int]:
    """The families with most copies as (layer, parent, utility), highest utility first, and how many there are."""
    histogram = copies_histogram(expansion)
    if not histogram:
        return [], 0
    largest = histogram[-1][0]
    found = [
        (layer, expert, scores[expert] if scores else None)
        for layer, copies, scores in _plan_layers(expansion)
        for expert, size in enumerate(copies)
        if size == largest
    ]
    found.sort(key=lambda family: (-(family[2] or 0.0), family[0], family[1]))
    return found[:MAX_FAMILIES], len(found)


def _plan_layers(expansion: Expansion) -> list[tuple[int, list[int], list[float] | None]]:
    layers = expansion.plan.get("layers") if expansion.plan else None
    found = []
    for entry in layers if isinstance(layers, list) else []:
        copies, scores = entry.get("copies") or [], entry.get("scores")
        found.append((entry.get("layer", 0), copies, scores if scores and len(scores) == len(copies) else None))
    return found


def summary_lines(record: RunRecord) -> list[str]:
    """The results of a run on one screen of plain text, none wider than 120 columns unless a path is."""
    tokens = number(float(record.columns["tokens"][-1]))
    lines = [f"{record.name}: {record.status}, {whole_text(tokens)} tokens, {experts_text(record)}"]
    for expansion in record.expansions[:4]:
        lines.append(
            f"  switch            after step {expansion.step:,}: {expansion.from_experts} {ARROW} "
            f"{expansion.to_experts} experts ({expansion.selection})"
        )
        lines.append(
            f"  validation loss   before {loss_text(expansion.loss_before)} (step {expansion.step:,})   right after "
            f"{loss_text(expansion.loss_after)} ({change_text(expansion.loss_before, expansion.loss_after)})"
        )
        parts = ", ".join(f"{name} {seconds_text(value)}" for name, value in expansion.seconds.items())
        lines.append(f"  pause             {seconds_text(expansion.pause_seconds)}{f' ({parts})' if parts else ''}")
    if len(record.expansions) > 4:
        lines.append(f"  ... and {len(record.expansions) - 4} more expansions, see the report")
    value, step, kind = record.end_loss
    lines.append(f"  {kind + ' loss':<17} at the end {loss_text(value)} (step {step:,})")
    for stage in record.stages[:6]:
        model = f"{stage.num_experts} experts" if stage.num_experts else "dense"
        lines.append(
            f"  throughput        stage {stage.index} ({model}): {whole_text(stage.tokens_per_second)} tokens/s, median"
        )
    report = record.files.report
    lines.append(
        f"  report            {report if report.exists() else f'not written: python -m train.report {report.parent}'}"
    )
    lines.append(f"  checkpoints       {record.files.checkpoints} ({len(record.checkpoints)} written)")
    return lines
