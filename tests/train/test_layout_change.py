"""A stage that changes the parallel layout, on the same processes: what a run reads, writes, saves and resumes around it.

That both paths of the switch carry the state over bit for bit is test_live_switch.py's; here it is the run around it.
"""

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from parallel.errors import ConfigError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.corpus.build import CorpusRequest, build_corpus
from train.settings import load_settings

# What a step leaves in metrics.jsonl that does not depend on the clock.
_EXACT = ("stage", "num_experts", "tokens", "lm_loss", "grad_norm", "learning_rate", "expert_load_max")
_GROW = "factor: 2, selection: greedy, scoring_batches: 2, "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _stages(*entries: str) -> str:
    return f"upcycle.stages=[{', '.join('{' + entry + '}' for entry in entries)}]"


def _exact(run_dir: Path, first: int = 1) -> list[dict[str, Any]]:
    return [{key: line[key] for key in _EXACT} for step, line in metrics(run_dir).items() if step >= first]


_TO_EP4 = "parallel: {expert: 4}"
# First layout, what stage 1 says, path of the switch, further settings.
_CASES: dict[str, tuple[list[str], str, str, list[str]]] = {
    "ep2-to-4-dropout": (["parallel.expert=2"], _TO_EP4, "live", ["model.dropout=0.1"]),
}
_SLOW: dict[str, tuple[list[str], str, str, list[str]]] = {
    "grow-ep2-to-4": (["parallel.expert=2"], _GROW + _TO_EP4, "checkpoint", []),
    "grow-ep2-to-4-live-dropout": (["parallel.expert=2"], _GROW + _TO_EP4, "live", ["model.dropout=0.1"]),
    "grow-ep2-to-4-dropout": (["parallel.expert=2"], _GROW + _TO_EP4, "checkpoint", ["model.dropout=0.1"]),
    "ep2-to-4": (["parallel.expert=2"], _TO_EP4, "checkpoint", []),
    "tp1-to-2": (["parallel.expert=2"], "parallel: {tensor: 2}", "checkpoint", ["model.dropout=0.1"]),
    "grow-tp2-to-1-live": (["parallel.tensor=2", "parallel.expert=2"], _GROW + "parallel: {tensor: 1}", "live", []),
    "pp1-to-2-live": (["parallel.expert=2"], "parallel: {pipeline: 2}", "live", ["model.dropout=0.1"]),
}


@pytest.mark.parametrize("name", [*_CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in _SLOW)])
def test_resumed_equals_uninterrupted_around_a_change(name: str, corpus: Path, tmp_path: Path) -> None:
    """Resumed right before the change (which is made again), right after it, and one step later: the same bits."""
    layout, entry, path, more = (_CASES | _SLOW)[name]
    base = [*SMALL, "run.steps=5", *layout, _stages(f"at_step: 3, {entry}"), f"upcycle.path={path}", *more,
            "upcycle.save_after=true", f"data.corpus={corpus}"]  # fmt: skip
    whole, parts, after = tmp_path / "whole", tmp_path / "parts", tmp_path / "after"
    post = whole / "checkpoints" / "step-00000003-stage1"
    run_distributed(
        train_in_turn,
        4,
        [
            [*base, f"run.dir={whole}"],
            [*base, f"run.dir={parts}", "run.stop_at_step=3"],
            [*base, f"run.dir={parts}", "run.stop_at_step=4"],
            [*base, f"run.dir={parts}"],
            [*base, f"run.dir={after}", f"run.resume={post}"],
        ],
        timeout=400,
    )
    names = ["step-00000003", "step-00000003-stage1", "step-00000004", "step-00000005"]
    assert [p.name for p in list_checkpoints(parts)] == names
    assert [p.name for p in list_checkpoints(whole)] == [names[0], names[1], names[3]]
    assert len(metrics(whole)) == 5
    assert _exact(parts) == _exact(whole)
    assert _exact(after) == _exact(whole, first=4)
    end = list_checkpoints(whole)[-1]
    digests = tensor_digests(end)
    for other in (parts, after):
        newest = list_checkpoints(other)[-1]
        assert read_manifest(newest).fingerprints == read_manifest(end).fingerprints
        assert tensor_digests(newest) == digests
        assert _generators(newest) == _generators(end)
    before = read_manifest(whole / "checkpoints" / "step-00000003")
    then = read_manifest(post)
    assert before.layout != then.layout == read_manifest(end).layout
    assert (before.stage, then.stage, len(then.plans)) == (0, 1, 1)


