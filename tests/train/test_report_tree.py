"""The family tree of a report: which plans it draws, what it says of the rest, and how it degrades with size."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.synthetic_run import make_plan, make_run
from train.report import write_report
from train.report.data import Expansion, RunRecord, load_run
from train.report.html import page
from train.report.plans import MAX_STAGES, Tree, family_tree
from train.report.plot import NARROW, WIDE
from train.report.tree import MAX_BANDS, MAX_LINES, draw_tree, has_tree, tree_caption
from train.run_files import RunFiles
from upcycle.plan import ExpansionPlan
from upcycle.provenance import lineage


def _tree(record: RunRecord) -> Tree:
    tree = family_tree(record.expansions)
    assert tree is not None
    return tree


def _expansions(
    counts: list[int], layers: int = 2, greedy: bool = False, ep_ranks: int = 1, lost: tuple[int, ...] = ()
) -> list[Expansion]:
    """Expansions through these counts, 100 steps apart; the plans of those in `lost` (from 0) are missing."""
    rng, found = np.random.default_rng(3), []
    for i, (before, after) in enumerate(itertools.pairwise(counts)):
        plan = make_plan(100 * (i + 1), i + 1, before, after, layers, greedy, rng, ep_ranks)
        why = "The plan of this expansion is not in plans/." if i in lost else ""
        kept = None if i in lost else plan
        found.append(Expansion(100 * (i + 1), before, after, "", None, None, None, {}, kept, why))
    return found


@pytest.fixture(scope="module")
def grown_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 -> 6 -> 6 -> 18 experts in five layers; the second switch changes the layout. Tests that change it take a copy."""
    run_dir = tmp_path_factory.mktemp("runs") / "grown"
    make_run(run_dir, [(20, 4), (20, 6), (20, 6), (20, 18)], layers=5, greedy=True, every=5, ep_ranks=2)
    return run_dir


@pytest.fixture
def record(grown_run: Path) -> RunRecord:
    return load_run(grown_run)


def test_the_tree_is_that_of_the_plans(grown_run: Path, record: RunRecord) -> None:
    tree = _tree(record)
    assert tree.counts == [4, 6, 18] and tree.layers == [1, 2, 3, 4, 5] and tree.layout_changes == 1
    stages = lineage([ExpansionPlan.from_dict(plan) for plan in RunFiles(grown_run).read_plans().values()])
    for layer in tree.layers:
        assert tree.founders(layer)[-1] == [chain[-1] for chain in stages[-1][layer]]
    # The layer whose families differ most in size is drawn with the first and the last.
    sizes = {n: np.bincount(tree.founders(n)[-1], minlength=4) for n in tree.layers}
    uneven = max(tree.layers, key=lambda n: float(sizes[n].var()))
    assert tree.shown == sorted({1, uneven, 5})

    caption = tree_caption(record)
    drawn = np.concatenate([sizes[n] for n in tree.shown])
    assert f"4 families per layer, each with {drawn.min()} to {drawn.max()} of the 18 experts after step 60." in caption
    assert f"Shown: {len(tree.shown)} of 5 layers: the first, the last and the one that grew most unevenly." in caption
    assert "Lines cross where the placement (spread)" in caption
    assert "Changes of layout, in which every expert keeps its id, are not drawn." in caption


def test_the_page_holds_the_tree(tmp_path: Path, grown_run: Path) -> None:
    text = write_report(grown_run, tmp_path / "page.html").read_text()
    assert '<h2 id="family_tree">Family tree of the experts</h2>' in text
    assert (tmp_path / "page" / "family_tree.png").stat().st_size > 5000
    # After the expansions it is drawn from, before what became of the families.
    assert text.index("Expansion after step 60") < text.index('id="family_tree"') < text.index('id="expert_load_map"')


