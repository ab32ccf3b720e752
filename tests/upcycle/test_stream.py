"""The streaming executor: the same bytes and fingerprints as the checkpoint path, in bounded memory, in pieces of any size.

Three real runs, each expanded inside the job through a checkpoint, are the reference: bf16 with masters on two
expert-parallel ranks, fp32 with tensor-parallel experts (shards cut along other axes), fp32 with an expert per shard.
"""

import dataclasses
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from parallel.errors import CheckpointError, ExpansionError
from parallel.stream_files import read_index
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, _tensor_digests, metrics, small_corpus, train_in_turn
from train.checkpoint.files import digests, file_names, seal
from train.checkpoint.folder import Manifest, read_manifest
from upcycle.plan import ExpansionPlan, LayerPlan
from upcycle.stream import stream_expand, stream_weight_scores
from upcycle.verify import verify_expansion

_BEFORE, _AFTER = "step-00000003", "step-00000003-stage1"
# The smallest unit holds a few elements: rows and experts are cut, as they are in a large model.
_CHUNKS = (1 << 20, 5000, 700)
_GREEDY = "at_step: 3, factor: 2, selection: greedy"
_RUNS = {
    "bf16": ["parallel.expert=2", f"upcycle.stages=[{{{_GREEDY}, scoring_batches: 1}}]"],
    "fp32-split": [
        "parallel.tensor=2", "parallel.expert_tensor=2", "run.precision=fp32",
        f"upcycle.stages=[{{{_GREEDY}, utility: weight_norm, optimizer_rule: scale}}]",
    ],
    "fp32-sequential": [
        "parallel.expert=2", "run.precision=fp32", "model.experts=sequential", "optimizer.distributed=false",
        "upcycle.stages=[{at_step: 3, factor: 2, placement: spread, optimizer_rule: reset, optimizer_scope: all}]",
    ],
}  # fmt: skip


class Case(NamedTuple):
    """Both sides of an expansion that a job made."""

    before: Path
    after: Path

    @property
    def source(self) -> Path:
        return self.before / "tensors"

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.before)

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        return self.manifest.experts

    @property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan.from_dict(read_manifest(self.after).plans[0])


def _overrides(folder: Path, name: str, run_dir: Path, *more: str) -> list[str]:
    common = [f"data.corpus={small_corpus(folder)}", f"run.dir={run_dir}", "run.steps=5"]
    return [*SMALL, *common, *_RUNS[name], *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stream")


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Case]:
    runs = [_overrides(folder, n, folder / n, "upcycle.path=checkpoint", "run.stop_at_step=4") for n in _RUNS]
    run_distributed(train_in_turn, 2, runs, timeout=300)
    return {n: Case(folder / n / "checkpoints" / _BEFORE, folder / n / "checkpoints" / _AFTER) for n in _RUNS}


@pytest.fixture
def case(cases: dict[str, Case]) -> Case:
    return cases["bf16"]


