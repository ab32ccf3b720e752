"""The live switch in whole runs: equal to the checkpoint path bit for bit, with any network, factor and change of layout.

Both paths start from one checkpoint of the smaller stage; afterwards every tensor of model and optimizer is compared byte by
byte, and the steps that follow must log the same losses.
"""

import json
from pathlib import Path

import pytest

from parallel.errors import CoppiceError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, events, metrics, small_corpus, tensor_digests, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest

_STAGE = "step-00000002-stage1"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _stages(grow: str) -> str:
    return f"upcycle.stages=[{{at_step: 2, {grow}}}]"


_TWICE = "factor: 2, selection: greedy, scoring_batches: 1"
_NETWORK = ["model.num_experts=8"]
# name -> processes, layout, growth, network
_CASES: dict[str, tuple[int, list[str], str, list[str]]] = {
    "ep2-bf16": (2, ["parallel.expert=2"], _TWICE, []),
    "ep2-m3": (2, ["parallel.expert=2"], "factor: 3", []),
    "ep2-to-4-greedy-chunks": (4, ["parallel.expert=2"], _TWICE + ", parallel: {expert: 4}", ["upcycle.transfer_chunk_mib=1", "upcycle.offload=true"]),
    "layout-only-ep2-to-4": (4, ["parallel.expert=2"], "parallel: {expert: 4}", []),
    "tp2-to-1": (2, ["parallel.tensor=2", "parallel.expert=2"], _TWICE + ", parallel: {tensor: 1}", []),
}  # fmt: skip
_SLOW: dict[str, tuple[int, list[str], str, list[str]]] = {
    "shared-tied-interleaved": (
        2,
        ["parallel.expert=2"],
        _TWICE,
        ["model.layers=4", "model.moe_period=2", "model.tie_embeddings=true", "model.shared_expert_ffn_hidden_size=32"],
    ),
    "sequential-biases": (
        2,
        ["parallel.expert=2"],
        _TWICE,
        ["model.linear_bias=true", "model.normalization=LayerNorm", "model.activation=gelu", "model.experts=sequential"],
    ),
    "ep2-to-4": (4, ["parallel.expert=2"], "factor: 2, parallel: {expert: 4}", []),
    "ep4-m4": (4, ["parallel.expert=4"], "factor: 4", []),
    "ep1-dp2-to-ep2-plain": (2, ["optimizer.distributed=false"], _TWICE + ", parallel: {expert: 2}", []),
    "ep4-to-2": (4, ["parallel.expert=4"], "num_experts: 12, selection: greedy, parallel: {expert: 2}", []),
    "spread": (4, ["parallel.expert=4"], _TWICE + ", placement: spread", []),
    "auto": (4, ["parallel.expert=4"], _TWICE + ", placement: auto, max_load_imbalance: 1.1", []),
    # mcore has no biases in experts that are split.
    "etp2-gelu": (
        4,
        ["parallel.tensor=2", "parallel.expert_tensor=2", "parallel.expert=2"],
        _TWICE,
        ["model.activation=gelu"],
    ),
    "tp2-ep2-to-tp1-ep4": (
        4, ["parallel.tensor=2", "parallel.expert=2"], "factor: 2, parallel: {tensor: 1, expert: 4}", [],
    ),
    "pp2-tied": (4, ["parallel.pipeline=2", "parallel.expert=2"], _TWICE, ["model.tie_embeddings=true"]),
    "pp2-to-1": (
        4, ["parallel.pipeline=2", "parallel.expert=2"], "factor: 2, parallel: {pipeline: 1, expert: 4}", [],
    ),
    "vpp2": (
        2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], _TWICE,
        ["model.layers=4", "model.moe_period=1"],
    ),
    "ep8-overlap": (
        8, ["parallel.expert=4", "optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"],
        "factor: 2, parallel: {expert: 8}", ["data.global_batch_size=16"],
    ),
    "pp2-tied-offload": (
        4, ["parallel.pipeline=2", "parallel.expert=2"], _TWICE, ["model.tie_embeddings=true", "upcycle.offload=true"],
    ),
    "fp32-offload": (2, ["parallel.expert=2", "run.precision=fp32"], _TWICE, ["upcycle.offload=true"]),
    "fp32": (4, ["parallel.expert=2", "run.precision=fp32"], _TWICE + ", parallel: {expert: 4}", []),
}  # fmt: skip


