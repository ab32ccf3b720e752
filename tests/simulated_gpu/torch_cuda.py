"""What `torch.cuda` says and does with the simulated GPU: a torch without CUDA lacks the Python half of it."""

import collections
import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nvtx
import torch.distributed as dist

NAME = "NVIDIA H100 80GB HBM3"
_BYTES = 80 << 30
_ROOT = str(Path(__file__).resolve().parents[2])
_DEVICE = torch.device("cuda", 0)
# Methods whose result, or the size of it, the host has to know.
_WAITING = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "cpu",
    "nonzero",
    "masked_select",
    "unique",
)


class Waits:
    """Where the host waited for the device: how often, by the two innermost places that are not torch's."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()

    def note(self, act: str) -> None:
        """Count one wait of the caller's caller."""
        places: list[str] = []
        for frame in reversed(traceback.extract_stack(limit=40)):
            if "/torch/" in frame.filename or "/simulated_gpu/" in frame.filename:
                continue
            name = frame.filename.split("site-packages/")[-1].removeprefix(_ROOT + "/")
            places.append(f"{name} {frame.name}")
            if len(places) == 2:
                break
        self.places[f"{act}: {' < '.join(places)}"] += 1

    @contextlib.contextmanager
    def counted(self, into: "collections.Counter[str]") -> Iterator[None]:
        """Add the waits of a block to a counter."""
        before = self.places.copy()
        yield
        into.update(self.places - before)


class _Event:
    """Stands in for `torch.cuda.Event`: all work is done when a call returns."""

    waits: Waits

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def record(self, *arguments: Any) -> None:
        pass

    def wait(self, *arguments: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.waits.note("synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return 1.0


class _Stream(_Event):
    """Stands in for `torch.cuda.Stream`: one stream, in order."""

    cuda_stream = 0
    device = _DEVICE

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _replacements(waits: Waits, stream: _Stream) -> dict[str, Any]:
    device = torch.ops.simulated
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **options: call(),
        "device_count": lambda: int(os.environ.get("SIMULATED_GPUS") or os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name=NAME, total_memory=_BYTES, major=9, minor=0, multi_processor_count=132
        ),
        "synchronize": lambda device=None: waits.note("synchronize"),
        "empty_cache": lambda: None,
        "Stream": lambda *arguments, **options: stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
        "default_generators": (torch.default_generator,),
        "memory_allocated": lambda device=None: device_bytes(),
        "memory_reserved": lambda device=None: device_bytes(),
        "max_memory_allocated": lambda device_=None: device.peak(),
        "max_memory_reserved": lambda device_=None: device.peak(),
        "reset_peak_memory_stats": lambda device_=None: device.reset_peak(),
        "mem_get_info": lambda device_=None: (_BYTES - device.held(), _BYTES),
        "memory_stats": lambda device_=None: collections.defaultdict(int),
        "set_per_process_memory_fraction": lambda share, device_=None: limit_bytes(int(share * _BYTES)),
        # Pinning: ordinary memory is as good here.
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *a: 0, cudaHostUnregister=lambda *a: 0),
        "check_error": lambda code: None,
    }


def device_bytes() -> int:
    """Bytes that tensors on the device hold now."""
    return int(torch.ops.simulated.held())


def limit_bytes(limit: int) -> None:
    """From now on the device has so many bytes; 0 for no limit."""
    torch.ops.simulated.set_limit(limit)


def install() -> Waits:
    """Make `torch.cuda` that of a machine with one simulated GPU per process; once per process.

    Returns:
        Where the host waits from now on.
    """
    waits = Waits()
    _Event.waits = waits
    for name, value in _replacements(waits, _Stream()).items():
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            if module is torch.cuda or hasattr(module, name):
                setattr(module, name, value)
    torch._C._cuda_getDevice = lambda: 0
    torch.cuda.memory._dump_snapshot = lambda path: Path(path).write_bytes(b"")
    torch.cuda.memory._record_memory_history = lambda *arguments, **options: None
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *arguments: 0)
    torch.Tensor.record_stream = lambda self, stream: None
    torch.UntypedStorage.resize_ = _resizing(torch.UntypedStorage.resize_)
    for name in _WAITING:
        setattr(torch.Tensor, name, _noted(waits, name))
    torch.Tensor.to = _to(waits)
    _carry_by_gloo()
    return waits


def _resizing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`UntypedStorage.resize_`, which torch has for GPUs only in a build for them."""

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        if storage.device.type != "cuda":
            return original(storage, size)
        torch.ops.simulated.resize_storage(torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage), size)
        return storage

    return resize_


def _noted(waits: Waits, name: str) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def method(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.device.type == "cuda":
            waits.note(name)
        return original(tensor, *arguments, **options)

    return method


def _to(waits: Waits) -> Callable[..., Any]:
    original = torch.Tensor.to

    @functools.wraps(original)
    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        result = original(tensor, *arguments, **options)
        if tensor.device.type == "cuda" and result.device.type == "cpu" and not options.get("non_blocking"):
            waits.note("to")
        return result

    return to


def _carry_by_gloo() -> None:
    """Groups of NCCL become groups of gloo, which has no barrier of a device."""
    init, barrier = dist.init_process_group, dist.barrier

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        init("gloo" if backend in ("nccl", None) else backend, *arguments, **options)

    def barrier_of_hosts(*arguments: Any, device_ids: object = None, **options: Any) -> Any:
        return barrier(*arguments, **options)

    dist.init_process_group, dist.barrier = init_process_group, barrier_of_hosts
