"""A grown run goes on in every layout: the state equal bit for bit in the global view, the losses as far as sums allow."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import list_checkpoints

# Four layers, so that pipelines of two with two chunks each fit.
_BASE = [*SMALL, "run.precision=fp32", "run.steps=6", "model.layers=4", "model.moe_period=2", "checkpoint.interval_steps=5",
         "checkpoint.keep_last=null"]  # fmt: skip
# What the run was trained in, and what it goes on in.
_FROM = (2, ["parallel.expert=2"])
_TO = {
    "one-process": (1, []),
    "tp2-ep2": (2, ["parallel.tensor=2", "parallel.expert=2"]),
    "pp2-vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "ep4-accumulating": (4, ["parallel.expert=4", "data.micro_batch_size=1"]),
    "etp2-tp2": (2, ["parallel.tensor=2", "parallel.expert_tensor=2"]),
    "dp2-plain-optimizer": (2, ["optimizer.distributed=false"]),
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a run of 6 steps that grew after its third and was saved after its fifth."""
    folder = tmp_path_factory.mktemp("grown")
    corpus = small_corpus(folder)
    processes, layout = _FROM
    run_distributed(train_in_turn, processes, [[*_BASE, *layout, f"data.corpus={corpus}", f"run.dir={folder / 'run'}"]])
    return corpus, folder / "run"


def _save_again(overrides: list[str], output: str) -> None:
    """Restore a run, as a start does, and write its state again in its own layout."""
    from parallel.compat import prepare_megatron

    prepare_megatron()
    from model.sharded_state import save_tensors
    from parallel.layout import Layout, join_job, leave_job
    from train.data.stream import open_corpora
    from train.run import Run
    from train.settings import load_settings

    settings = load_settings(overrides)
    joined = join_job(settings.parallel.timeout_seconds)
    run, _, _ = Run.restore(settings, Layout.create(settings.parallel, settings.run.seed), open_corpora(settings.data))
    try:
        save_tensors(Path(output) / "tensors", run.stage.chunks, run.stage.optimizer, run.layout)
    finally:
        run.close()
        leave_job(joined)


# The others behind `make test-slow`.
_FAST = ("tp2-ep2", "pp2-vpp2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _FAST else pytest.mark.slow) for n in _TO])
def test_a_grown_run_goes_on_in_another_layout(name: str, grown: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, run = grown
    processes, layout = _TO[name]
    source = next(path for path in list_checkpoints(run) if path.name == "step-00000005")
    base = [*_BASE, *layout, f"data.corpus={corpus}", f"run.resume={source}"]
    run_distributed(_save_again, processes, [*base, f"run.dir={tmp_path / 'again'}"], str(tmp_path / "copy"))
    assert tensor_digests(tmp_path / "copy") == tensor_digests(source)
    run_distributed(train_in_turn, processes, [[*base, f"run.dir={tmp_path / 'on'}"]])
    here, there = metrics(run)[6], metrics(tmp_path / "on")[6]
    # fp32 sums in another order: a few units in the last place of a loss near 5.
    assert there["lm_loss"] == pytest.approx(here["lm_loss"], abs=2e-5)
    assert there["tokens"] == here["tokens"]