@pytest.mark.parametrize("name", [*_CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in _SLOW)])
def test_live_equals_the_checkpoint_path(name: str, corpus: Path, tmp_path: Path) -> None:
    processes, layout, grow, more = (_CASES | _SLOW)[name]
    base = [*SMALL, *_NETWORK, "run.steps=4", *layout, _stages(grow), *more, f"data.corpus={corpus}",
            "upcycle.save_after=true", "run.load_interval_steps=1"]  # fmt: skip
    seed, live, disk = (f"run.dir={tmp_path / name}" for name in ("seed", "live", "disk"))
    start = f"run.resume={tmp_path / 'seed' / 'checkpoints' / 'step-00000002'}"
    run_distributed(
        train_in_turn,
        processes,
        [
            [*base, seed, "run.stop_at_step=2"],
            [*base, live, start],
            [*base, disk, start, "upcycle.path=checkpoint", "upcycle.offload=false"],
        ],
        timeout=400,
    )
    for step in (_STAGE, "step-00000004"):
        a, b = (tensor_digests(tmp_path / path / "checkpoints" / step) for path in ("live", "disk"))
        assert a.keys() == b.keys()
        assert [key for key in a if a[key] != b[key]] == [], step
        one, other = (read_manifest(tmp_path / path / "checkpoints" / step) for path in ("live", "disk"))
        assert (one.optimizer_step, one.scheduler, one.layout) == (other.optimizer_step, other.scheduler, other.layout)
    a, b = metrics(tmp_path / "live"), metrics(tmp_path / "disk")
    assert list(a) == list(b) == [3, 4]
    for key in ("lm_loss", "grad_norm", "learning_rate", "tokens", "num_experts", "expert_load_max"):
        assert [a[s][key] for s in a] == [b[s][key] for s in b], key
    kind = "layout_change" if name.startswith("layout-only") else "expansion"
    (event,) = events(tmp_path / "live", kind)
    assert event["details"]["moved_bytes"] == event["details"]["least_bytes"]


def test_uniform_growth_beside_the_parent_moves_nothing_without_zero1(corpus: Path, tmp_path: Path) -> None:
    overrides = [*SMALL, "run.steps=3", _stages("factor: 2"), "parallel.expert=2", "optimizer.distributed=false",
                 f"data.corpus={corpus}", f"run.dir={tmp_path}"]  # fmt: skip
    run_distributed(train_in_turn, 2, [overrides])
    (event,) = events(tmp_path, "expansion")
    assert event["details"]["moved_bytes"] == 0


