"""Three arms at the same tokens: E experts throughout, grown from E to mE at step tau, mE throughout.

Every run is a whole run of Coppice on the same corpus, in the same order, with the same schedule. The grown arms of a seed
share their first stage: the run of E experts is saved at tau, and each of them resumes from there. Told per arm: the jump
of the validation loss at the switch, the steps until it is back where it was, the loss at the end, and the gap closure

    eta = (L_E - L_grown) / (L_E - L_mE)        (arXiv 2604.19835 v2, section 5)

which means something only where mE throughout is better than E throughout by more than the scatter over seeds.

    python benchmarks/study_small.py [--seeds 4] [--quick] [--folder runs/study-small] [--output FILE]

Two runs at a time, one process each. A rerun skips what is finished. Writes benchmarks/results/study_small.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_RESULT = Path(__file__).parent / "results" / "study_small.json"
_LANES = 2
_SEQUENCE = 128


@dataclass(frozen=True)
class Scale:
    """Sizes of a study.

    Attributes:
        experts: E of the small model.
        factor: m.
        steps: optimizer steps of every arm.
        switch: tau, the step after which the grown arms grow.
        batch: sequences a step.
        evaluations: global batches per validation loss.
    """

    # Of a few sizes tried with one other seed, the one at which the larger fixed arm was furthest ahead; that gap was of the
    # size of the scatter over seeds everywhere.
    experts: int = 8
    factor: int = 2
    steps: int = 1000
    # Half of the tokens after the switch: the paper's "100 %" continued pretraining.
    switch: int = 500
    batch: int = 16
    # 32,768 tokens; more would cost as much as the training.
    evaluations: int = 16


QUICK = Scale(steps=24, switch=12, batch=8, evaluations=1)


def overrides(scale: Scale) -> list[str]:
    """What all arms have in common."""
    return [
        "experiment=demo", "model=tiny", "tracking=none", "checkpoint=ends", "run.precision=fp32",
        f"run.steps={scale.steps}", f"data.corpus={ROOT / 'runs' / 'corpus' / 'stdlib'}",
        # Narrow, so that experts are most of what the model can learn with; short, so that two cores see many tokens.
        "model.hidden_size=64", "model.expert_ffn_hidden_size=64", "model.top_k=2", f"data.sequence_length={_SEQUENCE}",
        f"data.micro_batch_size={scale.batch}", f"data.global_batch_size={scale.batch}",
        # Tuned on one seed of the fixed arms, not on the grown ones.
        "schedule.learning_rate=5.0e-3", "schedule.min_learning_rate=2.0e-4",
        f"schedule.warmup_steps={max(1, scale.steps // 20)}", f"schedule.decay_steps={scale.steps // 10}",
        f"evaluation.batches={scale.evaluations}",
        f"evaluation.interval_steps={max(1, scale.steps // 40)}", "upcycle.guard.action=off",
        "run.log_interval_steps=100", "run.load_interval_steps=50",
    ]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One kind of run.

    Attributes:
        name: in tables.
        experts: at the first step.
        stage: keys of the stage that grows it; None for a fixed arm.
    """

    name: str
    experts: int
    stage: str | None = None


def arms(scale: Scale) -> list[Arm]:
    """All arms, the fixed ones first."""
    utility = "selection: greedy, utility: grad_norm"
    # Released well before the learning rate falls, so that the end is the plain model that is exported.
    release = f"mode: exact, release_steps: {max(1, scale.steps // 5)}"
    grown = {
        "plain uniform": "selection: uniform",
        "plain utility": utility,
        "exact uniform": f"selection: uniform, {release}",
        "exact utility": f"{utility}, {release}",
        "plain utility, reset": f"{utility}, optimizer_rule: reset",
        "plain utility, reset_momentum": f"{utility}, optimizer_rule: reset_momentum",
        "plain utility, scale": f"{utility}, optimizer_rule: scale",
    }
    more = scale.experts * scale.factor
    return [
        Arm(f"fixed {scale.experts}", scale.experts),
        Arm(f"fixed {more}", more),
        *(Arm(name, scale.experts, keys) for name, keys in grown.items()),
    ]


def arm_folder(arm: Arm, seed: int, folder: Path) -> Path:
    """Where a run lies."""
    return folder / f"seed-{seed}" / arm.name.replace(", ", "-").replace(" ", "-")


