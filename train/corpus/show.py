"""Shows what a step of a run sees: of each sample the corpus, the epoch, the documents and the text.

What: `python -m train.corpus show --step N` finds the global batch of step N as a run would, on one process without a
group, a GPU or a model, and decodes it. Where documents begin and which tokens do not count in the loss is marked.
Why: what a blend, a schedule or a mask really does to the stream is seen best in the tokens.
How: with the overrides of a run (the stream from its beginning), or with the folder of one (as it went and will go on).
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, CoppiceError
from train.checkpoint.folder import Manifest, list_checkpoints, read_manifest
from train.config import RunSettings
from train.data.blends import Position, stream_blends
from train.data.sample_order import Blend, SampleOrder
from train.data.samples import TrainingSamples
from train.data.stream import open_corpora, phases_of
from train.guard import held_from
from train.health import beyond, read_skipped
from train.settings import compose_settings, read_yaml, to_settings
from upcycle.course import Past, plan_course

END = "<end of document>"


@dataclass(frozen=True)
class Part:
    """A stretch of one document in a sample: its number in the corpus, and how many of its tokens, from which on."""

    document: int
    first: int
    tokens: int


@dataclass(frozen=True)
class ShownSample:
    """One sample of the training stream.

    Attributes:
        number: in the stream.
        corpus: prefix.
        epoch: pass over the corpus, from 0.
        place: in that pass.
        parts: the documents in it, in order.
        tokens: input ids, [sequence].
        masked: of each, whether predicting it is left out of the loss; of the first it is nobody's task.
    """

    number: int
    corpus: str
    epoch: int
    place: int
    parts: tuple[Part, ...]
    tokens: tuple[int, ...]
    masked: tuple[bool, ...]


@dataclass(frozen=True)
class Stream:
    """The training stream of a run, and the samples that a step takes of it."""

    order: SampleOrder
    seed: int
    first: int
    count: int


def stream_of(settings: RunSettings, corpora: Sequence[Any], step: int, run_dir: Path | None) -> Stream:
    """The training stream around a step.

    Args:
        settings: of the run.
        corpora: what `open_corpora` returned.
        step: from 1 on.
        run_dir: follow the run in this folder, by its checkpoints; None for one that begins now.

    Raises:
        CoppiceError: if the step is none of the run, or a checkpoint cannot be read.
    """
    if not 1 <= step <= settings.run.steps:
        raise ConfigError(f"--step={step} is no step of the run: use one from 1 to run.steps={settings.run.steps}")
    manifests = [read_manifest(path) for path in list_checkpoints(run_dir)] if run_dir else []
    skipped = tuple(read_skipped(run_dir)) if run_dir else ()

    def position(of: Manifest | None, batch: int) -> Position:
        step, sample, tokens = (of.step, of.data["samples"], of.tokens) if of else (0, 0, 0)
        return Position(step, sample, tokens, batch, batch * settings.data.sequence_length, skipped)

    newest = manifests[-1] if manifests else None
    here = position(newest, settings.data.global_batch_size)
    known = [Blend.from_dict(values) for values in newest.data["blends"]] if newest else []
    stages = _stage_steps(settings, newest, run_dir)
    order = SampleOrder(stream_blends(phases_of(settings.data, corpora), known, here, stages))
    # The steps between two checkpoints were made with the batch that the later one knows of.
    before = next((m for m in reversed(manifests) if m.step < step), None)
    after = next((m for m in manifests if m.step >= step), None)
    batch = after.config["data"]["global_batch_size"] if after else settings.data.global_batch_size
    first = beyond(position(before, batch).sample_at(step - 1), batch, skipped)
    return Stream(order, newest.data["seed"] if newest else settings.run.seed, first, batch)


def _stage_steps(settings: RunSettings, newest: Manifest | None, run_dir: Path | None) -> list[int]:
    """The step after which each stage begins: as entered, and as configured from there on."""
    if newest is None:
        return [stage.at_step for stage in settings.resolved().upcycle.stages]
    past = Past.of(str(run_dir), newest.step, newest.num_experts, newest.plans, newest.stages)
    course = plan_course(
        settings.resolved(newest.step, newest.tokens).upcycle.stages,
        settings.model.num_experts,
        past,
        held_from=held_from(run_dir) if run_dir else None,
        on_load=settings.upcycle.on_load,
        expert_ranks=settings.parallel.expert,
    )
    return [stage.at_step for stage in course.stages]


def show_step(settings: RunSettings, step: int, run_dir: Path | None = None) -> tuple[list[ShownSample], Any]:
    """The samples of a step, in the order of the global batch, and the tokenizer that decodes them.

    Args:
        settings: of the run.
        step: from 1 on.
        run_dir: as in `stream_of`.

    Raises:
        CoppiceError: for a step, a corpus or a checkpoint that is not there.
    """
    corpora = open_corpora(settings.data)
    stream = stream_of(settings, corpora, step, run_dir)
    # The run's own index files may be written at this moment.
    with tempfile.TemporaryDirectory(prefix="coppice-show-") as cache:
        manifests = [manifest for _, manifest in corpora]
        samples = TrainingSamples(settings.data, manifests, stream.order, stream.seed, Path(cache))
        names = {manifest.fingerprint: part.prefix for part, manifest in corpora}
        numbers = range(stream.first, stream.first + stream.count)
        return [_shown(samples, number, names) for number in numbers], samples.tokenizer


def _shown(samples: TrainingSamples, number: int, names: dict[str, str]) -> ShownSample:
    samples.open(number, 1)
    fingerprint, position = samples.order.place(number)
    if fingerprint not in names:
        raise ConfigError(
            f"sample {number} is of a corpus (fingerprint {fingerprint[:12]}) that the run does not read any more: "
            "add it to data.blend to show the step"
        )
    epoch, place = divmod(position, samples.samples_per_epoch(fingerprint))
    sample = samples.sample(number)
    tokens = sample["tokens"].tolist()
    return ShownSample(
        number=number,
        corpus=names[fingerprint],
        epoch=epoch,
        place=place,
        parts=tuple(_parts(samples.epoch_of(number), place, len(tokens))),
        tokens=tuple(tokens),
        # The loss at a token is that of predicting the next.
        masked=(False, *(not counts for counts in sample["loss_mask"].tolist()[:-1])),
    )


def _parts(epoch: Any, place: int, length: int) -> list[Part]:
    """The documents of a sample, from the indices of mcore's dataset; without the token that is only predicted."""
    index = epoch.shuffle_index[place]
    (first, offset), (last, end) = epoch.sample_index[index].tolist(), epoch.sample_index[index + 1].tolist()
    found = []
    for number in range(first, last + 1):
        document = int(epoch.document_index[number])
        begin = offset if number == first else 0
        # In mcore's index a sample ends with the token that the next one begins with.
        stop = end if number == last else int(epoch.dataset.sequence_lengths[document])
        count = min(stop - begin, length)
        length -= count
        if count:
            found.append(Part(document, begin, count))
    return found


