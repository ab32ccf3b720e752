"""Fills the model of a rank, weights and fp32 masters, from a published model; every rank reads what it holds.

The model is described as the live switch describes it (`model/holdings.py`): boxes of logical tensors with the memory
behind them. Whatever the layout, a rank reads those boxes, a bounded piece at a time. Masters come from the published
numbers and not from the rounded weights. Moments are left as a fresh optimizer has them.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from model.hf.logical import our_key
from model.hf.read import PublishedReader
from model.holdings import describe_stage
from model.sharded_state import model_state
from parallel.errors import CheckpointError
from parallel.layout import Layout
from parallel.regions import pieces_of
from parallel.sharded_load import asked_by_all

_CHUNK_ELEMENTS = 1 << 24


def fill(reader: PublishedReader, chunks: list[GPTModel], optimizer: Any, layout: Layout) -> int:
    """Set every weight, persistent buffer and master of this rank; collective.

    Args:
        reader: of the published model.
        chunks: bare model chunks.
        optimizer: their optimizer, without moments yet.
        layout: of both.

    Returns:
        Elements that this rank has set.

    Raises:
        CheckpointError: on all ranks, if model and folder do not have the same tensors, or a file cannot be read.
    """
    asked = asked_by_all(model_state(chunks, layout))
    names = {key: our_key(key, reader.tensors) for key in asked}
    with layout.together("comparing the model with the published one"):
        _compare(reader, asked, names)
    done = 0
    with layout.together("reading the published weights"), torch.no_grad():
        state = describe_stage(chunks, optimizer, layout, moments=False)
        for name, holding in state.holdings().items():
            key = names[name.split("/", 1)[1]]
            for box in holding.boxes:
                for part in pieces_of(box, _CHUNK_ELEMENTS):
                    reader.read_into(key, part, state.view(name, part))
                    done += part.numel
    return done


def _compare(reader: PublishedReader, asked: dict[str, Any], names: dict[str, str]) -> None:
    where = reader.source.folder
    for key in asked:
        if names[key] not in reader.tensors:
            raise CheckpointError(f"{where} has nothing for {key} of this model: it has no such part")
        shape = reader.tensors[names[key]].shape
        if asked[key] not in (None, shape):
            raise CheckpointError(f"{key} has the shape {asked[key]} in this model and {shape} by {where}/config.json")
    unused = sorted(reader.tensors.keys() - set(names.values()))
    if unused:
        raise CheckpointError(f"{where} holds {unused[0]}, for which this model has no place")
