"""Gives every Python that starts with this folder in PYTHONPATH the simulated GPU: programs that start programs, as they are.

SIMULATED_GPU is the compiled library; SIMULATED_GPUS how many devices a machine has (default: one per local process).
"""

import os
import sys
from pathlib import Path

if "SIMULATED_GPU" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.simulated_gpu import library

    library.start(Path(os.environ["SIMULATED_GPU"]))
