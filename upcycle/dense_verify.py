"""Checks that a checkpoint made from a dense one is what its plan says, before it is published. Always on.

Fingerprints (`model/fingerprint.py`) of the new tensors are compared with those of the dense checkpoint: what was carried
over has the number it had. Experts' numbers are computed a second time from the dense matrices, in the order of those,
so that a mix-up of rows, columns or shards shows; the dense matrices themselves are compared with what was saved. What
was drawn is compared with what must hold of it: shards of a copy share a row of the router, no two other rows are equal,
no two experts with redrawn units are equal. New rows have moments of zero, and a selection bias of zero.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from model.fingerprint import Fingerprints, tensor_sums
from model.sharded_state import OPTIMIZER_PREFIX
from parallel.errors import CheckpointError, ExpansionError
from parallel.optimizer_state import MOMENTS
from parallel.regions import first_element
from parallel.stream_files import pieces
from upcycle.dense_keys import Place, changed_source, factor_of, moe_key, place_of, scaled
from upcycle.dense_stream import DenseCheckpoint
from upcycle.verify import check_complete

_REMEDY = "nothing was published: use an older checkpoint; if it happens again, the disk or the memory is at fault"


def verify_from_dense(before: Fingerprints, after: Fingerprints, dense: DenseCheckpoint, *, chunk_bytes: int) -> int:
    """Compare the state before and after.

    Args:
        before: fingerprints of the dense checkpoint, from its manifest.
        after: of what was written.
        dense: the checkpoint and its plan.
        chunk_bytes: memory for a piece of a tensor.

    Returns:
        How many numbers were compared.

    Raises:
        CheckpointError: if a feed-forward on disk is not the one that was saved.
        ExpansionError: naming the first tensor, and expert, that is not what the plan says.
    """
    expected = dict(_expected(before, dense, chunk_bytes))
    for name in expected.keys() - after.keys():
        raise ExpansionError(f"{name} is missing among the new tensors; {_REMEDY}")
    for name in after.keys() - expected.keys():
        raise ExpansionError(f"{name} appeared from nowhere among the new tensors; {_REMEDY}")
    for name, numbers in sorted(expected.items()):
        found = after[name]
        same = [a is None or a == b for a, b in zip(numbers, found, strict=False)]
        if len(found) != len(numbers) or not all(same):
            row = same.index(False) if False in same else min(len(found), len(numbers))
            what = f"expert {row} of {name}" if len(numbers) > 1 else name
            raise ExpansionError(f"{what} is not what the plan says; {_REMEDY}")
    _check_drawn(after, dense)
    check_complete(after)
    return sum(number is not None for numbers in expected.values() for number in numbers)


def _expected(
    before: Fingerprints, dense: DenseCheckpoint, chunk_bytes: int
) -> Iterator[tuple[str, Sequence[int | None]]]:
    """Name of a new tensor -> its numbers; None for what is drawn."""
    experts, layers = dense.plan.experts_after, {layer.layer for layer in dense.plan.layers}
    states = set()
    for name, numbers in before.items():
        state, parameter = name.split("/", 1)
        place = place_of(parameter)
        if place is None or place.layer not in layers:
            yield name, numbers
            continue
        states.add(state)
        new = f"{state}/{moe_key(place)}"
        if place.module == "norm":
            yield new, numbers
            continue
        if state in MOMENTS and dense.plan.optimizer_rule == "reset":
            yield new, [0] * experts
            continue
        _check_source(dense, name, numbers, chunk_bytes)
        if dense.origin.method == "drop" and place.name == "weight":
            yield new, [None] * experts
        else:
            shards = _shard_sums(dense, state, place, chunk_bytes)
            yield new, [shards[shard] for shard in dense.plan.layer(place.layer).parents]
    for key, of in dense.experts.items():
        if of["kind"] == "selection_bias":
            yield f"weight/{key}", [0] * experts
        elif of["kind"] == "router":
            for state in states:
                drawn = key.endswith(".weight") and state not in MOMENTS
                yield f"{state}/{key}", [None if drawn else 0] * experts


def _check_source(dense: DenseCheckpoint, name: str, numbers: Sequence[int], chunk_bytes: int) -> None:
    """Check that a tensor of the dense checkpoint is the one that was saved; nothing else compares it as a whole.

    Raises:
        CheckpointError: naming it.
    """
    state, parameter = name.split("/", 1)
    key = parameter if state == "weight" else f"{OPTIMIZER_PREFIX}{state}.{parameter}"
    shape = dense.stored.tensors[key].shape
    numel, total = torch.Size(shape).numel(), torch.zeros(1, dtype=torch.int64)
    for box in pieces(shape, torch.float64.itemsize, chunk_bytes):
        total += tensor_sums(dense.stored.read(key, box), first_element(shape, box), numel, 1)
    if total.tolist() != list(numbers):
        raise CheckpointError(
            f"checkpoint {dense.where}: {key} is not what was saved: the files are damaged; use an older checkpoint"
        )


def _shard_sums(dense: DenseCheckpoint, state: str, place: Place, chunk_bytes: int) -> list[int]:
    """The fingerprint of every shard of a dense tensor, its numbers scaled as the plan says, [G].

    Goes through the dense tensor from its first element to its last, and knows nothing of how experts are written.
    """
    origin, stored = dense.origin, dense.stored
    prefix = "" if state == "weight" else f"{OPTIMIZER_PREFIX}{state}."
    key = f"{prefix}decoder.layers.{place.layer - 1}.mlp.linear_{place.module}.{place.name}"
    dtype, shape = stored.tensors[key].dtype, stored.tensors[key].shape
    key = changed_source(stored, origin, key, place)
    g, f = origin.granularity, origin.shard_units
    sums = torch.zeros(g, dtype=torch.int64)
    matrices = [m for m in origin.matrices if m != "down"] if place.module == "fc1" else ["down"]
    for box in pieces(shape, torch.float64.itemsize, chunk_bytes):
        part, first = stored.read(key, box), first_element(shape, box)
        if place.module == "fc2" and place.name == "bias":
            # Every expert has all of it.
            values = scaled(part, factor_of(origin, state, "down_bias")).to(dtype)
            sums += tensor_sums(values, first, shape[0], 1)
            continue
        if place.module == "fc2":
            # Blocks of f neighbouring elements belong to the shards in turn.
            values = scaled(part, factor_of(origin, state, "down")).to(dtype)
            sums += tensor_sums(values, first, f, shape[0] * g).view(shape[0], g).sum(dim=0)
            continue
        for index, matrix in enumerate(matrices):
            begin = max(box.offset[0], index * f * g) - box.offset[0]
            stop = min(box.offset[0] + box.shape[0], (index + 1) * f * g) - box.offset[0]
            if begin < stop:
                part[begin:stop] = scaled(part[begin:stop], factor_of(origin, state, matrix))
        width = torch.Size(shape).numel() // shape[0]
        blocks = tensor_sums(part.to(dtype), first, f * width, len(matrices) * g)
        sums += blocks.view(len(matrices), g).sum(dim=0)
    return sums.tolist()


def _check_drawn(after: Mapping[str, Sequence[int]], dense: DenseCheckpoint) -> None:
    """What must hold of drawn numbers.

    Raises:
        ExpansionError: naming the tensor and two experts.
    """
    for name, numbers in after.items():
        state, key = name.split("/", 1)
        kind = dense.experts.get(key, {}).get("kind")
        if state in MOMENTS or not key.endswith(".weight"):
            continue
        if kind == "router":
            rows = [dense.origin.router_row(expert) for expert in range(len(numbers))]
        elif kind == "expert" and dense.origin.method == "drop":
            rows = list(range(len(numbers)))
        else:
            continue
        for a, b in itertools.combinations(range(len(numbers)), 2):
            if (numbers[a] == numbers[b]) != (rows[a] == rows[b]):
                raise ExpansionError(
                    f"experts {a} and {b} of {name} are {'equal' if numbers[a] == numbers[b] else 'not equal'}, against "
                    f"the plan; {_REMEDY}"
                )
