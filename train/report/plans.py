"""The plans of a run as a report may use them: checked, and chained into a family tree with its gaps.

A plan that is missing, damaged, or of another expansion than the one that happened is not used for anything; the report
says what is wrong with it and draws the rest.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from parallel.errors import ExpansionError
from train.run_files import RunFiles
from upcycle.plan import ExpansionPlan
from upcycle.provenance import check_whole, telling_layers

if TYPE_CHECKING:
    from train.report.data import Expansion

# Layers drawn side by side or one below the other.
MAX_LAYERS = 3
# Stages drawn; of more the newest.
MAX_STAGES = 6


def read_plan(files: RunFiles, step: int, before: int, after: int) -> tuple[dict[str, Any] | None, str]:
    """The plan of one switch, or None and what is wrong with it, as a sentence.

    Only the file of this switch is read: plans that a run has left behind do not matter, whatever is in them.

    Args:
        files: of the run.
        step: the step after which the switch happened.
        before: experts before it, as the run recorded them; 0 if it did not.
        after: experts after it.
    """
    path = files.plans / f"step-{step:08d}.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "The plan of this expansion is not in plans/."
    except OSError as error:
        return None, f"The plan plans/{path.name} cannot be read ({error.strerror})."
    except ValueError:
        return None, f"The plan plans/{path.name} is damaged: it is not JSON."
    try:
        if not isinstance(value, dict):
            raise ExpansionError("it holds no plan")
        plan = ExpansionPlan.from_dict(value)
        check_whole(plan)
        if not plan.layers:
            raise ExpansionError("it names no layer")
    except ExpansionError as error:
        return None, f"The plan plans/{path.name} is not used: {error}."
    recorded = f"{before} -> {after} experts after step {step}"
    planned = f"{plan.experts_before} -> {plan.experts_after} experts after step {plan.step}"
    if plan.step != step or (before and after and planned != recorded):
        return None, f"The plan plans/{path.name} is not used: it is of {planned}, the run recorded {recorded}."
    return value, ""


@dataclass(frozen=True)
class Link:
    """What joins a stage to the one before it.

    Attributes:
        step: the step after which it happened.
        parents: layer number -> parent of each new expert, [M]; None where no plan tells.
        scores: layer number -> utility of each old expert, [E], where the rule had any.
        placement: the rule that decided the order.
        problem: a sentence that says why no plan tells; empty where one does.
    """

    step: int
    parents: dict[int, list[int]] | None
    scores: dict[int, list[float]] = field(default_factory=dict)
    placement: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Tree:
    """The family tree of a run's experts.

    Attributes:
        counts: experts per layer of each stage that is drawn, oldest first.
        links: one less: how each stage but the oldest began.
        layers: layers that all known links tell of.
        shown: those to draw.
        chosen: in words how they were chosen; empty if all are drawn.
        alike: whether all layers have the same tree; then one is drawn.
        layout_changes: stages left out because every expert kept its id.
        omitted: older growths that are not drawn.
        inherited: whether there were stages before the run's own.
    """

    counts: list[int]
    links: list[Link]
    layers: list[int]
    shown: list[int]
    chosen: str
    alike: bool
    layout_changes: int
    omitted: int
    inherited: bool

    def segments(self) -> list[range]:
        """Runs of stages that known links join, as ranges of columns; a gap in the plans begins a new one."""
        starts = [0, *(i + 1 for i, link in enumerate(self.links) if link.parents is None), len(self.counts)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def founders(self, layer: int) -> list[list[int]]:
        """For each stage, which expert of the oldest stage in its segment each expert descends from."""
        found: list[list[int]] = []
        for column, count in enumerate(self.counts):
            parents = self.links[column - 1].parents if column else None
            found.append([found[-1][p] for p in parents[layer]] if parents else list(range(count)))
        return found


def family_tree(expansions: Sequence["Expansion"]) -> Tree | None:
    """Chain the plans of the switches that hold; None if nothing grew, or no plan tells how.

    Args:
        expansions: the run's switches that were not taken back, changes of layout included, in order.
    """
    grown = [expansion for expansion in expansions if expansion.to_experts > expansion.from_experts > 0]
    omitted = max(0, len(grown) - MAX_STAGES + 1)
    drawn = grown[omitted:]
    layers: list[int] = []
    links: list[Link] = []
    for i, expansion in enumerate(drawn):
        link = _link(expansion)
        known = list(link.parents or ())
        if i and drawn[i - 1].to_experts != expansion.from_experts:
            # An event is missing in between, and with it a stage.
            found = (
                f"{drawn[i - 1].to_experts} experts do not lead to the {expansion.from_experts} before this expansion"
            )
            link = Link(expansion.step, None, problem=f"An expansion is missing: {found}.")
        elif known and layers and known != layers:
            link = Link(
                expansion.step, None, problem="The plan of this expansion is of other layers than those before."
            )
        else:
            layers = layers or known
        links.append(link)
    if not layers:
        return None
    parents = {n: [link.parents[n] for link in links if link.parents is not None] for n in layers}
    alike = all(parents[n] == parents[layers[0]] for n in layers)
    shown, chosen = layers, ""
    if alike:
        shown = layers[:1]
    elif len(layers) > MAX_LAYERS:
        newest = _newest_known(links)
        shown, chosen = telling_layers({n: [stage[n] for stage in newest] for n in layers})
    first = expansions[0].plan
    return Tree(
        counts=[drawn[0].from_experts, *(expansion.to_experts for expansion in drawn)],
        links=links,
        layers=layers,
        shown=shown,
        chosen=chosen,
        alike=alike,
        layout_changes=sum(expansion.to_experts == expansion.from_experts > 0 for expansion in expansions),
        omitted=omitted,
        inherited=first is not None and first["stage"] > 1,
    )


def _newest_known(links: Sequence[Link]) -> list[dict[int, list[int]]]:
    """The parents of the newest stages that hang together: nothing can be counted across a gap in the plans."""
    found: list[dict[int, list[int]]] = []
    for link in reversed(links):
        if link.parents is not None:
            found.insert(0, link.parents)
        elif found:
            break
    return found


def _link(expansion: "Expansion") -> Link:
    plan = expansion.plan
    if plan is None:
        return Link(expansion.step, None, problem=expansion.plan_problem)
    return Link(
        expansion.step,
        {entry["layer"]: entry["parents"] for entry in plan["layers"]},
        {entry["layer"]: entry["scores"] for entry in plan["layers"] if entry["scores"]},
        str((plan.get("placement") or {}).get("rule", "")),
    )