def run_arm(arm: Arm, seed: int, scale: Scale, folder: Path) -> None:
    """Train one arm of one seed, unless it is finished.

    Raises:
        SystemExit: if the run fails, or its folder holds a run of other settings.
    """
    run_dir = arm_folder(arm, seed, folder)
    status = run_dir / "status.json"
    words = [*overrides(scale), f"run.dir={run_dir}", f"run.seed={seed}", f"model.num_experts={arm.experts}"]
    if arm.stage is None:
        words += ["upcycle.stages=[]"]
        if arm.experts == scale.experts:
            words += [f"checkpoint.interval_steps={scale.switch}", "checkpoint.keep_last=9"]
    else:
        start = folder / f"seed-{seed}" / f"fixed-{scale.experts}" / "checkpoints" / f"step-{scale.switch:08d}"
        words += [
            f"run.resume={start}",
            f"upcycle.stages=[{{at_step: {scale.switch}, factor: {scale.factor}, {arm.stage}}}]",
        ]
    told = run_dir / "overrides.json"
    if told.exists() and json.loads(told.read_text()) != words:
        raise SystemExit(f"error: {run_dir} holds a run of other settings: move it away, or use another --folder")
    if status.exists() and json.loads(status.read_text())["state"] == "finished":
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(words))
    with open(run_dir / "log.txt", "w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "train", *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode or json.loads(status.read_text())["state"] != "finished":
        raise SystemExit(f"error: {run_dir}: the run failed, see {run_dir / 'log.txt'}")


def read_arm(arm: Arm, seed: int, scale: Scale, folder: Path) -> dict[str, Any]:
    """The figures of one run: `final`, and for a grown one `jump` and `recovery_steps` (None: not within the run)."""
    run_dir = arm_folder(arm, seed, folder)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    losses = [(e["step"], e["details"]["valid_loss"]) for e in events if e["event"] == "evaluation"]
    found: dict[str, Any] = {"final": losses[-1][1]}
    if arm.stage is not None:
        # The last: a run that was killed after its switch has made it again.
        switch = [e["details"] for e in events if e["event"] == "expansion"][-1]
        before = switch["valid_loss_before"]
        back = [step for step, loss in losses if step > scale.switch and loss <= before]
        found |= {
            "jump": switch["valid_loss_after"] - before,
            "recovery_steps": back[0] - scale.switch if back else None,
        }
    return found


# ---- statistics: pure, on {arm: {seed: figures}} ---------------------------------------------------------------------


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Closure:
    """Gap closure over seeds.

    Attributes:
        pooled: of the mean losses; None where it means nothing.
        by_seed: of each seed in which mE throughout was ahead.
        reason: why the pooled one means nothing.
    """

    pooled: float | None
    by_seed: tuple[float, ...] = ()
    reason: str = ""


# Student's t for 95 %, two-sided, by degrees of freedom; with few seeds it is far from 2.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def margin(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    t = _T95[min(len(values) - 1, len(_T95)) - 1]
    return t * spread(values) / len(values) ** 0.5


def gap_closure(small: Mapping[int, float], grown: Mapping[int, float], large: Mapping[int, float]) -> Closure:
    """How much of the gap between two fixed arms a grown one closes: 1 is all of it.

    Seeds share data, so gaps are taken within a seed.

    Args:
        small: final loss of E throughout, by seed.
        grown: of the grown arm.
        large: of mE throughout.
    """
    gaps = [small[seed] - large[seed] for seed in sorted(small)]
    ahead = [seed for seed in sorted(small) if small[seed] > large[seed]]
    by_seed = tuple((small[seed] - grown[seed]) / (small[seed] - large[seed]) for seed in ahead)
    error, mean = margin(gaps), statistics.fmean(gaps)
    if mean <= 0:
        return Closure(None, by_seed, f"undefined: the larger fixed arm is worse, by {-mean:.4f} on average")
    if error is None:
        return Closure(None, by_seed, f"undefined: one seed cannot tell a gap of {mean:.4f} from noise")
    if mean <= error:
        return Closure(None, by_seed, f"undefined: the gap, {mean:.4f} +- {error:.4f} (95 %), may be none")
    closed = statistics.fmean(small[seed] - grown[seed] for seed in sorted(small))
    return Closure(closed / mean, by_seed)


def differs(a: Mapping[int, float], b: Mapping[int, float]) -> str:
    """Whether one arm ends better than another, in words: mean and 95 % margin of the differences within seeds."""
    gaps = [a[seed] - b[seed] for seed in sorted(a)]
    mean, error = statistics.fmean(gaps), margin(gaps)
    if error is None:
        return f"{mean:+.4f} (one seed)"
    return f"{mean:+.4f} +- {error:.4f}" + (" within noise" if abs(mean) <= error else "")


def table(results: Mapping[str, Mapping[int, Mapping[str, Any]]], scale: Scale) -> list[str]:
    """The study as lines of text.

    Args:
        results: arm -> seed -> figures.
        scale: of the study.
    """
    small, large = f"fixed {scale.experts}", f"fixed {scale.experts * scale.factor}"
    final = {name: {seed: row["final"] for seed, row in rows.items()} for name, rows in results.items()}
    seeds = sorted(final[small])
    lines = [
        f"{scale.experts} -> {scale.experts * scale.factor} experts, switch after step {scale.switch} of {scale.steps}, "
        f"{scale.batch * _SEQUENCE} tokens a step, {len(seeds)} seeds",
        "",
        "| arm | loss at the end (+- over seeds) | against "
        + small
        + " | jump at the switch | steps to recover | gap closed (by seed) |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        values = list(final[name].values())
        cells = [name, f"{statistics.fmean(values):.4f} +- {spread(values):.4f}"]
        cells.append("-" if name == small else differs(final[name], final[small]))
        if name in (small, large):
            cells += ["-", "-", "-"]
        else:
            jumps = [row["jump"] for row in rows.values()]
            back = [row["recovery_steps"] for row in rows.values()]
            known = [steps for steps in back if steps is not None]
            cells.append(f"{statistics.fmean(jumps):+.4f} +- {spread(jumps):.4f}")
            tokens = max(known, default=0) * scale.batch * _SEQUENCE
            cells.append(
                f"{max(known)} ({tokens / 1e3:,.0f} k tokens) at most"
                if len(known) == len(back)
                else f"not within the run in {back.count(None)}"
            )
            closure = gap_closure(final[small], final[name], final[large])
            pooled = f"{closure.pooled:.0%}" if closure.pooled is not None else "undefined"
            cells.append(f"{pooled} ({', '.join(f'{x:.0%}' for x in closure.by_seed) or 'no seed'})")
        lines.append("| " + " | ".join(cells) + " |")
    fixed = gap_closure(final[small], final[small], final[large])
    lines += ["", fixed.reason or f"the gap between the fixed arms: {differs(final[small], final[large])}"]
    lines += ["", "Between grown arms (negative: the first is better), mean and 95 % margin within seeds:"]
    pairs = (("exact uniform", "plain uniform"), ("exact utility", "plain utility"), ("plain utility", "plain uniform"),
             ("plain utility, reset", "plain utility"), ("plain utility, reset_momentum", "plain utility"),
             ("plain utility, scale", "plain utility"))  # fmt: skip
    lines += [f"- {a} against {b}: {differs(final[a], final[b])}" for a, b in pairs if a in final and b in final]
    return lines


# ---- the command -----------------------------------------------------------------------------------------------------


def _train_all(scale: Scale, seeds: Sequence[int], folder: Path) -> None:
    """Fixed arms of a seed before the grown ones, which start from a checkpoint of the first."""
    jobs = [(arm, seed) for arm in arms(scale) for seed in seeds]
    done, spent, began = 0, 0.0, time.monotonic()
    # A grown arm costs about the share of its stage.
    cost = {arm: 1.0 if arm.stage is None else 1 - scale.switch / scale.steps for arm, _ in jobs}

    def train(job: tuple[Arm, int]) -> None:
        nonlocal done, spent
        run_arm(*job, scale, folder)
        done, spent = done + 1, spent + cost[job[0]]
        left = (time.monotonic() - began) / spent * (sum(cost[arm] for arm, _ in jobs) - spent)
        print(f"{done} of {len(jobs)} runs: {job[0].name}, seed {job[1]}; about {left / 60:.0f} min left", flush=True)

    for group in (jobs[: len(seeds)], jobs[len(seeds) :]):
        with ThreadPoolExecutor(_LANES) as pool:
            list(pool.map(train, group))


def _processor() -> str:
    """The processor's name, as the kernel tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run or finish the study, print its table, write its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4, help="seeds of every arm (default 4)")
    parser.add_argument("--quick", action="store_true", help="a minute of smoke: says nothing about models")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study-small", help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=_RESULT, help="where the figures go, as JSON (not for --quick)")
    options = parser.parse_args()
    if options.seeds < 1:
        raise SystemExit(f"error: --seeds={options.seeds} must be 1 or more")
    scale, seeds = QUICK if options.quick else Scale(), list(range(1, options.seeds + 1))
    folder, began = options.folder.resolve() / ("quick" if options.quick else ""), time.monotonic()
    _train_all(scale, seeds, folder)
    results = {arm.name: {seed: read_arm(arm, seed, scale, folder) for seed in seeds} for arm in arms(scale)}
    lines = table(results, scale)
    print("\n".join(["", *lines]))
    minutes = (time.monotonic() - began) / 60
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_minutes = (cpu.ru_utime + cpu.ru_stime) / 60
    print(f"\n{minutes:.1f} min on {os.cpu_count()} cores, {cpu_minutes:.1f} min of processor time")
    if options.quick and options.output == _RESULT:
        return
    options.output.write_text(json.dumps({
        "scale": asdict(scale), "seeds": seeds, "results": results, "table": lines, "minutes": minutes,
        "cpu_minutes": cpu_minutes, "versions": {name: version(name) for name in ("torch", "megatron-core", "coppice")},
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(), "command": "python " + " ".join(sys.argv),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
