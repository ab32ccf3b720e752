"""The frozen record of one beginning of a stage: who descends from whom, where replicas stand, by which rules and seed.

`plan_expansion` is pure Python on global expert ids: the same plan on every rank. How many copies an expert gets
(`upcycle/selection.py`) does not depend on the layout; in which order they stand (`upcycle/placement.py`) does so only
where a stage asks for it. Executors carry a plan out and decide nothing. A stage that adds no experts has a plan too, in
which every expert descends from itself. `upcycle/dense.py` makes plans whose experts are shards of dense feed-forwards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from parallel.errors import ExpansionError
from upcycle.placement import Placed, contiguous, imbalance, place
from upcycle.selection import select_copies
from upcycle.slices import DenseOrigin, SliceRecord, Source, dense_records
from upcycle.stage_config import OptimizerRule, StageConfig

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer of an expansion.

    Attributes:
        layer: number of the layer, from 1.
        parents: parent (old id) of each new expert, [M], in any order.
        copies: copies of each old expert, the original included, [E].
        scores: utility of each old expert, [E]; None where the rule needs none.
    """

    layer: int
    parents: tuple[int, ...]
    copies: tuple[int, ...]
    scores: tuple[float, ...] | None = None

    def replicas(self) -> list[int]:
        """New ids that are copies, ascending; the lowest id of each family stands for the original."""
        seen: set[int] = set()
        found = []
        for new, parent in enumerate(self.parents):
            if parent in seen:
                found.append(new)
            seen.add(parent)
        return found


@dataclass(frozen=True)
class ExpansionPlan:
    """The beginning of one stage, from E to M experts in every MoE layer; E = M where only the layout changes.

    Attributes:
        step: optimizer step after which it happens.
        stage: number of the stage that begins.
        experts_before: E.
        experts_after: M.
        layers: one plan per MoE layer.
        selection: rule and what it was told.
        placement: rule, and where ranks share the experts, per layer what it means for them.
        optimizer_rule: what happens to optimizer state.
        optimizer_scope: of which experts.
        optimizer_scale: factor of the rule `scale`; None for the default.
        mode: plain, or exact (family routing until its release).
        dense: how the experts were made out of dense feed-forwards, whose shards are the E experts before; None where
            there were experts before.
        bias_noise: half-width of the noise on the replicas' selection bias.
        seed: root seed of the run.
    """

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
    optimizer_scope: str = "replicas"
    optimizer_scale: float | None = None
    mode: str = "plain"
    dense: DenseOrigin | None = None

    @property
    def rule(self) -> OptimizerRule:
        """What happens to optimizer state; a change of layout leaves all of it as it is."""
        if self.experts_after == self.experts_before:
            return OptimizerRule()
        return OptimizerRule(self.optimizer_rule, self.optimizer_scope, self.optimizer_scale)

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
                if self.dense is not None:
                    yield from dense_records(
                        self.dense, layer.layer, layer.parents, kind, self.seed, self.optimizer_rule
                    )
                    continue
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
        if self.dense is None:
            # As older versions wrote it: equal plans have equal digests.
            del body["dense"]
        text = _canonical(body)
        return json.loads(text) | {"digest": _digest(text)}

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON; equal plans have equal digests."""
        return str(self.to_dict()["digest"])

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "ExpansionPlan":
        """Read back what `to_dict` gave, also of an older version that knew fewer fields.

        Raises:
            ExpansionError: if the format is unknown, a field is unknown or missing, or the digest does not fit the content.
        """
        if value.get("format") != FORMAT:
            raise ExpansionError(f"plan format {value.get('format')} is unknown: this version reads format {FORMAT}")
        # Over what was written and not over what was understood: fields added since then have their defaults.
        if _digest(_canonical({k: v for k, v in value.items() if k != "digest"})) != value.get("digest"):
            raise ExpansionError(
                f"the plan of step {value.get('step')} was changed after it was made: its digest does not fit"
            )
        body = {k: v for k, v in value.items() if k not in ("digest", "format")}
        try:
            body["layers"] = tuple(
                LayerPlan(
                    layer=x["layer"],
                    parents=tuple(x["parents"]),
                    copies=tuple(x["copies"]),
                    scores=None if x["scores"] is None else tuple(x["scores"]),
                )
                for x in body["layers"]
            )
            if body.get("dense") is not None:
                body["dense"] = DenseOrigin(**body["dense"])
            return cls(**body)
        except (KeyError, TypeError) as e:
            raise ExpansionError(
                f"the plan of step {value.get('step')} is not one that this version reads: {e}"
            ) from None

    def table(self) -> list[str]:
        """The plan for the log: one line per layer with the number of experts by copies, expected load and moves."""
        if self.experts_after == self.experts_before:
            return [f"layout change after step {self.step}: the {self.experts_before} experts stay as they are"]
        if self.dense is not None:
            return [self._dense_text(self.dense)]
        lines = [f"expansion after step {self.step}: {self.experts_before} -> {self.experts_after} experts"]
        placed = {x["layer"]: x for x in self.placement.get("layers", ())}
        for layer in self.layers:
            histogram = {r: layer.copies.count(r) for r in sorted(set(layer.copies))}
            text = f"  layer {layer.layer}: " + ", ".join(f"{n} x r={r}" for r, n in histogram.items())
            lines.append(text + _placed_text(placed[layer.layer]) if layer.layer in placed else text)
        return lines

    def _dense_text(self, origin: DenseOrigin) -> str:
        copies = self.experts_after // self.experts_before
        shards = f"cut into {origin.granularity} shards, " if origin.granularity > 1 else ""
        drawn = f", {origin.redraw_share:g} of the units of each drawn anew" if origin.redraw_share else ""
        factors = ", ".join(f"{name} x {factor:.4g}" for name, factor in origin.scales.items() if factor != 1)
        return (
            f"dense -> {self.experts_after} experts after step {self.step} ({origin.method}): in {len(self.layers)} layers "
            f"the feed-forward, {shards}{copies} times{drawn}; "
            + (f"weights scaled: {factors}" if factors else "weights as they are")
        )


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _placed_text(record: Mapping[str, Any]) -> str:
    """The end of a layer's line: busiest rank over the mean, and how many experts arrive from another rank."""
    text = ""
    if record["load_after"] is not None:
        before = "" if record["load_before"] is None else f"{record['load_before']:.3f} -> "
        text += f"; expected load of ranks, max/mean {before}{record['load_after']:.3f}"
    if record["moved"] is not None:
        text += f"; {record['moved']} experts come from another rank"
    return text if record["within_bound"] else text + "; the load bound is not met"


