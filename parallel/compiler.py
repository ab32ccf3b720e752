"""Whether kernels can be compiled on this machine while a run goes on, as torch and Transformer Engine do with Triton."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def compile_obstacle() -> str | None:
    """What keeps Triton from compiling kernels for a GPU of this machine; None if nothing does.

    Triton builds a part of itself with a C compiler and Python's headers when it compiles its first kernel. Where it cannot,
    it raises in the middle of the first step.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not os.environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "there is no C compiler (gcc, clang, or the one that CC names)"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.is_file() else f"Python's headers are not installed ({header})"
