"""The live switch against its alternatives, on one model, one machine, in one run.

    python benchmarks/live_switch.py [--experts 32 --layers 4 --hidden 512 --ffn 1024] [--processes 2]

Trains a few steps of a network of at least 200 M parameters, then takes it from E to 2E experts in three ways:
  live        in memory (`upcycle.path=live`)
  checkpoint  through the disk inside the job (`upcycle.path=checkpoint`)
  relaunch    save, exit, transform, start again, load: what a framework without expansion does; process start apart
and measures the pause, the bytes moved against the fewest possible, and the peak of resident memory during the live switch
against the steady state of the larger stage. Writes benchmarks/results/live_switch.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_RESULT = Path(__file__).parent / "results" / "live_switch.json"
_STEP = 2


class PeakMemory:
    """Highest resident memory of this process over a stretch, sampled every few milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process, without shared file pages."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _overrides(options: argparse.Namespace, mode: str, folder: Path) -> list[str]:
    corpus = folder / "corpus"
    base = [
        "experiment=demo", "model=tiny", f"model.layers={options.layers}", f"model.hidden_size={options.hidden}",
        f"model.expert_ffn_hidden_size={options.ffn}", f"model.num_experts={options.experts}", "model.attention_heads=8",
        "model.kv_heads=4", "model.dense_first=0", f"parallel.expert={options.processes}", f"data.corpus={corpus}",
        "data.sequence_length=128", "data.micro_batch_size=1", f"data.global_batch_size={2 * options.processes}",
        "run.steps=6", "schedule.warmup_steps=1", "schedule.decay_steps=2", "evaluation.batches=1",
        "evaluation.interval_steps=null", "tracking=none", "checkpoint=ends", "checkpoint.save_final=false",
        f"run.precision={options.precision}",
    ]  # fmt: skip
    if mode == "relaunch":
        # Load the larger stage that the checkpoint path has left.
        source = folder / "checkpoint" / "checkpoints" / f"step-{_STEP:08d}-stage1"
        base += [f"run.resume={source}"]
    grow = f"upcycle.stages=[{{at_step: {_STEP}, factor: 2, selection: {options.selection}, scoring_batches: 1}}]"
    path = "checkpoint" if mode in ("checkpoint", "relaunch") else "live"
    return [*base, grow, f"upcycle.path={path}", "upcycle.save_before=false", f"run.dir={folder / mode}"]


def rank_main(options: argparse.Namespace, mode: str, folder: Path) -> None:
    """One way on this rank; rank 0 prints one JSON line."""
    began = time.time()
    from parallel.compat import prepare_megatron, versions

    prepare_megatron()
    from parallel.layout import Layout, join_job, leave_job
    from train.data.stream import open_corpora
    from train.evaluation import evaluate
    from train.expansion import expand
    from train.run import Run
    from train.settings import load_settings

    settings = load_settings(_overrides(options, mode, folder))
    joined = join_job(600)
    imported = time.time()
    run = Run.open(
        settings, Layout.create(settings.parallel_of(1 if mode == "relaunch" else 0), 1), open_corpora(settings.data)
    )
    opened = time.time()
    found: dict[str, Any] = {"mode": mode, "start_seconds": imported - began, "open_seconds": opened - imported}
    while run.step < _STEP:
        run._one_step()
    if mode in ("live", "checkpoint"):
        if mode == "checkpoint":
            # The save belongs to this path; written here so that it can be told apart.
            saving = time.time()
            run.persistence.save_unless_saved()
            found["save_seconds"] = time.time() - saving
        evaluate(run)
        with PeakMemory() as switching:
            expand(run)
        with PeakMemory() as training:
            for _ in range(3):
                run._one_step()
        peaks = run.layout.gather_objects((switching.peak, training.peak))
        found |= {"switch_peak": max(a for a, _ in peaks), "steady_peak": max(b for _, b in peaks),
                  "peak_ratio": max(a / b for a, b in peaks)}  # fmt: skip
    if run.layout.rank == 0:
        events = [json.loads(x) for x in (folder / mode / "events.jsonl").read_text().splitlines()]
        found["expansion"] = next((e["details"] for e in events if e["event"] == "expansion"), None)
        found["parameters"] = events[0]["details"]["parameters_total"]
        print("RESULT " + json.dumps(found | {"versions": versions()}), flush=True)
    run.close()
    leave_job(joined)


