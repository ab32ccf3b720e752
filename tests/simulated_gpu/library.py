"""Compiles `device.cpp` against the installed torch, and starts it. Imports no torch above: the library has to be there first."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("device.cpp")


def can_compile() -> bool:
    """Whether there is a compiler, and a torch without CUDA, which brings devices of its own."""
    # By its library: the version of a build says nothing where it came from the package index.
    return shutil.which("g++") is not None and not (_torch() / "lib" / "libtorch_cuda.so").exists()


def compiled() -> Path:
    """The library for the installed torch; compiled (20 s) unless a former call did.

    Raises:
        RuntimeError: with what the compiler said.
    """
    mark = hashlib.sha256(f"{importlib.metadata.version('torch')} {sys.version}".encode() + _SOURCE.read_bytes())
    path = Path(tempfile.gettempdir()) / f"coppice-simulated-gpu-{os.getuid()}-{mark.hexdigest()[:16]}.so"
    if not path.exists():
        torch = _torch()
        # Beside it and then renamed: two test sessions may compile at once.
        draft = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include",
                   f"-I{torch}/include/torch/csrc/api/include", str(_SOURCE), "-o", str(draft), f"-L{torch}/lib",
                   "-lc10", "-ltorch_cpu", "-ltorch"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        draft.replace(path)
    return path


def load(path: Path) -> None:
    """Load the library. Before `import torch`: torch asks once which devices there are."""
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the simulated GPU was loaded")
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def start(path: Path) -> Any:
    """Load the library, import torch, and make its device that of this process; before anything else imports torch.

    Returns:
        Where the host waits from now on (`torch_cuda.Waits`).
    """
    load(path)
    # mcore compiles its small functions when it is imported.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from tests.simulated_gpu import torch_cuda

    return torch_cuda.install()


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent
