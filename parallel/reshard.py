"""Carries out a redistribution plan on one rank: copies, messages, freeing the old state as the new one fills.

Waves run in one order on all ranks (weights layer by layer, then masters and moments layer by layer). Within a wave the
fetches of each pair of ranks are packed into messages of bounded size; the two ends pack alike, so nothing but the payload
travels. Staging memory is at most `chunk_bytes` for sending and as much for receiving.

A rank that fails in the middle (out of memory, say) goes on exchanging empty messages to the end, so that its peers are
not left waiting, and raises then; the caller makes all ranks raise together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from parallel.regions import Box, intersect, pieces_of, shift
from parallel.reshard_plan import Fetch, RankPlan, Wave, WavePlan
from parallel.transport import Transport


class State(Protocol):
    """The tensors of one stage on one rank, addressed by logical boxes."""

    def view(self, key: str, box: Box) -> torch.Tensor:
        """The memory of a box that this rank holds, shaped as the box."""

    def begin(self, wave: Wave) -> None:
        """Called before a wave; a place to allocate what it fills."""

    def end(self, wave: Wave) -> None:
        """Called after a wave; a place to free what nobody needs any more."""


@dataclass
class Moved:
    """What an execution did on this rank."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0


class _Part(NamedTuple):
    """A piece of a fetch in one message: which fetch, which of its elements, from which byte."""

    fetch: Fetch
    box: Box
    first_byte: int

    @property
    def nbytes(self) -> int:
        return self.box.numel * self.fetch.itemsize


def pack(fetches: Sequence[Fetch], message_bytes: int) -> Iterator[list[_Part]]:
    """Divide the fetches of a pair into messages; larger elements come first, so every part is aligned.

    Args:
        fetches: in an order that both ends know, falling element size.
        message_bytes: most bytes of one message; at least one element travels.
    """
    message: list[_Part] = []
    used = 0
    for fetch in fetches:
        for box in pieces_of(fetch.source, max(1, message_bytes // fetch.itemsize)):
            nbytes = box.numel * fetch.itemsize
            if message and used + nbytes > message_bytes:
                yield message
                message, used = [], 0
            message.append(_Part(fetch, box, used))
            used += nbytes
    if message:
        yield message


def execute(
    plan: RankPlan,
    old: State,
    new: State,
    transport: Transport,
    *,
    message_bytes: int,
    device: torch.device | str = "cpu",
) -> Moved:
    """Fill the new state from the old one; every rank calls it with its own part of one plan.

    Args:
        plan: this rank's part.
        old: what this rank held.
        new: what it shall hold; filled.
        transport: how bytes travel.
        message_bytes: bound of one message, equal on all ranks.
        device: where staging buffers lie.

    Raises:
        ExpansionError: if a peer is gone.
        Exception: whatever went wrong on this rank, after its peers were served.
    """
    moved = Moved()
    failure: Exception | None = None
    for wave, todo in plan.waves.items():
        if failure is None:
            try:
                new.begin(wave)
                for key, copy in todo.local:
                    new.view(key, copy.target).copy_(old.view(key, copy.source))
            except Exception as e:
                failure = e
        failure = _exchange(todo, old, new, transport, message_bytes, device, moved, failure)
        if failure is None:
            try:
                old.end(wave)
                new.end(wave)
            except Exception as e:
                failure = e
    if failure is not None:
        raise failure
    return moved


def _exchange(
    todo: WavePlan,
    old: State,
    new: State,
    transport: Transport,
    message_bytes: int,
    device: torch.device | str,
    moved: Moved,
    failure: Exception | None,
) -> Exception | None:
    """All messages of one wave; returns what failed on this rank, if anything has."""
    outgoing = {peer: pack(fetches, message_bytes) for peer, fetches in todo.sends.items()}
    incoming = {peer: pack(fetches, message_bytes) for peer, fetches in todo.receives.items()}
    while outgoing or incoming:
        out_parts = _next_messages(outgoing)
        in_parts = _next_messages(incoming)
        sends = {p: _buffer(parts, device) for p, parts in out_parts.items()}
        receives = {p: _buffer(parts, device) for p, parts in in_parts.items()}
        if failure is None:
            try:
                for peer, parts in out_parts.items():
                    for part in parts:
                        value = old.view(part.fetch.key, part.box)
                        _typed(sends[peer], part, value.dtype).copy_(value)
            except Exception as e:
                failure = e
        transport.exchange(sends, receives)
        moved.sent_bytes += sum(buffer.numel() for buffer in sends.values())
        moved.received_bytes += sum(buffer.numel() for buffer in receives.values())
        moved.messages += len(sends)
        if failure is None:
            try:
                for peer, parts in in_parts.items():
                    for part in parts:
                        _unpack(receives[peer], part, new)
            except Exception as e:
                failure = e
    return failure


def _next_messages(streams: dict[int, Iterator[list[_Part]]]) -> dict[int, list[_Part]]:
    """The next message of every peer that has one; a peer without is forgotten."""
    found = {}
    for peer in list(streams):
        parts = next(streams[peer], None)
        if parts is None:
            del streams[peer]
        else:
            found[peer] = parts
    return found


def _buffer(parts: list[_Part], device: torch.device | str) -> torch.Tensor:
    return torch.empty(sum(part.nbytes for part in parts), dtype=torch.uint8, device=device)


def _typed(buffer: torch.Tensor, part: _Part, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of one part as a tensor of the part's shape."""
    return buffer[part.first_byte : part.first_byte + part.nbytes].view(dtype).view(part.box.shape)


def _unpack(buffer: torch.Tensor, part: _Part, new: State) -> None:
    """Put a part that has arrived wherever the plan wants a copy of it."""
    for copy in part.fetch.targets:
        common = intersect(part.box, copy.source)
        if common is None:
            continue
        target = new.view(part.fetch.key, shift(common, copy.source, copy.target))
        whole = _typed(buffer, part, target.dtype)
        inside = tuple(slice(o - p, o - p + n) for o, n, p in zip(*common, part.box.offset, strict=True))
        target.copy_(whole[inside])
