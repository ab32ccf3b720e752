"""Moves a whole training state from one stage to another across all ranks: tell, plan, agree, move.

The collective half of the live switch. It knows nothing of experts beyond a map of rows per tensor, so it serves any
change of layout as well.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from parallel.layout import Layout
from parallel.reshard import State, execute
from parallel.reshard_plan import Holding, Rows, Wave, least_bytes, plan_rank
from parallel.telling import tell
from parallel.transport import GroupTransport

# Smallest message worth its latency, whatever the number of peers.
_LEAST_MESSAGE = 64 << 10


class DescribedState(State, Protocol):
    """A state that can tell what it holds."""

    def holdings(self) -> dict[str, Holding]:
        """key -> element size and boxes on this rank."""


@dataclass
class Redistribution:
    """What was moved, over all ranks.

    Attributes:
        pairs: (sender, receiver) -> bytes.
        least: the fewest bytes that any plan could have moved.
        sent: bytes that all ranks really sent.
        copied: elements copied within ranks.
        messages: messages sent.
    """

    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    least: int = 0
    sent: int = 0
    copied: int = 0
    messages: int = 0

    def table(self, most: int = 8) -> list[str]:
        """The traffic for the log: totals, and the busiest pairs."""
        lines = [
            f"moved {self.sent / 2**20:,.1f} MiB between ranks in {self.messages} messages (least possible "
            f"{self.least / 2**20:,.1f} MiB), {self.copied:,} elements within ranks"
        ]
        busiest = sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  rank {a} -> {b}: {n / 2**20:,.1f} MiB" for (a, b), n in busiest[:most]]
        if len(busiest) > most:
            lines.append(f"  and {len(busiest) - most} more pairs")
        return lines


def told_together(rows: Rows, wave_of: Callable[[str], Wave]) -> Callable[[str], Hashable]:
    """Kinds of keys for `parallel.telling`: weights and moments by turns, experts' apart.

    Ranks have each of them alike without the others.
    """
    return lambda key: (wave_of(key)[:1], rows(key) is None)


def redistribute(
    old: DescribedState,
    new: DescribedState,
    rows: Rows,
    wave_of: Callable[[str], Wave],
    layout: Layout,
    *,
    chunk_bytes: int,
) -> Redistribution:
    """Fill a new state from an old one; collective over the job.

    Args:
        old: what this rank holds.
        new: what it shall hold.
        rows: old row of each new row per tensor; None where rows keep their place.
        wave_of: order in which tensors move.
        layout: of the job; only its world matters.
        chunk_bytes: staging memory per rank and direction.

    Raises:
        ExpansionError: on all ranks, if the states do not fit together, a rank fails, or a peer is gone.
    """
    mine = old.holdings(), new.holdings()
    olds, news = tell(mine, told_together(rows, wave_of), layout)
    with layout.together("planning the move of the training state"):
        plan = plan_rank(layout.rank, olds, news, rows, wave_of, layout.ranks_per_node)
        least = least_bytes({layout.rank: mine[0]}, {layout.rank: mine[1]}, rows)
    summaries = layout.gather_objects((plan.received_bytes(), least, plan.max_peers()))
    message_bytes = max(_LEAST_MESSAGE, chunk_bytes // max(1, max(peers for _, _, peers in summaries)))
    with layout.together("moving the training state"):
        moved = execute(plan, old, new, GroupTransport(), message_bytes=message_bytes, device=layout.device)
    result = Redistribution(
        pairs={(a, b): n for b, (received, _, _) in enumerate(summaries) for a, n in sorted(received.items())},
        least=sum(least for _, least, _ in summaries),
    )
    for sent, messages, copied in layout.gather_objects((moved.sent_bytes, moved.messages, plan.copied_elements())):
        result.sent += sent
        result.messages += messages
        result.copied += copied
    return result
