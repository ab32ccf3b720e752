"""The family tree of a report: which expert came from which, at every stage, drawn from the run's plans.

Stages stand side by side, oldest at the left, and in each the experts from top to bottom by id, as in the map of expert
load. Small models have a line for each expert; large ones a band for each family, or for a few neighbouring ones.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D

from train.report.data import Floats, RunRecord
from train.report.plans import Tree, family_tree
from train.report.plot import INK, RAW, SECOND, SMOOTH, Canvas, count_text, new_figure
from upcycle.provenance import families

# Up to this many experts in a stage each has a line and a number of its own.
MAX_LINES = 48
# Of a larger model, at most this many bands; families beyond it share one with their neighbours.
MAX_BANDS = 64
# Families picked out of the bands in black; if there are few, all are named and none is black.
MARKED, FEW = 3, 16
# On a narrow page a column this long leaves room for one layer.
MAX_NARROW = 24
# Height of an expert with a number, in inches, and of a panel of bands.
PITCH, BANDS_HEIGHT = 0.165, 3.3
# Half the width of the bar that stands for a stage of many experts, as a share of the space between stages.
BAR = 0.018
# Bands lower than this share of a panel are threads.
THREAD = 0.006
SHADES = LinearSegmentedColormap.from_list("families", ["#e9efeb", "#7d998a"])
# The same smooth step for every line: 0 at the older stage, 1 at the newer.
_T = np.linspace(0.0, 1.0, 25)
_S = _T * _T * (3.0 - 2.0 * _T)


def has_tree(record: RunRecord) -> bool:
    """Whether any plan tells how experts descend."""
    return family_tree(record.expansions) is not None


def draw_tree(record: RunRecord, canvas: Canvas) -> Any:
    """A panel per layer, side by side on a wide page, one below the other on a narrow one."""
    tree = family_tree(record.expansions)
    assert tree is not None, "draw_tree was called for a run without a family tree"
    lines = _as_lines(tree)
    shown = tree.shown
    if canvas.narrow and lines and max(tree.counts) > MAX_NARROW:
        shown = [_narrow_layer(tree)]
    # A panel of many stages needs the width of the page.
    columns = len(shown) if not canvas.narrow and len(tree.counts) <= 4 else 1
    rows = -(-len(shown) // columns)
    height = 0.55 + (max(1.4, PITCH * max(tree.counts)) if lines else BANDS_HEIGHT)
    figure = new_figure(canvas, 0.45 + rows * height)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, layer in zip(axes, shown, strict=True):
        roomy = canvas.width / columns > 1.15 * len(tree.counts)
        _prepare(axis, tree, layer, spare=0.16 if lines else 0.3, roomy=roomy)
        if lines:
            _draw_lines(axis, tree, layer)
        else:
            _draw_bands(axis, tree, layer)
        for column, link in enumerate(tree.links):
            if link.parents is None:
                place = {"ha": "center", "va": "center", "rotation": 90, "style": "italic", "color": "#5b636a"}
                axis.text(column + 0.5, 0.5, "no usable plan", fontsize=8, **place)
    if lines:
        figure.legend(handles=_line_legend(), loc="outside upper left", ncols=3, handlelength=2.2, columnspacing=1.4)
    return figure


def _as_lines(tree: Tree) -> bool:
    return max(tree.counts) <= MAX_LINES


def _narrow_layer(tree: Tree) -> int:
    """The one layer that a narrow page shows of several: the one that is neither the first nor the last, if any."""
    inner = [layer for layer in tree.shown if layer not in (tree.layers[0], tree.layers[-1])]
    return inner[0] if inner else tree.shown[-1]


def _prepare(axis: Any, tree: Tree, layer: int, spare: float, roomy: bool) -> None:
    """Axes without lines: what stage a column is stands above it."""
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_xlim(-spare, len(tree.counts) - 1 + spare)
    # The first expert on top, as in a table.
    axis.set_ylim(1.0, 0.0)
    axis.set_yticks([])
    axis.xaxis.tick_top()
    axis.tick_params(axis="x", length=0, pad=3)
    began = ["at the start" if not tree.omitted else "before"]
    began += [f"after {'step ' if roomy else ''}{_step_text(link.step)}" for link in tree.links]
    heads = [
        f"{count} experts\n{when}" if roomy else f"{count}\n{when}"
        for count, when in zip(tree.counts, began, strict=True)
    ]
    axis.set_xticks(range(len(tree.counts)), heads)
    if len(tree.shown) > 1 or len(tree.layers) > 1:
        axis.set_title("all layers" if tree.alike else f"layer {layer}", pad=6, fontweight="bold")


def _step_text(step: int) -> str:
    return count_text(step) if step >= 1e5 else f"{step:,}"


# ---- a line for each expert -----------------------------------------------------------------------------------------


def _draw_lines(axis: Any, tree: Tree, layer: int) -> None:
    """Experts as numbered discs, joined to their parents."""
    kinds: dict[str, list[Floats]] = {role: [] for role in _LINES}
    roles: list[dict[int, str]] = [dict.fromkeys(range(tree.counts[0]), "kept")]
    for column, link in enumerate(tree.links):
        before, after = tree.counts[column], tree.counts[column + 1]
        roles.append(dict.fromkeys(range(after), "kept"))
        if link.parents is None:
            continue
        for parent, children in families(link.parents[layer]).items():
            for i, child in enumerate(children):
                role = "replica" if i else "original" if len(children) > 1 else "kept"
                roles[-1][child] = role
                start, end = (parent + 0.5) / before, (child + 0.5) / after
                kinds[role].append(np.column_stack([column + _T, start + (end - start) * _S]))
    for order, (role, style) in enumerate(_LINES.items()):
        axis.add_collection(LineCollection(kinds[role], zorder=1 + 0.1 * order, **style))
    for column, count in enumerate(tree.counts):
        for role, look in _DISCS.items():
            ids = [expert for expert in range(count) if roles[column][expert] == role]
            y = [(expert + 0.5) / count for expert in ids]
            axis.scatter([column] * len(ids), y, s=98, zorder=3, clip_on=False, **look["disc"])
            for expert, height in zip(ids, y, strict=True):
                place = {"ha": "center", "va": "center_baseline", "fontsize": 6.4, "zorder": 4}
                axis.text(column, height, str(expert), color=look["text"], **place)


_LINES: dict[str, dict[str, Any]] = {
    "kept": {"colors": RAW, "linewidths": 1.1},
    "replica": {"colors": SECOND, "linewidths": 1.1, "linestyles": (0, (3.2, 1.6))},
    "original": {"colors": SMOOTH, "linewidths": 1.6},
}
_DISCS: dict[str, dict[str, Any]] = {
    "kept": {"disc": {"color": "#e3eae6", "edgecolors": RAW, "linewidths": 0.8}, "text": INK},
    "original": {"disc": {"color": SMOOTH, "edgecolors": SMOOTH, "linewidths": 0.8}, "text": "white"},
    "replica": {"disc": {"color": "white", "edgecolors": SECOND, "linewidths": 1.1}, "text": INK},
}


def _line_legend() -> list[Any]:
    names = {"original": "original of a family", "replica": "replica", "kept": "not copied"}
    handles = []
    for role, name in names.items():
        style, disc = _LINES[role], _DISCS[role]["disc"]
        handles.append(
            Line2D(
                [],
                [],
                label=name,
                color=style["colors"],
                linewidth=style["linewidths"],
                linestyle=style.get("linestyles", "-"),
                marker="o",
                markersize=6.5,
                markerfacecolor=disc["color"],
                markeredgecolor=disc["edgecolors"],
                markeredgewidth=disc["linewidths"],
            )
        )
    return handles


# ---- a band for each family -----------------------------------------------------------------------------------------


def _draw_bands(axis: Any, tree: Tree, layer: int) -> None:
    """Stages as bars of shades, joined by bands: the shade is the place of the ancestor in the oldest stage."""
    founders = tree.founders(layer)
    for segment in tree.segments():
        first = tree.counts[segment[0]]
        width = _block_size(first)
        blocks = -(-first // width)
        marked = _marked(tree, layer, segment, founders)
        for column in segment:
            block_E = np.array(founders[column]) // width
            shade_E = SHADES(block_E / max(1, blocks - 1))
            edges = np.linspace(0.0, 1.0, tree.counts[column] + 1)
            for a, b in _runs(block_E):
                axis.fill_between(
                    [column - BAR, column + BAR], edges[a], edges[b], color=shade_E[a], linewidth=0, zorder=3
                )
            parents = tree.links[column - 1].parents if column else None
            if parents is not None:
                _join(axis, column, tree.counts[column - 1], parents[layer], block_E, shade_E)
                picked = [] if first <= FEW else [e for e, founder in enumerate(founders[column]) if founder in marked]
                _pick_out(axis, column, tree.counts[column - 1], parents[layer], picked)
            edge = {"color": INK, "linewidth": 0.6, "zorder": 6}
            for x in (column - BAR, column + BAR):
                axis.plot([x, x], [0.0, 1.0], **edge)
        if len(segment) > 1:
            _label(axis, tree, segment, marked, founders[segment[-1]])


def _block_size(experts: int) -> int:
    """Neighbouring experts that share a band: a power of two that leaves at most `MAX_BANDS` of them."""
    size = 1
    while experts > size * MAX_BANDS:
        size *= 2
    return size


def _runs(values: Any) -> Iterable[tuple[int, int]]:
    """Stretches `[a, b)` of equal neighbours."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return itertools.pairwise(edges)


