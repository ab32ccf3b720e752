"""Expert load over time for a report: read thinned, and laid out so that a family keeps its place across a switch.

Legend of shape suffixes: R recorded steps kept, L layers, E experts of one stage, M experts of the next.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.run_files import RunFiles, parse_line, raw_lines

Floats = npt.NDArray[np.float64]

# A page has no pixels for more columns than this in one panel.
MAX_ROWS_PER_STAGE = 240
_STAGE_PATTERN = re.compile(rb'"stage": ?(\d+)')


@dataclass(frozen=True)
class LoadHistory:
    """Expert load of one stage: each expert's share of the choices made in its layer, 1/E when even."""

    stage: int
    num_experts: int
    layers: list[int]
    steps_R: Floats
    share_RLE: Floats
    # One recorded line in this many was kept.
    stride: int


class _Thinned:
    """Keeps evenly spaced lines of a stream whose length is unknown, in bounded memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.stride, self.seen = limit, 1, 0
        self.kept: list[tuple[int, bytes]] = []

    def add(self, number: int, line: bytes) -> None:
        """Keep every stride-th line; when there are too many, double the stride."""
        if self.seen % self.stride == 0:
            self.kept.append((number, line))
            if len(self.kept) > self.limit:
                self.kept = self.kept[::2]
                self.stride *= 2
        self.seen += 1


def load_histories(files: RunFiles) -> list[LoadHistory]:
    """The expert load of each stage; most lines of a long run, whose file may exceed memory, are never parsed.

    Raises:
        DataError: a line is no expert load record, or the tables of one stage differ in size.
    """
    thinned: dict[int, _Thinned] = {}
    for number, line in raw_lines(files.expert_load):
        match = _STAGE_PATTERN.search(line)
        thinned.setdefault(int(match.group(1)) if match else 0, _Thinned(MAX_ROWS_PER_STAGE)).add(number, line)
    return [_history(files, stage, thinned[stage]) for stage in sorted(thinned)]


def _history(files: RunFiles, stage: int, thinned: _Thinned) -> LoadHistory:
    shares: dict[float, Any] = {}
    layers: list[int] = []
    for number, line in thinned.kept:
        record = parse_line(line, files.expert_load, number)
        try:
            share_LE = np.array(record["share_LE"], dtype=np.float64)
            layers = [int(layer) for layer in record["layers"]]
            step = float(record["step"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{files.expert_load}:{number}: not an expert load record ({error!r}): remove this line"
            ) from error
        shapes = {share.shape for share in shares.values()} | {share_LE.shape}
        if len(shapes) > 1 or share_LE.ndim != 2 or len(layers) != len(share_LE):
            raise DataError(
                f"{files.expert_load}:{number}: share_LE of shape {share_LE.shape} does not fit {len(layers)} layers "
                f"or the lines before it in stage {stage}: remove this line"
            )
        shares[step] = share_LE
    steps = sorted(shares)
    share_RLE = np.stack([shares[step] for step in steps])
    return LoadHistory(stage, share_RLE.shape[2], layers, np.array(steps), share_RLE, thinned.stride)


@dataclass(frozen=True)
class Bands:
    """Where each expert of a layer lies on a 0..1 axis: `experts[i]` between `edges[i]` and `edges[i + 1]`."""

    edges: Floats
    experts: list[int]


def family_bands(counts: list[int], parents: list[list[int] | None]) -> list[Bands]:
    """Bands of one layer in each stage, such that replicas divide the band their parent had before the switch.

    Args:
        counts: experts of each stage.
        parents: for each stage but the first, the parent of each of its M experts; None where no plan is known: that
            stage then starts afresh with even bands.
    """
    bands = [_even(counts[0])]
    for count, parents_M in zip(counts[1:], parents, strict=True):
        before = bands[-1]
        if parents_M is None or len(parents_M) != count or set(parents_M) != set(before.experts):
            bands.append(_even(count))
            continue
        edges: list[float] = [0.0]
        experts: list[int] = []
        for i, parent in enumerate(before.experts):
            replicas = [child for child, source in enumerate(parents_M) if source == parent]
            edges += np.linspace(before.edges[i], before.edges[i + 1], len(replicas) + 1)[1:].tolist()
            experts += replicas
        bands.append(Bands(np.array(edges), experts))
    return bands


def _even(experts: int) -> Bands:
    return Bands(np.linspace(0.0, 1.0, experts + 1), list(range(experts)))


def plan_parents(plan: dict[str, Any] | None, layer: int) -> list[int] | None:
    """Parents of one layer in a plan, or None where there is no plan or it has no such layer."""
    layers = plan.get("layers") if plan else None
    for entry in layers if isinstance(layers, list) else []:
        if isinstance(entry, dict) and entry.get("layer") == layer and isinstance(entry.get("parents"), list):
            return [int(parent) for parent in entry["parents"]]
    return None
