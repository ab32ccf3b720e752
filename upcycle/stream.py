"""Expands a checkpoint on disk in bounded memory, without a job: the executor of `python -m upcycle expand`.

What `upcycle/transform.py` does with whole tensors on all ranks, one process does here a chunk at a time: read the parents
of a few new rows from where they lie in the files, finish them (noise, optimizer rule), add them to the fingerprints, write
them. The tensors are bit for bit those of the checkpoint path, and of the live switch. Memory is a few chunks, whatever
the size of a tensor or of the checkpoint; a stored shard is in memory whole only where its elements lie out of order.

    found = stream_expand(checkpoint / "tensors", output / "tensors", plan, manifest.experts, chunk_bytes=64 << 20)
    verify_expansion(manifest.fingerprints, found, plan, manifest.experts)
"""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.fingerprint import Fingerprints, tensor_sums
from model.sharded_state import parameter_of
from parallel.errors import CheckpointError, ExpansionError
from parallel.regions import Box, first_element
from parallel.sharded_load import mark_complete, require_complete
from parallel.stream_files import StoredTensor, StoredTensors, TensorWriter, pieces
from upcycle.plan import ExpansionPlan
from upcycle.transform import finish_rows, parents_of

Experts = Mapping[str, Mapping[str, Any]]

_REPORT_SECONDS = 10.0


def quiet(line: str) -> None:
    """Say nothing."""