def _generators(checkpoint: Path) -> dict[str, str]:
    files = sorted((checkpoint / "rng").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_streams_do_not_begin_again(corpus: Path, tmp_path: Path) -> None:
    """Each change starts the generators at a place of its own: not at that of the run's start, nor of another change."""
    base = [*SMALL, "run.steps=4", "parallel.expert=2", "model.dropout=0.1", "upcycle.save_after=true",
            _stages(f"at_step: 1, {_TO_EP4}", "at_step: 2, parallel: {expert: 2}", f"at_step: 3, {_TO_EP4}"),
            f"data.corpus={corpus}", "run.stop_at_step=1"]  # fmt: skip
    dirs = {path: tmp_path / path for path in ("live", "checkpoint")}
    runs = [[*base, f"upcycle.path={path}", f"run.dir={dirs[path]}", "run.stop_at_step=4"] for path in dirs]
    run_distributed(train_in_turn, 4, runs)
    names = [f"step-{n:08d}-stage{n}" for n in (1, 2, 3)]
    states = {path: [_generators(dirs[path] / "checkpoints" / name) for name in names] for path in dirs}
    # Drawing initial weights, as the checkpoint path does, leaves no trace.
    assert states["live"] == states["checkpoint"]
    assert len({state["rank-00000.pt"] for state in states["live"]}) == 3


@pytest.mark.slow
def test_a_stage_with_the_first_layout_again_resumes(corpus: Path, tmp_path: Path) -> None:
    """EP 2 -> 4 -> 2, nothing saved at the changes: the next save is of the new stage, and is resumed in its layout."""
    base = [*SMALL, "run.steps=4", "parallel.expert=2", "model.dropout=0.1", "upcycle.save_before=false",
            _stages(f"at_step: 1, {_TO_EP4}", "at_step: 2, parallel: {expert: 2}"), f"data.corpus={corpus}"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs = [[*base, f"run.dir={whole}"], [*base, f"run.dir={parts}", "run.stop_at_step=3"], [*base, f"run.dir={parts}"]]
    run_distributed(train_in_turn, 4, runs)
    assert _exact(parts) == _exact(whole)
    assert [(p.name, read_manifest(p).stage) for p in list_checkpoints(parts)] == [
        ("step-00000003", 2),
        ("step-00000004", 2),
    ]
    assert read_manifest(list_checkpoints(parts)[-1]).fingerprints == (
        read_manifest(list_checkpoints(whole)[-1]).fingerprints
    )


def test_a_changed_stage_resumes_on_other_processes(corpus: Path, tmp_path: Path) -> None:
    """Past layouts may differ at a resume; only the state counts. Losses agree as far as the order of sums allows."""
    base = [*SMALL, "run.steps=5", "run.precision=fp32", f"data.corpus={corpus}", "upcycle.path=live"]
    here, there = tmp_path / "here", tmp_path / "there"
    four = _stages(f"at_step: 3, {_GROW}{_TO_EP4}")
    run_distributed(
        train_in_turn, 4, [[*base, four, "parallel.expert=2", "upcycle.save_after=true", f"run.dir={here}"]]
    )
    start = here / "checkpoints" / "step-00000003-stage1"
    two = _stages(f"at_step: 3, {_GROW}parallel: {{expert: 2}}")
    run_distributed(train_in_turn, 2, [[*base, two, f"run.dir={there}", f"run.resume={start}"]])
    a, b = metrics(here), metrics(there)
    assert list(b) == [4, 5]
    # fp32 sums over other groups differ by rounding; one Adam step in between amplifies it far less than this.
    for step in b:
        assert b[step]["lm_loss"] == pytest.approx(a[step]["lm_loss"], rel=2e-5)
    assert read_manifest(list_checkpoints(there)[-1]).layout["expert"] == 2


def _train_and_note(overrides: list[str]) -> list[tuple[int, int, list[str]]]:
    """Train one run; for every step what this rank read, for one rank of each data-parallel coordinate."""
    from train import run as run_module

    noted: list[tuple[int, int, list[str]]] = []
    original = run_module.optimizer_step

    def noting(stage: Any, layout: Any, batches: list[dict[str, Any]], clock: Any) -> Any:
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for batch in batches for row in batch["tokens"]]
        if layout.groups.tp.rank() == layout.groups.pp.rank() == 0:
            noted.append((len(noted) + 1, layout.data_size, rows))
        else:
            noted.append((len(noted) + 1, layout.data_size, []))
        return original(stage, layout, batches, clock)

    run_module.optimizer_step = noting
    train_in_turn([overrides])
    return noted


@pytest.fixture(scope="module")
def random_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which no stretch of text occurs twice, so that equal tokens are the same sample."""
    folder, generator = tmp_path_factory.mktemp("words"), random.Random(5)
    documents = [" ".join(f"{generator.getrandbits(64):x}" for _ in range(20)) for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    request = CorpusRequest(
        inputs=(str(folder / "text.jsonl"),), output=str(folder / "corpus"), validation_fraction=0.2
    )
    build_corpus(request, say=lambda line: None)
    return folder / "corpus"


def test_another_data_parallel_size_reads_every_sample_once(random_words: Path, tmp_path: Path) -> None:
    """Data ranks 4 -> 2 -> 4, with evaluations in between: the samples of each step are those of a single process."""
    corpus = random_words
    base = [*SMALL, "run.steps=5", f"data.corpus={corpus}", "evaluation.interval_steps=1", "upcycle.save_before=false"]
    stages = _stages("at_step: 2, parallel: {tensor: 2}", f"at_step: 3, {_GROW}parallel: {{tensor: 1, expert: 4}}")
    four = run_distributed(_train_and_note, 4, [*base, stages, "parallel.expert=2", f"run.dir={tmp_path / 'four'}"])
    (one,) = run_distributed(_train_and_note, 1, [*base, _stages(), f"run.dir={tmp_path / 'one'}"])
    assert [size for _, size, _ in four[0]] == [4, 4, 2, 4, 4]
    for step in range(5):
        together = [row for rank in four for row in rank[step][2]]
        assert len(together) == 8
        assert sorted(together) == sorted(one[step][2])
    assert len({row for step in one for row in step[2]}) == 40
    # A layout alone changes nothing that is learned, up to the order of bf16 sums.
    a, b = metrics(tmp_path / "four"), metrics(tmp_path / "one")
    assert [a[step]["tokens"] for step in a] == [b[step]["tokens"] for step in b]
    (change,) = events(tmp_path / "four", "layout_change")
    assert change["step"] == 2


@pytest.mark.slow
def test_checkpoints_around_a_change_are_kept(corpus: Path, tmp_path: Path) -> None:
    """Of a layout change as of an expansion; ordinary ones go. Without save_after there is none of the new stage."""
    base = [*SMALL, "run.steps=6", "parallel.expert=2", f"data.corpus={corpus}", "checkpoint.interval_steps=1",
            "checkpoint.keep_last=1", _stages(f"at_step: 2, {_TO_EP4}")]  # fmt: skip
    plain, both = tmp_path / "plain", tmp_path / "both"
    run_distributed(
        train_in_turn, 4, [[*base, f"run.dir={plain}"], [*base, f"run.dir={both}", "upcycle.save_after=true"]]
    )
    assert [p.name for p in list_checkpoints(plain)] == ["step-00000002", "step-00000006"]
    assert [p.name for p in list_checkpoints(both)] == ["step-00000002", "step-00000002-stage1", "step-00000006"]
    assert [read_manifest(p).layout["expert"] for p in list_checkpoints(both)] == [2, 4, 4]


_DEMO = ["experiment=demo", "model=tiny", "parallel.expert=2", "data.corpus=x", "data.global_batch_size=8"]


@pytest.mark.parametrize(
    ("entries", "more", "message"),
    [
        (["parallel: {expert: 3}"], [], r"upcycle\.stages\[0\]\.parallel\.expert=3 does not divide the 8 experts"),
        (["num_experts: 24, parallel: {expert: 3}"], [],
         r"upcycle\.stages\[0\]\.parallel\.expert=3 x parallel\.expert_tensor=1 x parallel\.pipeline=1 = 3 does not divide "
         r"the 4 processes: start a multiple of 3"),
        (["parallel: {expert: 8}"], [], r"upcycle\.stages\[0\]\.parallel\.expert=8 x .* = 8 does not divide the 4 processes"),
        (["parallel: {tensor: 3}"], [], r"upcycle\.stages\[0\]\.parallel\.tensor=3 x .* does not divide the 4 processes"),
        (["parallel: {expert: 4}", "parallel: {pipeline: 2}"], [],
         r"upcycle\.stages\[0\]\.parallel\.expert=4 x parallel\.expert_tensor=1 x upcycle\.stages\[1\]\.parallel\.pipeline=2 = 8"),
        (["parallel: {tensor: 4}"], ["model.attention_heads=2", "model.kv_heads=2"],
         r"model\.attention_heads=2 is not divisible by upcycle\.stages\[0\]\.parallel\.tensor=4"),
        (["parallel: {pipeline: 4}"], ["model.layers=6", "parallel.expert=1"],
         r"model\.layers=6 is not divisible by upcycle\.stages\[0\]\.parallel\.pipeline x parallel\.virtual_pipeline=4"),
        (["parallel: {tensor: 1, expert: 4}"],
         ["parallel.tensor=2", "data.global_batch_size=4"],
         r"data\.global_batch_size=4 is not divisible by data\.micro_batch_size x data-parallel ranks \(processes / "
         r"upcycle\.stages\[0\]\.parallel\.tensor\)=8: use data\.global_batch_size=8"),
        (["parallel: {expert: 0}"], [], r"upcycle\.stages\[0\]\.parallel\.expert=0 must be 1 or more"),
        (["parallel: {expret: 4}"], [], r"unknown key .*expret; did you mean .*expert\?"),
        (["parallel: {virtual_pipeline: 2}"], [],
         r"upcycle\.stages\[0\]\.parallel.*virtual_pipeline=2 needs parallel\.pipeline of 2 or more"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_in_one_line(entries: list[str], more: list[str], message: str) -> None:
    stages = _stages(*(f"at_step: {10 * (i + 1)}, {entry}" for i, entry in enumerate(entries)))
    with pytest.raises(ConfigError, match=message) as refused:
        load_settings([*_DEMO, stages, *more], 4)
    assert "\n" not in str(refused.value)


def test_what_mcore_refuses_is_known_before_the_run_begins(corpus: Path, tmp_path: Path) -> None:
    """Context parallelism needs Transformer Engine: said at the start, not by the switch hours later."""
    from parallel.transformer_engine import have_transformer_engine

    if have_transformer_engine():
        pytest.skip("Transformer Engine makes this layout possible")
    overrides = [
        *SMALL,
        _stages("at_step: 3, parallel: {context: 2}"),
        f"data.corpus={corpus}",
        f"run.dir={tmp_path / 'run'}",
    ]
    with pytest.raises(ConfigError, match=r"upcycle\.stages\[0\]: parallel\.context=2 needs .*use parallel\.context=1"):
        run_distributed(train_in_turn, 2, [overrides])
    assert not os.path.exists(tmp_path / "run")
