"""What this rank holds of a stage, as boxes of logical tensors with the memory behind them.

Weights and persistent buffers come from mcore's own sharded description of the model, so whatever mcore can checkpoint can
be moved; masters and moments are the flat ranges that the optimizer keeps of the same parameters. Names are those of the
checkpoint and of the fingerprints: `weight/<key>`, `param/<key>` (fp32 master), `exp_avg/<key>`, `exp_avg_sq/<key>`.

`StageState` is the `State` of the redistribution (`parallel/reshard.py`): it hands out views of boxes, allocates the
moments of the new stage wave by wave, and frees the memory of the old one as soon as nobody needs it.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from model.sharded_state import model_state, sharded_leaves
from parallel.errors import ExpansionError
from parallel.host_memory import HostCopy
from parallel.layout import Layout
from parallel.optimizer_state import MOMENTS, OptimizerView, optimizer_views
from parallel.regions import Box, flat_boxes
from parallel.reshard_plan import Holding, Wave

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def wave_of(key: str) -> Wave:
    """When a tensor moves: all weights first, layer by layer, because they share a buffer; then the optimizer state."""
    state, parameter = key.split("/", 1)
    layer = _LAYER.search(parameter)
    number = int(layer[1]) + 1 if layer else 0
    return (0, number, 0) if state == "weight" else (1, number, ("param", *MOMENTS).index(state))


class Piece(NamedTuple):
    """A block of a logical tensor in a rank's memory.

    Attributes:
        box: where it lies in the logical tensor.
        strides: in elements, along the axes of the logical tensor (0 along axes that the memory does not have).
        first: position of its first element, counted from the first element of the memory.
    """

    box: Box
    strides: tuple[int, ...]
    first: int


class _Memory:
    """One tensor that pieces lie in; a moment may not exist before it is asked for."""

    def __init__(self, tensor: torch.Tensor | None, view: OptimizerView | None = None, name: str = "") -> None:
        self._tensor, self._view, self._name = tensor, view, name
        self._host: HostCopy | None = None

    @property
    def tensor(self) -> torch.Tensor:
        if self._tensor is None:
            assert self._view is not None
            self._tensor = self._view.moment(self._name)
        return self._tensor

    def move_to(self, host: HostCopy) -> None:
        """Lie in a copy of the whole storage from now on, where the tensor lay in the storage."""
        old = self.tensor
        self._tensor = torch.empty(0, dtype=old.dtype).set_(
            host.bytes.untyped_storage(), old.storage_offset(), old.shape, old.stride()
        )
        self._host = host

    def free(self) -> None:
        if self._host is not None:
            self._host.free()
        elif self._tensor is not None:
            self._tensor.untyped_storage().resize_(0)


class StageState:
    """The tensors of one stage on this rank (see the module's docstring)."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[Piece, _Memory]]] = {}
        self._itemsize: dict[str, int] = {}
        self._free_after: dict[Wave, list[_Memory]] = {}

    def add(self, key: str, piece: Piece, memory: _Memory, itemsize: int) -> None:
        """Note a piece; the same memory may be described twice (a tied embedding)."""
        known = self._pieces.setdefault(key, [])
        if not any(p == piece and m is memory for p, m in known):
            known.append((piece, memory))
        self._itemsize[key] = itemsize

    def holdings(self) -> dict[str, Holding]:
        """What this rank holds, to be told to the others."""
        return {
            key: Holding(self._itemsize[key], tuple(dict.fromkeys(p.box for p, _ in pieces)))
            for key, pieces in self._pieces.items()
        }

    def view(self, key: str, box: Box) -> torch.Tensor:
        """The memory of a box, shaped as the box.

        Raises:
            ExpansionError: if the box does not lie in one piece of this rank.
        """
        for piece, memory in self._pieces[key]:
            if piece.box.holds(box):
                tensor = memory.tensor
                steps = zip(box.offset, piece.box.offset, piece.strides, strict=True)
                first = tensor.storage_offset() + piece.first + sum((o - p) * s for o, p, s in steps)
                return tensor.as_strided(box.shape, piece.strides, first)
        raise ExpansionError(f"{key} at {box.offset} (extent {box.shape}) does not lie on this rank")

    def begin(self, wave: Wave) -> None:
        """Make the moments of a wave exist."""
        for key, pieces in self._pieces.items():
            if wave_of(key) == wave:
                for _, memory in pieces:
                    assert memory.tensor is not None

    def end(self, wave: Wave) -> None:
        """Free what was needed last in this wave, if `free_as_it_goes` was called."""
        for memory in self._free_after.pop(wave, ()):
            memory.free()

    def _storages(self) -> list[dict[_Memory, Wave]]:
        """By storage, the memories that lie in it with the last wave of each: weights and moments share flat buffers."""
        found: dict[int, dict[_Memory, Wave]] = {}
        for key, pieces in self._pieces.items():
            for _, memory in pieces:
                memories = found.setdefault(memory.tensor.untyped_storage().data_ptr(), {})
                memories[memory] = max(wave_of(key), memories.get(memory, wave_of(key)))
        return list(found.values())

    def host_bytes(self) -> int:
        """Host memory that `move_to_host` takes: all of it, or the largest part where the device is the host."""
        storages = [next(iter(memories)).tensor.untyped_storage() for memories in self._storages()]
        sizes = [storage.nbytes() for storage in storages]
        if any(storage.device.type != "cpu" for storage in storages):
            return sum(sizes)
        return max(sizes, default=0)

    def move_to_host(self) -> None:
        """Copy every tensor to host memory, one storage after the other, and free its memory on the device.

        Whoever holds references to the tensors must not use them any more.

        Raises:
            MemoryError: the host has no more.
        """
        for memories in self._storages():
            storage = next(iter(memories)).tensor.untyped_storage()
            host = HostCopy(storage)
            for memory in memories:
                memory.move_to(host)
            storage.resize_(0)

    def free_as_it_goes(self) -> None:
        """Let `end` free the memory of this stage; whoever holds references to its tensors must not use them any more."""
        for memories in self._storages():
            memory, wave = max(memories.items(), key=lambda entry: entry[1])
            self._free_after.setdefault(wave, []).append(memory)


def _leaf_pieces(leaf: Any) -> Iterator[tuple[str, Piece, torch.Tensor]]:
    """The pieces of one entry of a sharded state dict, with the tensor they lie in."""
    if isinstance(leaf, ShardedTensor):
        yield leaf.key, _piece(leaf, leaf.data, 0), leaf.data
        return
    if not isinstance(leaf, ShardedTensorFactory):
        return
    # Build its parts out of a tensor without memory: they are views, which tells where in the parameter they lie.
    probe = torch.empty(leaf.data.shape, dtype=leaf.data.dtype, device="meta")
    for _, part in sharded_leaves(dataclasses.replace(leaf, data=probe).build()):
        if not isinstance(part, ShardedTensor) or part.data is None or part.data._base is not probe:
            raise ExpansionError(
                f"{leaf.key} is checkpointed in a form that is not a view of the parameter; the live switch cannot move it: "
                "use upcycle.path=checkpoint"
            )
        yield part.key, _piece(part, part.data, part.data.storage_offset()), leaf.data


def _piece(leaf: ShardedTensor, data: torch.Tensor, first: int) -> Piece:
    axes = leaf.prepend_axis_num
    shape = (1,) * axes + tuple(data.shape)
    return Piece(Box(tuple(leaf.global_offset), shape), (0,) * axes + tuple(data.stride()), first)


def describe_stage(chunks: list[GPTModel], optimizer: Any, layout: Layout, *, moments: bool) -> StageState:
    """Describe what this rank holds of weights, persistent buffers, masters and moments.

    Args:
        chunks: bare model chunks.
        optimizer: their optimizer.
        layout: the layout they were built in.
        moments: whether moments belong to the state; those that the optimizer lacks are made when first needed.
    """
    state = StageState()
    of_parameter: dict[int, list[tuple[str, Piece]]] = {}
    memories: dict[int, _Memory] = {}
    with torch.no_grad():
        for part in model_state(chunks, layout).values():
            for _, leaf in sharded_leaves(part):
                for key, piece, tensor in _leaf_pieces(leaf):
                    memory = memories.setdefault(id(tensor), _Memory(tensor.detach()))
                    state.add(f"weight/{key}", piece, memory, tensor.element_size())
                    found = of_parameter.setdefault(id(tensor), [])
                    if (key, piece) not in found:
                        found.append((key, piece))
        for view in optimizer_views(optimizer):
            _describe_view(state, view, of_parameter[id(view.param)], moments)
    return state


def _describe_view(state: StageState, view: OptimizerView, pieces: list[tuple[str, Piece]], moments: bool) -> None:
    master = view.tensors["param"].detach()
    memories = {}
    # An fp32 weight is its own master.
    if master.untyped_storage().data_ptr() != view.param.untyped_storage().data_ptr():
        memories["param"] = _Memory(master)
    if moments:
        memories |= {name: _Memory(view.tensors.get(name), view, name) for name in MOMENTS}
    for key, piece in pieces:
        stop = view.start + master.numel()
        for box in flat_boxes(piece.box.shape, piece.strides, piece.first, view.start, stop):
            offset = tuple(a + b for a, b in zip(piece.box.offset, box.offset, strict=True))
            first = piece.first + sum(o * s for o, s in zip(box.offset, piece.strides, strict=True)) - view.start
            owned = Piece(Box(offset, box.shape), piece.strides, first)
            for name, memory in memories.items():
                state.add(f"{name}/{key}", owned, memory, master.element_size())