def test_lines_and_discs_are_counted(record: RunRecord) -> None:
    """As many lines as experts have parents, as many numbers as there are experts."""
    tree = _tree(record)
    figure = draw_tree(record, WIDE)
    assert len(figure.axes) == len(tree.shown)
    for axis, layer in zip(figure.axes, tree.shown, strict=True):
        lines = [
            len(collection.get_segments()) for collection in axis.collections if hasattr(collection, "get_segments")
        ]
        assert sum(lines) == 6 + 18
        parents = [link.parents[layer] for link in tree.links if link.parents is not None]
        replicas = sum(len(stage) - len(set(stage)) for stage in parents)
        originals = sum(sum(stage.count(p) > 1 for p in set(stage)) for stage in parents)
        assert sorted(lines) == sorted([replicas, originals, 24 - replicas - originals])
        assert [text.get_text() for text in axis.texts] == [
            str(e) for count in (4, 6, 18) for e in _by_role(tree, layer, count)
        ]


def _by_role(tree: Tree, layer: int, count: int) -> list[int]:
    """Experts of a stage in the order they are drawn: not copied, originals, replicas."""
    column = tree.counts.index(count)
    parents = tree.links[column - 1].parents if column else None
    if parents is None:
        return list(range(count))
    of = parents[layer]
    roles = {e: (of.count(p) > 1) + (p in of[:e]) for e, p in enumerate(of)}
    return sorted(range(count), key=lambda e: (roles[e], e))


def test_large_models_are_drawn_as_bands(record: RunRecord) -> None:
    for counts, greedy in (([64, 128], True), ([256, 512], False)):
        big = replace(record, expansions=_expansions(counts, layers=61, greedy=greedy))
        figure = draw_tree(big, NARROW)
        assert len(figure.axes) == (3 if greedy else 1)
        # Replicas of `near` stand beside each other: a band for each family, or for a few of them.
        bands = max(len(collection.get_paths()) for collection in figure.axes[0].collections)
        assert bands == min(counts[0], MAX_BANDS)
        assert len(figure.axes[0].texts) < 8
        assert f"{counts[0]} families per layer" in tree_caption(big)
    assert "All 61 layers have the same tree." in tree_caption(big)
    assert "up to 4 neighbouring experts" in tree_caption(big)
    edge = replace(record, expansions=_expansions([8, MAX_LINES], layers=1))
    assert "A line leads" in tree_caption(edge)


def test_spread_families_in_bands_cover_every_expert(record: RunRecord) -> None:
    spread = replace(record, expansions=_expansions([64, 96, 192], greedy=True, ep_ranks=8))
    tree, caption = _tree(spread), tree_caption(spread)
    for layer in tree.layers:
        assert sorted(set(tree.founders(layer)[-1])) == list(range(64))
    assert "Bands cross where the placement (spread)" in caption
    assert draw_tree(spread, WIDE).axes


def test_a_narrow_page_shows_one_long_layer(record: RunRecord) -> None:
    long = replace(record, expansions=_expansions([8, 12, 36], layers=6, greedy=True))
    assert len(draw_tree(long, WIDE).axes) > 1 and len(draw_tree(long, NARROW).axes) == 1
    assert re.search(r"A narrow page shows layer \d alone\.", tree_caption(long))


def test_of_many_stages_the_newest_are_drawn(record: RunRecord) -> None:
    many = replace(record, expansions=_expansions([2, 4, 8, 16, 32, 64, 128, 256]))
    tree = _tree(many)
    assert tree.counts == [8, 16, 32, 64, 128, 256] and len(tree.counts) == MAX_STAGES
    assert "The first 2 of 7 expansions are not drawn." in tree_caption(many)
    assert draw_tree(many, NARROW).axes


