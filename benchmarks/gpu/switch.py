"""The live switch on this device against the checkpoint path."""

import contextlib
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.rows import corpus, device, fitting, no_time_for, opened, row, seconds_left, synchronize
from parallel.compat import prepare_megatron

prepare_megatron()

from model.fingerprint import take_fingerprints  # noqa: E402
from parallel.devices import empty_cache  # noqa: E402
from parallel.errors import CoppiceError  # noqa: E402
from parallel.layout import join_job, leave_job  # noqa: E402
from parallel.optimizer_state import get_step  # noqa: E402
from train.evaluation import evaluate  # noqa: E402
from train.expansion import expand  # noqa: E402
from train.settings import load_settings  # noqa: E402

if TYPE_CHECKING:
    from train.run import Run

_STEP = 2
# 0.23 B to 0.38 B parameters: 8.5 GB of checkpoints, which a disk of 1 GB/s takes in nine seconds.
BESIDE_DISK = ["model=paper_7b", "model.layers=2", "model.num_experts=8", "data.sequence_length=1024"]
# Seconds of the section that are left to what comes after a save and a load of the largest size, and what the switch by way
# of host memory takes of it.
_AFTER_DISK, _AWAY = 40.0, 8.0


def _candidates(layers: tuple[int, ...]) -> list[list[str]]:
    """The 7B network that grows to 13B, with as many of its 20 layers as are asked for, the most first."""
    return [["model=paper_7b", f"model.layers={n}", "data.sequence_length=1024"] for n in layers]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Pause, bytes, peak memory; the state after it, bit for bit, on both paths; and the largest that fits, live alone."""
    joined = join_job(600)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = corpus(folder)
        tiny = [["model=tiny", "data.sequence_length=32"]]
        sizes = tiny if small else _candidates((20, 16, 14, 12, 10, 8, 6, 4, 2))
        grown = [[*x, *_run_options(1), *_growth("live", None)] for x in sizes]
        yield from _largest_that_fits(sizes[grown.index(fitting(grown, flash=False)) :], prefix, folder)
        few = tiny[0] if small else BESIDE_DISK
        disk: dict[str, Any] = {}
        yield from both_paths(few, prefix, folder, 1, found=disk)
        if seconds_left() < _AWAY:
            yield no_time_for("the live switch by way of host memory")
        else:
            yield from _by_way_of_the_host(few, prefix, folder, disk)
    leave_job(joined)


def _largest_that_fits(sizes: list[list[str]], prefix: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """The first of several sizes that grows on this device, or the next but one; one that does not ends nothing else.

    Args:
        sizes: overrides of each, the one that fits by arithmetic first.
        prefix: of the corpus.
        folder: for the runs.
    """
    what, grown = "largest that fits", False
    for number, size in enumerate(sizes[:3]):
        try:
            with after_switch("live", size, prefix, folder / f"largest-{number}", 1) as (run, found):
                yield from largest(found, what)
                grown = True
                yield from _beside_a_save(run, found["pause"], what, folder)
            return
        except (torch.OutOfMemoryError, CoppiceError) as e:
            # Too large though it should fit, or a defect, which the row tells.
            why = f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"
        gc.collect()
        empty_cache(device())
        yield row(f"{what}: {size[1]}", f"failed: {why}", goal="none fails", met=False)
        if grown:
            # The switch has its figures, and what failed is the save beside it.
            return


def _by_way_of_the_host(few: list[str], prefix: Path, folder: Path, disk: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The live switch with the old stage in host memory, held against the checkpoint path's result."""
    name = "state after the live switch by way of host memory"
    try:
        away = switched("live", [*few, "upcycle.offload=true"], prefix, folder / "away", 1)
    except (RuntimeError, CoppiceError) as e:
        # Not every machine lets a process pin its memory.
        yield row(name, f"failed: {type(e).__name__}: {str(e).splitlines()[0][:300]}", goal="equal bit for bit", met=False,
                  check=True)  # fmt: skip
        return
    same = away["fingerprints"] == disk["fingerprints"]
    yield row(name, "equal" if same else "DIFFERS", goal="equal bit for bit", met=same, check=True)
    yield row("pause by way of host memory over the live switch's", away["pause"] / disk["live_pause"])
    if torch.cuda.is_available():
        yield row("peak memory by way of host memory", away["switch_peak"] / 2**30, "GiB")


