"""Boxes of our tensors out of a published model: only the slices that a box needs are read.

How to use:

    reader = PublishedReader(PublishedModel(folder), model)
    reader.read_into("decoder.layers.0.self_attention.linear_qkv.weight", Box((0, 0), (64, 32)), target)
"""

import math
from bisect import bisect_left
from itertools import count

import torch

from model.config import ModelConfig
from model.hf.logical import logical_tensors, published_shapes
from model.hf.registry import family_of
from model.hf.source import PublishedModel
from parallel.errors import CheckpointError
from parallel.regions import Box, intersect

# Rotary frequencies, which Llama 2 and others of its time hold as tensors: config.json says what they are.
_COMPUTED = ".rotary_emb.inv_freq"
# Elements that are compared at a time.
_COMPARED = 1 << 22


class PublishedReader:
    """Our tensors, read from a published model.

    Args:
        source: the folder.
        model: the network that it is read into, by the folder's config.json or by a configuration that may differ.

    Attributes:
        tensors: ours, by key.
        left_out: names in the folder that are no part of what is trained here.

    Raises:
        ConfigError: if config.json is of no known family, or the family lacks a part that the model has.
        CheckpointError: naming a tensor that is missing, unknown or of another shape.
    """

    def __init__(self, source: PublishedModel, model: ModelConfig) -> None:
        self.source, self.family = source, family_of(source.config)
        self.tensors = logical_tensors(model, model.num_experts, self.family.names)
        self._first = {key: [b.box.offset[0] for b in t.blocks] for key, t in self.tensors.items()}
        self._extent = {key: max(b.box.shape[0] for b in t.blocks) for key, t in self.tensors.items()}
        self.left_out = sorted(
            n for n in source.tensors if n.endswith(_COMPUTED) or self.family.left_out(source.config, n)
        )
        if model.tie_embeddings:
            self._leave_out_tied(self.family.names["embedding"], self.family.names["output"])
        self._check()

    def _leave_out_tied(self, embedding: str, output: str) -> None:
        """Leave out a second copy of a tied embedding, which some tools write; it must be one."""
        there = self.source.tensors
        if output not in there or embedding not in there:
            return
        (rows, width), shape = there[embedding].shape, there[output].shape
        step = max(1, _COMPARED // width)
        for first in range(0, rows, step):
            block = (first, 0), (min(step, rows - first), width)
            if shape != (rows, width) or not torch.equal(
                *(self.source.read(name, *block).float() for name in (embedding, output))
            ):
                raise CheckpointError(
                    f"{self.source.folder} has {output} other than {embedding}, but its config.json says "
                    "tie_word_embeddings=true: correct whichever is wrong"
                )
        self.left_out = sorted([*self.left_out, output])

    def _check(self) -> None:
        wanted, there, where = published_shapes(self.tensors.values()), self.source.tensors, self.source.folder
        missing = [name for name in wanted if name not in there]
        if missing:
            raise CheckpointError(f"{where} lacks {len(missing)} tensors of this model, first {missing[0]}")
        extra = sorted(there.keys() - wanted.keys() - set(self.left_out))
        if extra:
            raise CheckpointError(
                f"{where} holds {len(extra)} tensors that have no place in {self.family.model_type}, first {extra[0]}"
            )
        for name, shape in wanted.items():
            if there[name].shape != shape:
                raise CheckpointError(
                    f"{where} has {name} of shape {list(there[name].shape)}, but its config.json asks for {list(shape)}"
                )

    def read_into(self, key: str, box: Box, target: torch.Tensor) -> None:
        """Fill a tensor with a box of one of ours, cast to its type.

        Args:
            key: of our tensor.
            box: any block of it.
            target: of the box's shape, of any type and device.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        tensor, filled = self.tensors[key], 0
        for number in count(bisect_left(self._first[key], box.offset[0] - self._extent[key] + 1)):
            if number == len(tensor.blocks) or tensor.blocks[number].box.offset[0] >= box.offset[0] + box.shape[0]:
                break
            block = tensor.blocks[number]
            common = intersect(block.box, box)
            if common is None:
                continue
            here = target
            for axis, (first, at, extent) in enumerate(zip(box.offset, *common, strict=True)):
                here = here.narrow(axis, at - first, extent)
            if block.name is None:
                here.zero_()
            else:
                axes = len(block.offset)
                moved = zip(block.offset, common.offset[-axes:], block.box.offset[-axes:], strict=True)
                offset = tuple(start + at - first for start, at, first in moved)
                here.copy_(self.source.read(block.name, offset, common.shape[-axes:]).view(here.shape))
            filled += common.numel
        if filled != box.numel:
            raise AssertionError(f"the blocks of {key} cover {filled} of {box.numel} elements of {box}")

    def bytes_read(self) -> int:
        """Bytes of all tensors of the folder that are taken."""
        names = published_shapes(self.tensors.values())
        taken = (self.source.tensors[name] for name in names)
        return sum(math.prod(t.shape) * t.dtype.itemsize for t in taken)