@pytest.mark.parametrize("name", _RUNS)
def test_gives_what_the_job_saved(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """No process group; tensors and fingerprints of the job's own checkpoint, whatever the size of a piece."""
    case, expected = cases[name], read_manifest(cases[name].after)
    assert case.plan.bias_noise > 0
    lines: list[str] = []
    for chunk in _CHUNKS:
        target = tmp_path / str(chunk)
        found = stream_expand(case.source, target, case.plan, case.experts, chunk_bytes=chunk, say=lines.append)
        assert found == expected.fingerprints
        verify_expansion(case.manifest.fingerprints, found, case.plan, case.experts)
    assert len(lines) == len(_CHUNKS) and " MiB written in " in lines[0]
    reference, *mine = run_distributed(
        _all_digests, 1, [str(case.after / "tensors"), *(str(tmp_path / str(c)) for c in _CHUNKS)]
    )[0]
    assert all(digests == reference for digests in mine)


def _all_digests(folders: list[str]) -> list[dict[str, str]]:
    return [_tensor_digests(folder) for folder in folders]


def test_equals_the_checkpoint_path_with_every_rule(cases: dict[str, Case], tmp_path: Path) -> None:
    case, plans = cases["bf16"], []
    for rule, scope, scale in (
        ("reset", "replicas", None), ("reset", "all", None), ("reset_momentum", "families", None), ("scale", "replicas", None),
        ("scale", "families", 0.3),
    ):  # fmt: skip
        changed = {"optimizer_rule": rule, "optimizer_scope": scope, "optimizer_scale": scale}
        plans.append((case, dataclasses.replace(case.plan, **changed)))
    # Any order of parents, and families of any size.
    plans += [(cases[name], _shuffled(cases[name].plan)) for name in ("fp32-split", "fp32-sequential")]
    work = [(case.source, plan.to_dict(), case.experts) for case, plan in plans]
    run_distributed(_expand_both_ways, 1, work, tmp_path)


def _shuffled(plan: ExpansionPlan) -> ExpansionPlan:
    parents = (7, 0, 3, 3, 1, 6, 7, 7, 2, 5, 4)
    copies = tuple(parents.count(e) for e in range(plan.experts_before))
    layers = tuple(LayerPlan(x.layer, parents, copies) for x in plan.layers)
    return dataclasses.replace(plan, layers=layers, experts_after=len(parents), optimizer_rule="scale")


def _expand_both_ways(work: list[tuple[Path, dict[str, Any], dict[str, Any]]], folder: Path) -> None:
    from parallel.config import ParallelConfig
    from parallel.layout import Layout
    from upcycle.transform import expand_checkpoint

    layout = Layout.create(ParallelConfig(), seed=3)
    for number, (source, plan_dict, experts) in enumerate(work):
        plan = ExpansionPlan.from_dict(plan_dict)
        whole, stream = folder / f"{number}-whole", folder / f"{number}-stream"
        expand_checkpoint(source, whole, plan, experts, layout)
        stream_expand(source, stream, plan, experts, chunk_bytes=9000)
        assert _tensor_digests(str(stream)) == _tensor_digests(str(whole)), plan
        assert {p.name for p in stream.iterdir()} >= {p.name for p in whole.iterdir()}
        shutil.rmtree(whole)
        shutil.rmtree(stream)


def test_a_run_goes_on_from_it_as_from_its_own(folder: Path, case: Case, tmp_path: Path) -> None:
    """Loaded on two ranks with the state verified, the next step is the job's own, bit for bit."""
    made = tmp_path / "made" / "checkpoints" / _AFTER
    found = stream_expand(case.source, made / "tensors", case.plan, case.experts, chunk_bytes=5000)
    shutil.copytree(case.after / "rng", made / "rng")
    manifest = dataclasses.replace(read_manifest(case.after), fingerprints=found)
    seal(made, manifest, digests(made, file_names(made)))
    run = _overrides(folder, "bf16", tmp_path / "run", f"run.resume={made}", "run.stop_at_step=4")
    run_distributed(train_in_turn, 2, [run], timeout=200)
    theirs, mine = metrics(folder / "bf16"), metrics(tmp_path / "run")
    assert list(mine) == [4] and mine[4]["num_experts"] == 16
    assert (mine[4]["lm_loss"], mine[4]["grad_norm"]) == (theirs[4]["lm_loss"], theirs[4]["grad_norm"])
    assert (
        read_manifest(tmp_path / "run" / "checkpoints" / "step-00000004").fingerprints
        == read_manifest(folder / "bf16" / "checkpoints" / "step-00000004").fingerprints
    )


def test_the_references_are_cut_in_different_ways(cases: dict[str, Case]) -> None:
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    shards = {
        n: {tuple(c.sizes) for c in read_index(case.source).state_dict_metadata[key].chunks}
        for n, case in cases.items()
    }
    assert shards == {"bf16": {(4, 64, 32)}, "fp32-split": {(8, 16, 32)}, "fp32-sequential": {(1, 32, 32)}}


def test_scores_are_those_of_the_job(cases: dict[str, Case]) -> None:
    case = cases["fp32-split"]
    for chunk in (1 << 20, 900):
        scores = stream_weight_scores(case.source, case.experts, 8, chunk_bytes=chunk)
        for layer in case.plan.layers:
            # fp64 sums of a few thousand fp32 squares in another order.
            assert scores[layer.layer] == pytest.approx(layer.scores, rel=1e-12)
        assert len(scores) == len(case.plan.layers)
    with pytest.raises(ExpansionError, match=r"has 8 experts, checkpoint .* has 9"):
        stream_weight_scores(case.source, case.experts, 9, chunk_bytes=900)


# ---- memory ---------------------------------------------------------------------------------------------------------

_LAYERS, _EXPERTS, _SHARDS, _ROWS, _COLUMNS = 2, 8, 2, 1024, 512
_KEYS = {f"layers.{n}.experts.{w}": {"layer": n + 1, "kind": "expert"} for n in range(_LAYERS) for w in ("fc1", "fc2")}


def _save_large(folder: str) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from parallel.sharded_save import save_sharded

    state: dict[str, Any] = {}
    for key in _KEYS:
        for prefix in ("", *(f"optimizer.state.{name}." for name in ("param", "exp_avg", "exp_avg_sq"))):
            dtype = torch.float32 if prefix else torch.bfloat16
            for shard in range(_SHARDS):
                part = torch.randn(_EXPERTS // _SHARDS, _ROWS, _COLUMNS).to(dtype)
                state[f"{prefix}{key}/{shard}"] = ShardedTensor.from_rank_offsets(
                    prefix + key, part, (0, shard, _SHARDS)
                )
    save_sharded(state, folder)


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peaks_mib(source: str, target: str, plan: dict[str, Any], chunk_bytes: int) -> tuple[float, float]:
    """By how much the memory of this process grew at most, while expanding and while scoring."""
    peaks = []
    for act in (
        lambda: stream_expand(
            Path(source), Path(target), ExpansionPlan.from_dict(plan), _KEYS, chunk_bytes=chunk_bytes
        ),
        lambda: stream_weight_scores(Path(source), _KEYS, _EXPERTS, chunk_bytes=chunk_bytes),
    ):
        # Starts the record of the peak anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory_mib("VmRSS")
        act()
        peaks.append(_memory_mib("VmHWM") - before)
    return peaks[0], peaks[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak of a process' memory")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    run_distributed(_save_large, 1, str(tmp_path / "before"))
    parents = tuple(e for e in range(_EXPERTS) for _ in range(2))
    layers = tuple(LayerPlan(n + 1, parents, (2,) * _EXPERTS) for n in range(_LAYERS))
    plan = ExpansionPlan(3, 1, _EXPERTS, 2 * _EXPERTS, layers).to_dict()
    size = sum(f.stat().st_size for f in (tmp_path / "before").iterdir()) / 2**20
    assert size > 220
    chunk = 2 << 20
    expanding, scoring = run_distributed(
        _peaks_mib, 1, str(tmp_path / "before"), str(tmp_path / "after"), plan, chunk, init=False
    )[0]
    print(f"checkpoint {size:.0f} MiB; memory grew by {expanding:.0f} MiB expanding, {scoring:.0f} MiB scoring")
    # A shard has 8 MiB (16 in the larger stage, a tensor 16 to 32); the first use of torch's archives brings some code.
    assert expanding < 40 and scoring < 40


# ---- what is refused ------------------------------------------------------------------------------------------------


def _refused(
    case: Case, target: Path, kind: type[Exception], match: str, source: Path | None = None, **plan: Any
) -> None:
    changed = dataclasses.replace(case.plan, **plan)
    with pytest.raises(kind, match=match) as caught:
        stream_expand(source or case.source, target, changed, case.experts, chunk_bytes=5000)
    assert "\n" not in str(caught.value)
    assert not (target / "metadata.json").exists()


def test_a_plan_that_does_not_fit_writes_nothing(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "new"
    _refused(case, target, ExpansionError, "has 8 experts, the plan starts from 4", experts_before=4)
    _refused(case, target, ExpansionError, "has no layer 2", layers=case.plan.layers[:1])
    lacking = case.experts | {"decoder.layers.7.mlp.router.weight": {"layer": 8, "kind": "router"}}
    with pytest.raises(ExpansionError, match=r"lacks decoder\.layers\.7\.mlp\.router\.weight: it is of another model"):
        stream_expand(case.source, target, case.plan, lacking, chunk_bytes=5000)
    assert not target.exists()


def test_a_source_that_cannot_be_read(case: Case, tmp_path: Path) -> None:
    source, target = tmp_path / "damaged", tmp_path / "new"
    _refused(case, target, CheckpointError, "no complete checkpoint", source=tmp_path)
    shutil.copytree(case.source, source)
    file = source / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1000])
    _refused(case, target, CheckpointError, rf"{file} is truncated, .* bytes: use another checkpoint", source=source)
    file.unlink()
    _refused(case, target, CheckpointError, rf"{file} cannot be read \(No such file", source=source)
    # Found out in the middle: what was written is gone.
    file.write_bytes(b"\0" * len(content))
    _refused(case, target, CheckpointError, rf"{file}: .* cannot be read \(.*\): use another checkpoint", source=source)
    assert not target.exists()
    (source / ".metadata").write_bytes(b"not an index")
    _refused(case, target, CheckpointError, "cannot be read by torch", source=source)


class _Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["COPPICE_TRAP"],)


def test_an_index_runs_no_code(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setenv("COPPICE_TRAP", str(trap))
    source = tmp_path / "evil"
    shutil.copytree(case.source, source)
    (source / ".metadata").write_bytes(pickle.dumps(_Trap()))
    _refused(case, tmp_path / "new", CheckpointError, r"it wants posix\.mkdir", source=source)
    assert not trap.exists()


def test_a_target_in_use_stays_as_it_is(case: Case, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    _refused(case, tmp_path, CheckpointError, "is not empty: choose another folder")
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "notes").unlink()
    stream_expand(case.source, tmp_path, case.plan, case.experts, chunk_bytes=5000)
    (tmp_path / "file").write_text("")
    _refused(case, tmp_path / "file", CheckpointError, r"cannot be written \(File exists\)")


def _expand_on_a_small_disk(
    source: Path, target: Path, plan: dict[str, Any], experts: dict[str, Any], room: int
) -> str:
    # The kernel refuses to let a file grow beyond this, which looks like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        stream_expand(source, target, ExpansionPlan.from_dict(plan), experts, chunk_bytes=5000)
    except CheckpointError as e:
        return str(e)
    return "written"


def test_a_full_disk_leaves_nothing_behind(case: Case, tmp_path: Path) -> None:
    for room in (200_000, 1_000):
        arguments = (case.source, tmp_path / "new", case.plan.to_dict(), case.experts, room)
        (message,) = run_distributed(_expand_on_a_small_disk, 1, *arguments, init=False)
        assert message == (
            f"checkpoint {tmp_path / 'new'} cannot be written (File too large): free space, or choose another folder"
        )
        assert not (tmp_path / "new").exists()
