"""Memory of the host for tensors that leave a device for a while; pinned where the device is a GPU.

Pinned by registering ordinary memory: torch's own pinned allocator rounds up to powers of two, which for buffers of whole
models would take up to twice the memory.
"""

from pathlib import Path

import psutil
import torch

from parallel.errors import ExpansionError
from parallel.layout import Layout

# What other processes of the node may come to need while the state is away.
_RESERVE = 0.05
_CGROUP = Path("/sys/fs/cgroup")


class HostCopy:
    """The bytes of a storage, in host memory.

    Attributes:
        bytes: `[nbytes]` uint8; freed by `free`.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        """Copy a storage; on return the copy is complete.

        Raises:
            MemoryError: the host has no more.
        """
        self._pinned = storage.device.type == "cuda"
        try:
            self.bytes = torch.empty(storage.nbytes(), dtype=torch.uint8)
        except RuntimeError as e:
            # torch's allocator on CPU has no exception of its own.
            raise MemoryError(str(e).splitlines()[0]) from e
        if self._pinned and storage.nbytes():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), storage.nbytes(), 0))
        # Waits for the device, and with it for every kernel that still writes there.
        self.bytes.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))

    def free(self) -> None:
        """Give the memory back, once the device has read what it was told to."""
        if self._pinned and self.bytes.numel():
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr()))
        self.bytes.untyped_storage().resize_(0)


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Host memory that this process may still take: what is free on the machine, or less under a limit of its group.

    Args:
        cgroup: folder of the control group, as a container sees its own.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        # No such limit, or another kind of system.
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def refuse_too_little(needed: int, host: str, layout: Layout) -> None:
    """Refuse to offload what does not fit into the memory of a node; collective.

    Args:
        needed: bytes of this rank.
        host: name of its machine; its ranks share the memory.
        layout: of the job.

    Raises:
        ExpansionError: on all ranks, naming the node and both numbers.
    """
    told = layout.gather_objects((host, needed, available_bytes()))
    for name in dict.fromkeys(name for name, _, _ in told):
        wanted = sum(n for where, n, _ in told if where == name)
        free = min(free for where, _, free in told if where == name)
        if wanted > free * (1 - _RESERVE):
            raise ExpansionError(
                f"upcycle.offload=true needs {wanted / 2**30:.2f} GiB of host memory on {name}, where {free / 2**30:.2f} "
                "GiB are left: use upcycle.offload=false, or upcycle.path=checkpoint; nothing was moved"
            )