class _Progress:
    """Says how much is written, how fast, and how long the rest will take."""

    def __init__(self, total_bytes: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total_bytes, say
        self._done = 0
        self._began = self._told = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes that were written; say so from time to time."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= _REPORT_SECONDS:
            self._told = now
            rate = max(self._done, 1) / (now - self._began)
            left = (self._total - self._done) / rate
            self._say(f"{self._amount()}, {rate / 2**20:,.0f} MiB/s, {_duration(left)} left")

    def end(self) -> None:
        """Say what it came to."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        self._say(f"{self._amount()} in {_duration(seconds)}, {self._done / seconds / 2**20:,.0f} MiB/s")

    def _amount(self) -> str:
        unit, size = ("GiB", 2**30) if self._total >= 2**30 else ("MiB", 2**20)
        return f"{self._done / size:,.1f} of {self._total / size:,.1f} {unit} written"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def stream_expand(
    source: Path,
    target: Path,
    plan: ExpansionPlan,
    experts: Experts,
    *,
    chunk_bytes: int,
    say: Callable[[str], None] = quiet,
) -> Fingerprints:
    """Write the tensors of the larger stage; one process, with or without a process group.

    Args:
        source: tensors of the smaller stage, as `model.sharded_state.save_tensors` wrote them; only read.
        target: folder for the larger stage's; made, or empty. Gone again if this raises.
        plan: the expansion.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
        chunk_bytes: size of what is read, changed and written at once; an expert that is larger is cut.
        say: told of progress.

    Returns:
        The fingerprints of the larger stage, as `model.fingerprint.take_fingerprints` gives them once it is loaded.

    Raises:
        ExpansionError: if checkpoint and plan do not fit.
        CheckpointError: if the source cannot be read, or the target not be written.
    """
    with _opened(source, experts) as stored:
        parents = {key: parents_of(key, tensor.shape, plan, experts) for key, tensor in stored.tensors.items()}
        new = {
            key: NewTensor(_larger(tensor, parents[key]), 1 if parents[key] is None else len(parents[key] or ()))
            for key, tensor in stored.tensors.items()
        }

        def part_of(key: str, box: Box) -> torch.Tensor:
            return _new_part(stored, key, box, parents[key], plan, experts)

        return write_tensors(target, new, part_of, chunk_bytes=chunk_bytes, say=say)


class NewTensor(NamedTuple):
    """A tensor to be written, and in how many rows its fingerprint is taken: one per expert, or one in all."""

    tensor: StoredTensor
    rows: int


def write_tensors(
    target: Path,
    new: Mapping[str, NewTensor],
    part_of: Callable[[str, Box], torch.Tensor],
    *,
    chunk_bytes: int,
    say: Callable[[str], None] = quiet,
) -> Fingerprints:
    """Write a checkpoint's tensors a piece at a time, fingerprinting each piece on the way.

    Args:
        target: folder for them; made, or empty. Gone again if this raises.
        new: checkpoint key -> what it holds, in the order in which they are written.
        part_of: makes a box of a tensor, contiguous and alone in its memory.
        chunk_bytes: size of a piece.
        say: told of progress.

    Returns:
        The fingerprints of what was written.

    Raises:
        CheckpointError: if the target cannot be written.
    """
    with _fresh(target):
        progress = _Progress(sum(tensor.nbytes for tensor, _ in new.values()), say)
        found: Fingerprints = {}
        with TensorWriter(target) as writer:
            for key, (tensor, rows) in new.items():
                state, parameter = parameter_of(key)
                sums = torch.zeros(rows, dtype=torch.int64)
                row_numel = max(1, math.prod(tensor.shape) // rows)
                for box in pieces(tensor.shape, tensor.dtype.itemsize, chunk_bytes):
                    part = part_of(key, box)
                    sums += tensor_sums(part, first_element(tensor.shape, box), row_numel, rows)
                    writer.add(key, tensor.shape, box, part)
                    progress.add(part.nbytes)
                found[f"{state}/{parameter}"] = sums.tolist()
            writer.finish()
        mark_complete(target)
        progress.end()
    return dict(sorted(found.items()))


def _larger(tensor: StoredTensor, parents: Sequence[int] | None) -> StoredTensor:
    """The shape after the expansion."""
    return tensor if parents is None else StoredTensor((len(parents), *tensor.shape[1:]), tensor.dtype)


def _new_part(
    stored: StoredTensors,
    key: str,
    box: Box,
    parents: Sequence[int] | None,
    plan: ExpansionPlan,
    experts: Experts,
) -> torch.Tensor:
    """A box of a tensor of the larger stage."""
    if parents is None:
        return finish_rows(key, stored.read(key, box), plan, experts)
    first, number = box.offset[0], box.shape[0]
    part = torch.empty(box.shape, dtype=stored.tensors[key].dtype)
    # Parent -> the row of this part that has it already: siblings are often neighbours, and are read once.
    rows: dict[int, int] = {}
    row = 0
    while row < number:
        parent = parents[first + row]
        if parent in rows:
            part[row] = part[rows[parent]]
            row += 1
            continue
        count = 1
        while row + count < number and parents[first + row + count] == parent + count and parent + count not in rows:
            count += 1
        origin = Box((parent, *box.offset[1:]), (count, *box.shape[1:]))
        stored.read_into(key, origin, part[row : row + count])
        rows |= {parent + i: row + i for i in range(count)}
        row += count
    return finish_rows(key, part, plan, experts, first)


def stream_weight_scores(
    source: Path, experts: Experts, experts_before: int, *, chunk_bytes: int
) -> dict[int, list[float]]:
    """Squared weight norm per layer number and expert: `upcycle.utility.weight_scores` of a checkpoint on disk.

    Args:
        source: tensors, as `model.sharded_state.save_tensors` wrote them.
        experts: keys with an expert axis (`model.sharded_state.expert_keys`).
        experts_before: experts per MoE layer, E.
        chunk_bytes: memory for a piece of a tensor in fp64.

    Raises:
        ExpansionError: if a weight is missing, or does not have E experts.
        CheckpointError: if the source cannot be read.
    """
    numbers = sorted({of["layer"] for of in experts.values()})
    scores_LE = {number: torch.zeros(experts_before, dtype=torch.float64) for number in numbers}
    with _opened(source, experts) as stored:
        for key, tensor in stored.tensors.items():
            if key not in experts or experts[key]["kind"] != "expert":
                continue
            if tensor.shape[0] != experts_before:
                raise ExpansionError(f"{key} has {tensor.shape[0]} experts, checkpoint {source} has {experts_before}")
            for box in pieces(tensor.shape, torch.float64.itemsize, chunk_bytes):
                squares = stored.read(key, box).double().reshape(box.shape[0], -1).square_().sum(dim=1)
                scores_LE[experts[key]["layer"]][box.offset[0] :][: box.shape[0]] += squares
    return {number: scores_E.tolist() for number, scores_E in scores_LE.items()}


@contextlib.contextmanager
def _opened(source: Path, experts: Experts) -> Iterator[StoredTensors]:
    """The tensors of a complete checkpoint that has all weights and buffers that run over experts.

    Raises:
        ExpansionError: if one is missing.
        CheckpointError: if there is no checkpoint, or it cannot be read.
    """
    require_complete(source)
    with StoredTensors(source) as stored:
        for key in experts:
            if key not in stored.tensors:
                raise ExpansionError(f"checkpoint {source} lacks {key}: it is of another model")
        yield stored


@contextlib.contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Make a folder to write in, and remove it if the block raises.

    Raises:
        CheckpointError: if it cannot be made, or holds something.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be written ({e.strerror}): choose another folder") from None
    if used:
        raise CheckpointError(f"{folder} is not empty: choose another folder, or remove what is in it")
    try:
        yield
    except BaseException:
        # Without metadata.json it is no checkpoint, and a full disk needs the room.
        shutil.rmtree(folder, ignore_errors=True)
        raise
