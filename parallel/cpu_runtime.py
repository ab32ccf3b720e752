"""Lets megatron-core run on CPU with gloo: the one place in Coppice that patches functions of others.

Why: mcore calls `torch.cuda` unconditionally in a few dozen places, and gloo lacks one thing that NCCL has. All
tests and the two-minute demo run the real mcore on a laptop, so those places are redirected here, in one file, only
where there is no CUDA device. Nothing in this file changes a result that a GPU would give: it changes where tensors
live and how they travel.

How to use: call `install_cpu_runtime()` once, before building anything and preferably before importing megatron (it
switches torch.compile off). `parallel.compat.prepare_megatron()` does both. A thread that calls mcore or makes tensors
on 'cuda' wraps its work in `cpu_runtime_in_thread()`, because the redirection of devices is local to a thread.

docs/cpu.md lists each replaced name with its reason.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from parallel.errors import LaunchError

_CPU = torch.device("cpu")


class _CompletedEvent:
    """Stands in for `torch.cuda.Event`: on CPU all earlier work is complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: _CompletedEvent) -> float:
        return 0.0


class _InOrderStream(_CompletedEvent):
    """Stands in for `torch.cuda.Stream`: the CPU executes everything in program order."""

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _CompletedEvent | None = None) -> _CompletedEvent:
        return event or _CompletedEvent()


_STREAM = _InOrderStream()

# What mcore calls in `torch.cuda` without asking whether CUDA is there.
_TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: _CPU,  # used as a `device=` argument, so a torch.device and not an index
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "Stream": lambda *args, **kwargs: _STREAM,
    "Event": _CompletedEvent,
    "current_stream": lambda device=None: _STREAM,
    "default_stream": lambda device=None: _STREAM,
    "stream": lambda stream: contextlib.nullcontext(),
    "get_rng_state": lambda device="cuda": torch.get_rng_state(),
    "set_rng_state": lambda new_state, device="cuda": torch.set_rng_state(new_state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
}


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on 'cuda', and lets `Tensor.type()` name the CUDA type mcore compares with."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # 'torch.FloatTensor' -> 'torch.cuda.FloatTensor', once also where this mode was entered twice.
            return "torch.cuda." + func(*args).removeprefix("torch.").removeprefix("cuda.")
        return func(*args, **(kwargs or {}))


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """State of the generator that dropout and initialisation draw from; here the CPU's."""
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _splits_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`maybe_move_tensor_to_cpu` whose tensors are already on the CPU; mcore converts to numpy only what it moved."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_gather(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps mcore's gather along the first dimension: gloo gathers only equal sizes, so pad, gather and cut.

    The alltoall dispatcher needs it with expert tensor parallelism. Its backward, an uneven reduce-scatter, gloo has.
    """

    def gather(
        input_: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def _recomputes_here(original: Any) -> Any:
    """mcore's recomputation with the redirection of devices: torch leaves modes out of `torch.autograd.backward`."""

    class CheckpointFunction(original):  # type: ignore[misc]
        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with _CudaMeansCpu():
                return original.backward(ctx, *gradients)

    return CheckpointFunction


def _always(value: Any) -> Callable[[Any], Any]:
    """A replacement that does not depend on the original."""
    return lambda original: value


def _without_kernels(name: str) -> Callable[[Any], Any]:
    """What mcore itself takes in place of a kernel where neither Transformer Engine nor Apex is installed."""
    return lambda original: getattr(importlib.import_module("megatron.core.utils"), name)


