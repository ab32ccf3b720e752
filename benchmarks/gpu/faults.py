"""Faults on purpose, and what the user is told: out of memory, more processes than GPUs, a collective that times out."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, row, seconds_left

_ROOT = Path(__file__).resolve().parents[2]
# What train/__main__.py does, on a card that seems nearly full.
_FULL = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from train.__main__ import main
sys.argv = ["train", *sys.argv[2:]]
sys.exit(main())
"""
# The same, with a rank that does not come to its second step.
_LATE = """
import os, sys, time
from train.data.stream import DataStream
from train.__main__ import main
if os.environ["RANK"] == "1":
    train, calls = DataStream.train, []
    def late(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            time.sleep(600)
        return train(self, *arguments)
    DataStream.train = late
sys.argv = ["train", *sys.argv[1:]]
sys.exit(main())
"""
_TIMEOUT_SECONDS = 10


@dataclass
class _Ended:
    """How a process ended: its exit code, None if it had to be killed; and what it said."""

    code: int | None
    said: str


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The messages, exit codes and files; the faults are made side by side."""
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(3) as pool:
        folder = Path(name)
        prefix = corpus(folder)
        late = pool.submit(_late, prefix, folder / "late") if cards != 1 else None
        if not cards:
            yield row("out of memory and too many processes", "not possible here: needs a GPU")
        else:
            full, many = pool.submit(_full, prefix, folder / "full"), pool.submit(_many, prefix, folder / "many", cards)
            told = full.result()
            yield _held("out of memory ends with exit code 6", told.code == 6, told)
            yield _held("out of memory names the rank and keys", "ran out of memory in" in told.said, told)
            snapshots = list((folder / "full").glob("out-of-memory-rank-*.pickle"))
            yield _held("its snapshot is written", bool(snapshots), told)
            told = many.result()
            refused = f"{cards + 1} processes on this machine and {cards} visible GPUs" in told.said
            yield _held("one process more than GPUs is refused", refused, told)
        if late is None:
            yield row("a collective that times out", "not possible here: needs 2 GPUs, NCCL refuses two ranks on one")
        else:
            yield from _timed_out(late.result(), folder / "late", nccl=cards > 0)


def _full(prefix: Path, run_dir: Path) -> _Ended:
    # 0.2 B parameters take 3 GB and the activations of 131,072 tokens 20 GB; 8 GB are given: it fills up in a step.
    fraction = 8 * 2**30 / torch.cuda.get_device_properties(0).total_memory
    options = [
        "model=paper_7b", "model.layers=2", "model.num_experts=4", f"data.corpus={prefix}", "data.sequence_length=4096",
        "data.micro_batch_size=32", "data.global_batch_size=32", "run.steps=2", "schedule.decay_steps=1",
        "schedule.warmup_steps=0", "tracking=none", "upcycle.stages=[]", f"run.dir={run_dir}",
    ]  # fmt: skip
    return _end([_begin([sys.executable, "-c", _FULL, f"{fraction:.4f}", *options])])[0]


def _many(prefix: Path, run_dir: Path, cards: int) -> _Ended:
    options = ["model=tiny", f"data.corpus={prefix}", "data.micro_batch_size=1", f"data.global_batch_size={cards + 1}",
               "upcycle.stages=[]", "tracking=none", f"run.dir={run_dir}"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards + 1)]
    return _end([_begin([*command, "-m", "train", *options])])[0]


def _late(prefix: Path, run_dir: Path) -> list[_Ended]:
    """Two ranks without a launcher, which would end the other one as soon as one has ended."""
    options = ["model=tiny", f"data.corpus={prefix}", "data.sequence_length=32", "data.micro_batch_size=1",
               "data.global_batch_size=2", "parallel.expert=2", "upcycle.stages=[]", "tracking=none", "run.steps=4",
               "schedule.decay_steps=1", "health.hang_seconds=null", f"parallel.timeout_seconds={_TIMEOUT_SECONDS}",
               f"run.dir={run_dir}"]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return _end([
        _begin([sys.executable, "-c", _LATE, *options], {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ])  # fmt: skip


def _timed_out(ranks: list[_Ended], run_dir: Path, *, nccl: bool) -> Iterator[dict[str, Any]]:
    # gloo tells the rank that waits, NCCL all of them.
    those = ranks if nccl else ranks[:1]
    backend, which = ("NCCL", "every rank") if nccl else ("gloo", "the rank that waits")
    yield _held(f"a time-out of {backend} ends {which} with exit code 6", all(r.code == 6 for r in those), *those)
    words = (
        "rank 0 waited in vain in step 2 at ",
        f" for {backend.lower()}:",
        "nccl-trace-rank-R",
        "start the job again",
    )
    yield _held("it names the collective, the record and the remedy", all(w in ranks[0].said for w in words), ranks[0])
    there = all((run_dir / f"nccl-trace-rank-{rank}").is_file() for rank in range(len(those)))
    yield _held("the records lie in run.dir", there, *those)


def _begin(command: list[str], more: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(_ROOT), *sys.path])
    return subprocess.Popen(
        command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": path, **(more or {})}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def _end(processes: list[subprocess.Popen[str]]) -> list[_Ended]:
    """Wait for processes; one that stays when the first has ended for a while is killed."""
    ended = []
    # Some are left to tell of it before the section is stopped.
    seconds = max(5.0, min(120.0, seconds_left() - 5))
    for process in processes:
        killed = False
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            killed = True
            process.kill()
            said, _ = process.communicate()
        ended.append(_Ended(None if killed else process.returncode, said))
        # They read a clock of their own, and wait a little for each other.
        seconds = 12.0
    return ended


def _held(name: str, met: bool, *told: _Ended) -> dict[str, Any]:
    last = [(one.said.strip().splitlines() or [""])[-1][:200] for one in told]
    value = "yes" if met else f"no: exit codes {[one.code for one in told]}, {' | '.join(last)}"
    return row(name, value, goal="yes", met=met, check=True)
