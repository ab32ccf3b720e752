"""What one slice of a new model is made of: the record that every plan can list, whatever it does.

A slice is an expert, one matrix of an expert, a row of the router, or an entry of the selection bias. An expansion copies
whole experts; a dense feed-forward is cut into shards along its intermediate dimension, which then count as experts of
the stage before (`upcycle/dense.py`). Pure Python on global ids.

Legend: M experts after, G shards of a dense feed-forward, F its intermediate units.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# Matrices of a feed-forward. `gate` is there only where the activation has one.
MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Source:
    """Where a slice of the new model comes from."""

    layer: int
    # Id of the expert; of a dense feed-forward the number of the shard.
    expert: int
    # Index into the list of source checkpoints; one is all that any plan needs so far.
    checkpoint: int = 0
    # Intermediate units of a dense feed-forward that the shard holds, [first, end).
    units: tuple[int, int] | None = None


@dataclass(frozen=True)
class SliceRecord:
    """How one slice of the new model is made.

    Attributes:
        layer: number of the layer, from 1.
        kind: expert, router or selection_bias.
        expert: new id.
        sources: what it is made of; empty for what is drawn or zero.
        init: copy; redraw (copy, then draw a share of the intermediate units anew); draw; zero.
        scale: factor on the weights.
        optimizer_rule: what happens to its optimizer state.
        part: gate, up or down, where the matrices of an expert differ in scale; empty for all of it.
        generator: name of the generator of what is drawn; empty where nothing is.
    """

    layer: int
    kind: str
    expert: int
    sources: tuple[Source, ...]
    init: str = "copy"
    scale: float = 1.0
    optimizer_rule: str = "copy"
    part: str = ""
    generator: str = ""


@dataclass(frozen=True)
class DenseOrigin:
    """How the experts of a plan were made out of dense feed-forwards.

    Attributes:
        method: copy, virtual_group or drop.
        granularity: shards that each feed-forward was cut into, G.
        ffn_hidden_size: its intermediate units, F.
        activation_scale: what the output of an expert is multiplied by, so that the gates of a neutral router give the
            dense output.
        scaling: exact or even: how the matrices share that factor.
        scales: matrix -> its factor; `down_bias` is that of the output's bias, where there are biases.
        redraw_share: of the intermediate units of every expert, those that were drawn anew.
        router_std: standard deviation of the router's rows.
    """

    method: str
    granularity: int
    ffn_hidden_size: int
    activation_scale: float
    scaling: str
    scales: Mapping[str, float]
    redraw_share: float
    router_std: float

    @property
    def shard_units(self) -> int:
        """Intermediate units of one shard, and of one expert."""
        return self.ffn_hidden_size // self.granularity

    @property
    def matrices(self) -> tuple[str, ...]:
        """Matrices of a feed-forward, in the order in which the first projection stacks them."""
        return tuple(name for name in MATRICES if name in self.scales)

    def router_row(self, expert: int) -> int:
        """Which drawn row an expert has: its own, or that of its copy where the shards of a copy go together."""
        return expert // self.granularity if self.method == "virtual_group" else expert


def generator_name(seed: int, layer: int, what: str) -> str:
    """Name of the generator of what is drawn for a layer; the same wherever it is drawn."""
    return f"upcycling/{seed}/{layer}/{what}"


def dense_records(
    origin: DenseOrigin, layer: int, parents: Sequence[int], kind: str, seed: int, optimizer_rule: str
) -> Iterator[SliceRecord]:
    """The slices of one layer whose experts come from a dense feed-forward.

    Args:
        origin: how.
        layer: number of the layer.
        parents: shard of each new expert, [M].
        kind: expert, router or selection_bias.
        seed: root seed of the run.
        optimizer_rule: of the experts; a router has no past.
    """
    width, redraws = origin.shard_units, origin.method == "drop"
    for new, shard in enumerate(parents):
        if kind == "expert":
            source = Source(layer, shard, units=(shard * width, (shard + 1) * width))
            for part in origin.matrices:
                yield SliceRecord(
                    layer=layer,
                    kind=kind,
                    expert=new,
                    sources=(source,),
                    init="redraw" if redraws else "copy",
                    scale=origin.scales[part],
                    optimizer_rule=optimizer_rule,
                    part=part,
                    generator=generator_name(seed, layer, f"{new}/{part}") if redraws else "",
                )
        elif kind == "router":
            name = f"{generator_name(seed, layer, 'router')}/{origin.router_row(new)}"
            yield SliceRecord(layer, kind, new, (), "draw", optimizer_rule="reset", generator=name)
        else:
            yield SliceRecord(layer, kind, new, (), "zero", optimizer_rule="reset")
