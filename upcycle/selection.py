"""How many copies each expert of one layer gets. Pure Python on global expert ids.

`r_e` counts the copies of expert e with the original included; sum r_e is the number of experts afterwards. `uniform` needs
no scores; `greedy` and `sampling` go by utility under a cap on extra copies.
"""

import hashlib
import math
import random
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


def _check_cap(before: int, after: int, cap: int) -> None:
    left = after - before * (1 + cap)
    if left > 0:
        raise ExpansionError(
            f"max_extra_copies={cap} is too small to grow {before} experts to {after}: raise it by {-(-left // before)}"
        )


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
    _check_cap(before, after, cap)
    copies, left = [1] * before, after - before
    for expert in sorted(range(before), key=lambda e: (-scores[e], e)):
        extra = min(cap, left)
        copies[expert] += extra
        left -= extra
    return copies


def named_generator(name: str) -> random.Random:
    """A generator of its own for one use, the same on every rank and machine (Python keeps `random()` of a seed)."""
    return random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest(), "big"))


def sampled_copies(
    scores: Sequence[float], after: int, cap: int, temperature: float, generator: random.Random
) -> list[int]:
    """Extra copies drawn one by one with probability softmax(score / mean score / temperature), each expert up to a cap.

    After the published code's second selector, which takes the softmax of raw scores, so that its temperature means
    something else for every utility and model; over the mean it is a ratio: at temperature 1 an expert twice as useful as
    the mean is drawn e times as often as one at the mean. An expert that has reached the cap is drawn no more.

    Args:
        scores: utility of each expert, [E], zero or more.
        after: experts afterwards, M.
        cap: extra copies one expert may get.
        temperature: above zero; small ones approach greedy, large ones even odds.
        generator: where draws come from.

    Raises:
        ExpansionError: if the cap leaves slots empty.
    """
    before = len(scores)
    _check_cap(before, after, cap)
    # Over the largest first: neither very large nor very small scores leave the range of floats.
    largest = max(scores)
    parts = [score / largest if largest else 1.0 for score in scores]
    mean = math.fsum(parts) / before
    copies = [1] * before
    for _ in range(after - before):
        open_ = [e for e in range(before) if copies[e] <= cap]
        top = max(parts[e] for e in open_)
        odds = [math.exp((parts[e] - top) / mean / temperature) for e in open_]
        # The first whose cumulated odds pass the draw; the last one if rounding leaves none.
        draw, chosen = generator.random() * math.fsum(odds), open_[-1]
        for expert, odd in zip(open_, odds, strict=True):
            draw -= odd
            if draw < 0:
                chosen = expert
                break
        copies[chosen] += 1
    return copies


def select_copies(
    rule: str,
    scores: Sequence[float] | None,
    before: int,
    after: int,
    cap: int,
    groups: int,
    *,
    temperature: float = 1.0,
    generator: str = "",
) -> list[int]:
    """Copies per expert of one layer; under group-limited routing every routing group grows by itself.

    A routing group is a block of neighbouring ids, so families that stay inside their block keep the meaning of the
    groups a token may use.

    Args:
        rule: `uniform`, `greedy` or `sampling`.
        scores: utility of each expert, [E]; unused by uniform.
        before: experts before, E.
        after: experts afterwards, M.
        cap: extra copies one expert may get under greedy and sampling.
        groups: routing groups; 1 without group-limited routing.
        temperature: of sampling.
        generator: name of the generator that sampling draws from.

    Raises:
        ExpansionError: if the rule cannot reach the target, or a score is missing, negative or no number.
    """
    if rule == "uniform":
        return uniform_copies(before, after)
    if rule not in ("greedy", "sampling"):
        raise ExpansionError(f"selection={rule} is unknown: use uniform, greedy or sampling")
    if scores is None:
        raise ExpansionError(f"selection={rule} needs scores and none were given")
    for expert, score in enumerate(scores):
        if not (math.isfinite(score) and score >= 0):
            raise ExpansionError(
                f"the utility of expert {expert} is {score}, so selection={rule} cannot rank it: look for overflow in the "
                "gradients, or use selection=uniform"
            )
    width, rng = before // groups, named_generator(generator)
    copies: list[int] = []
    for group in range(groups):
        group_scores = scores[group * width : (group + 1) * width]
        if rule == "greedy":
            copies += greedy_copies(group_scores, after // groups, cap)
        else:
            copies += sampled_copies(group_scores, after // groups, cap, temperature, rng)
    return copies
