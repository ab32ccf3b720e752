"""What would fit: single changes of a run's settings that bring its fullest rank under the memory of a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from launch.footprint import footprint, switch_memory
from launch.plan_inputs import check_without_corpus
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from train.config import RunSettings


def hints(
    settings: RunSettings, processes: int, vocab: int, flash: bool, limit_bytes: int, staging_bytes: int
) -> Iterator[dict[str, Any]]:
    """Single changes that bring the fullest rank under a limit, the smallest step of each; else how far each gets.

    Yields:
        The change, what the fullest rank would hold, and whether that fits.
    """
    for steps in _changes(settings):
        best: dict[str, Any] | None = None
        for text, changed in steps:
            try:
                check_without_corpus(changed, processes)
            except ConfigError:
                continue
            needed = needed_bytes(changed, processes, vocab, flash, staging_bytes)
            if best is None or needed < best["needed_bytes"]:
                best = {"change": text, "needed_bytes": needed, "fits": needed <= limit_bytes}
            if needed <= limit_bytes:
                break
        if best is not None:
            yield best


def needed_bytes(settings: RunSettings, processes: int, vocab: int, flash: bool, staging_bytes: int) -> int:
    """What the fullest rank holds in any stage or switch, looking at the first ranks of each pipeline rank.

    The traffic of a switch is not planned again; its staging memory is taken from the plan as it was asked for.
    """
    number = len(settings.upcycle.stages) + 1
    firsts = [first_of_pipeline(settings.parallel_of(i), processes) for i in range(number)]
    only = sorted({rank for ranks in firsts for rank in ranks})
    prints = [footprint(settings, i, processes, vocab, flash=flash, only=only) for i in range(number)]
    found = [p.ranks[p.largest].total for p in prints]
    path, offload = settings.upcycle.path, settings.upcycle.offload
    found += [switch_memory(a, b, path, staging_bytes, offload=offload).peak for a, b in pairwise(prints)]
    return max(found)


def _changes(settings: RunSettings) -> Iterator[Iterator[tuple[str, RunSettings]]]:
    """Kinds of change, each from its smallest step on."""
    if not settings.optimizer.distributed:
        yield iter(
            [("optimizer.distributed=true", replace(settings, optimizer=replace(settings.optimizer, distributed=True)))]
        )
    for name in ("expert", "tensor", "pipeline"):
        yield (_scaled(settings, name, factor) for factor in (2, 4, 8, 16))
    kinds = ("none", "selective", "full")
    later = kinds[kinds.index(settings.model.recompute) + 1 :]
    yield (
        (
            f"model.recompute={kind}",
            replace(settings, model=replace(settings.model, recompute=kind, recompute_modules=[])),
        )
        for kind in later
    )
    if settings.model.recompute_method == "block":
        every = replace(settings.model, recompute_method="uniform", recompute_layers=1)
        yield iter([("model.recompute_method=uniform model.recompute_layers=1", replace(settings, model=every))])
    if settings.performance.expert_parallel_overlap:
        apart = replace(settings.performance, expert_parallel_overlap=False)
        yield iter([("performance.expert_parallel_overlap=false", replace(settings, performance=apart))])
    size, smaller = settings.data.micro_batch_size, []
    while size > 1:
        size //= 2
        smaller.append(size)
    yield (
        (f"data.micro_batch_size={n}", replace(settings, data=replace(settings.data, micro_batch_size=n)))
        for n in smaller
    )


def _scaled(settings: RunSettings, name: str, factor: int) -> tuple[str, RunSettings]:
    """One parallel size times a factor, in every stage that sets it."""
    value = getattr(settings.parallel, name) * factor
    stages, own = [], False
    for stage in settings.upcycle.stages:
        size = getattr(stage.parallel, name)
        if size is not None:
            own = True
            stage = replace(stage, parallel=replace(stage.parallel, **{name: size * factor}))
        stages.append(stage)
    text = f"parallel.{name}={value}" + (f", and {factor} times that of the stages that set it" if own else "")
    changed = replace(
        settings,
        parallel=replace(settings.parallel, **{name: value}),
        upcycle=replace(settings.upcycle, stages=stages),
    )
    return text, changed


def first_of_pipeline(parallel: ParallelConfig, processes: int) -> range:
    """The first rank of every pipeline rank."""
    return range(0, processes, processes // parallel.pipeline)
