"""Whole runs over bounds on epochs, a schedule of blends and documents that are kept apart; and what `show` says of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.moves import Links
from launch.plan import make_plan
from launch.plan_inputs import settings_without_corpus
from launch.plan_tables import as_text
from parallel.errors import CheckpointError, ConfigError, DataError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, tensor_digests, train_here, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.corpus.__main__ import main as corpus_command
from train.corpus.build import CorpusRequest, build_corpus
from train.corpus.show import show_step
from train.data.stream import open_corpora
from train.requests import leave_request
from train.settings import compose_settings, read_yaml, to_settings

_PLAIN = [*SMALL, "schedule.style=constant", "schedule.warmup_steps=0", "schedule.decay_steps=null",
          "checkpoint.interval_steps=null", "data.corpus=null", "run.precision=fp32", "data.document_attention=true",
          "data.mask_boundary_loss=true"]  # fmt: skip
_GROW = "upcycle.stages=[{at_step: 3, factor: 2, selection: greedy, scoring_batches: 2}]"
STEPS, BATCH, LENGTH = 6, 8, 32


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two corpora of documents that are shorter than a sample or not: about 64 and 32 samples per epoch."""
    folder = tmp_path_factory.mktemp("two")
    for name, documents in (("one", 70), ("other", 35)):
        text = folder / f"{name}-text"
        text.mkdir()
        for number in range(documents):
            (text / f"{number:03}.txt").write_text(f"{name} {number:04} "[: 11 - number % 3] * (1 + number % 5))
        request = CorpusRequest(inputs=(str(text),), output=str(folder / name), validation_fraction=0.0)
        build_corpus(request, say=lambda line: None)
    return folder / "one", folder / "other"


def _course(two: tuple[Path, Path], *, stage: int = 1, tokens: int = 5 * BATCH * LENGTH) -> list[str]:
    """A blend whose first corpus is used up in the middle of step 2, another from step 3, from the expansion, and a last."""
    one, other = two
    return [
        f"data.blend=[{{prefix: {one}, weight: 3, max_epochs: 0.15}}, {{prefix: {other}, replay: true}}]",
        f"data.schedule=[{{at_step: 2, blend: [{{prefix: {one}}}, {{prefix: {other}, replay: true}}]}}, "
        f"{{at_stage: {stage}, blend: [{{prefix: {other}}}]}}, {{at_tokens: {tokens}, blend: [{{prefix: {one}}}]}}]",
    ]


def _collect(runs: list[list[str]]) -> dict[int, list[list[Any]]]:
    """Train in turn; by first sample of each global batch, the samples of this rank as they went into the model."""
    from train.data.stream import DataStream

    reading, seen = DataStream.train, {}  # type: ignore[var-annotated]

    def train(self: DataStream, first: int) -> Any:
        batches = reading(self, first)
        keys = ("tokens", "documents", "loss_mask")
        seen[first] = [[b[k][i].tolist() for k in keys] for b in batches for i in range(len(b["tokens"]))]
        return batches

    DataStream.train = train  # type: ignore[method-assign]
    try:
        for overrides in runs:
            train_here(overrides)
    finally:
        DataStream.train = reading  # type: ignore[method-assign]
    return seen


