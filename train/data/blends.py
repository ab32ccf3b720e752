"""The blends of a run: what its configuration says of the training stream, and where in the stream each of them begins.

    phase       one entry of the configuration: a blend, and the step, token count or stage from which on it is read
    in force    of the phases whose time has come, the one that is listed last
    stream      `train/data/sample_order.py`: what was read so far stays; what is ahead follows from the phases

Every trigger becomes a step (that of a stage through the run's course), and a step becomes a sample, because a run knows
where it stands and how many samples a step takes. Pure Python, the same on every rank.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from parallel.errors import DataError
from train.data.sample_order import Blend, SampleOrder, Share, continued, difference

TRIGGERS = ("at_step", "at_tokens", "at_stage")


@dataclass(frozen=True)
class Phase:
    """One blend of the configuration and when it begins; none of the triggers for the one that the run begins with."""

    shares: tuple[Share, ...]
    at_step: int | None = None
    at_tokens: int | None = None
    at_stage: int | None = None

    def when(self) -> str:
        """Its trigger, for messages."""
        told = [f"{name}={getattr(self, name)}" for name in TRIGGERS if getattr(self, name) is not None]
        return told[0] if told else "the beginning"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Phase":
        """What `to_dict` gave."""
        return cls(**{**values, "shares": tuple(Share(**share) for share in values["shares"])})


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps.

    Attributes:
        step: optimizer steps made.
        sample: of the training stream, the first that it has not passed.
        tokens: training tokens seen.
        batch: samples of each step to come.
        tokens_per_step: of the steps to come.
        skipped: stretches of the stream that are left out, as first sample and count.
    """

    step: int
    sample: int
    tokens: int
    batch: int
    tokens_per_step: int
    skipped: tuple[tuple[int, int], ...] = ()

    def sample_at(self, step: int) -> int:
        """Where the run will stand after `step` steps, which is not before it."""
        sample, left = self.sample, step - self.step
        for first, count in sorted(self.skipped):
            if first + count <= sample:
                continue
            # As many batches as fit before it; the next one begins behind it (`train.health.beyond`).
            whole = max(0, (first - sample) // self.batch)
            if whole >= left:
                break
            sample, left = first + count, left - whole
        return sample + left * self.batch

    def step_of(self, sample: int, last: int) -> int:
        """The first step, at most `last` + 1, after which the run has passed a sample."""
        steps = range(self.step, last + 1)
        return self.step + bisect_right(steps, sample, key=self.sample_at)


def begins(phase: Phase, here: Position, stage_steps: Sequence[int]) -> int | None:
    """The step after which a phase begins; None if it is not known to.

    Args:
        phase: of the configuration.
        here: where the run stands.
        stage_steps: the step after which each stage of the run's course begins, from stage 1 on.
    """
    if phase.at_tokens is not None:
        return here.step - (here.tokens - phase.at_tokens) // here.tokens_per_step
    if phase.at_stage is not None:
        return stage_steps[phase.at_stage - 1] if phase.at_stage <= len(stage_steps) else None
    return phase.at_step or 0


def stream_blends(
    phases: Sequence[Phase], known: Sequence[Blend], here: Position, stage_steps: Sequence[int]
) -> list[Blend]:
    """The blends of the training stream: those read so far, the one in force, and those ahead.

    Args:
        phases: of the configuration; the first has no trigger.
        known: of the stream up to here, as a checkpoint has them; what they say of samples from here on is passed over.
        here: where the run stands.
        stage_steps: as in `begins`.
    """
    times = [begins(phase, here, stage_steps) for phase in phases]
    force = max(i for i, step in enumerate(times) if step is not None and step <= here.step)
    blends = continued(known, Blend(here.sample, phases[force].shares))
    ahead = sorted((step, i) for i, step in enumerate(times) if step is not None and step > here.step)
    for step, i in ahead:
        if i > force:
            force = i
            blends = continued(blends, Blend(here.sample_at(step), phases[i].shares))
    return blends


def changed(before: Sequence[Phase], after: Sequence[Phase]) -> str | None:
    """What one configuration of the blends changes about another, in words; None if they mean the same."""
    for mine, theirs in zip(before, after, strict=False):
        if mine.when() != theirs.when():
            return f"a blend of data.schedule began at {mine.when()} and begins at {theirs.when()}"
        words = difference(mine.shares, theirs.shares)
        if words is not None:
            return (
                words if mine.when() == Phase(()).when() else f"in the blend of data.schedule at {mine.when()} {words}"
            )
    if len(before) != len(after):
        extra = (before if len(before) > len(after) else after)[min(len(before), len(after))]
        gone = "is not in data.schedule any more" if len(before) > len(after) else "is new in data.schedule"
        return f"the blend at {extra.when()} {gone}"
    return None


def refuse_used_up(order: SampleOrder, here: Position, steps: int) -> None:
    """Refuse a run whose corpora have all given what they may before its last step.

    Raises:
        DataError: naming the step and the remedy.
    """
    end = order.used_up_at
    if end is None or end >= here.sample_at(steps):
        return
    names = ", ".join(share.name for share in order.blends[order.piece_of[order.piece_at(end)]].shares)
    raise DataError(
        f"data: every corpus of the blend ({names}) has made its max_epochs at step {here.step_of(end, steps)}, before "
        f"run.steps={steps}: raise max_epochs of one or leave it out, add a corpus, or lower run.steps"
    )


def resolved_table(
    order: SampleOrder, here: Position, steps: int, sizes: Mapping[str, tuple[int, int]]
) -> list[dict[str, Any]]:
    """What is read from here to the end of the run, piece by piece.

    Args:
        order: the training stream.
        here: where the run stands.
        steps: of the whole run.
        sizes: training tokens of each corpus and samples of one pass over it, by fingerprint.

    Returns:
        For each piece its first and last step (a step that two pieces share is the first of the later one), its tokens,
        and of each corpus in its blend: name, share of the samples, tokens of the corpus and those drawn of it in the
        piece, passes made before and after it, whether it is replay, and whether its max_epochs is reached.
    """
    stop, sequence = here.sample_at(steps), here.tokens_per_step // here.batch
    rows = []
    firsts = [piece.first_sample for piece in order.pieces]
    for number, (first, end) in enumerate(zip(firsts, [*firsts[1:], stop], strict=True)):
        first, end = max(first, here.sample), min(end, stop)
        if first >= end:
            continue
        before, after = order.drawn(first), order.drawn(end)
        shares = {share.fingerprint: share.weight for share in order.pieces[number].shares}
        sources = []
        for share in order.blends[order.piece_of[number]].shares:
            (tokens, epoch), key = sizes[share.fingerprint], share.fingerprint
            begun, done = before.get(key, 0), after.get(key, 0)
            sources.append(
                {
                    "corpus": share.name,
                    "share": shares.get(key, 0.0),
                    "tokens": tokens,
                    "tokens_drawn": (done - begun) * sequence,
                    "epochs_before": begun / epoch,
                    "epochs_after": done / epoch,
                    "replay": share.replay,
                    "used_up": key not in shares,
                }
            )
        first_step = here.step_of(first, steps)
        last_step = max(first_step, here.step_of(end, steps) - 1) if end < stop else steps
        rows.append(
            {"first_step": first_step, "last_step": last_step, "tokens": (end - first) * sequence, "sources": sources}
        )
    return rows


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`resolved_table` for people."""
    lines = []
    for row in rows:
        replay = sum(source["share"] for source in row["sources"] if source["replay"])
        told = f", replay {replay:.1%}" if replay else ""
        lines.append(f"data, steps {row['first_step']} to {row['last_step']}: {row['tokens']:,} tokens{told}")
        width = max(len(source["corpus"]) for source in row["sources"])
        for source in row["sources"]:
            marks = [
                mark for mark, so in (("replay", source["replay"]), ("max_epochs reached", source["used_up"])) if so
            ]
            lines.append(
                f"  {source['corpus']:{width}}  {source['share']:>6.1%}  {source['tokens_drawn']:>13,} of its "
                f"{source['tokens']:,} tokens, epochs {source['epochs_before']:.2f} to {source['epochs_after']:.2f}"
                + "".join(f"  {mark}" for mark in marks)
            )
    return lines
