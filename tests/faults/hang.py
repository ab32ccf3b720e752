"""`python -m train` with a fault in one rank: run as `-m tests.faults.hang FAULT RANK TOLD [Hydra overrides]`, by hand or by
torchrun. The file TOLD gets the time of the fault and the process.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel import sharded_save
from train import evaluation, switch
from train.__main__ import main
from train.data import stream as data

# Fault -> where it happens, and at which call.
_PLACES: dict[str, tuple[Any, str, int]] = {
    "step": (data.DataStream, "_close_before", 2),
    "late": (data.DataStream, "_close_before", 2),
    "stop": (data.DataStream, "_close_before", 2),
    "kill": (data.DataStream, "_close_before", 2),
    "raise": (data.DataStream, "_close_before", 2),
    "evaluation": (evaluation.Evaluation, "batch", 2),
    "slow": (evaluation.Evaluation, "batch", 0),
    "save": (sharded_save.SaveInProgress, "write", 1),
    "switch": (switch, "add_bias_noise", 1),
}


def _faulty(fault: str, told: Path, original: Callable[..., Any], nth: int) -> Callable[..., Any]:
    calls = 0

    def faulty(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if fault == "slow":
            time.sleep(1.2)
        elif calls == nth:
            told.write_text(f"{time.time()} {os.getpid()}")
            if fault in ("stop", "kill"):
                os.kill(os.getpid(), signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
            if fault == "raise":
                raise ZeroDivisionError("made up")
            while True:
                time.sleep(60)
        return original(*arguments)

    return faulty


if __name__ == "__main__":
    fault, rank, told = sys.argv[1:4]
    if os.environ["RANK"] == rank and fault != "none":
        holder, name, nth = _PLACES[fault]
        setattr(holder, name, _faulty(fault, Path(told), getattr(holder, name), nth))
    sys.argv[1:4] = []
    code = main()
    sys.stdout.flush()
    sys.exit(code)