@pytest.fixture(scope="module")
def whole(two: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    """The run without an interruption on two data ranks, and the global batch of each step."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    ranks = run_distributed(_collect, 2, [[*_PLAIN, *_course(two), _GROW, f"run.dir={run_dir}"]])
    # Micro-batches of two: of every four samples two are of each rank.
    batches = {
        step: [ranks[i // 2 % 2][(step - 1) * BATCH][i // 4 * 2 + i % 2] for i in range(BATCH)]
        for step in range(1, STEPS + 1)
    }
    return run_dir, batches


def test_a_run_resumed_in_every_phase_equals_one_that_was_not(two: Any, whole: Any, tmp_path: Path) -> None:
    base = [*_PLAIN, *_course(two), _GROW, f"run.dir={tmp_path / 'parts'}"]
    run_distributed(train_in_turn, 2, [[*base, f"run.stop_at_step={step}"] for step in (1, 2, 3, 4)] + [base])
    losses = [[line["lm_loss"] for line in metrics(run_dir).values()] for run_dir in (whole[0], tmp_path / "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS
    ends = [list_checkpoints(run_dir)[-1] for run_dir in (whole[0], tmp_path / "parts")]
    assert tensor_digests(ends[0]) == tensor_digests(ends[1])
    blends = [read_manifest(end).data["blends"] for end in ends]
    assert blends[0] == blends[1] and [blend["first_sample"] for blend in blends[0]] == [0, 16, 24, 40]
    table = events(whole[0], "start")[0]["details"]["data"]
    assert [row["first_step"] for row in table] == [1, 2, 3, 4, 6]
    used_up = [[s["corpus"] for s in row["sources"] if s["used_up"]] for row in table]
    assert used_up == [[], [str(two[0])], [], [], []]
    assert sum(row["tokens"] for row in table) == STEPS * BATCH * LENGTH


def test_another_layout_sees_the_same_and_gets_the_same_loss(two: Any, whole: Any, tmp_path: Path) -> None:
    """Where tokens are left out of the loss micro-batches have different numbers of them: each token weighs the same."""
    base = [*_PLAIN, *_course(two), _GROW, f"run.dir={tmp_path / 'run'}"]
    (seen,) = run_distributed(_collect, 1, [[*base, "data.micro_batch_size=8", "run.stop_at_step=3"]])
    for step in (1, 2, 3):
        assert seen[(step - 1) * BATCH] == whole[1][step]
        # Different numbers indeed, or this would show nothing.
        assert len({sum(mask) for _, _, mask in whole[1][step]}) > 1
        losses = [metrics(run_dir)[step]["lm_loss"] for run_dir in (whole[0], tmp_path / "run")]
        # fp32 keeps 24 bits; sums in another order, and two updates that Adam divides by the size of a gradient.
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_documents_stay_apart_over_ranks(two: Any, whole: Any, tmp_path: Path) -> None:
    """A mask on every tensor rank and on every pipeline stage."""
    end = list_checkpoints(whole[0])[-1]
    base = [*_PLAIN, *_course(two), _GROW, f"run.resume={end}", f"run.steps={STEPS + 1}", "data.micro_batch_size=4"]
    runs = [[*base, f"run.dir={tmp_path / name}", f"parallel.{name}={size}"]
            for name, size in (("expert", 1), ("tensor", 2), ("pipeline", 2))]  # fmt: skip
    run_distributed(train_in_turn, 2, runs)
    losses = [metrics(tmp_path / name)[STEPS + 1]["lm_loss"] for name in ("expert", "tensor", "pipeline")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_show_says_what_the_run_read(two: Any, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, batches = whole
    overrides = [*_PLAIN, *_course(two), _GROW]
    for step, (words, folder) in {
        1: (overrides, None),
        4: (overrides, None),
        2: ([], run_dir),
        6: ([], run_dir),
    }.items():
        settings = read_yaml(folder / "config.yaml") if folder else to_settings(compose_settings(words))
        shown, tokenizer = show_step(settings, step, folder)
        assert [sample.number for sample in shown] == list(range((step - 1) * BATCH, step * BATCH))
        for sample, (tokens, documents, loss_mask) in zip(shown, batches[step], strict=True):
            assert list(sample.tokens) == tokens
            assert [not m for m in sample.masked[1:]] == [bool(m) for m in loss_mask[:-1]]
            # The boundaries of mcore's index are those that the end-of-document tokens mark.
            assert [part.tokens for part in sample.parts] == [documents.count(n) for n in sorted(set(documents))]
            name = tokenizer.detokenize(tokens)
            assert ("other" in name) == sample.corpus.endswith("other")
    assert corpus_command(["show", "--step", "6", "--samples", "1", "--tokens", "20", str(run_dir)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "step 6: samples 40 to 47 of the training stream, 32 tokens each"
    assert printed[1].startswith(f"sample 40: {two[0]}, epoch 0, place ")
    assert printed[2].startswith("  document ") and printed[-2:] == [
        "  (12 more tokens: --tokens 32)", "(7 more samples: --samples 8)",
    ]  # fmt: skip
    assert corpus_command(["show", "--step", "7", str(run_dir)]) == ConfigError.exit_code
    assert "--step=7 is no step of the run: use one from 1 to run.steps=6" in capsys.readouterr().err


def test_a_changed_schedule_is_refused_unless_declared(two: Any, whole: Any, tmp_path: Path) -> None:
    base = [*_PLAIN, *_course(two), _GROW]
    shutil.copytree(whole[0], tmp_path / "run")
    later = [*base, f"run.dir={tmp_path / 'run'}", "run.steps=7"]
    moved = [*later, *_course(two, tokens=STEPS * BATCH * LENGTH + 1)]
    with pytest.raises(
        CheckpointError,
        match=r"other data: a blend of data\.schedule began at at_tokens=1280 and begins at at_tokens=1537:",
    ):
        run_distributed(train_in_turn, 1, [moved])
    run_distributed(train_in_turn, 1, [[*moved, "data.allow_change=true"]])
    manifest = read_manifest(list_checkpoints(tmp_path / "run")[-1])
    # What was read stays; the blend of the stage is in force again.
    assert [blend["first_sample"] for blend in manifest.data["blends"]][:5] == [0, 16, 24, 40, 48]
    (change,) = events(tmp_path / "run", "data_change")
    assert "at_tokens=1537" in change["details"]["change"]


def test_a_blend_begins_with_a_stage_that_was_asked_for(two: Any, tmp_path: Path) -> None:
    """Scored on its own data already; and the same at a resume from before it."""
    asked, later = tmp_path / "asked", tmp_path / "later"
    base = [*_PLAIN, *_course(two, tokens=10**9), "upcycle.stages=[]", "checkpoint.interval_steps=1",
            "checkpoint.keep_last=9", "run.steps=5"]  # fmt: skip
    run_distributed(train_in_turn, 1, [[*base, f"run.dir={asked}", "run.stop_at_step=2"]])
    leave_request(asked, {"factor": 2, "selection": "greedy", "scoring_batches": 1})
    run_distributed(train_in_turn, 1, [[*base, f"run.dir={asked}"]])
    ends = [read_manifest(path) for path in list_checkpoints(asked)]
    assert [blend["first_sample"] for blend in ends[-1].data["blends"]][:3] == [0, 16, 24]
    shutil.copytree(asked, later)
    for path in list_checkpoints(later)[2:]:
        shutil.rmtree(path)
    run_distributed(train_in_turn, 1, [[*base, f"run.dir={later}"]])
    assert [m["lm_loss"] for m in metrics(later).values()] == [m["lm_loss"] for m in metrics(asked).values()]
    assert read_manifest(list_checkpoints(later)[-1]).data["blends"] == ends[-1].data["blends"]


def test_a_run_that_would_use_up_its_corpora_does_not_begin(two: Any, tmp_path: Path) -> None:
    one, other = two
    parts = f"data.blend=[{{prefix: {one}, max_epochs: 0.4}}, {{prefix: {other}, max_epochs: 0.2}}]"
    with pytest.raises(DataError, match=r"has made its max_epochs at step \d, before run\.steps=6: raise max_epochs"):
        run_distributed(train_in_turn, 1, [[*_PLAIN, parts, _GROW, f"run.dir={tmp_path / 'run'}"]])
    assert not list_checkpoints(tmp_path / "run")


def test_the_plan_has_the_table_of_the_run(two: Any, whole: Any) -> None:
    settings = settings_without_corpus([*_PLAIN, *_course(two), _GROW], 2).resolved()
    document = make_plan(settings, 2, None, None, Links())
    assert document["data"] == events(whole[0], "start")[0]["details"]["data"]
    assert "data, steps 2 to 2: 128 tokens, replay 100.0%" in list(as_text(document))


def test_documents_without_an_end_are_refused(two: Any, tmp_path: Path) -> None:
    for path in two[0].parent.glob("one.*"):
        shutil.copy(path, tmp_path)
    manifest = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps(manifest | {"append_eod": False}))
    settings = to_settings(compose_settings([*_PLAIN, f"data.blend=[{{prefix: {tmp_path / 'one'}}}]"]))
    with pytest.raises(
        DataError, match=r"document_attention=true needs documents that end .*data\.blend\[0\]\.prefix="
    ):
        open_corpora(settings.data)
