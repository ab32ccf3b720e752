"""Step time of Coppice's loop over a bare mcore loop with the same model, side by side in one run.

Both sides train the same network on the same batches with the same mcore parts (GPTModel, DDP, distributed optimizer,
forward-backward schedule, scheduler). The bare side is the shortest loop that trains; Coppice's side is `Run._one_step`
with everything a run does between steps: data, expert load, metrics, JSONL, progress, tracker queue. Steps are timed in
alternating blocks, so a slow moment of the machine meets both; the ratio is taken per pair of blocks and its median told.

    python benchmarks/step_overhead.py [--processes 2] [--model demo] [--pairs 9] [--block 4]

Writes benchmarks/results/step_overhead.json. The aim (issue 2) is a ratio of at most 1.02.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RESULT = Path(__file__).parent / "results" / "step_overhead.json"


def bare_steps(stage: Any, layout: Any, batches: list[list[dict[str, Any]]]) -> None:
    """The shortest mcore loop: zero, forward-backward, step, schedule, and the loss on the host."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model, optimizer = stage.wrapped[0], stage.optimizer

    def loss_of(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (output.float() * mask).sum() / mask.sum()
        return loss, {"loss": loss.detach().clone()}

    def forward(iterator: Any, model: Any) -> Any:
        batch = {key: value.to(layout.device, non_blocking=True) for key, value in next(iterator).items()}
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, lambda out: loss_of(batch["loss_mask"], out)

    for micro_batches in batches:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(micro_batches), model=model,
            num_microbatches=len(micro_batches), seq_length=micro_batches[0]["tokens"].shape[1],
            micro_batch_size=micro_batches[0]["tokens"].shape[0], forward_only=False,
        )  # fmt: skip
        optimizer.step()
        stage.scheduler.step(increment=1)
        torch.stack([r["loss"] for r in results]).mean().item()


def open_run(model: str) -> Any:
    """The demo's run without an expansion and without an end, open on the ranks of this job.

    Args:
        model: preset.
    """
    from parallel.compat import prepare_megatron

    prepare_megatron()
    from parallel.layout import Layout, join_job
    from train.data.stream import open_corpora
    from train.run import Run
    from train.settings import load_settings

    processes = int(os.environ["WORLD_SIZE"])
    settings = load_settings([
        "experiment=demo", f"model={model}", f"parallel.expert={processes}", "upcycle.stages=[]", "run.steps=100000",
        "schedule.decay_steps=1", f"run.dir={os.environ['COPPICE_BENCH_DIR']}", "evaluation.batches=1",
    ])  # fmt: skip
    join_job(600)
    return Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))


def paired_seconds(run: Any, pairs: int, block: int, settle: Callable[[], None]) -> list[dict[str, float]]:
    """Seconds of a step of both loops, "ours" and "bare", pair by pair; one more pair comes first and warms up.

    Args:
        run: open.
        pairs: how many.
        block: steps that are timed together.
        settle: waits until all that was begun is done.
    """
    batches = [run.data.peek(i * run.settings.data.global_batch_size) for i in range(block)]
    found = []
    for pair in range(pairs + 1):
        times = {}
        # The order alternates, so that neither side is always the first.
        for side in ("bare", "ours") if pair % 2 else ("ours", "bare"):
            settle()
            began = time.perf_counter()
            if side == "bare":
                # Counting expert load is part of our loop's cost.
                run.stage.load.remove()
                bare_steps(run.stage, run.layout, batches)
                run.stage.load.attach()
            else:
                for _ in range(block):
                    run._one_step()
            settle()
            times[side] = (time.perf_counter() - began) / block
        found.append(times)
    return found[1:]


def rank_main(model: str, pairs: int, block: int) -> None:
    """Time both loops on this rank; rank 0 prints one JSON line."""
    from parallel.compat import versions
    from parallel.layout import leave_job

    run = open_run(model)
    found = paired_seconds(run, pairs, block, run.layout.barrier)
    ratios = [times["ours"] / times["bare"] for times in found]
    bare_seconds, ours_seconds = ([times[side] for times in found] for side in ("bare", "ours"))
    if run.layout.rank == 0:
        print("RESULT " + json.dumps({
            "ratio": statistics.median(ratios), "ratios": ratios, "bare_seconds": statistics.median(bare_seconds),
            "ours_seconds": statistics.median(ours_seconds), "processes": run.layout.world_size, "model": model,
            "block": block, "versions": versions(),
        }), flush=True)  # fmt: skip
    run.close()
    leave_job(True)


def main() -> None:
    """Start the ranks and write the result with the machine named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--block", type=int, default=4)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(arguments.model, arguments.pairs, arguments.block)
        return
    result = launch(__file__, arguments.processes, _RESULT)
    print(f"ours {result['ours_seconds'] * 1e3:.1f} ms, bare {result['bare_seconds'] * 1e3:.1f} ms a step: ratio "
          f"{result['ratio']:.3f} (median of {arguments.pairs} pairs, {min(result['ratios']):.3f} to "
          f"{max(result['ratios']):.3f}); {result['machine']}")  # fmt: skip


def launch(script: str, processes: int, target: Path) -> dict[str, Any]:
    """Run a benchmark's ranks with this command line, and write what rank 0 found, with machine, date and command.

    Args:
        script: the benchmark; under torchrun it prints a line `RESULT JSON`.
        processes: how many.
        target: the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), script,
             *sys.argv[1:]],
            env={"OMP_NUM_THREADS": "1", **os.environ, "COPPICE_BENCH_DIR": f"{folder}/run"},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    result |= {"machine": machine(), "date": time.strftime("%Y-%m-%d"), "command": "python " + " ".join(sys.argv)}
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    return result


def machine() -> str:
    """The processor and its cores."""
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
