"""The live switch on this device against the checkpoint path."""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, row, synchronize
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


def _overrides(small: bool) -> list[str]:
    if small:
        return ["model=tiny", "data.sequence_length=32"]
    # About 1.5 B parameters that become 2.6 B: 18 bytes each at the larger stage, and room for both paths.
    return ["model=paper_7b", "model.layers=4", "model.num_experts=32", "data.sequence_length=1024"]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Pause, bytes, peak memory; the state after it, bit for bit, on both paths."""
    joined, found = join_job(600), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = corpus(folder)
        for path in ("live", "checkpoint"):
            found[path] = _switched(path, small, prefix, folder / path)
    leave_job(joined)
    live, disk = found["live"], found["checkpoint"]
    yield row("parameters before", live["before"] / 1e9, "B")
    yield row("parameters after", live["after"] / 1e9, "B")
    same = live["fingerprints"] == disk["fingerprints"]
    yield row("state after the live switch and after the checkpoint path", "equal" if same else "DIFFERS",
              goal="equal bit for bit", met=same, check=True)  # fmt: skip
    yield row("pause of the live switch", live["pause"], "s")
    yield row("save, transform, rebuild and load", disk["pause"], "s")
    yield row("live over checkpoint", live["pause"] / disk["pause"])
    if torch.cuda.is_available():
        ratio = live["switch_peak"] / live["steady_peak"]
        yield row("peak memory at the switch", live["switch_peak"] / 2**30, "GiB")
        yield row("over the steady state of the larger stage", ratio, goal="at most 1.10", met=ratio <= 1.10)


def _switched(path: str, small: bool, prefix: Path, run_dir: Path) -> dict[str, Any]:
    """Two steps, the switch, three steps."""
    settings = load_settings([
        *_overrides(small), f"data.corpus={prefix}", f"run.dir={run_dir}", "data.micro_batch_size=1",
        "data.global_batch_size=2", "run.steps=6", "schedule.warmup_steps=1", "schedule.decay_steps=2", "tracking=none",
        "evaluation.batches=1", "evaluation.interval_steps=null", "checkpoint=ends", "checkpoint.save_final=false",
        f"upcycle.path={path}", "upcycle.save_before=false", "model.balancing=loss_free", "model.router_score=sigmoid",
        f"upcycle.stages=[{{at_step: {_STEP}, factor: 2, selection: greedy, scoring_batches: 1}}]",
    ])  # fmt: skip
    run = Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))
    cuda, found = torch.cuda.is_available(), {}
    while run.step < _STEP:
        run._one_step()
    found["before"] = sum(p.numel() for chunk in run.stage.chunks for p in chunk.parameters())
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
    found["after"] = sum(p.numel() for chunk in run.stage.chunks for p in chunk.parameters())
    for _ in range(3):
        run._one_step()
    if cuda:
        found["steady_peak"] = torch.cuda.max_memory_allocated()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    acts = next(e["details"]["seconds"] for e in events if e["event"] == "expansion")
    found["pause"] = saving + sum(v for k, v in acts.items() if k not in ("plan", "save", "score"))
    run.close()
    run.stage.release()
    return found
