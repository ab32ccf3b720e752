"""The machine a run is made for: kind of GPU, libraries that make it faster, processes per node.

`this_machine` looks at the one it runs on, `named_machine` makes one up for a plan. Rules that decide by these facts
(`model/choices.py`) touch no device and are the same for both.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.compiler import compile_obstacle
from parallel.errors import ConfigError
from parallel.transformer_engine import have_transformer_engine

if TYPE_CHECKING:
    import torch

# Kind of GPU -> compute capability, and memory in GiB that programs see: data sheets count in GB and leave out what ECC and
# the driver take. H100 and H200 as seen on machines, the others by the same share of their data sheets.
GPU_KINDS = {
    "A100": ((8, 0), 78),
    "H100": ((9, 0), 78),
    "H200": ((9, 0), 139),
    "GH200": ((9, 0), 94),
    "B200": ((10, 0), 177),
    "GB200": ((10, 0), 183),
}
# Capabilities below and above those of every GPU.
_OLDEST, _NEWEST = (0, 0), (99, 0)
# What a plan may assume to be installed. `apex` stands for NVIDIA's extension for weight gradients alone.
LIBRARIES = ("transformer-engine", "deepep", "hybridep", "apex")


@dataclass(frozen=True)
class Machine:
    """What decides how a step is computed.

    Attributes:
        gpu: name of the GPUs; None on CPU.
        capability: their compute capability.
        libraries: those of `LIBRARIES` that are there and usable.
        ranks_per_node: processes on each machine.
        compile_obstacle: what keeps Triton from compiling kernels there; None if nothing does.
    """

    gpu: str | None
    capability: tuple[int, int]
    libraries: frozenset[str]
    ranks_per_node: int
    compile_obstacle: str | None = None

    def has(self, library: str) -> bool:
        """Whether a library is there, and a GPU for it."""
        return self.gpu is not None and library in self.libraries


def machines_to_be(ranks_per_node: int) -> tuple["Machine", ...]:
    """The machines that this process may find itself on, before a word to its GPU: of that the kind is left open.

    Args:
        ranks_per_node: processes on this machine.
    """
    # Here and not above: a plan needs no torch.
    import torch

    if not torch.cuda.is_available():
        return (Machine(None, (0, 0), frozenset(), ranks_per_node),)
    found, obstacle = frozenset(_found()), compile_obstacle()
    return tuple(Machine("GPU", able, found, ranks_per_node, obstacle) for able in (_OLDEST, _NEWEST))


def this_machine(device: "torch.device", ranks_per_node: int) -> Machine:
    """The machine of this process.

    Args:
        device: of this rank, already chosen.
        ranks_per_node: processes on this machine.
    """
    if device.type != "cuda":
        return Machine(None, (0, 0), frozenset(), ranks_per_node)
    # Here and not above: a plan needs no torch.
    import torch

    return Machine(
        gpu=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        libraries=frozenset(_found()),
        ranks_per_node=ranks_per_node,
        compile_obstacle=compile_obstacle(),
    )


def _found() -> Iterable[str]:
    """What can be imported; nothing is, because some of these make a context on a GPU when they are."""
    if have_transformer_engine():
        yield "transformer-engine"
    deep_ep = importlib.util.find_spec("deep_ep")
    if deep_ep is not None:
        yield "deepep"
        # A branch of DeepEP, with a module of its own in the same package.
        if any((Path(folder) / "hybrid_ep_buffer.py").is_file() for folder in deep_ep.submodule_search_locations or ()):
            yield "hybridep"
    if have_apex_gradients():
        yield "apex"


def have_apex_gradients() -> bool:
    """Whether NVIDIA Apex's extension is there by which mcore's own linear layers add weight gradients in their products."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def named_machine(kind: str, installed: str, ranks_per_node: int) -> Machine:
    """A machine for a plan.

    Args:
        kind: one of `GPU_KINDS`, in any case.
        installed: names of `LIBRARIES`, separated by commas.
        ranks_per_node: processes on each machine.

    Raises:
        ConfigError: naming what is unknown and what is known.
    """
    name = kind.upper()
    if name not in GPU_KINDS:
        raise ConfigError(f"--gpu={kind} is unknown: use one of {', '.join(GPU_KINDS)}")
    libraries = {word.strip().lower() for word in installed.split(",") if word.strip()}
    for library in sorted(libraries - set(LIBRARIES)):
        raise ConfigError(f"--installed={library} is unknown: use some of {', '.join(LIBRARIES)}")
    return Machine(name, GPU_KINDS[name][0], frozenset(libraries), ranks_per_node)