def _launch(options: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    began = time.time()
    names = {"COPPICE_BENCH_DIR": str(folder), "COPPICE_BENCH_MODE": mode}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.processes),
    ]
    done = subprocess.run(
        [*command, __file__, *sys.argv[1:]],
        env={"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1", **os.environ, **names},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{mode} failed:\n{done.stdout}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return found | {"process_seconds": time.time() - began}


def _corpus(folder: Path) -> None:
    from train.corpus.build import CorpusRequest, build_corpus

    root = Path(__file__).resolve().parents[1]
    request = CorpusRequest(inputs=(str(root / "train"), str(root / "model")), output=str(folder / "corpus"),
                            validation_fraction=0.2)  # fmt: skip
    build_corpus(request, say=lambda line: None)


def _seconds(expansion: dict[str, Any], *acts: str) -> float:
    return float(sum(expansion["seconds"].get(act, 0.0) for act in acts))


def main() -> None:
    """Run the three ways after one another and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--selection", default="greedy")
    parser.add_argument("--folder", type=Path, help="where the checkpoints of the comparison go")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(options, os.environ["COPPICE_BENCH_MODE"], Path(os.environ["COPPICE_BENCH_DIR"]))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        _corpus(folder)
        live, disk, again = (_launch(options, mode, folder) for mode in ("live", "checkpoint", "relaunch"))
    finally:
        shutil.rmtree(folder)
    grown = live["expansion"]
    pause = _seconds(grown, "describe", "rebuild", "move", "verify")
    through_disk = disk["save_seconds"] + _seconds(
        disk["expansion"], "transform", "rebuild", "load", "verify", "publish"
    )
    # Saved, transformed, built and loaded again, without the start of the processes.
    relaunch = disk["save_seconds"] + _seconds(disk["expansion"], "transform") + again["open_seconds"]
    result = {
        "parameters_before": live["parameters"], "parameters_after": grown["parameters_total"],
        "pause_seconds": {"live": pause, "checkpoint": through_disk, "relaunch": relaunch},
        "relaunch_start_seconds": again["process_seconds"] - again["open_seconds"],
        "live_over_checkpoint": pause / through_disk, "live_over_relaunch": pause / relaunch,
        "moved_bytes": grown["moved_bytes"], "least_bytes": grown["least_bytes"],
        "switch_peak_bytes": live["switch_peak"], "steady_peak_bytes": live["steady_peak"], "peak_ratio": live["peak_ratio"],
        "acts": {"live": grown["seconds"], "checkpoint": disk["expansion"]["seconds"] | {"save": disk["save_seconds"]},
                 "relaunch": {"open": again["open_seconds"], "start": again["start_seconds"]}},
        "versions": live["versions"], "machine": machine(), "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(sys.argv), "options": {k: str(v) for k, v in vars(options).items()},
    }  # fmt: skip
    _RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['parameters_before'] / 1e6:.0f} M -> {result['parameters_after'] / 1e6:.0f} M parameters")
    print(f"pause: live {pause:.2f} s, through the checkpoint {through_disk:.2f} s ({pause / through_disk:.3f}), save, "
          f"exit, relaunch, load {relaunch:.2f} s ({pause / relaunch:.3f}) and {result['relaunch_start_seconds']:.1f} s of "
          "process start")  # fmt: skip
    ratio = grown["moved_bytes"] / grown["least_bytes"] if grown["least_bytes"] else 1.0
    print(f"moved {grown['moved_bytes'] / 2**20:.1f} MiB between ranks, {ratio:.2f} of the least possible")
    print(f"peak memory {live['switch_peak'] / 2**30:.2f} GiB in the switch, {live['steady_peak'] / 2**30:.2f} GiB in the "
          f"larger stage's steps: {live['peak_ratio']:.3f}")  # fmt: skip
    print("acts: " + json.dumps(result["acts"]))


def machine() -> str:
    """The processor and its cores."""
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else 'unknown'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
