"""What every rank's environment holds unless the user says otherwise; libraries read it when a process starts."""

from collections.abc import Mapping

from parallel.flight_recorder import flight_recorder

DEFAULTS = {
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Huge pages: without them the kernel spends more time on handing out large tensors than a switch on filling them.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Segments of the CUDA allocator grow in place: a switch frees a model and builds a larger one in the same memory.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # mcore starts communication before the computation that hides it, which needs one hardware queue before Blackwell.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Where its files go is for the run to say, which knows its folder (`parallel/layout.py`).
    **flight_recorder(None),
}
# Newer names of the same settings. torch prefers the older one, so what a user gave under the newer is to be its value.
NEWER = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF"}


def with_defaults(given: Mapping[str, str]) -> dict[str, str]:
    """An environment with the defaults where it says nothing."""
    newer = {old: given[new] for old, new in NEWER.items() if new in given}
    return DEFAULTS | newer | dict(given)