def _sources(before: int, parents: list[int]) -> Floats:
    """Where each new expert's band leaves its parent, [M, 2]: siblings divide their parent's place, in order of id."""
    ends = np.zeros((len(parents), 2))
    for parent, children in families(parents).items():
        edges = np.linspace(parent / before, (parent + 1) / before, len(children) + 1)
        ends[children, 0], ends[children, 1] = edges[:-1], edges[1:]
    return ends


def _ribbon(column: int, start: tuple[float, float], end: tuple[float, float]) -> Floats:
    """Outline of a band from the stage before `column` to it."""
    top = start[0] + (end[0] - start[0]) * _S
    bottom = start[1] + (end[1] - start[1]) * _S
    x = column - 1 + BAR + (1 - 2 * BAR) * _T
    return np.concatenate([np.column_stack([x, top]), np.column_stack([x, bottom])[::-1]])


def _join(axis: Any, column: int, before: int, parents: list[int], block_E: Any, shade_E: Any) -> None:
    """The bands of one switch; neighbours on both sides are one piece."""
    ends, after = _sources(before, parents), len(parents)
    pieces, colours = [], []
    start = 0
    for i in range(1, after + 1):
        if i < after and block_E[i] == block_E[start] and abs(ends[i, 0] - ends[i - 1, 1]) < 1e-9:
            continue
        pieces.append(_ribbon(column, (ends[start, 0], ends[i - 1, 1]), (start / after, i / after)))
        colours.append(shade_E[start])
        start = i
    # White between bands that are wide enough for it; a thread would vanish under its own edges.
    heights = np.array([np.ptp(piece[[0, -1], 1]) + np.ptp(piece[[len(_T) - 1, len(_T)], 1]) for piece in pieces]) / 2
    edges = [("white" if height > THREAD else colour) for height, colour in zip(heights, colours, strict=True)]
    axis.add_collection(PolyCollection(pieces, facecolors=colours, edgecolors=edges, linewidths=0.35, zorder=1))


