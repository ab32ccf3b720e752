"""Generator states of one rank: torch's, CUDA's, and those mcore keeps per parallel coordinate; and named seeds."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, get_cuda_rng_tracker

from parallel.errors import CheckpointError
from parallel.safe_pickle import load_plain


def named_seed(name: str) -> int:
    """A seed that depends on a name alone: the same on every rank and machine, unrelated to that of any other name."""
    # Seven bytes: mcore adds small offsets, and torch takes 64 bits.
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def capture() -> dict[str, Any]:
    """Every generator state of this rank, as byte tensors."""
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    # A tracker for CUDA graphs has generators in place of their states.
    state["tracker"] = {
        name: convert_cuda_rng_state(value).clone() for name, value in get_cuda_rng_tracker().get_states().items()
    }
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tracker, told = get_cuda_rng_tracker(), state["tracker"]
    there = tracker.get_states()
    if any(isinstance(value, torch.Generator) for value in there.values()):
        # Graphs and attention hold these very objects.
        for name, value in told.items():
            there[name].set_state(value)
    else:
        tracker.set_states({name: value.clone() for name, value in told.items()})


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank's states lie in a checkpoint's `rng` folder."""
    return folder / f"rank-{rank:05d}.pt"


def save(folder: Path, rank: int, state: dict[str, Any] | None = None) -> None:
    """Write this rank's states.

    Args:
        folder: where.
        rank: this one.
        state: of some time before (`capture`); that of now by default.

    Raises:
        CheckpointError: if the disk refuses; torch reports a full one as a RuntimeError.
    """
    try:
        torch.save(capture() if state is None else state, rank_file(folder, rank))
    except (OSError, RuntimeError) as e:
        raise CheckpointError(f"{rank_file(folder, rank)} could not be written: {str(e).splitlines()[0]}") from e


def load(folder: Path, rank: int) -> None:
    """Read this rank's states; tensors only, no code is run. States of another kind of device mean nothing here.

    Raises:
        CheckpointError: if the file is damaged or hostile.
    """
    state = load_plain(rank_file(folder, rank))
    if ("cuda" in state) == torch.cuda.is_available():
        restore(state)
