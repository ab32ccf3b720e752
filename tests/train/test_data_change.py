"""Which samples whole runs read: across epochs, lengths, batch shapes, rank counts, and a change of the blend."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CheckpointError, DataError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, tensor_digests, train_here, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.corpus.build import CorpusRequest, build_corpus

_PLAIN = [*SMALL, "upcycle.stages=[]", "schedule.style=constant", "schedule.warmup_steps=0", "schedule.decay_steps=null",
          "checkpoint.interval_steps=null", "checkpoint.save_final=true"]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora: about 60 and about 30 samples of 32 tokens per epoch, every token of a document telling which."""
    folder = tmp_path_factory.mktemp("two")
    for name, documents, letters in (("one", 20, 100), ("other", 10, 100)):
        text = folder / f"{name}-text"
        text.mkdir()
        for number in range(documents):
            (text / f"{number:03}.txt").write_text(f"{name} {number:04} " * (letters // 10))
        request = CorpusRequest(inputs=(str(text),), output=str(folder / name), validation_fraction=0.0)
        build_corpus(request, say=lambda line: None)
    return folder / "one", folder / "other"


def _blend(*parts: tuple[Path, float]) -> list[str]:
    listed = ",".join(f"{{prefix: {prefix}, weight: {weight}}}" for prefix, weight in parts)
    return ["data.corpus=null", f"data.blend=[{listed}]"]


def _read(runs: list[list[str]]) -> list[list[tuple[str, int]]]:
    """Train in turn; of each run the places of the samples that this rank trained on, in order."""
    from train.data.stream import DataStream

    reading, taken = DataStream.sample, []  # type: ignore[var-annotated]
    seen: list[tuple[str, int]] = []

    def sample(self: DataStream, number: int) -> Any:
        corpus, position = self.order.place(number)
        seen.append((corpus, position))
        epoch = self._epochs[corpus, position // self.samples_per_epoch(corpus)]
        # mcore's own order of an epoch has every sample once.
        assert sorted(epoch.shuffle_index) == list(range(self.samples_per_epoch(corpus))) == list(range(len(epoch)))
        return reading(self, number)

    DataStream.sample = sample  # type: ignore[method-assign]
    try:
        for overrides in runs:
            seen.clear()
            train_here(overrides)
            taken.append(list(seen))
    finally:
        DataStream.sample = reading  # type: ignore[method-assign]
    return taken


def test_a_longer_run_reads_on_where_a_shorter_one_ended(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Past the end of an epoch too, with another micro-batch, and equal bit for bit to a run that was long from the start."""
    base = [*_PLAIN, f"data.corpus={two[0]}"]
    runs = [
        [*base, f"run.dir={tmp_path / 'short'}", "run.steps=5"],
        [*base, f"run.dir={tmp_path / 'short'}", "run.steps=18"],
        [*base, f"run.dir={tmp_path / 'long'}", "run.steps=18"],
    ]
    run_distributed(train_in_turn, 2, runs)
    short, long = metrics(tmp_path / "short"), metrics(tmp_path / "long")
    assert [short[n]["lm_loss"] for n in range(1, 19)] == [long[n]["lm_loss"] for n in range(1, 19)]
    ends = [list_checkpoints(tmp_path / name)[-1] for name in ("short", "long")]
    assert tensor_digests(ends[0]) == tensor_digests(ends[1])
    (piece,) = events(tmp_path / "long", "start")[-1]["details"]["data"]
    (source,) = piece["sources"]
    # Otherwise the second epoch was not reached.
    assert source["epochs_before"] == 0 and 1.5 < source["epochs_after"] < 4


def test_a_changed_blend_is_refused_unless_declared_and_repeats_nothing(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    base = [*_PLAIN, f"run.dir={tmp_path / 'run'}"]
    run_distributed(train_in_turn, 2, [[*base, f"data.corpus={one}", "run.steps=3"]])
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))
    both = _blend((one, 3), (other, 1))
    with pytest.raises(
        CheckpointError, match=r"other data: corpus .*other .* is new: .* data\.allow_change=true"
    ) as refused:
        run_distributed(train_in_turn, 2, [[*base, *both, "run.steps=6"]])
    assert "\n" not in str(refused.value)
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before
    # The same with and without an interruption in the middle, once declared; the flag may stay.
    declared = [*base, *both, "data.allow_change=true"]
    run_distributed(train_in_turn, 2, [[*declared, "run.steps=5"], [*declared, "run.steps=6"]])
    manifest = read_manifest(list_checkpoints(tmp_path / "run")[-1])
    assert [blend["first_sample"] for blend in manifest.data["blends"]] == [0, 24]
    assert len(events(tmp_path / "run", "data_change")) == 1
    # Undeclared again, now that it is no change.
    run_distributed(train_in_turn, 1, [[*base, *both, "run.steps=7"]])


def test_no_sample_comes_twice_within_an_epoch_whatever_the_course(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    base = [*_PLAIN, f"run.dir={tmp_path / 'run'}", "data.allow_change=true"]
    course = [
        [*base, f"data.corpus={one}", "run.steps=3"],
        [*base, *_blend((one, 1), (other, 1)), "run.steps=6", "data.micro_batch_size=4"],
        # The other way round is no change.
        [*base, *_blend((other, 1), (one, 1)), "run.steps=7", "data.global_batch_size=16"],
        [*base, f"data.corpus={one}", "run.steps=9"],
    ]
    (taken,) = run_distributed(_read, 1, course)
    starts = [0, 24, 48, 64]
    # What is read ahead at the end of a job is not trained on.
    trained = [place for run, n in zip(taken, (24, 24, 16, 16), strict=True) for place in run[:n]]
    assert len(trained) == 80 and len(set(trained)) == 80
    positions = Counter(corpus for corpus, _ in trained)
    for corpus, drawn in positions.items():
        assert [p for c, p in trained if c == corpus] == list(range(drawn))
    assert sorted(positions.values()) == [20, 60]
    manifest = read_manifest(list_checkpoints(tmp_path / "run")[-1])
    assert [b["first_sample"] for b in manifest.data["blends"]] == [starts[0], starts[1], starts[3]]


def test_one_corpus_twice_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.blend\[1\]\.prefix=.* holds the same text as data\.blend\[0\]\.prefix"):
        run_distributed(train_in_turn, 1, [[*_PLAIN, f"run.dir={tmp_path}", *_blend((two[0], 1), (two[0], 2))]])


def test_another_tokenizer_is_refused_even_if_declared(two: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of text " * 500)
    request = CorpusRequest(
        inputs=(str(text),), output=str(tmp_path / "bpe"), tokenizer="bpe:300", validation_fraction=0.0
    )
    build_corpus(request, say=lambda line: None)
    base = [*_PLAIN, f"run.dir={tmp_path / 'run'}", "run.steps=2", "model.vocab_multiple=512"]
    run_distributed(train_in_turn, 1, [[*base, f"data.corpus={two[0]}"]])
    with pytest.raises(CheckpointError, match="tokens of another tokenizer"):
        run_distributed(train_in_turn, 1, [[*base, f"data.corpus={tmp_path / 'bpe'}", "data.allow_change=true"]])