def test_a_gap_in_the_plans_is_drawn_as_one(record: RunRecord) -> None:
    for counts in ([4, 8, 16, 32], [64, 128, 256, 512]):
        gap = replace(record, expansions=_expansions(counts, lost=(1,)))
        tree, caption = _tree(gap), tree_caption(gap)
        assert [list(segment) for segment in tree.segments()] == [[0, 1], [2, 3]]
        assert tree.founders(1)[1] == [e // 2 for e in range(counts[1])]
        assert tree.founders(1)[3] == [e // 2 for e in range(counts[3])]
        assert f"{counts[0]} families per layer, each with 2 of the {counts[1]} experts after step 100." in caption
        assert f"{counts[2]} families per layer, each with 2 of the {counts[3]} experts after step 300." in caption
        said = f"Not known: how {counts[1]} experts became {counts[2]} after step 200. The plan of this expansion is not in"
        assert said in caption
        assert [text.get_text() for text in draw_tree(gap, WIDE).axes[0].texts].count("no usable plan") == 1
    lost = replace(record, expansions=_expansions([4, 8, 16], lost=(0, 1)))
    assert not has_tree(lost)
    # An event that is missing breaks the chain as well.
    first, _, third = _expansions([4, 8, 16, 32])
    broken = replace(record, expansions=[first, third])
    assert "An expansion is missing: 8 experts do not lead to the 16" in tree_caption(broken)


def _edited(plan: dict[str, Any]) -> str:
    plan["layers"][0]["parents"][0] = 3
    return json.dumps(plan)


def _rewritten(plan: dict[str, Any], **changes: Any) -> str:
    return json.dumps(replace(ExpansionPlan.from_dict(plan), **changes).to_dict())


DAMAGE: list[tuple[Callable[[dict[str, Any]], str | bytes], str]] = [
    (lambda plan: json.dumps(plan)[:-40], "is damaged: it is not JSON"),
    (lambda plan: b"\xff\xfe", "is damaged: it is not JSON"),
    (lambda plan: "[]", "is not used: it holds no plan"),
    (lambda plan: "{}", "is not used: plan format None is unknown"),
    (_edited, "is not used: the plan of step 60 was changed after it was made"),
    (lambda plan: _rewritten(plan, layers=()), "is not used: it names no layer"),
    (lambda plan: _rewritten(plan, experts_after=17), "does not say where every expert of layer 1 comes from"),
    (
        lambda plan: json.dumps(make_plan(60, 3, 6, 12, 5, False, np.random.default_rng(0))),
        "it is of 6 -&gt; 12 experts after step 60, the run recorded 6 -&gt; 18 experts",
    ),
    (
        lambda plan: json.dumps(make_plan(40, 2, 6, 18, 5, False, np.random.default_rng(0))),
        "experts after step 40, the run",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[str(i) for i in range(len(DAMAGE))])
def test_a_damaged_plan_is_named_and_not_used(
    tmp_path: Path, grown_run: Path, damage: Callable[[dict[str, Any]], str | bytes], message: str
) -> None:
    files = _copy(grown_run, tmp_path / "run")
    path = files.plans / "step-00000060.json"
    text = damage(json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    record = load_run(files.run_dir)
    assert record.expansions[-1].plan is None and record.expansions[0].plan is not None
    shown = page(record, [])
    assert message in shown and "step-00000060.json" in shown
    # What is known is drawn, and the caption says what is not.
    assert _tree(record).counts == [4, 6, 18] and len(_tree(record).segments()) == 2
    assert "Not known: how 6 experts became 18 after step 60. The plan plans/step-00000060.json" in tree_caption(record)


def test_plans_that_were_left_behind_are_not_drawn(tmp_path: Path, grown_run: Path) -> None:
    """The guard, or a resume, went back to 6 experts and the run did not grow again; the plan is still there."""
    for name in ("return", "resume"):
        files = _copy(grown_run, tmp_path / name)
        files.append_event(name, step=60, checkpoint="checkpoints/step-00000060-stage2", num_experts=6, stage=2)
        files.truncate_after(60)
        (files.plans / "step-00000060.json").write_text("left behind, and torn")
        record = load_run(files.run_dir)
        assert _tree(record).counts == [4, 6]
        assert "18" not in tree_caption(record) and "Not known" not in tree_caption(record)
        assert draw_tree(record, WIDE).axes


def test_a_run_that_began_with_another_says_so(tmp_path: Path, grown_run: Path, record: RunRecord) -> None:
    assert "belong to the run" not in tree_caption(record)
    files = _copy(grown_run, tmp_path / "run")
    lines = files.events.read_text().splitlines(keepends=True)
    files.events.write_text("".join(line for line in lines if json.loads(line)["step"] >= 60))
    metrics = files.metrics.read_text().splitlines(keepends=True)
    files.metrics.write_text("".join(metrics[60:]))
    later = load_run(files.run_dir)
    assert _tree(later).counts == [6, 18]
    assert "Older stages belong to the run this one was started from." in tree_caption(later)


def _copy(source: Path, target: Path) -> RunFiles:
    """The files of a run without its report."""
    for path in [p for p in source.rglob("*") if p.is_file() and "report" not in p.name]:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return RunFiles(target)
