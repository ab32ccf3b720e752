"""What a checkpoint costs: stop and drag of a save in the background, rates of saving and loading over the disk's.

One run of the demo's kind of network on two processes, on one disk, in turn: steps without a save; a save in the background
with the steps beside it; a save that is waited for; a load with all its checks; and, beside them, the same bytes written
and read as plain files, and digested.

    python benchmarks/checkpoints.py [--processes 2] [--rounds 5] [--hidden 512] [--folder DIR]

Writes benchmarks/results/checkpoints.json. The aim (issue 5): a save in the background costs at most 2 % of the time
between two saves; told here as the seconds it adds, which any interval can be held against.
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
    from train.checkpoint_files import digest

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
    from train.checkpoint import folder_bytes, read_manifest
    from train.data import open_corpora
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
        began = time.perf_counter()
        saver._task = saver._begin(copy=True)
        saver._task.start()
        stop, beside = time.perf_counter() - began, []
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
        saver.load(path, read_manifest(path))
        loaded = time.perf_counter() - began
        size = folder_bytes(path)
        # Each rank its share, at the same time, as a save does.
        shared = folder / f"plain-{run.layout.rank}"
        shared.mkdir(exist_ok=True)
        run.layout.barrier()
        disk = _disk(shared, size // processes)
        figures.append({
            "step": plain, "stop": stop, "settle": settle, "drag": sum(beside) - plain * len(beside),
            "steps_beside": len(beside), "save": waited, "check": checked, "load": loaded, "bytes": size, "disk": disk,
        })  # fmt: skip
    if run.layout.rank == 0:
        print("RESULT " + json.dumps({"rounds": figures, "versions": versions()}), flush=True)
    run.close()
    leave_job(joined)


def main() -> None:
    """Start the ranks, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512, help="width of the network and of its experts")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(options.rounds, options.hidden)
        return
    folder = Path(tempfile.mkdtemp(prefix="coppice-bench-", dir=options.folder))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}",
             __file__, "--rounds", str(options.rounds), "--hidden", str(options.hidden)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "COPPICE_BENCH_DIR": str(folder)},
            cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    told = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found = json.loads(told[len("RESULT ") :])
    rows = found["rounds"]

    def median(*keys: str) -> float:
        return statistics.median(row[keys[0]] if len(keys) == 1 else row[keys[0]][keys[1]] for row in rows)

    added = [row["stop"] + row["drag"] + row["settle"] for row in rows]
    ratios = {
        "save over plain write": statistics.median(row["disk"]["write"] / row["save"] for row in rows),
        "load over plain read": statistics.median(row["disk"]["read"] / row["load"] for row in rows),
    }
    print(f"checkpoint of {median('bytes') / 2**20:,.0f} MiB, {len(rows)} rounds; medians in seconds")
    plain = (
        f"write {median('disk', 'write'):.2f}, read {median('disk', 'read'):.2f}, digest {median('disk', 'digest'):.2f}"
    )
    for name, text in {
        "a step": f"{median('step'):.2f}",
        "background": f"stop {median('stop'):.2f}, drag {median('drag'):.2f} over {median('steps_beside'):.0f} steps, "
        f"publishing {median('settle'):.2f}",
        "which adds": f"{statistics.median(added):.2f} ({min(added):.2f} to {max(added):.2f}), 2 % of an interval of "
        f"{statistics.median(added) / 0.02:.0f}",
        "waited for": f"{median('save'):.2f}",
        "a load": f"{median('load'):.2f}, of which checking the files {median('check'):.2f}",
        "plain files": plain,
    }.items():
        print(f"  {name:20} {text}")
    print("; ".join(f"rate of {name}: {value:.2f}" for name, value in ratios.items()))
    found |= {"ratios": ratios, "added_seconds": added, "date": datetime.now(UTC).date().isoformat(),
              "machine": f"{platform.machine()}, {os.cpu_count()} cores", "options": {"hidden": options.hidden}}  # fmt: skip
    _RESULT.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
