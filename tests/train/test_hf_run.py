"""Runs that begin with a published model, directly and by way of an import, at several layouts."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.errors import CheckpointError, ConfigError, CoppiceError
from tests.distributed import run_distributed
from tests.model.published import judge
from tests.train.trainer import events, metrics, small_corpus, tensor_digests, train_here

_RUN = [
    "data.sequence_length=32", "data.micro_batch_size=2", "data.global_batch_size=8", "run.steps=4", "checkpoint=ends",
    "schedule.warmup_steps=1", "schedule.decay_steps=1", "evaluation.batches=1", "evaluation.interval_steps=null",
    "tracking=none", "run.precision=fp32",
]  # fmt: skip
_GROW = "upcycle.stages=[{at_step: 2, factor: 2, mode: exact, release_steps: 1}]"


def _refusal(words: list[str]) -> str:
    try:
        train_here(words)
    except CoppiceError as e:
        return f"{type(e).__name__}: {e}"
    raise AssertionError("it was not refused")


def _stories(root: str, corpus: str) -> dict[str, Any]:
    """One process: a run from hf:, again with the source gone, exported; a run from an import; what is refused."""
    from tests.model.ours import layout_of, loaded, logits_of
    from train import evaluate
    from train.checkpoint.folder import list_checkpoints
    from train.hf import command as hf_command
    from train.offline import upcycle_command

    folder, model = Path(root), Path(root) / "model"
    told, found = io.StringIO(), {}
    run = [*_RUN, f"data.corpus={corpus}", f"model.init_from=hf:{model}", f"run.dir={folder / 'run'}"]
    found["contradiction"] = _refusal([*run, "model.layers=3"])
    found["small vocabulary"] = _refusal([w.replace(str(model), str(folder / "small")) for w in run])
    with contextlib.redirect_stdout(told):
        train_here([*run, _GROW])
    shutil.move(model, folder / "moved")
    with contextlib.redirect_stdout(told):
        train_here([*run, _GROW, "run.steps=5", "schedule.style=constant"])
    found["told"] = told.getvalue()
    with contextlib.redirect_stdout(told):
        # Without the model in the command, and with the source gone.
        train_here([*(w for w in run if not w.startswith("model.")), _GROW, "run.steps=6", "schedule.style=constant"])
    shutil.move(folder / "moved", model)
    # Takes batches over a restored copy of the run, whose configuration names the model that it began with.
    rules = ["--factor", "2", "--selection", "greedy", "--scoring-batches", "1", "--mode", "exact"]
    assert upcycle_command.main(["plan", str(folder / "run"), *rules]) == 0
    assert hf_command.main(["export", str(folder / "run"), "--output", str(folder / "exported")]) == 0
    newest = list_checkpoints(folder / "run")[-1]

    imported = folder / "imported"
    assert hf_command.main(["import", str(model), "--output", str(imported)]) == 0
    words = [str(imported), "data.sequence_length=32", "--data", f"text={corpus}", "--batches", "4"]
    assert evaluate.main([*words, "--json", str(folder / "evaluation.json")]) == 0
    again = [
        *(w for w in _RUN if "precision" not in w),
        f"data.corpus={corpus}",
        f"run.resume={imported}",
        f"run.dir={folder / 'second'}",
    ]
    found["two sources"] = _refusal([*again, f"model.init_from=hf:{model}"])
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        train_here([*again, "run.steps=2"])
        train_here([*again, "run.steps=3", "schedule.style=constant"])
    found["told of the import"] = told.getvalue()
    layout = layout_of()
    found["logits"] = logits_of(*loaded(newest, layout), layout)
    return found


@pytest.fixture(scope="module")
def stories(published: Path, noise: dict[str, float], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(published / "mixtral-300", folder / "model")
    shutil.copytree(published / "mixtral", folder / "small")
    found = run_distributed(_stories, 1, str(folder), str(small_corpus(folder)))[0]
    return found | {"folder": folder}


def test_a_run_begins_with_a_published_model(stories: dict[str, Any]) -> None:
    run = stories["folder"] / "run"
    (began,) = events(run, "published_model")
    assert began["details"]["family"] == "mixtral" and began["step"] == 0
    assert "Adam's moments are fresh" in stories["told"]
    # A fresh draw has small logits and so the loss of an even guess among 384 rows, 5.95; this one has large ones.
    assert metrics(run)[1]["lm_loss"] > 6.3
    assert (run / "huggingface" / "config.json").is_file()


def test_the_same_command_goes_on_with_its_own_checkpoints(stories: dict[str, Any]) -> None:
    run = stories["folder"] / "run"
    assert [e["step"] for e in events(run, "resume")] == [4, 5]
    assert sorted(metrics(run)) == [1, 2, 3, 4, 5, 6]


def test_a_grown_run_is_exported(stories: dict[str, Any], noise: dict[str, float]) -> None:
    (found,) = run_distributed(judge, 1, [str(stories["folder"] / "exported")], init=False)[0]
    assert found["told"] == {} and found["config"]["num_local_experts"] == 8
    distance = (found["logits"] - stories["logits"]).abs().max().item()
    assert distance <= 4 * noise["mixtral-300"]


def test_a_run_begins_with_an_import(stories: dict[str, Any]) -> None:
    run = stories["folder"] / "second"
    first, second = events(run, "resume")
    assert first["details"]["checkpoint"].endswith("imported") and first["step"] == 0
    assert second["step"] == 2
    assert "are fresh, as it has none" in stories["told of the import"]
    # The same weights, data and seed.
    assert metrics(run)[1]["lm_loss"] == metrics(stories["folder"] / "run")[1]["lm_loss"]
    assert not events(run, "data_change")
    # Other text, the same weights: over the 5.95 of a fresh draw, as above, whatever this project's sources say by now.
    evaluated = json.loads((stories["folder"] / "evaluation.json").read_text())
    assert 6.3 < evaluated["sets"]["text"]["loss"] < 7.3


def test_what_does_not_fit_is_refused(stories: dict[str, Any]) -> None:
    assert stories["contradiction"].startswith(ConfigError.__name__) and "model.layers=3" in stories["contradiction"]
    assert "model.vocab_size=103, but the tokenizer of the data has 257" in stories["small vocabulary"]
    assert "both say what the run begins with" in stories["two sources"]


def _save_filled(folder: str, target: str, sizes: dict[str, int]) -> None:
    from model.sharded_state import save_tensors
    from tests.model.ours import filled, layout_of

    layout = layout_of(**sizes)
    stage, _ = filled(Path(folder), layout, "bf16")
    if layout.rank == 0:
        (Path(target) / "tensors").mkdir(parents=True)
    layout.barrier()
    save_tensors(Path(target) / "tensors", stage.chunks, stage.optimizer, layout)


def _import(folder: str, target: str, precision: str) -> None:
    from train.hf import command as hf_command

    assert hf_command.main(["import", folder, "--output", target, "--precision", precision]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe-normed", "qwen3_moe-sparse", "deepseek_v3", "olmoe"])
def test_every_layout_reads_the_same_bits(case: str, published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    """Weights are those of an import in bf16, masters those of an import in fp32, whatever the layout."""
    folder = str(published / case)
    for precision in ("bf16", "fp32"):
        run_distributed(_import, 1, folder, str(tmp_path / precision), precision, init=False)
    rounded, exact = (tensor_digests(tmp_path / precision) for precision in ("bf16", "fp32"))
    layouts = [
        (1, {}),
        (2, {"expert": 2}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (4, {"tensor": 2, "expert": 2, "pipeline": 2}),
    ]
    layouts += [(4, {"expert": 4})] if case in ("mixtral", "deepseek_v3") else []
    for world, sizes in layouts:
        if sizes.get("tensor", 1) > 1 and case == "olmoe":
            continue
        if sizes.get("pipeline", 1) > 1 and case == "deepseek_v3":
            continue
        target = tmp_path / ("at-" + "-".join(f"{k}{v}" for k, v in sizes.items()))
        run_distributed(_save_filled, world, folder, str(target), sizes)
        found = tensor_digests(target)
        masters = {k.removeprefix("optimizer.state.param."): v for k, v in found.items() if ".param." in k}
        assert {k: v for k, v in found.items() if not k.startswith("optimizer.")} == rounded, sizes
        assert masters == {k: v for k, v in exact.items() if not k.endswith("expert_bias")}, sizes


def _logits_at(folder: str, sizes: dict[str, int]) -> torch.Tensor:
    from tests.model.ours import filled, layout_of, logits_of

    layout = layout_of(**sizes)
    return logits_of(*filled(Path(folder), layout), layout)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}], ids=str)
@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_logits_at_a_layout(case: str, sizes: dict[str, int], published: Path, noise: dict[str, float]) -> None:
    there = torch.load(published / f"{case}.logits")["exact"]
    for logits in run_distributed(_logits_at, 2, str(published / case), sizes):
        assert (logits.double() - there).abs().max() <= 4 * noise[case]


def test_olmoe_at_two_tensor_ranks_is_refused(published: Path, noise: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"qk_norm_all_heads=true needs parallel\.tensor=1"):
        run_distributed(_logits_at, 2, str(published / "olmoe"), {"tensor": 2})


def test_the_error_of_a_source_is_raised_by_all(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(published / "mixtral", broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_distributed(_logits_at, 1, str(broken), {})
