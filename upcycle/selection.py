"""How many copies each expert of one layer gets. Pure Python on global expert ids.

`r_e` counts the copies of expert e with the original included; sum r_e is the number of experts afterwards.
"""

from collections.abc import Sequence

from parallel.errors import ExpansionError


def uniform_copies(before: int, after: int) -> list[int]:
    """The same number of copies for every expert.

    Raises:
        ExpansionError: if `after` is not a multiple of `before`.
    """
    if after % before:
        raise ExpansionError(f"uniform selection cannot grow {before} experts to {after}: use selection=greedy")
    return [after // before] * before


def greedy_copies(scores: Sequence[float], after: int, cap: int) -> list[int]:
    """Most useful experts first, each up to a cap of extra copies (arXiv 2604.19835, section 4).

    With q extra slots and cap n, floor(q / n) experts get n extra copies and one gets the rest. Ties go to the lower id.

    Args:
        scores: utility of each expert, [E].
        after: experts afterwards, M.
        cap: extra copies one expert may get.

    Raises:
        ExpansionError: if the cap leaves slots empty.
    """
    before = len(scores)
    copies, left = [1] * before, after - before
    for expert in sorted(range(before), key=lambda e: (-scores[e], e)):
        extra = min(cap, left)
        copies[expert] += extra
        left -= extra
    if left:
        raise ExpansionError(
            f"max_extra_copies={cap} is too small to grow {before} experts to {after}: raise it by {-(-left // before)}"
        )
    return copies


def select_copies(
    rule: str, scores: Sequence[float] | None, before: int, after: int, cap: int, groups: int
) -> list[int]:
    """Copies per expert of one layer; under group-limited routing every routing group grows by itself.

    A routing group is a block of neighbouring ids, so families that stay inside their block keep the meaning of the
    groups a token may use.

    Args:
        rule: `uniform` or `greedy`.
        scores: utility of each expert, [E]; unused by uniform.
        before: experts before, E.
        after: experts afterwards, M.
        cap: extra copies one expert may get under greedy.
        groups: routing groups; 1 without group-limited routing.

    Raises:
        ExpansionError: if the rule cannot reach the target.
    """
    if rule == "uniform":
        return uniform_copies(before, after)
    if scores is None:
        raise ExpansionError(f"selection={rule} needs scores and none were given")
    width = before // groups
    copies: list[int] = []
    for group in range(groups):
        copies += greedy_copies(scores[group * width : (group + 1) * width], after // groups, cap)
    return copies
