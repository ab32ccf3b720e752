"""What a switch would send between ranks, with the planner of the running job and no process but this one.

`parallel/cluster.py` says what every rank would hold, `parallel/reshard_plan.py` who fetches what from whom. Two things
keep a thousand ranks affordable. Where the pipeline stays, its ranks never exchange with each other, and those with
layers of the same kind do the same. And weights of one shape and kind move alike, so one of them is planned. Where that is
still too much, fewer layers are planned and the bytes scaled, which the result says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from model.network import Chunk, network_chunks
from parallel.cluster import LogicalTensor, describe_rank, round_up
from parallel.config import ParallelConfig
from parallel.reshard_plan import Holding, plan_key
from train.config import RunSettings
from upcycle.plan import plan_expansion

Pair = tuple[int, int]
# Ranks x tensors above which fewer layers are planned: a few seconds on one core.
_AFFORDABLE = 100_000


@dataclass(frozen=True)
class Links:
    """Bandwidths, per rank and direction, in GB/s; assumptions, not measurements.

    Attributes:
        network: between nodes.
        node: inside a node.
        ranks_per_node: ranks that share one.
    """

    network: float = 40.0
    node: float = 300.0
    ranks_per_node: int = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes of one switch.

    Attributes:
        pairs: (sender, receiver) -> bytes.
        note: how the experts' descent was guessed, and whether layers were scaled.
        parents: parent of every new expert.
    """

    pairs: Mapping[Pair, int]
    parents: tuple[int, ...]
    note: list[str] = field(default_factory=list)

    @property
    def moved(self) -> int:
        """Bytes between ranks."""
        return sum(self.pairs.values())

    def between_nodes(self, ranks_per_node: int) -> int:
        """Bytes that leave a node."""
        return sum(n for (a, b), n in self.pairs.items() if a // ranks_per_node != b // ranks_per_node)

    def busiest(self, count: int) -> list[tuple[Pair, int]]:
        """The pairs with most bytes."""
        return sorted(self.pairs.items(), key=lambda item: (-item[1], item[0]))[:count]

    def seconds(self, links: Links) -> float:
        """Longest time of any rank for what it sends or receives, network and node one after the other."""
        spent: dict[tuple[int, str], float] = {}
        for (sender, receiver), count in self.pairs.items():
            inside = sender // links.ranks_per_node == receiver // links.ranks_per_node
            took = count / ((links.node if inside else links.network) * 1e9)
            for end in ((sender, "out"), (receiver, "in")):
                spent[end] = spent.get(end, 0.0) + took
        return max(spent.values(), default=0.0)

    def largest_by_rank(self) -> tuple[int, int]:
        """Most bytes that one rank sends, and that one receives."""
        sent: dict[int, int] = {}
        received: dict[int, int] = {}
        for (sender, receiver), count in self.pairs.items():
            sent[sender] = sent.get(sender, 0) + count
            received[receiver] = received.get(receiver, 0) + count
        return max(sent.values(), default=0), max(received.values(), default=0)


def guessed_parents(settings: RunSettings, number: int, world_size: int) -> tuple[tuple[int, ...], list[str]]:
    """Parents of the experts of a stage, as far as they can be known before the experts are scored.

    Args:
        settings: of the run, every stage with its step.
        number: of the stage that begins, from 1.
        world_size: processes of the run.

    Returns:
        Parents [M], the same for all layers, and what was assumed.

    Raises:
        ExpansionError: if the rules cannot reach the target.
    """
    rules = settings.upcycle.stages[number - 1]
    notes: list[str] = []
    experts = settings.experts_of(number - 1)
    if not rules.grows():
        return tuple(range(experts)), notes
    if rules.selection != "uniform":
        even = rules.target(experts) % experts == 0
        notes.append(
            f"selection={rules.selection} depends on scores that do not exist yet: counted with "
            + ("the same copies for all experts" if even else "equal scores")
        )
        rules = replace(rules, selection="uniform" if even else "greedy")
    if rules.placement != "near":
        notes.append(f"placement={rules.placement} depends on loads that do not exist yet: counted with placement=near")
        rules = replace(rules, placement="near")
    before, after = settings.parallel_of(number - 1), settings.parallel_of(number)
    one = next(iter(settings.model.moe_layer_numbers()))
    plan = plan_expansion(
        rules,
        settings.model,
        stage=number,
        experts_before=experts,
        scores=None
        if rules.selection == "uniform"
        else {n: [1.0] * experts for n in settings.model.moe_layer_numbers()},
        seed=settings.run.seed,
        ep_ranks=after.expert,
        ep_ranks_before=before.expert,
    )
    return next(layer.parents for layer in plan.layers if layer.layer == one), notes


def switch_traffic(
    settings: RunSettings, number: int, world_size: int, vocab_size: int, ranks_per_node: int = 8
) -> Traffic:
    """Bytes between every pair of ranks at the beginning of a stage on the live path.

    Args:
        settings: of the run, every stage with its step.
        number: of the stage that begins, from 1.
        world_size: processes.
        vocab_size: tokens of the tokenizer.
        ranks_per_node: a holder on the receiver's node is preferred.

    Raises:
        ExpansionError: if the rules cannot reach the target.
    """
    parents, notes = guessed_parents(settings, number, world_size)
    before, after = settings.parallel_of(number - 1), settings.parallel_of(number)
    counts = settings.upcycle.expert_counts(settings.model.num_experts)
    weight = 2 if settings.run.precision == "bf16" else 4
    old, new = (
        network_chunks(settings.model, counts[stage], parallel, vocab_size, weight)
        for stage, parallel in ((number - 1, before), (number, after))
    )
    if settings.optimizer.overlap_grad_reduce is True or max(before.chunks(), after.chunks()) > 1:
        notes.append(
            "masters and moments are cut as in one buffer per rank; buckets and model chunks shift them a little"
        )
    mover = _Mover(before, after, world_size, settings, parents, ranks_per_node)
    pairs: dict[Pair, int] = {}
    if (before.pipeline, before.chunks()) == (after.pipeline, after.chunks()):
        mover.stage_by_stage(old, new, pairs)
    else:
        mover.add(range(world_size), _tensors(old), _tensors(new), pairs)
    if mover.scaled:
        notes.append(f"planned for {mover.scaled[0]} of {mover.scaled[1]} layers of a rank, bytes scaled")
    return Traffic(pairs, parents, notes)


def _tensors(chunks: Sequence[Chunk], stage: int | None = None) -> list[LogicalTensor]:
    return [t for chunk in chunks if stage is None or chunk.stage == stage for t in chunk.tensors]


def _alike(tensors: Sequence[LogicalTensor]) -> tuple[object, ...]:
    """Equal for pipeline ranks whose parameters have the same shapes and kinds."""
    return tuple((t.shape, t.expert, t.split, t.halves) for t in tensors)


class _Mover:
    """Plans tensor by tensor."""

    def __init__(
        self,
        before: ParallelConfig,
        after: ParallelConfig,
        world_size: int,
        settings: RunSettings,
        parents: tuple[int, ...],
        ranks_per_node: int,
    ) -> None:
        self._before, self._after, self._world = before, after, world_size
        self._distributed = settings.optimizer.distributed
        # An fp32 weight is its own master.
        self._states = {"param": 3} if settings.run.precision == "bf16" else {"param": 2}
        self._parents, self._per_node, self._period = parents, ranks_per_node, settings.model.moe_period
        self.scaled: tuple[int, int] | None = None

    def stage_by_stage(self, old: Sequence[Chunk], new: Sequence[Chunk], pairs: dict[Pair, int]) -> None:
        """One pipeline rank after the other; those that are alike are planned once."""
        size = self._world // self._before.pipeline
        known: dict[object, tuple[int, dict[Pair, int]]] = {}
        for stage in range(self._before.pipeline):
            mine, next_ = _tensors(old, stage), _tensors(new, stage)
            first = stage * size
            # Which holder is near depends on where nodes begin.
            kind = (_alike(mine), _alike(next_), first % self._per_node)
            if kind not in known:
                found: dict[Pair, int] = {}
                self.add(range(first, first + size), mine, next_, found)
                known[kind] = (first, found)
            origin, found = known[kind]
            for (sender, receiver), count in found.items():
                pairs[sender - origin + first, receiver - origin + first] = count

    def add(self, ranks: range, old: list[LogicalTensor], new: list[LogicalTensor], pairs: dict[Pair, int]) -> None:
        """Plan the tensors that some ranks share, all of them or a sample of layers."""
        size = sum(math.prod(t.shape) for t in new)
        if len(ranks) * len(new) > _AFFORDABLE:
            old, new = self._sample(len(ranks), old, new)
        factor = size / sum(math.prod(t.shape) for t in new)
        for pair, count in self._plan(ranks, old, new).items():
            pairs[pair] = pairs.get(pair, 0) + round(count * factor)

    def _sample(
        self, ranks: int, old: list[LogicalTensor], new: list[LogicalTensor]
    ) -> tuple[list[LogicalTensor], list[LogicalTensor]]:
        """The tensors of fewer layers, whole periods of dense and MoE layers, as many on each pipeline rank."""
        layers = sorted({n for t in new if (n := _layer_of(t)) is not None})
        same = self._before.pipeline == self._after.pipeline
        stages = 1 if same else math.lcm(self._before.pipeline, self._after.pipeline)
        share = max(1, len(layers) // stages)
        wanted = min(share, round_up(max(1, _AFFORDABLE * share // (ranks * len(new))), self._period))
        # From the end of each share: leading layers may be dense.
        kept = {n for first in range(0, len(layers), share) for n in layers[first : first + share][-wanted:]}
        self.scaled = (len(kept), len(layers))
        return [t for t in old if _layer_of(t) in {*kept, None}], [t for t in new if _layer_of(t) in {*kept, None}]

    def _plan(self, ranks: range, old: list[LogicalTensor], new: list[LogicalTensor]) -> dict[Pair, int]:
        olds = self._held(ranks, self._before, old)
        news = self._held(ranks, self._after, new)
        tensors = {t.key: t for t in new}
        pairs: dict[Pair, int] = {}
        known: dict[object, dict[Pair, int]] = {}
        for key, held in news.items():
            state, name = key.split("/", 1)
            tensor = tensors[name]
            moved_rows = tensor.expert or ".mlp.router." in name
            if not moved_rows and olds[key] == held:
                continue
            # Optimizer state lies elsewhere for every tensor.
            kind: object = key if state != "weight" else (tensor.shape, tensor.expert, tensor.split, tensor.stage)
            if state == "weight":
                kind = (kind, tensor.halves, tuple(olds[key]), moved_rows)
            if kind not in known:
                rows = self._parents if moved_rows else None
                known[kind] = found = {}
                for receiver, plan in plan_key(key, olds[key], held, rows, self._per_node).items():
                    for sender, fetches in plan.fetches.items():
                        found[sender, receiver] = sum(f.nbytes for f in fetches)
            times = self._states.get(state, 1)
            for pair, count in known[kind].items():
                pairs[pair] = pairs.get(pair, 0) + count * times
        return pairs

    def _held(
        self, ranks: range, parallel: ParallelConfig, tensors: list[LogicalTensor]
    ) -> dict[str, dict[int, Holding]]:
        """Key -> what each rank holds of it; of the states, which are cut alike, one."""
        found: dict[str, dict[int, Holding]] = {}
        for rank in ranks:
            held = describe_rank(rank, self._world, parallel, tensors, distributed=self._distributed)
            for key, holding in held.items():
                if key.startswith("weight/") or key.split("/", 1)[0] in self._states:
                    found.setdefault(key, {})[rank] = holding
        return found


def _layer_of(tensor: LogicalTensor) -> int | None:
    """Number of the layer of a parameter; None for those outside."""
    parts = tensor.key.split(".")
    return int(parts[2]) if parts[0] == "decoder" and parts[1] == "layers" else None
