"""Validation sets of whole runs, and `python -m train.evaluate`: the same sets, samples and numbers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from parallel.errors import ConfigError, DataError
from tests.distributed import run_distributed
from tests.train.texts import write_texts
from tests.train.trainer import SMALL, events, rewrite_manifest, small_corpus, train_here, train_in_turn
from train import job
from train.corpus.build import CorpusRequest, build_corpus
from train.data.manifest import load_manifest
from train.evaluate import main


def _corpus(prefix: Path, text: Path, **options: Any) -> Path:
    request = CorpusRequest(inputs=(str(text),), output=str(prefix), **options)
    build_corpus(request, say=lambda line: None)
    return prefix


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two kinds of text."""
    folder = tmp_path_factory.mktemp("corpora")
    prose = write_texts(folder / "prose-texts", "prose")
    return small_corpus(folder), _corpus(folder / "prose", prose, validation_fraction=0.1)


def _sets(*entries: str) -> str:
    return f"evaluation.sets=[{','.join(f'{{{entry}}}' for entry in entries)}]"


def _run(corpora: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    code, prose = corpora
    sets = _sets(f"name: prose, prefix: {prose}, batches: 2", f"name: seen, prefix: {code}, split: train")
    return [*SMALL, "parallel.expert=2", f"data.corpus={code}", f"run.dir={run_dir}", sets, *more]


@pytest.fixture(scope="module")
def ran(corpora: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that expands after the third and evaluates every second."""
    run_dir = tmp_path_factory.mktemp("ran") / "run"
    more = ("evaluation.interval_steps=2", "upcycle.save_after=true")
    run_distributed(train_in_turn, 2, [_run(corpora, run_dir, *more)], timeout=300)
    return run_dir


def test_a_run_records_every_set_at_intervals_and_around_the_switch(ran: Path, corpora: tuple[Path, Path]) -> None:
    recorded = [(event["step"], event["details"]) for event in events(ran, "evaluation")]
    assert [step for step, _ in recorded] == [2, 3, 3, 4, 6]
    code, prose = (load_manifest(prefix) for prefix in corpora)
    for _, details in recorded:
        sets = details["sets"]
        assert list(sets) == ["valid", "prose", "seen"]
        assert (details["valid_loss"], details["tokens"]) == (sets["valid"]["loss"], sets["valid"]["tokens"])
        assert [figures["tokens"] for figures in sets.values()] == [256, 512, 256]
        for figures, split in zip(
            sets.values(), (code.splits["valid"], prose.splits["valid"], code.splits["train"]), strict=True
        ):
            assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
            nats_per_byte = figures["loss"] * split.tokens / split.bytes
            assert figures["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2))
        # Different text.
        assert len({figures["loss"] for figures in sets.values()}) == 3
    before, after = recorded[1][1]["sets"], recorded[2][1]["sets"]
    (expansion,) = events(ran, "expansion")
    assert expansion["details"]["sets"] == {
        name: {"loss_before": before[name]["loss"], "loss_after": after[name]["loss"]} for name in before
    }
    assert expansion["details"]["valid_loss_before"] == before["valid"]["loss"]


def _evaluate_in_turn(commands: list[list[str]]) -> list[int]:
    return [main(words) for words in commands]


def test_the_command_finds_what_the_run_logged(
    ran: Path, corpora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((str(p), p.stat().st_mtime_ns) for p in ran.rglob("*"))
    _, before, after, _, end = (event["details"]["sets"] for event in events(ran, "evaluation"))
    folder, prose = ran / "checkpoints", ["--data", f"prose={corpora[1]}"]
    commands = {
        "before": [str(folder / "step-00000003")],
        "after": [str(folder / "step-00000003-stage1")],
        # By name and corpus instead of by the run's settings.
        "named": [str(ran), *prose, "--batches", "2"],
        "tensor": [str(ran), "parallel.expert=1", "parallel.tensor=2"],
        "alone": [str(ran)],
        "all": [str(ran), *prose, "--batches", "all"],
    }
    words = {name: [*given, "--json", str(tmp_path / name)] for name, given in commands.items()}
    told = run_distributed(_evaluate_in_turn, 2, [words[name] for name in ("before", "after", "named", "tensor")])
    assert told == [[0] * 4] * 2
    assert main(words["alone"]) == 0
    capsys.readouterr()
    assert main(words["all"]) == 0
    head, columns, row = capsys.readouterr().out.splitlines()
    found = {name: json.loads((tmp_path / name).read_text()) for name in commands}
    keys = ("loss", "perplexity", "bits_per_byte", "tokens")
    sets = {
        name: {one: {key: told[key] for key in keys} for one, told in record["sets"].items()}
        for name, record in found.items()
    }
    # In the layout of the run, bit for bit.
    assert (sets["before"], sets["after"]) == (before, after)
    assert sets["named"] == {"prose": end["prose"]}
    assert (found["after"]["num_experts"], found["after"]["layout"]["expert"]) == (16, 2)
    print(
        {n: {o: sets[n][o]["loss"] - end[o]["loss"] for o in end} for n in ("alone", "tensor")},
    )
    # In another one bf16 rounds other sums: the loss of a token moves by a few times 2^-9, either way, the mean of 256 of
    # them by a sixteenth of that.
    for name in ("alone", "tensor"):
        assert {one: figures["loss"] for one, figures in sets[name].items()} == pytest.approx(
            {one: figures["loss"] for one, figures in end.items()}, abs=5e-4
        )
    # All that a split holds, in whole batches.
    assert 0 <= load_manifest(corpora[1]).tokens("valid") - 1 - sets["all"]["prose"]["tokens"] < 256
    assert head.endswith("step-00000006: step 6, stage 1, 16 experts")
    assert columns.split("  ")[0] == "set" and row.split()[:2] == ["prose", f"{sets['all']['prose']['tokens']:,}"]
    assert sorted((str(p), p.stat().st_mtime_ns) for p in ran.rglob("*")) == files


def test_without_held_out_text_the_first_named_set_is_the_validation_loss(
    corpora: tuple[Path, Path], tmp_path: Path
) -> None:
    code = _corpus(tmp_path / "all", write_texts(tmp_path / "all-texts"), validation_fraction=0.0)
    sets = _sets(f"name: prose, prefix: {corpora[1]}", f"name: code, prefix: {corpora[0]}")
    run_dir = tmp_path / "run"
    train_here([*SMALL, f"data.corpus={code}", f"run.dir={run_dir}", sets, "upcycle.stages=[]", "run.steps=3",
                "schedule.decay_steps=1"])  # fmt: skip
    (event,) = events(run_dir, "evaluation")
    assert list(event["details"]["sets"]) == ["prose", "code"]
    assert event["details"]["valid_loss"] == event["details"]["sets"]["prose"]["loss"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["name: Code, prefix: x"], r"evaluation\.sets\[0\]\.name='Code': use lower-case letters"),
        (["name: valid, prefix: x"], r"sets\[0\]\.name=valid is the name of the held-out part of the training corpora"),
        (["name: a, prefix: x", "name: a, prefix: y"], r"sets\[1\]\.name=a is the name of evaluation\.sets\[0\]"),
        (["name: a"], r"sets\[0\]\.prefix is empty"),
        (["name: a, prefix: x, split: test"], r"sets\[0\]\.split=test is unknown: use one of valid, train"),
        (["name: a, prefix: x, batches: 0"], r"sets\[0\]\.batches=0 must be above zero"),
        ([f"name: a{i}, prefix: x" for i in range(17)], r"holds 17 sets: use 16 at most"),
        (["name: a, prefix: x, weight: 2"], r"unknown key .*weight"),
    ],
)
def test_settings_that_cannot_be(sets: list[str], message: str, corpora: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_here([*SMALL, f"data.corpus={corpora[0]}", f"run.dir={tmp_path / 'run'}", _sets(*sets)])


def test_sets_that_cannot_be_opened_are_refused_before_any_process_group(
    corpora: tuple[Path, Path], ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a word\n" * 3)
    short = _corpus(tmp_path / "short", text, validation_fraction=0.0)
    others = write_texts(tmp_path / "other-texts", "prose", documents=20)
    other = _corpus(tmp_path / "other", others, tokenizer="bpe:300", validation_fraction=0.3)
    cases = [
        (tmp_path / "none", "valid", r"sets\[0\] \(odd\): prefix=.*none: there is no corpus"),
        (short, "valid", r"sets\[0\] \(odd\): prefix=.*short holds 0 tokens in its valid split, fewer than one sample"),
        (short, "train", r"holds 22 tokens in its train split, .*data\.sequence_length=32"),
        (other, "valid", r"validation set odd: corpus .*other uses tokenizer bpe:300 .*build it with that tokenizer"),
    ]
    with mock.patch.object(job, "join_job", side_effect=AssertionError("joined")):
        for prefix, split, message in cases:
            sets = _sets(f"name: odd, prefix: {prefix}, split: {split}")
            with pytest.raises(DataError, match=message) as refused:
                train_here([*SMALL, f"data.corpus={corpora[0]}", f"run.dir={tmp_path / 'run'}", sets])
            assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()

    data = ["--data", f"prose={corpora[1]}"]
    for words, code, message in [
        ([str(tmp_path)], 4, "neither a complete checkpoint nor a run directory"),
        ([str(ran), "--data", f"odd={other}"], 3, "another than checkpoint"),
        ([str(ran), "--data", f"odd={tmp_path / 'none'}"], 3, "--data odd="),
        ([str(ran), "--data", "prose"], 2, "give a name and a corpus"),
        ([str(ran), *data, *data], 2, "there is a set prose already"),
        ([str(ran), *data, "--batches", "none"], 2, "--batches=none: give a number above zero, or all"),
        ([str(ran), "--split", "train"], 2, "go with --data"),
        ([str(ran), *data, "--batches", "all", "data.global_batch_size=8192"], 3, "lower data.global_batch_size"),
        ([str(ran), *data, "model.top_k=1"], 4, "is of another model: model.top_k was 2 there and is 1 here"),
        ([str(ran), *data, "parallel.expert=2"], 2, "parallel.expert"),
        ([str(ran), *data, "parallel.experts=2"], 2, "parallel.experts"),
        ([str(ran), *data, "--json", str(tmp_path / "no" / "file")], 3, "--json"),
        ([str(ran), *data, "--cache", str(text)], 3, "--cache"),
    ]:
        capsys.readouterr()
        assert main(words) == code, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_weights_that_are_not_those_that_were_saved_are_refused(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "checkpoints" / "step-00000006"
    shutil.copytree(ran / "checkpoints" / "step-00000006", copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    name = next(name for name in manifest["fingerprints"] if name.startswith("weight/"))
    manifest["fingerprints"][name][0] += 1
    rewrite_manifest(copy, fingerprints=manifest["fingerprints"])
    assert main([str(copy)]) == 4
    assert f"{name} is not what was saved" in capsys.readouterr().err
    file = next((copy / "tensors").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main([str(copy)]) == 4
    assert file.name in capsys.readouterr().err
