"""The frozen record of one expansion: who descends from whom, by which rules, with which seed.

`plan_expansion` is pure Python on global expert ids: the same plan on every rank and for every layout. Executors
(`upcycle/transform.py`) only carry it out. Replicas are placed next to their parent ("near"): new ids are ordered by
parent, so a uniform expansion moves no expert to another expert-parallel rank.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from parallel.errors import ExpansionError
from upcycle.config import StageConfig
from upcycle.selection import select_copies

FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Where a slice of the new model comes from."""

    layer: int
    expert: int
    # Index into the list of source checkpoints; one is all an expansion needs.
    checkpoint: int = 0


@dataclass(frozen=True)
class SliceRecord:
    """How one slice (an expert, a router row, an entry of the selection bias) of the new model is made."""

    layer: int
    kind: str
    expert: int
    sources: tuple[Source, ...]
    init: str = "copy"
    scale: float = 1.0
    optimizer_rule: str = "copy"


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer of an expansion.

    Attributes:
        layer: number of the layer, from 1.
        parents: parent (old id) of each new expert, [M], ascending.
        copies: copies of each old expert, the original included, [E].
        scores: utility of each old expert, [E]; None where the rule needs none.
    """

    layer: int
    parents: tuple[int, ...]
    copies: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    def replicas(self) -> list[int]:
        """New ids that are copies; the first of each family stands for the original."""
        return [j for j in range(1, len(self.parents)) if self.parents[j] == self.parents[j - 1]]


@dataclass(frozen=True)
class ExpansionPlan:
    """One expansion, from E to M experts in every MoE layer."""

    step: int
    stage: int
    experts_before: int
    experts_after: int
    layers: tuple[LayerPlan, ...]
    selection: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=lambda: {"rule": "near"})
    optimizer_rule: str = "copy"
    bias_noise: float = 0.0
    seed: int = 0

    def layer(self, number: int) -> LayerPlan:
        """The plan of one layer.

        Raises:
            ExpansionError: if the plan does not know the layer.
        """
        for layer in self.layers:
            if layer.layer == number:
                return layer
        raise ExpansionError(f"the plan of step {self.step} has no layer {number}: it is of another model")

    def records(self, kinds: Sequence[str] = ("expert", "router", "selection_bias")) -> Iterator[SliceRecord]:
        """Every slice of the new model with its sources, layer by layer."""
        for layer in self.layers:
            for kind in kinds:
                for new, parent in enumerate(layer.parents):
                    yield SliceRecord(
                        layer=layer.layer,
                        kind=kind,
                        expert=new,
                        sources=(Source(layer.layer, parent),),
                        optimizer_rule=self.optimizer_rule,
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the digest of everything else in it."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return json.loads(text) | {"digest": hashlib.sha256(text.encode()).hexdigest()}

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON; equal plans have equal digests."""
        return str(self.to_dict()["digest"])

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ExpansionPlan":
        """Read back what `to_dict` gave.

        Raises:
            ExpansionError: if the format is unknown or the digest does not fit the content.
        """
        body = {k: v for k, v in value.items() if k not in ("digest", "format")}
        if value.get("format") != FORMAT:
            raise ExpansionError(f"plan format {value.get('format')} is unknown: this version reads format {FORMAT}")
        body["layers"] = tuple(
            LayerPlan(
                layer=x["layer"],
                parents=tuple(x["parents"]),
                copies=tuple(x["copies"]),
                scores=None if x["scores"] is None else tuple(x["scores"]),
            )
            for x in body["layers"]
        )
        plan = cls(**body)
        if plan.digest != value.get("digest"):
            raise ExpansionError(f"the plan of step {plan.step} was changed after it was made: its digest does not fit")
        return plan

    def table(self) -> list[str]:
        """The plan for the log: one line per layer with the number of experts by copies."""
        lines = [f"expansion after step {self.step}: {self.experts_before} -> {self.experts_after} experts"]
        for layer in self.layers:
            histogram = {r: layer.copies.count(r) for r in sorted(set(layer.copies))}
            lines.append(f"  layer {layer.layer}: " + ", ".join(f"{n} x r={r}" for r, n in histogram.items()))
        return lines


def plan_expansion(
    rules: StageConfig,
    model: ModelConfig,
    *,
    stage: int,
    experts_before: int,
    scores: Mapping[int, Sequence[float]] | None,
    seed: int,
) -> ExpansionPlan:
    """Decide the expansion into stage `stage`.

    Args:
        rules: the stage as configured.
        model: the network; its routing groups and MoE layers matter here.
        stage: number of the new stage, from 1.
        experts_before: E.
        scores: utility [E] per layer number; None for rules that need none.
        seed: root seed of the run; noise is drawn from (seed, stage, layer).

    Raises:
        ExpansionError: if the rule cannot reach the target.
    """
    after = rules.target(experts_before)
    layers = []
    for number in model.moe_layer_numbers():
        layer_scores = None if scores is None else [float(s) for s in scores[number]]
        copies = select_copies(
            rules.selection, layer_scores, experts_before, after, rules.max_extra_copies, model.router_groups or 1
        )
        parents = tuple(expert for expert, count in enumerate(copies) for _ in range(count))
        layers.append(LayerPlan(number, parents, tuple(copies), None if layer_scores is None else tuple(layer_scores)))
    selection: dict[str, Any] = {"rule": rules.selection}
    if rules.selection != "uniform":
        selection |= {
            "utility": rules.utility,
            "max_extra_copies": rules.max_extra_copies,
            "scoring_batches": rules.scoring_batches,
        }
    return ExpansionPlan(
        step=rules.at_step,
        stage=stage,
        experts_before=experts_before,
        experts_after=after,
        layers=tuple(layers),
        selection=selection,
        optimizer_rule=rules.optimizer_rule,
        bias_noise=rules.bias_noise,
        seed=seed,
    )
