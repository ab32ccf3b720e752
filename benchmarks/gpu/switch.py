"""The live switch on this device against the checkpoint path."""

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, fitting, row, synchronize
from parallel.compat import prepare_megatron

prepare_megatron()

from model.fingerprint import take_fingerprints  # noqa: E402
from parallel.layout import Layout, join_job, leave_job  # noqa: E402
from train.data.stream import open_corpora  # noqa: E402
from train.evaluation import evaluate  # noqa: E402
from train.expansion import expand  # noqa: E402
from train.run import Run  # noqa: E402
from train.settings import load_settings  # noqa: E402

_STEP = 2
# 0.4 B to 0.7 B parameters: 16 GB of checkpoints, which a disk of 1 GB/s takes in a quarter of a minute.
BESIDE_DISK = ["model=paper_7b", "model.layers=2", "model.num_experts=16", "data.sequence_length=1024"]


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
        chosen = fitting(grown, flash=False)
        yield from largest(
            switched("live", sizes[grown.index(chosen)], prefix, folder / "largest", 1), "largest that fits"
        )
        yield from both_paths(tiny[0] if small else BESIDE_DISK, prefix, folder, 1)
    leave_job(joined)


def both_paths(
    overrides: list[str], prefix: Path, folder: Path, processes: int, first: int | None = None
) -> Iterator[dict]:
    """The live path and the checkpoint path from the same start.

    Args:
        overrides: of the network.
        prefix: of the corpus.
        folder: for the runs; on a file system that all processes see.
        processes: of the job, all of them expert-parallel after the switch.
        first: expert-parallel ranks before the switch; all by default.
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


def largest(live: dict[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """Rows of one live switch."""
    yield row(f"{what}: parameters", f"{live['before'] / 1e9:.3g} to {live['after'] / 1e9:.3g}", "B")
    yield row(f"{what}: pause of the live switch", live["pause"], "s")
    yield row(f"{what}: moved between GPUs", live["moved"] / 2**30, "GiB")
    if torch.cuda.is_available():
        ratio = live["switch_peak"] / live["steady_peak"]
        yield row(f"{what}: peak memory at the switch", live["switch_peak"] / 2**30, "GiB")
        yield row(f"{what}: over the steady state of the larger stage", ratio, goal="at most 1.10", met=ratio <= 1.10)


def _run_options(processes: int) -> list[str]:
    return [
        "data.micro_batch_size=1", f"data.global_batch_size={2 * processes}", "run.steps=6", "schedule.warmup_steps=1",
        "schedule.decay_steps=2", "tracking=none", "evaluation.batches=1", "evaluation.interval_steps=null",
        "checkpoint=ends", "checkpoint.save_final=false", "upcycle.save_before=false", "model.balancing=loss_free",
        "model.router_score=sigmoid",
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
    """Two steps, the switch, three steps; collective.

    Returns:
        Parameters `before` and `after` (all ranks together), `pause` in seconds, `moved` bytes, `fingerprints`, and on a
        GPU the peaks of this job's fullest rank, in bytes.
    """
    settings = load_settings([
        *overrides, f"data.corpus={prefix}", f"run.dir={run_dir}", *_run_options(processes),
        f"parallel.expert={first or processes}", *_growth(path, processes if first else None),
    ], processes)  # fmt: skip
    run = Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))
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
        found["switch_peak"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found["fingerprints"] = take_fingerprints(run.stage.chunks, run.stage.optimizer, run.layout)
    for _ in range(3):
        run._one_step()
    if cuda:
        found["steady_peak"] = torch.cuda.max_memory_allocated()
    if cuda:
        peaks = run.layout.gather_objects((found["switch_peak"], found["steady_peak"]))
        found["switch_peak"], found["steady_peak"] = max(peaks, key=lambda peak: peak[0] / peak[1])
    run.layout.barrier()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    grown = next(e["details"] for e in events if e["event"] == "expansion")
    acts = grown["seconds"]
    found |= {"before": events[0]["details"]["parameters_total"], "after": grown["parameters_total"],
              "moved": grown.get("moved_bytes", 0)}  # fmt: skip
    found["pause"] = saving + sum(v for k, v in acts.items() if k not in ("plan", "save", "score"))
    run.close()
    run.stage.release()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found