def sample_lines(sample: ShownSample, tokenizer: Any, limit: int) -> list[str]:
    """One sample for people.

    Args:
        sample: of `show_step`.
        tokenizer: that of its corpus.
        limit: tokens to decode.
    """
    lines = [f"sample {sample.number}: {sample.corpus}, epoch {sample.epoch}, place {sample.place}"]
    start = 0
    for part in sample.parts:
        if start >= limit:
            break
        end = min(start + part.tokens, limit)
        begins = "from its beginning" if part.first == 0 else f"from its token {part.first} on"
        lines.append(f"  document {part.document}, {part.tokens} tokens, {begins}")
        text = "".join(
            (f"[not in the loss: {words}]" if masked else words)
            for masked, run in groupby(range(start, end), key=lambda i: sample.masked[i])
            for words in (_decoded([sample.tokens[i] for i in run], tokenizer),)
        )
        lines += [f"  | {line}" for line in (text + ("..." if end < start + part.tokens else "")).split("\n")]
        start += part.tokens
    left = len(sample.tokens) - limit
    if left > 0:
        lines.append(f"  ({left} more tokens: --tokens {len(sample.tokens)})")
    return lines


def _decoded(ids: list[int], tokenizer: Any) -> str:
    ends = groupby(ids, key=lambda token: token == tokenizer.eod)
    return "".join(END * len(list(run)) if end else tokenizer.detokenize(list(run)) for end, run in ends)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.corpus show",
        description="Decode what a step of a run sees.",
        epilog="Example: python -m train.corpus show --step 80 experiment=demo; or: ... --step 80 runs/demo",
    )
    parser.add_argument(
        "run",
        nargs="*",
        metavar="RUN_DIR | OVERRIDE",
        help="the folder of a run (as it went, and goes on); or overrides as `python -m train` takes them (a run that "
        "begins anew)",
    )
    parser.add_argument("--step", type=int, required=True, metavar="N", help="optimizer step, from 1 on")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="samples of the global batch to show (4)")
    parser.add_argument("--tokens", type=int, default=200, metavar="M", help="tokens of each to decode (200)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; gives the exit code (0, or that of the error)."""
    options = _parser().parse_intermixed_args(argv)
    try:
        for name in ("samples", "tokens"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name}={getattr(options, name)}: must be at least 1")
        run_dir = Path(options.run[0]) if len(options.run) == 1 and "=" not in options.run[0] else None
        settings = read_yaml(run_dir / "config.yaml") if run_dir else to_settings(compose_settings(options.run))
        shown, tokenizer = show_step(settings, options.step, run_dir)
    except CoppiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    first, last = shown[0].number, shown[-1].number
    print(f"step {options.step}: samples {first} to {last} of the training stream, {len(shown[0].tokens)} tokens each")
    for sample in shown[: options.samples]:
        print("\n".join(sample_lines(sample, tokenizer, options.tokens)))
    if len(shown) > options.samples:
        print(f"({len(shown) - options.samples} more samples: --samples {len(shown)})")
    return 0
