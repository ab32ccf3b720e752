"""Checkpoints that are not what was written are passed over by name, or refused; a run never starts from one, nor anew."""

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import CheckpointError, LaunchError
from tests.distributed import run_distributed
from tests.train import corruptions
from tests.train.trainer import SMALL, events, metrics, rewrite_manifest, small_corpus, train_in_turn
from train.checkpoint.files import MARKER, digests, file_names, written_by
from train.checkpoint.folder import DamagedCheckpoint, list_checkpoints, read_manifest

# Every kind of corruption three times; the whole campaign is one of the long ones.
_CASES = (36, pytest.param(144, marks=(pytest.mark.slow, pytest.mark.faults)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, "parallel.expert=2", f"data.corpus={corpus}", f"run.dir={run_dir}", "run.steps=4",
            "upcycle.stages=[]", "checkpoint.interval_steps=1", "checkpoint.keep_last=9", *more]  # fmt: skip


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of two ranks that differ by their seed, with a checkpoint of every step."""
    root = tmp_path_factory.mktemp("runs")
    jobs = [_run(corpus, root / name, f"run.seed={seed}") for name, seed in (("a", 1), ("b", 2))]
    run_distributed(train_in_turn, 2, jobs, timeout=300)
    return root / "a", root / "b"


def _starts(overrides: list[str], cases: list[str]) -> list[tuple[str | None, list[dict[str, str]]]]:
    """Where a run would start from in each of some run directories, and what it would pass over."""
    from parallel.compat import prepare_megatron
    from parallel.layout import Layout
    from train.data.stream import open_corpora
    from train.run import Run
    from train.settings import load_settings
    from train.start import find_start

    prepare_megatron()
    found = []
    layout = None
    for case in cases:
        settings = load_settings([*overrides, f"run.dir={case}"])
        layout = layout or Layout.create(settings.parallel, 1)
        path, skipped = find_start(Run(settings, layout, open_corpora(settings.data)))
        found.append((path.name if path else None, skipped))
    return found


@pytest.mark.parametrize("cases", _CASES)
def test_every_corruption_is_named_and_passed_over(
    cases: int, runs: tuple[Path, Path], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of several checkpoints at once; what is left behind by a kill is no checkpoint at all."""
    run, other = runs
    rng = random.Random(5)
    folders, expected = [], []
    for number in range(cases):
        corrupt = corruptions.ALL[number % len(corruptions.ALL)]
        folder = tmp_path / str(number) / "checkpoints"
        folder.mkdir(parents=True)
        bad = 1 + (number % 5 == 4)
        for path in list_checkpoints(run)[-3:]:
            corruptions.copy_checkpoint(path, folder / path.name)
        problems = []
        for name in ("step-00000004", "step-00000003")[:bad]:
            problems.append(corrupt(folder / name, other / "checkpoints" / name, rng))
        # Another job died while it saved the next step.
        corruptions.copy_checkpoint(run / "checkpoints" / "step-00000004", folder / "step-00000005.partial")
        folders.append(str(folder.parent))
        expected.append((corrupt.__name__, bad, problems))
    results = run_distributed(_starts, 2, _run(corpus, tmp_path / "unused"), folders, timeout=400)
    assert results[0] == results[1]
    counts: dict[str, int] = {}
    for (start, skipped), (name, bad, problems) in zip(results[0], expected, strict=True):
        if not all(problems):  # two ranks' files with the same contents
            continue
        assert start == f"step-0000000{4 - bad}", (name, skipped)
        assert [entry["checkpoint"] for entry in skipped] == ["step-00000004", "step-00000003"][:bad]
        for entry, problem in zip(skipped, problems, strict=True):
            assert re.search(problem, entry["problem"]), (name, entry)
        counts[name] = counts.get(name, 0) + bad
    # One case in five has two of them.
    assert sum(counts.values()) >= 1.05 * cases and set(counts) == {c.__name__ for c in corruptions.ALL}
    with capsys.disabled():
        print(f"\n{sum(counts.values())} corruptions refused by name: {counts}")


def test_a_run_goes_on_from_the_last_good_one(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    """The events say what was passed over and why; the end is that of the undisturbed run, bit for bit."""
    run, other = runs
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest, before, good = list_checkpoints(copy)[:-4:-1]
    # Of nobody's; the load does not see them either.
    for name in ("tensors/__0_9.distcp", "rng/rank-00002.pt", ".nfs0001"):
        (good / name).write_text("left behind")
    # The order of the data, which no error would tell of.
    order = next((copy / "cache").glob("*-train-shuffle_index.npy"))
    order.write_bytes(order.read_bytes()[:128] + bytes(order.stat().st_size - 128))
    corruptions.flip_a_bit(newest, other, random.Random(0))
    corruptions.empty_marker(before, other, random.Random(0))
    run_distributed(train_in_turn, 2, [_run(corpus, copy, "run.seed=1")])
    skipped = [event["details"] for event in events(copy, "checkpoint_skipped")]
    assert [entry["checkpoint"] for entry in skipped] == ["step-00000004", "step-00000003"]
    assert "is damaged" in skipped[0]["problem"]
    assert {s: m["lm_loss"] for s, m in metrics(copy).items()} == {s: m["lm_loss"] for s, m in metrics(run).items()}
    assert (
        read_manifest(list_checkpoints(copy)[-1]).fingerprints == read_manifest(list_checkpoints(run)[-1]).fingerprints
    )


def _said(overrides: list[str]) -> tuple[str, str]:
    """Where a run would start from, and what it says of that."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ((start, skipped),) = _starts(overrides, [overrides[-1].removeprefix("run.dir=")])
    assert not skipped
    return str(start), said.getvalue()


def test_files_that_others_left_do_no_harm(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    """What file systems and people leave in a checkpoint's folder is neither read nor sealed into the next one."""
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    newest = list_checkpoints(copy)[-1]
    whole = file_names(newest)
    (newest / ".snapshot" / "hourly").mkdir(parents=True)
    for name in (".nfs0001", "tensors/.nfs0002", "rng/.rank-00000.pt.swp", ".snapshot/hourly/complete.json"):
        (newest / name).write_text("left behind")
    assert file_names(newest) == whole and "tensors/.metadata" in whole
    words = [*_run(corpus, copy, "parallel.expert=1"), f"run.dir={copy}"]
    assert "not its own" not in run_distributed(_said, 1, words)[0][1]
    # Two that a reader by pattern would take for its own, and two of somebody's.
    strays = ["notes.txt", "rng/rank-00009.pt", "tensors/__9_0.distcp", "tensors/notes.txt"]
    for name in strays:
        (newest / name).write_text("left behind")
    start, said = run_distributed(_said, 1, words)[0]
    assert start == newest.name
    assert f"checkpoint {newest.name}: not its own files, left unread: {', '.join(strays[:3])} and 1 more\n" in said


def test_nothing_whole_is_no_fresh_start(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    run, other = runs
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in list_checkpoints(copy):
        corruptions.cut(path, other, random.Random(1))
    before = metrics(copy)
    with pytest.raises(
        DamagedCheckpoint, match=r"none of the 4 checkpoints in run\.dir=.* is whole; the newest, step-00000004: "
    ):
        run_distributed(train_in_turn, 2, [_run(corpus, copy, "run.seed=1")])
    named = copy / "checkpoints" / "step-00000004"
    with pytest.raises(
        DamagedCheckpoint, match=r"checkpoint step-00000004: .* bytes instead of .*: use an older checkpoint"
    ):
        run_distributed(train_in_turn, 2, [_run(corpus, copy, "run.seed=1", f"run.resume={named}")])
    assert metrics(copy) == before and len(list_checkpoints(copy)) == 4


def test_sizes_alone_are_quick_and_see_less(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    run, other = runs
    folder = tmp_path / "case" / "checkpoints"
    folder.mkdir(parents=True)
    for path in list_checkpoints(run)[-2:]:
        corruptions.copy_checkpoint(path, folder / path.name)
    corruptions.flip_a_bit(folder / "step-00000004", other, random.Random(3))
    base = _run(corpus, tmp_path / "unused")
    (deep,) = run_distributed(_starts, 1, [*base, "parallel.expert=1"], [str(folder.parent)])[0]
    (quick,) = run_distributed(
        _starts, 1, [*base, "parallel.expert=1", "checkpoint.verify=sizes"], [str(folder.parent)]
    )[0]
    assert deep[0] == "step-00000003" and quick == ("step-00000004", [])


def test_an_optimizer_that_was_started_anew_is_refused(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    """The field's most repeated bug: everything loads, and the moments are zero."""
    copy = tmp_path / "run"
    shutil.copytree(runs[0], copy)
    newest = list_checkpoints(copy)[-1]
    fingerprints: dict[str, Any] = read_manifest(newest).fingerprints
    name = next(n for n in sorted(fingerprints) if n.startswith("exp_avg_sq/") and "experts" not in n)
    rewrite_manifest(newest, fingerprints=fingerprints | {name: [0]})
    message = f"has made 4 optimizer steps, but {name} is zero: .*checkpoint.load=model_only".replace(".", r"\.")
    with pytest.raises(CheckpointError, match=message.replace(r"\.*", ".*")):
        run_distributed(train_in_turn, 2, [_run(corpus, copy, "run.seed=1")])
    # The remedy that the message names.
    knowingly = _run(corpus, copy, "run.seed=1", "checkpoint.load=model_only", "run.steps=5")
    run_distributed(train_in_turn, 2, [knowingly])
    assert read_manifest(list_checkpoints(copy)[-1]).optimizer_step == 1


def test_files_are_told_apart_by_the_rank_that_wrote_them(runs: tuple[Path, Path]) -> None:
    newest = list_checkpoints(runs[0])[-1]
    names = file_names(newest)
    assert sorted([*written_by(names, 0), *written_by(names, 1)]) == names
    assert "tensors/.metadata" in written_by(names, 0) and "rng/rank-00001.pt" in written_by(names, 1)
    assert any(name.startswith("tensors/__1_") for name in written_by(names, 1))
    assert digests(newest, names) == read_manifest(newest).files
    assert MARKER not in names


def test_two_jobs_on_one_run_directory(corpus: Path, tmp_path: Path) -> None:
    """The second is refused while the first runs, and not after it was killed."""
    words = [*SMALL, f"data.corpus={corpus}", f"run.dir={tmp_path}", "run.steps=100000", "upcycle.stages=[]",
             "checkpoint.interval_steps=null"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [sys.executable, "-m", "train", *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("step "):
                break
        with pytest.raises(LaunchError, match=rf"run\.dir={tmp_path} is in use by process {first.pid} on "):
            run_distributed(train_in_turn, 1, [words])
    finally:
        first.kill()
        first.wait()
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines].count("start") == 1
    assert run_distributed(train_in_turn, 1, [[*words, "run.steps=5"]]) == [["finished"]]