_OPTIMIZER = "megatron.core.optimizer"
# (module, name) -> function from the original to its replacement. Checked at installation.
_MEGATRON: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state"): lambda original: _get_rng_state,
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"): lambda original: _set_rng_state,
    ("megatron.core.tensor_parallel.random", "CheckpointFunction"): _recomputes_here,
    ("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu"): lambda original: _splits_to_host,
    ("megatron.core.tensor_parallel.mappings", "_gather_along_first_dim"): _uneven_gather,
    # Where Transformer Engine or Apex can be imported mcore takes their Adam, and their kernels beside it, which need CUDA.
    (_OPTIMIZER, "Adam"): _always(torch.optim.AdamW),
    (_OPTIMIZER, "USING_PYTORCH_OPTIMIZER"): _always(True),
    (f"{_OPTIMIZER}.distrib_optimizer", "Adam"): _always(torch.optim.Adam),
    (f"{_OPTIMIZER}.distrib_optimizer", "HAVE_APEX_OR_TE"): _always(False),
    (f"{_OPTIMIZER}.distrib_optimizer", "USING_TE_OPTIMIZER"): _always(False),
    (f"{_OPTIMIZER}.distrib_optimizer", "USING_APEX_OPTIMIZER"): _always(False),
    (f"{_OPTIMIZER}.optimizer", "multi_tensor_applier"): _without_kernels("local_multi_tensor_applier"),
    (f"{_OPTIMIZER}.optimizer", "multi_tensor_scale_impl"): _without_kernels("local_multi_tensor_scale"),
    (f"{_OPTIMIZER}.clip_grads", "multi_tensor_applier"): _without_kernels("local_multi_tensor_applier"),
    (f"{_OPTIMIZER}.clip_grads", "l2_norm_impl"): _without_kernels("local_multi_tensor_l2_norm"),
    (f"{_OPTIMIZER}.clip_grads", "multi_tensor_scale_impl"): _without_kernels("local_multi_tensor_scale"),
    (f"{_OPTIMIZER}.clip_grads", "multi_tensor_scale_tensor_impl"): _always(None),
}
# Not in every tested version.
_MAY_BE_ABSENT = {(f"{_OPTIMIZER}.clip_grads", "multi_tensor_scale_tensor_impl")}

_installed: _CudaMeansCpu | None = None


def disable_compile() -> None:
    """Switches torch.compile off: mcore wraps small functions with it, and the first call costs a C++ compiler 20 s."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when a function is wrapped, that is when mcore is imported
    if "megatron.core" in sys.modules:
        torch.compiler.set_stance("force_eager")  # too late for the variable


def _drop_rng_warning(record: logging.LogRecord) -> bool:
    """False for mcore's warning that the CPU generator moved inside a 'GPU' context: here they are one generator."""
    return "CPU RNG state changed" not in record.msg


def _replace_megatron_names() -> None:
    found = []
    for (module_name, name), replacement in _MEGATRON.items():
        module = importlib.import_module(module_name)
        if hasattr(module, name):
            found.append((module, name, replacement))
        elif (module_name, name) not in _MAY_BE_ABSENT:
            version = importlib.metadata.version("megatron-core")
            raise LaunchError(
                f"megatron-core {version} has no {module_name}.{name}, which the CPU runtime replaces: "
                "install a tested version (0.16.1 or 0.19.2)"
            )
    for module, name, replacement in found:
        setattr(module, name, replacement(getattr(module, name)))


def install_cpu_runtime() -> None:
    """Redirects what mcore does on CUDA to the CPU, for this process; a second call does nothing.

    Raises:
        LaunchError: a CUDA device is available, or this mcore version lacks a name that has to be replaced.
    """
    global _installed
    if _installed is not None:
        return
    if torch.cuda.is_available():
        raise LaunchError(
            "the CPU runtime must not be installed where CUDA is available: hide the GPUs or leave it out"
        )
    disable_compile()
    _replace_megatron_names()
    for name, replacement in _TORCH_CUDA.items():
        setattr(torch.cuda, name, replacement)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_drop_rng_warning)
    _installed = _CudaMeansCpu()
    _installed.__enter__()


def cpu_runtime_in_thread() -> contextlib.AbstractContextManager[Any]:
    """A context for threads other than the installing one; does nothing where the runtime is not installed."""
    return contextlib.nullcontext() if _installed is None else _CudaMeansCpu()
