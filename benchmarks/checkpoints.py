"""What a checkpoint costs: stop and drag of a save in the background, rates of saving and loading over the disk's.

Runs of the demo's kind of network in a few sizes on two processes, on one disk, in turn: steps without a save; a save in
the background with the steps beside it; a save that is waited for; a load with all its checks; and, beside them, the same
bytes written (with fsync) and read as plain files, and digested.

    python benchmarks/checkpoints.py [--processes 2] [--rounds 3] [--hidden 256 384] [--interval 50] [--folder DIR]

Writes benchmarks/results/checkpoints.json. The aim (issue 5): a save in the background stops the run for at most 2 % of
the time between two saves; told here for one interval, and as the shortest interval that meets it.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_RESULT = Path(__file__).parent / "results" / "checkpoints.json"
_BLOCK = 1 << 24


def _disk(folder: Path, size: int) -> dict[str, float]:
    """Seconds to write, read back and digest `size` bytes in plain files."""
    from train.checkpoint.files import digest

    path, block = folder / "plain", os.urandom(_BLOCK)
    began = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(max(1, size // _BLOCK)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    wrote = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(_BLOCK):
            pass
    read = time.perf_counter()
    digest(path)
    done = time.perf_counter()
    path.unlink()
    return {"write": wrote - began, "read": read - wrote, "digest": done - read}


def rank_main(rounds: int, hidden: int) -> None:
    """Measure on this rank; rank 0 prints one JSON line."""
    from parallel.compat import prepare_megatron, versions

    prepare_megatron()
    from parallel.layout import Layout, join_job, leave_job
    from train.checkpoint.folder import folder_bytes, read_manifest
    from train.data.stream import open_corpora
    from train.run import Run
    from train.settings import load_settings
    from train.start import examine

    processes, folder = int(os.environ["WORLD_SIZE"]), Path(os.environ["COPPICE_BENCH_DIR"])
    settings = load_settings([
        "experiment=demo", f"parallel.expert={processes}", "upcycle.stages=[]", "run.steps=100000", "tracking=none",
        f"model.hidden_size={hidden}", f"model.expert_ffn_hidden_size={hidden}", "schedule.decay_steps=1",
        f"run.dir={folder / 'run'}", "evaluation.batches=1", "checkpoint.keep_last=1",
    ])  # fmt: skip
    joined = join_job(600)
    run = Run.open(settings, Layout.create(settings.parallel, 1), open_corpora(settings.data))
    saver = run.persistence
    for _ in range(3):
        run._one_step()
    figures: list[dict[str, Any]] = []
    for _ in range(rounds):
        steps = []
        for _ in range(6):
            began = time.perf_counter()
            run._one_step()
            steps.append(time.perf_counter() - began)
        plain = statistics.median(steps)
        began, worked = time.perf_counter(), time.thread_time()
        saver._task = saver._begin(copy=True)
        saver._task.start()
        stop, worked, beside = time.perf_counter() - began, time.thread_time() - worked, []
        while not beside or not run._all_written:
            began = time.perf_counter()
            run._one_step()
            beside.append(time.perf_counter() - began)
        began = time.perf_counter()
        saver.settle()
        settle = time.perf_counter() - began
        run._one_step()
        began = time.perf_counter()
        path = saver.save_unless_saved()
        waited = time.perf_counter() - began
        run.layout.barrier()
        began = time.perf_counter()
        examine(run, path)
        checked = time.perf_counter() - began
        saver.load(path, read_manifest(path), full=True)
        loaded = time.perf_counter() - began
        size = folder_bytes(path)
        # Each rank its share, at the same time, as a save does.
        shared = folder / f"plain-{run.layout.rank}"
        shared.mkdir(exist_ok=True)
        run.layout.barrier()
        disk = _disk(shared, size // processes)
        figures.append({
            "step": plain, "stop": stop, "stop_processor": worked, "settle": settle,
            "drag": sum(beside) - plain * len(beside), "steps_beside": len(beside),
            "save": waited, "check": checked, "load": loaded, "bytes": size, "disk": disk,
        })  # fmt: skip
    if run.layout.rank == 0:
        print("RESULT " + json.dumps({"rounds": figures, "versions": versions()}), flush=True)
    run.close()
    leave_job(joined)


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _measured(processes: int, rounds: int, hidden: int, parent: Path | None) -> dict[str, Any]:
    """Rounds and versions of one size, in processes of their own."""
    folder = Path(tempfile.mkdtemp(prefix="coppice-bench-", dir=parent))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
             __file__, "--rounds", str(rounds), "--hidden", str(hidden)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "COPPICE_BENCH_DIR": str(folder)},
            cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return dict(json.loads(told[len("RESULT ") :]))


def _summary(rows: list[dict[str, Any]], interval: int) -> dict[str, Any]:
    """Medians in seconds, and the ratios of each round's own figures."""
    fields = ("bytes", "step", "stop", "stop_processor", "drag", "steps_beside", "settle", "save", "check", "load")
    found: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in fields}
    found |= {f"plain {name}": statistics.median(row["disk"][name] for row in rows) for name in rows[0]["disk"]}
    between = [interval * row["step"] for row in rows]
    costs = {
        "stop over steps between saves": [row["stop"] / time for row, time in zip(rows, between, strict=True)],
        "stop, drag and publishing over them": [
            (row["stop"] + row["drag"] + row["settle"]) / time for row, time in zip(rows, between, strict=True)
        ],
        "rate of saving over plain write": [row["disk"]["write"] / row["save"] for row in rows],
        "rate of loading over plain read": [row["disk"]["read"] / row["load"] for row in rows],
        "digest over save": [row["disk"]["digest"] / row["save"] for row in rows],
    }
    found["ratios"] = {name: [min(v), statistics.median(v), max(v)] for name, v in costs.items()}
    return found


def main() -> None:
    """Start the ranks, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 384], help="widths of network and experts")
    parser.add_argument("--interval", type=int, default=50, help="steps between two saves, as the demo has it")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(options.rounds, options.hidden[0])
        return
    sizes, versions = {}, {}
    print(_machine())
    for hidden in options.hidden:
        found = _measured(options.processes, options.rounds, hidden, options.folder)
        told, versions = _summary(found["rounds"], options.interval), found["versions"]
        sizes[str(hidden)] = {"rounds": found["rounds"], **told}
        print(f"checkpoint of {told['bytes'] / 2**20:,.0f} MiB, {options.rounds} rounds; medians in seconds")
        for name, text in {
            "a step": f"{told['step']:.3f}",
            "background": f"stop {told['stop']:.3f} ({told['stop_processor']:.3f} of processor time), "
            f"drag {told['drag']:.3f} over {told['steps_beside']:.0f} steps, "
            f"publishing {told['settle']:.3f}",
            "2 % is": f"the stop at an interval of {told['stop'] / 0.02 / told['step']:.0f} steps",
            "waited for": f"{told['save']:.3f}",
            "a load": f"{told['load']:.3f}, of which checking the files {told['check']:.3f}",
            "plain files": f"write {told['plain write']:.3f}, read {told['plain read']:.3f}, digest "
            f"{told['plain digest']:.3f}",
        }.items():
            print(f"  {name:20} {text}")
        for name, (low, middle, high) in told["ratios"].items():
            print(f"  {name:36} {middle:.3f} ({low:.3f} to {high:.3f})")
    _RESULT.write_text(
        json.dumps(
            {"machine": _machine(), "date": datetime.now(UTC).date().isoformat(), "command": "python " + " ".join(sys.argv),
             "processes": options.processes, "interval": options.interval, "versions": versions, "sizes": sizes},
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