def test_without_a_checkpoint_before_and_resumed_from_an_older_one(corpus: Path, tmp_path: Path) -> None:
    """save_before=false writes nothing at the switch; the run goes on, and resumes from what the interval saved."""
    base = [*SMALL, "run.steps=5", _stages(_TWICE), "parallel.expert=2", f"data.corpus={corpus}",
            "upcycle.save_before=false", "checkpoint.interval_steps=1", "checkpoint.keep_last=9"]  # fmt: skip
    whole, parts = f"run.dir={tmp_path / 'whole'}", f"run.dir={tmp_path / 'parts'}"
    skip = "checkpoint.interval_steps=4"
    run_distributed(train_in_turn, 2, [[*base, whole, skip], [*base, parts, "run.stop_at_step=1"], [*base, parts]])
    assert [p.name for p in list_checkpoints(tmp_path / "whole")] == ["step-00000004", "step-00000005"]
    a, b = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [m["lm_loss"] for m in a.values()] == [m["lm_loss"] for m in b.values()]
    ends = [tensor_digests(list_checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts")]
    assert ends[0] == ends[1]


def _train_and_break(runs: list[list[str]], rank: int, act: str) -> list[str]:
    """Like `train_in_turn`, with a fault on one rank in the middle of the last run's switch."""
    import os

    from model import holdings

    reasons = train_in_turn(runs[:-1])
    if int(os.environ["RANK"]) == rank:
        original = getattr(holdings.StageState, act)
        calls = []

        def broken(self: holdings.StageState, *args: object) -> object:
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("injected: no memory left")
            return original(self, *args)

        setattr(holdings.StageState, act, broken)
    return reasons + train_in_turn(runs[-1:])


@pytest.mark.parametrize("act", ["begin", *(pytest.param(act, marks=pytest.mark.slow) for act in ("view", "end"))])
def test_a_rank_that_fails_in_the_middle(act: str, corpus: Path, tmp_path: Path) -> None:
    """Every rank ends with a clear error at once; the run directory is whole, and the run continues from before."""
    base = [*SMALL, "run.steps=4", _stages(_TWICE + ", parallel: {expert: 4}"), "parallel.expert=2",
            f"data.corpus={corpus}"]  # fmt: skip
    broken, whole = f"run.dir={tmp_path / 'broken'}", f"run.dir={tmp_path / 'whole'}"
    with pytest.raises(CoppiceError, match="injected: no memory left"):
        run_distributed(_train_and_break, 4, [[*base, broken]], 2, act, timeout=60)
    assert [p.name for p in list_checkpoints(tmp_path / "broken")] == ["step-00000002"]
    run_distributed(train_in_turn, 4, [[*base, broken], [*base, whole]])
    assert [m["lm_loss"] for m in metrics(tmp_path / "broken").values()] == [
        m["lm_loss"] for m in metrics(tmp_path / "whole").values()
    ]


def _disagree(overrides: list[str]) -> list[str]:
    """Rank 1 scores differently: its plan is another one."""
    import os

    from train import expansion

    if os.environ["RANK"] == "1":
        original = expansion.gradient_scores

        def other(*args: object, **kwargs: object) -> dict[int, list[float]]:
            scores = original(*args, **kwargs)  # type: ignore[arg-type]
            return {layer: list(reversed(values)) for layer, values in scores.items()}

        expansion.gradient_scores = other  # type: ignore[assignment]
    return train_in_turn([overrides])


def test_plans_that_differ_stop_before_anything_moves(corpus: Path, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "run.steps=4",
        _stages(_TWICE),
        "parallel.expert=2",
        f"data.corpus={corpus}",
        f"run.dir={tmp_path}",
    ]
    with pytest.raises(CoppiceError, match="rank 1 made another expansion plan than rank 0; nothing was changed"):
        run_distributed(_disagree, 2, overrides, timeout=60)
    assert not events(tmp_path, "expansion")


def _resources(overrides: list[str]) -> list[dict[str, float]]:
    """Train with four switches in a row; count memory, descriptors and threads after each."""
    import gc
    import os
    import threading

    import torch

    from train import run as run_module

    found: list[dict[str, float]] = []
    original = run_module.expand

    def counted(run: object) -> None:
        original(run)  # type: ignore[arg-type]
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and not thing.is_meta:
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        found.append({
            "tensor_bytes": sum(storages.values()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        })  # fmt: skip

    run_module.expand = counted  # type: ignore[assignment]
    train_in_turn([overrides])
    return found


def test_four_switches_in_a_row_leak_nothing(corpus: Path, tmp_path: Path) -> None:
    """EP 2 -> 4 -> 2 -> 4 -> 2 with unchanged experts: the same stage every other time, so the same memory."""
    stages = ", ".join(f"{{at_step: {i + 1}, parallel: {{expert: {4 if i % 2 == 0 else 2}}}}}" for i in range(4))
    overrides = [*SMALL, "run.steps=5", f"upcycle.stages=[{stages}]", "parallel.expert=2", f"data.corpus={corpus}",
                 f"run.dir={tmp_path}", "upcycle.save_before=false"]  # fmt: skip
    for counts in run_distributed(_resources, 4, overrides):
        assert len(counts) == 4
        for earlier, later in ((counts[0], counts[2]), (counts[1], counts[3])):
            assert later["descriptors"] <= earlier["descriptors"], json.dumps(counts)
            assert later["threads"] <= earlier["threads"], json.dumps(counts)
            # Small tensors come and go (logged losses, generator states); a stage left behind is megabytes.
            assert abs(later["tensor_bytes"] - earlier["tensor_bytes"]) < 64 << 10, json.dumps(counts)


@pytest.mark.parametrize(
    "rule",
    [*(pytest.param(r, marks=pytest.mark.slow) for r in ("reset", "scale")), "reset_momentum, optimizer_scope: family"],
)
def test_optimizer_rules_on_both_paths_and_across_a_resume(rule: str, corpus: Path, tmp_path: Path) -> None:
    """Reset or scaled moments, rates of their own and a re-warm-up: the same bits live, through the disk, and resumed."""
    grow = f"{_TWICE}, optimizer_rule: {rule}, rewarm_steps: 2, router_lr_multiplier: 0.5, lr_multiplier_steps: 2"
    grow += ", bias_rate_multiplier: 4, bias_rate_steps: 3"
    base = [*SMALL, "run.steps=5", "parallel.expert=2", _stages(grow), f"data.corpus={corpus}"]
    live, disk, parts = (f"run.dir={tmp_path / name}" for name in ("live", "disk", "parts"))
    runs = [[*base, live, "upcycle.save_after=true"], [*base, disk, "upcycle.path=checkpoint"]]
    runs += [[*base, parts, "run.stop_at_step=3"], [*base, parts]]
    run_distributed(train_in_turn, 2, runs)
    ends = [tensor_digests(list_checkpoints(tmp_path / name)[-1]) for name in ("live", "disk", "parts")]
    assert ends[0] == ends[1] == ends[2]
    assert tensor_digests(tmp_path / "live" / "checkpoints" / _STAGE) == tensor_digests(
        tmp_path / "disk" / "checkpoints" / _STAGE
    )
    manifests = [read_manifest(list_checkpoints(tmp_path / name)[-1]) for name in ("live", "disk", "parts")]
    assert manifests[0].ages == manifests[1].ages == manifests[2].ages != {}
    rates = [m["learning_rate"] for m in metrics(tmp_path / "live").values()]
    plain = [m["learning_rate"] for m in metrics(tmp_path / "parts").values()]
    assert rates == plain
    # Steps 3 and 4 at a third and two thirds of the schedule's rate, step 5 at all of it.
    assert rates[2] / rates[1] < 0.5 < rates[3] / rates[1] < 1


@pytest.mark.parametrize("balancing", ["loss_free", pytest.param("aux_loss", marks=pytest.mark.slow)])
def test_exact_mode_keeps_the_function_and_lets_go_of_it(balancing: str, corpus: Path, tmp_path: Path) -> None:
    """The loss does not jump at the switch, the release is a function of the step, and a resume in it changes nothing."""
    grow = f"{_TWICE}, mode: exact, release_hold_steps: 1, release_steps: 2, release_shape: linear"
    score = [] if balancing == "loss_free" else ["model.router_score=softmax"]
    base = [*SMALL, "run.steps=6", "parallel.expert=2", _stages(grow), f"data.corpus={corpus}", "run.precision=fp32",
            f"model.balancing={balancing}", *score]  # fmt: skip
    live, disk, parts = (f"run.dir={tmp_path / name}" for name in ("live", "disk", "parts"))
    runs = [[*base, live, "upcycle.save_after=true"], [*base, disk, "upcycle.path=checkpoint"]]
    runs += [[*base, parts, "run.stop_at_step=4"], [*base, parts]]
    run_distributed(train_in_turn, 2, runs)
    ends = [tensor_digests(list_checkpoints(tmp_path / name)[-1]) for name in ("live", "disk", "parts")]
    assert ends[0] == ends[1] == ends[2]
    details = events(tmp_path / "live", "expansion")[0]["details"]
    # fp32, and tokens meet other experts in other groups of rows: a few units in the last place of a loss near 5.
    assert details["valid_loss_after"] == pytest.approx(details["valid_loss_before"], abs=2e-6)
    found = metrics(tmp_path / "live")
    assert [found[s]["released"] for s in found] == [1.0, 1.0, 0.0, 0.0, 0.5, 1.0]
    assert [found[s]["lm_loss"] for s in found] == [m["lm_loss"] for m in metrics(tmp_path / "parts").values()]