def _pick_out(axis: Any, column: int, before: int, parents: list[int], picked: list[int]) -> None:
    """Draw the bands of these experts in black, at least as wide as a line one can see."""
    ends, after = _sources(before, parents), len(parents)
    pieces = [_ribbon(column, (ends[e, 0], ends[e, 1]), (e / after, (e + 1) / after)) for e in picked]
    axis.add_collection(PolyCollection(pieces, facecolors=INK, edgecolors=INK, linewidths=0.5, zorder=4))


def _marked(tree: Tree, layer: int, segment: range, founders: list[list[int]]) -> list[int]:
    """The ancestors that are named: all if they are few, else the largest families, of equals the most useful.

    Three evenly spaced ones if all families are as large.
    """
    first, last = tree.counts[segment[0]], founders[segment[-1]]
    if first <= FEW:
        return list(range(first))
    sizes = np.bincount(last, minlength=first)
    if sizes.min() == sizes.max():
        return sorted({0, first // 2, first - 1})
    scores = tree.links[segment[0]].scores.get(layer) if segment[0] < len(tree.links) else None
    utility = scores if scores and len(scores) == first else [0.0] * first
    return sorted(sorted(range(first), key=lambda e: (-sizes[e], -utility[e], e))[:MARKED])


def _label(axis: Any, tree: Tree, segment: range, marked: list[int], last: list[int]) -> None:
    """Numbers of the families in black, with their sizes, and the ids at the ends of the last stage."""
    first = tree.counts[segment[0]]
    least = 0.052
    places = [(expert + 0.5) / first for expert in marked]
    # Labels push each other down, and the last ones up again, until none touch.
    spread = list(places)
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + least)
    for i in reversed(range(len(spread))):
        spread[i] = min(spread[i], 1.0 - least * (len(spread) - 1 - i))
    for expert, at, y in zip(marked, places, spread, strict=True):
        axis.annotate(
            f"{expert}: \N{MULTIPLICATION SIGN}{last.count(expert)}",
            (segment[0] - BAR, at),
            xytext=(segment[0] - 0.07, y),
            ha="right",
            va="center",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": INK, "shrinkA": 0, "shrinkB": 0},
        )
    for expert, va in ((0, "top"), (tree.counts[segment[-1]] - 1, "bottom")):
        axis.text(segment[-1] + 0.05, 0.0 if va == "top" else 1.0, str(expert), va=va, fontsize=7.5)


# ---- caption --------------------------------------------------------------------------------------------------------


def tree_caption(record: RunRecord) -> str:
    """What the tree shows, and what was left out of it."""
    tree = family_tree(record.expansions)
    assert tree is not None, "tree_caption was called for a run without a family tree"
    text = "Stages side by side, the oldest at the left; in each the experts of a layer from top to bottom by id. "
    text += _lines_text() if _as_lines(tree) else _bands_text(tree)
    for segment in tree.segments():
        if len(segment) > 1:
            text += _families_text(tree, segment)
    if tree.alike:
        text += f"All {len(tree.layers)} layers have the same tree. " if len(tree.layers) > 1 else ""
    elif len(tree.shown) < len(tree.layers):
        text += f"Shown: {len(tree.shown)} of {len(tree.layers)} layers: {tree.chosen}. "
    if _as_lines(tree) and max(tree.counts) > MAX_NARROW and len(tree.shown) > 1:
        text += f"A narrow page shows layer {_narrow_layer(tree)} alone. "
    return (text + _left_out_text(tree)).strip()


def _lines_text() -> str:
    return (
        "A line leads from each expert to what became of it: solid and dark to the expert that stands for the original "
        "(the lowest id of a family), dashed to its replicas, pale where it was not copied. "
    )


def _bands_text(tree: Tree) -> str:
    width = _block_size(max(tree.counts[segment[0]] for segment in tree.segments()))
    what, its = ("each expert", "its") if width == 1 else (f"up to {width} neighbouring experts", "their")
    text = (
        f"A band leads from {what} to {its} copies, as high as {its} share of the experts; the shade, from light to dark, "
        "is the place of the ancestor in the oldest stage. "
    )
    if all(tree.counts[segment[0]] <= FEW for segment in tree.segments()):
        return (
            text + "Numbers at the left: id of an ancestor, and how many experts of the newest stage descend from it. "
        )
    return text + (
        f"In black and named at the left, by id and number of descendants: the {MARKED} largest families, of equals those "
        "of the highest utility; if all are equally large, the first, the middle and the last. "
    )


def _families_text(tree: Tree, segment: range) -> str:
    """How many families there are between two gaps, and how large."""
    first = tree.counts[segment[0]]
    sizes: set[int] = set()
    for layer in tree.shown:
        sizes |= set(np.bincount(tree.founders(layer)[segment[-1]], minlength=first).tolist())
    size = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    after = f"the {tree.counts[segment[-1]]} experts after step {tree.links[segment[-1] - 1].step:,}"
    return f"{first} families per layer, each with {size} of {after}. "


def _left_out_text(tree: Tree) -> str:
    """Gaps, what crosses, and what is not drawn."""
    text = ""
    orders = sorted({link.placement for link in tree.links if link.placement not in ("", "near")})
    if orders:
        what = "Lines" if _as_lines(tree) else "Bands"
        text += f"{what} cross where the placement ({', '.join(orders)}) put replicas on other ranks. "
    for (before, after), link in zip(itertools.pairwise(tree.counts), tree.links, strict=True):
        if link.parents is None:
            text += f"Not known: how {before} experts became {after} after step {link.step:,}. {link.problem} "
    if tree.omitted:
        text += f"The first {tree.omitted} of {tree.omitted + len(tree.links)} expansions are not drawn. "
    if tree.layout_changes:
        text += "Changes of layout, in which every expert keeps its id, are not drawn. "
    if tree.inherited:
        text += "Older stages belong to the run this one was started from. "
    return text