def last_growth(plans: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest of a run's plans, as dicts, that added experts; layouts may have changed after it."""
    return next((plan for plan in reversed(plans) if plan["experts_after"] > plan["experts_before"]), None)


def plan_expansion(
    rules: StageConfig,
    model: ModelConfig,
    *,
    stage: int,
    experts_before: int,
    scores: Mapping[int, Sequence[float]] | None,
    seed: int,
    loads: Mapping[int, Sequence[float]] | None = None,
    ep_ranks: int = 1,
    ep_ranks_before: int | None = None,
    homes: Sequence[Collection[int]] | None = None,
) -> ExpansionPlan:
    """Decide how stage `stage` begins.

    Args:
        rules: the stage as configured.
        model: the network; its routing groups and MoE layers matter here.
        stage: number of the new stage, from 1.
        experts_before: E.
        scores: utility [E] per layer number; None for rules that need none.
        seed: root seed of the run; draws and noise are named by (seed, stage, layer).
        loads: measured load [E] per layer number, in any unit; None takes all experts as equally busy.
        ep_ranks: expert-parallel size of the new stage.
        ep_ranks_before: that of the stage before; None for the same.
        homes: for each expert-parallel rank of the new stage, the old experts that all processes behind it hold already;
            None works them out where the expert-parallel size stays.

    Raises:
        ExpansionError: if a rule cannot reach the target.
    """
    if not rules.grows():
        return _same_experts(rules, model, stage, experts_before, seed)
    ep_before = ep_ranks if ep_ranks_before is None else ep_ranks_before
    if homes is None and ep_before == ep_ranks and experts_before % ep_ranks == 0:
        homes = contiguous(experts_before, ep_ranks)
    layers, placed = [], {}
    for number in model.moe_layer_numbers():
        scores_E = None if scores is None else tuple(float(s) for s in scores[number])
        loads_E = None if loads is None else loads[number]
        draw = f"selection/{seed}/{stage}/{number}"
        copies_E = _copies(rules, model, experts_before, scores_E, draw)
        placed[number] = _place(rules, model, copies_E, loads_E, ep_ranks, homes)
        layers.append(LayerPlan(number, placed[number].parents, tuple(copies_E), scores_E))
    return ExpansionPlan(
        step=rules.at_step,
        stage=stage,
        experts_before=experts_before,
        experts_after=rules.target(experts_before),
        layers=tuple(layers),
        selection=_selection_record(rules),
        placement=_placement_record(rules, placed, loads, ep_before, ep_ranks),
        optimizer_rule=rules.optimizer_rule,
        optimizer_scope=rules.optimizer_scope,
        optimizer_scale=rules.optimizer_scale,
        bias_noise=rules.noise(),
        mode=rules.mode,
        seed=seed,
    )


def _same_experts(rules: StageConfig, model: ModelConfig, stage: int, experts: int, seed: int) -> ExpansionPlan:
    """The plan of a stage that adds none."""
    same = tuple(range(experts))
    return ExpansionPlan(
        step=rules.at_step,
        stage=stage,
        experts_before=experts,
        experts_after=experts,
        layers=tuple(LayerPlan(n, same, (1,) * experts) for n in model.moe_layer_numbers()),
        selection={"rule": "none"},
        seed=seed,
    )


def _copies(
    rules: StageConfig, model: ModelConfig, experts_before: int, scores_E: Sequence[float] | None, draw: str
) -> list[int]:
    """How many copies each expert of a layer gets, [E]; `draw` names the generator."""
    return select_copies(
        rules.selection,
        scores_E,
        experts_before,
        rules.target(experts_before),
        rules.max_extra_copies,
        model.router_groups or 1,
        temperature=rules.temperature,
        generator=draw,
    )


def _place(
    rules: StageConfig,
    model: ModelConfig,
    copies_E: Sequence[int],
    loads_E: Sequence[float] | None,
    ep_ranks: int,
    homes: Sequence[Collection[int]] | None,
) -> Placed:
    """In which order the copies of a layer stand."""
    return place(
        copies_E,
        rule=rules.placement,
        ep_ranks=ep_ranks,
        loads_E=loads_E,
        homes=homes,
        groups=model.router_groups or 1,
        bound=rules.max_load_imbalance,
    )


def _selection_record(rules: StageConfig) -> dict[str, Any]:
    """The rule that decided the copies, with what it was told."""
    record: dict[str, Any] = {"rule": rules.selection}
    if rules.selection != "uniform":
        record |= {
            "utility": rules.utility,
            "max_extra_copies": rules.max_extra_copies,
            "scoring_batches": rules.scoring_batches,
        }
    if rules.selection == "sampling":
        record["temperature"] = rules.temperature
    return record


def _placement_record(
    rules: StageConfig,
    placed: Mapping[int, Placed],
    loads: Mapping[int, Sequence[float]] | None,
    ep_before: int,
    ep_after: int,
) -> dict[str, Any]:
    """The rule that decided the order, and what the order means for expert-parallel ranks where there are any.

    Per layer: the expected load of the busiest rank over the mean before and after the switch, each rank's share of the
    load after it, how many experts ranks fetch from others, and whether the bound of `auto` is kept. Null: not known.
    """
    record: dict[str, Any] = {"rule": rules.placement}
    if ep_before == ep_after == 1:
        return record
    if rules.placement == "auto":
        record["bound"] = rules.max_load_imbalance
    record |= {"ep_ranks_before": ep_before, "ep_ranks_after": ep_after, "layers": []}
    for number, result in placed.items():
        before = after = shares = None
        if loads is not None:
            old = [sum(loads[number][e] for e in ids) for ids in contiguous(len(loads[number]), ep_before)]
            total = sum(result.load_R)
            before, after = imbalance(old), imbalance(result.load_R)
            shares = [round(load / total, 6) if total else 1 / ep_after for load in result.load_R]
        record["layers"].append(
            {
                "layer": number,
                "load_before": before,
                "load_after": after,
                "load_shares": shares,
                "moved": result.fetches,
                "within_bound": result.within_bound,
            }
        )
    return record
