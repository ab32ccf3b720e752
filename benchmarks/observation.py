"""What watching a run costs: a step with all default observation against one with none, side by side in one run.

Both sides are `Run._one_step` on the demo model. One measures and records as every run does by default: expert load, times
of the parts, FLOPs, norms, memory, router entropy, metrics.jsonl, expert_load.jsonl, the console's lines, the queue to
W&B (offline). The other trains the same step with none of it. Blocks alternate, each as long as `run.log_interval_steps`,
so that every block holds one step at which everything is measured. Besides the ratio of the blocks, which scatters with
the machine, the seconds that the training thread spends inside the functions of observation are added up.

    python benchmarks/observation.py [--processes 2] [--model demo] [--pairs 15]

Writes benchmarks/results/observation.json. The aim (issue 6) is at most 1 % of a step.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RESULT = Path(__file__).parent / "results" / "observation.json"


class Blind:
    """Stands where the observer stands, and sees nothing."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def begin(self, step: int) -> None:
        self.clock.take()

    def figures(self, step: int, seconds: float, grad_norm: float) -> dict[str, float]:
        return {}


class Account:
    """Seconds spent inside some functions: by the wall, waiting for other ranks included, and of this thread's CPU."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.cpu_seconds += time.thread_time() - cpu_began

        return call


def rank_main(model: str, pairs: int) -> None:
    """Time both sides on this rank; rank 0 prints one JSON line."""
    from step_overhead import open_run

    run = open_run(model)
    from parallel.compat import versions
    from parallel.layout import leave_job
    from train import run as run_module
    from train.step_clock import StepClock

    block, account = run.settings.run.log_interval_steps, Account()
    observer = run._observe()
    layers = [part.layer for part in run.stage.moe_parts()]
    record: Any = account.timed(run_module.record_step)
    observer.figures, observer.begin = account.timed(observer.figures), account.timed(observer.begin)  # type: ignore[method-assign]
    load = run.stage.load
    load.take, load._add_entropy = account.timed(load.take), account.timed(load._add_entropy)  # type: ignore[method-assign]
    even = load.take(run.layout)

    def watch(on: bool) -> None:
        run_module.record_step = record if on else lambda *arguments: None
        run._observer = (run.stage, observer if on else Blind(StepClock(run.layout.device)))  # type: ignore[assignment]
        load.remove()
        if on:
            load.attach()
            vars(load).pop("take", None)
            load.take = account.timed(load.take)  # type: ignore[method-assign]
        else:
            load.take = lambda layout: even  # type: ignore[method-assign]
        for layer in layers:
            for name in ("token_dispatch", "token_combine"):
                vars(layer.token_dispatcher).pop(name, None)
            if on:
                observer.clock.watch_exchanges(layer)

    ratios, times_of, shares, cpu_shares = [], {"observed": [], "blind": []}, [], []  # type: ignore[var-annotated]
    for pair in range(pairs + 1):
        times = {}
        for side in ("blind", "observed") if pair % 2 else ("observed", "blind"):
            watch(side == "observed")
            run.layout.barrier()
            account.seconds = account.cpu_seconds = 0.0
            began = time.perf_counter()
            for _ in range(block):
                run._one_step()
            run.layout.barrier()
            times[side] = time.perf_counter() - began
            if side == "observed" and pair:
                shares.append(account.seconds / times[side])
                cpu_shares.append(account.cpu_seconds / times[side])
        # The first pair warms up.
        if pair:
            ratios.append(times["observed"] / times["blind"])
            for side, seconds in times.items():
                times_of[side].append(seconds / block)
    if run.layout.rank == 0:
        print("RESULT " + json.dumps({
            "share_inside": statistics.median(shares), "shares_inside": shares,
            "cpu_share_inside": statistics.median(cpu_shares),
            "ratio": statistics.median(ratios), "ratios": ratios,
            "seconds": {side: statistics.median(times) for side, times in times_of.items()},
            "processes": run.layout.world_size, "model": model, "block": block, "versions": versions(),
        }), flush=True)  # fmt: skip
    run.close()
    leave_job(True)


def main() -> None:
    """Start the ranks and write the result with the machine named."""
    from step_overhead import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(arguments.model, arguments.pairs)
        return
    result = launch(__file__, arguments.processes, _RESULT)
    quartiles = statistics.quantiles(result["ratios"], n=4)
    ratio = f"{result['ratio']:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {arguments.pairs} pairs)"
    print(
        f"observation takes {result['share_inside']:.2%} of a step of {result['seconds']['observed'] * 1e3:.0f} ms inside "
        f"its functions ({result['cpu_share_inside']:.2%} without waiting); blocks with it over blocks without {ratio}; "
        f"{result['machine']}"
    )


if __name__ == "__main__":
    main()
