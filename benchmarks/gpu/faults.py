"""Out of memory on purpose, and more processes than GPUs: what the user is told, on a real card."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import corpus, row

_ROOT = Path(__file__).resolve().parents[2]
# What train/__main__.py does, on a card that seems nearly full.
_CHILD = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from train.__main__ import main
sys.argv = ["train", *sys.argv[2:]]
sys.exit(main())
"""


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """The messages, exit codes and files."""
    if not torch.cuda.is_available():
        yield row("out of memory and too many processes", "not possible here: needs a GPU")
        return
    cards = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefix = corpus(folder)
        run_dir = folder / "full"
        # 0.2 B parameters take 3 GB and the activations of 131,072 tokens 20 GB; 8 GB are given: it fills up in a step.
        fraction = 8 * 2**30 / torch.cuda.get_device_properties(0).total_memory
        options = [
            "model=paper_7b", "model.layers=2", "model.num_experts=4", f"data.corpus={prefix}", "data.sequence_length=4096",
            "data.micro_batch_size=32", "data.global_batch_size=32", "run.steps=2", "schedule.decay_steps=1",
            "schedule.warmup_steps=0", "tracking=none", "upcycle.stages=[]",
        ]  # fmt: skip
        told = _output([sys.executable, "-c", _CHILD, f"{fraction:.4f}", *options, f"run.dir={run_dir}"])
        yield _held("out of memory ends with exit code 6", told.returncode == 6, told)
        yield _held("out of memory names the rank and keys", "ran out of memory in" in told.stdout, told)
        yield _held("its snapshot is written", any(run_dir.glob("out-of-memory-rank-*.pickle")), told)
        many = ["model=tiny", f"data.corpus={prefix}", "data.micro_batch_size=1", f"data.global_batch_size={cards + 1}",
                "upcycle.stages=[]", "tracking=none"]  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards + 1)]
        told = _output([*command, "-m", "train", *many, f"run.dir={folder / 'many'}"])
        refused = f"{cards + 1} processes on this machine and {cards} visible GPUs" in told.stdout
        yield _held("one process more than GPUs is refused", refused, told)


def _output(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=_ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path])}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
    )  # fmt: skip


def _held(name: str, met: bool, told: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    last = told.stdout.strip().splitlines()[-1:] or [""]
    value = "yes" if met else f"no: exit code {told.returncode}, {last[0][:200]}"
    return row(name, value, goal="yes", met=met, check=True)