def _beside_a_save(run: "Run", pause: float, what: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A save and a load of the larger stage, the least that a relaunch takes; from the disk's rates where time is short."""
    wanted = run.persistence.needed_bytes()
    rates = _disk_rates(folder, 64 << 20 if wanted < 4 << 30 else 512 << 20)
    room = seconds_left() - _AFTER_DISK
    estimate = sum(wanted / rate for rate in rates)
    yield row(f"{what}: the disk writes", rates[0] / 1e9, "GB/s")
    yield row(f"{what}: the disk reads", rates[1] / 1e9, "GB/s")
    free = shutil.disk_usage(folder).free
    if wanted > 0.95 * free or estimate > room:
        why = f"{wanted / 2**30:.0f} GiB ({free / 2**30:.0f} free), {estimate:.0f} s by the disk's rates ({room:.0f} left)"
        yield row(f"{what}: save and load", f"not measured: {why}")
        seconds, how = estimate, " by the disk's rates"
    else:
        before = take_fingerprints(run.stage.chunks, run.stage.optimizer, run.layout)
        synchronize()
        began = time.perf_counter()
        saved = run.persistence.save_unless_saved()
        run.persistence.load_stage(saved / "tensors", get_step(run.stage.optimizer))
        synchronize()
        seconds, how = time.perf_counter() - began, ""
        same = take_fingerprints(run.stage.chunks, run.stage.optimizer, run.layout) == before
        yield row(f"{what}: state after a save and a load", "equal" if same else "DIFFERS", goal="equal bit for bit",
                  met=same, check=True)  # fmt: skip
        yield row(f"{what}: save and load", seconds, "s")
        shutil.rmtree(saved)
    ratio = pause / seconds
    yield row(f"{what}: pause over save and load{how}", ratio, goal="at most 0.05", met=ratio <= 0.05)


def _disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes per second that one process writes, to the disk itself, and reads; what it reads may come from memory."""
    path, data = folder / "probe", torch.randint(256, (size,), dtype=torch.uint8)
    began = time.perf_counter()
    with open(path, "wb") as file:
        torch.save(data, file)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    torch.load(path, weights_only=True)
    read = time.perf_counter()
    path.unlink()
    return size / (written - began), size / (read - written)


def both_paths(
    overrides: list[str],
    prefix: Path,
    folder: Path,
    processes: int,
    first: int | None = None,
    found: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """The live path and the checkpoint path from the same start.

    Args:
        overrides: of the network.
        prefix: of the corpus.
        folder: for the runs; on a file system that all processes see.
        processes: of the job, all of them expert-parallel after the switch.
        first: expert-parallel ranks before the switch; all by default.
        found: gets the `fingerprints` of the checkpoint path and the `live_pause`.
    """
    what = "" if processes == 1 else f", EP {first or processes} to {processes}"
    live, disk = (switched(path, overrides, prefix, folder / f"{path}{first}", processes, first)
                  for path in ("live", "checkpoint"))  # fmt: skip
    same = live["fingerprints"] == disk["fingerprints"]
    yield from largest(live, f"beside the checkpoint path{what}")
    yield row(f"state after the live switch and after the checkpoint path{what}", "equal" if same else "DIFFERS",
              goal="equal bit for bit", met=same, check=True)  # fmt: skip
    yield row(f"save, transform, rebuild and load{what}", disk["pause"], "s")
    yield row(f"live over checkpoint{what}", live["pause"] / disk["pause"])
    if found is not None:
        found |= {"fingerprints": disk["fingerprints"], "live_pause": live["pause"]}


def largest(live: dict[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """Rows of one live switch."""
    yield row(f"{what}: parameters", f"{live['before'] / 1e9:.3g} to {live['after'] / 1e9:.3g}", "B")
    yield row(f"{what}: pause of the live switch", live["pause"], "s")
    yield row(f"{what}: moved between GPUs", live["moved"] / 2**30, "GiB")
    if torch.cuda.is_available():
        ratio = live["switch_peak"] / live["steady_peak"]
        yield row(f"{what}: peak memory at the switch", live["switch_peak"] / 2**30, "GiB")
        yield row(f"{what}: over the steady state of the larger stage", ratio, goal="at most 1.10", met=ratio <= 1.10)
        yield row(f"{what}: most that torch held at the switch, cached blocks too", live["switch_held"] / 2**30, "GiB")
        yield row(f"{what}: most that torch held in a step after it", live["steady_held"] / 2**30, "GiB")


def _run_options(processes: int) -> list[str]:
    return [
        "data.micro_batch_size=1", f"data.global_batch_size={2 * processes}", "run.steps=6", "schedule.warmup_steps=1",
        "schedule.decay_steps=2", "tracking=none", "evaluation.batches=1", "evaluation.interval_steps=null",
        "checkpoint=ends", "checkpoint.save_final=false", "upcycle.save_before=false", "model.balancing=loss_free",
        "model.router_score=sigmoid", "run.log_interval_steps=100",
    ]  # fmt: skip


def _growth(path: str, expert: int | None) -> list[str]:
    layout = f", parallel: {{expert: {expert}}}" if expert else ""
    return [
        f"upcycle.path={path}",
        f"upcycle.stages=[{{at_step: {_STEP}, factor: 2, selection: greedy, scoring_batches: 1{layout}}}]",
    ]


def switched(
    path: str, overrides: list[str], prefix: Path, run_dir: Path, processes: int, first: int | None = None
) -> dict[str, Any]:
    """What `after_switch` finds."""
    with after_switch(path, overrides, prefix, run_dir, processes, first) as (_, found):
        return found


@contextlib.contextmanager
def after_switch(
    path: str, overrides: list[str], prefix: Path, run_dir: Path, processes: int, first: int | None = None
) -> Iterator[tuple["Run", dict[str, Any]]]:
    """Two steps, the switch, three steps; collective. The run is open inside, and gone afterwards.

    Yields:
        The run; and parameters `before` and `after` (all ranks together), `pause` in seconds, `moved` bytes,
        `fingerprints`, and on a GPU the peaks of this job's fullest rank, in bytes.
    """
    settings = load_settings([
        *overrides, f"data.corpus={prefix}", f"run.dir={run_dir}", *_run_options(processes),
        f"parallel.expert={first or processes}", *_growth(path, processes if first else None),
    ], processes)  # fmt: skip
    with opened(settings) as run:
        yield run, _grown(run, path)


def _grown(run: "Run", path: str) -> dict[str, Any]:
    """Two steps, the switch, three steps, and what was found (`after_switch`)."""
    cuda, found = torch.cuda.is_available(), {}
    while run.step < _STEP:
        run._one_step()
    saving = 0.0
    if path == "checkpoint":
        synchronize()
        began = time.perf_counter()
        run.persistence.save_unless_saved()
        saving = time.perf_counter() - began
    evaluate(run)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    expand(run)
    synchronize()
    if cuda:
        found |= {"switch_peak": torch.cuda.max_memory_allocated(), "switch_held": torch.cuda.max_memory_reserved()}
        torch.cuda.reset_peak_memory_stats()
    found["fingerprints"] = take_fingerprints(run.stage.chunks, run.stage.optimizer, run.layout)
    for _ in range(3):
        run._one_step()
    if cuda:
        found |= {"steady_peak": torch.cuda.max_memory_allocated(), "steady_held": torch.cuda.max_memory_reserved()}
        names = ("switch_peak", "steady_peak", "switch_held", "steady_held")
        peaks = run.layout.gather_objects([found[name] for name in names])
        found |= zip(names, max(peaks, key=lambda peak: peak[0] / peak[1]), strict=True)
    run.layout.barrier()
    events = [json.loads(line) for line in (run.files.run_dir / "events.jsonl").read_text().splitlines()]
    grown = next(e["details"] for e in events if e["event"] == "expansion")
    acts = grown["seconds"]
    found |= {"before": events[0]["details"]["parameters_total"], "after": grown["parameters_total"],
              "moved": grown.get("moved_bytes", 0)}  # fmt: skip
    found["pause"] = saving + sum(v for k, v in acts.items() if k not in ("plan", "save", "score"))
    return found
