"""`python -m upcycle from-dense`: what it writes tensor by tensor, and runs that really go on from it.

One dense run in bf16 on two processes; every checkpoint made of it is compared with the dense one by means of plain
slicing, and continued on two expert-parallel ranks.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.sharded_state import OPTIMIZER_PREFIX
from parallel.regions import Box
from parallel.sharded_load import mark_complete
from parallel.stream_files import StoredTensors, TensorWriter
from tests.distributed import run_distributed
from tests.train.trainer import SMALL, metrics, reseal, rewrite_manifest, small_corpus, train_in_turn
from train.checkpoint.folder import list_checkpoints, read_manifest
from train.offline.upcycle_command import main
from train.report import write_report
from train.run_files import RunFiles
from upcycle.dense_draw import redrawn_units
from upcycle.plan import ExpansionPlan

_MOE = {
    "copy": ["--num-experts", "8", "--top-k", "2"],
    "groups": ["--num-experts", "8", "--top-k", "4", "--method", "virtual_group", "--granularity", "4",
               "--optimizer-rule", "copy", "--router-score", "softmax", "--balancing", "aux_loss", "--dense-first", "1"],
    "drop": ["--num-experts", "4", "--top-k", "2", "--method", "drop", "--redraw-share", "0.3"],
}  # fmt: skip
_SETTINGS = {
    "copy": ["model.num_experts=8", "model.expert_ffn_hidden_size=64"],
    "groups": ["model.num_experts=8", "model.top_k=4", "model.expert_ffn_hidden_size=16", "model.router_score=softmax",
               "model.balancing=aux_loss", "model.dense_first=1"],
}  # fmt: skip
_STATES = ("", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
_MLP = "decoder.layers.1.mlp."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def _run(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.corpus={corpus}", f"run.dir={run_dir}", "upcycle.stages=[]", "run.steps=8", *more]


@pytest.fixture(scope="module")
def dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of four steps, with a checkpoint of the third."""
    run_dir = tmp_path_factory.mktemp("dense") / "run"
    more = ["model.num_experts=0", "checkpoint.interval_steps=3", "run.stop_at_step=4"]
    run_distributed(train_in_turn, 2, [_run(corpus, run_dir, *more)], timeout=300)
    return run_dir


def _start(dense: Path) -> Path:
    return dense / "checkpoints" / "step-00000003"


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each method makes of the third step."""
    folder = tmp_path_factory.mktemp("made")
    for name, flags in _MOE.items():
        assert main(["from-dense", str(_start(dense)), *flags, "--output", str(folder / name)]) == 0
    return {name: folder / name for name in _MOE}


@pytest.fixture(scope="module")
def weights_only(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense checkpoint as one that was imported: weights, at step 0 of nothing."""
    folder = tmp_path_factory.mktemp("imported") / "dense"
    shutil.copytree(_start(dense), folder)
    shutil.rmtree(folder / "tensors")
    (folder / "tensors").mkdir()
    with StoredTensors(_start(dense) / "tensors") as stored, TensorWriter(folder / "tensors") as writer:
        for key, tensor in stored.tensors.items():
            if not key.startswith(OPTIMIZER_PREFIX):
                box = Box((0,) * len(tensor.shape), tensor.shape)
                writer.add(key, tensor.shape, box, stored.read(key, box))
        writer.finish()
    mark_complete(folder / "tensors")
    old = read_manifest(_start(dense)).fingerprints
    kept = {name: rows for name, rows in old.items() if name.startswith("weight/")}
    data = read_manifest(_start(dense)).data | {"samples": 0}
    rewrite_manifest(folder, fingerprints=kept, step=0, tokens=0, optimizer_step=0, data=data)
    (folder / "huggingface").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "huggingface" / name).write_text("{}")
    reseal(folder)
    return folder


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    with StoredTensors(checkpoint / "tensors") as stored:
        return {k: stored.read(k, Box((0,) * len(t.shape), t.shape)) for k, t in stored.tensors.items()}


def _same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def _check_carried(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], layers: tuple[int, ...]) -> None:
    """Everything outside the feed-forwards of these layers (from 0) is there bit for bit, norms under another key."""
    for key, tensor in old.items():
        for layer in layers:
            key = key.replace(f"layers.{layer}.mlp.linear_fc1.layer_norm_", f"layers.{layer}.pre_mlp_layernorm.")
        if not any(f"layers.{layer}.mlp.linear_" in key for layer in layers):
            assert _same_bits(new[key], tensor), key


def test_sparse_upcycling_copies(dense: Path, made: dict[str, Path]) -> None:
    old, new, manifest = _tensors(_start(dense)), _tensors(made["copy"]), read_manifest(made["copy"])
    _check_carried(old, new, (0, 1))
    for layer in (0, 1):
        for fc in ("fc1", "fc2"):
            source, target = f"layers.{layer}.mlp.linear_{fc}", f"layers.{layer}.mlp.experts.experts.linear_{fc}"
            for state in _STATES:
                theirs, ours = old[f"{state}decoder.{source}.weight"], new[f"{state}decoder.{target}.weight"]
                assert _same_bits(ours, theirs.expand(8, -1, -1) * (0 if "exp_avg" in state else 1)), (state, target)
        router = f"decoder.layers.{layer}.mlp.router."
        drawn = new[f"optimizer.state.param.{router}weight"]
        assert _same_bits(new[f"{router}weight"], drawn.bfloat16()) and len(drawn.unique(dim=0)) == 8
        assert 0.01 < float(drawn.std()) < 0.03
        assert not any(new[f"{state}{router}weight"].any() for state in _STATES[2:])
        assert _same_bits(new[f"{router}expert_bias"], torch.zeros(8))
    old_manifest = read_manifest(_start(dense))
    (plan,) = manifest.plans
    assert manifest.fingerprints["weight/decoder.layers.0.mlp.experts.experts.linear_fc1.weight"] == (
        old_manifest.fingerprints["weight/decoder.layers.0.mlp.linear_fc1.weight"] * 8
    )
    assert (manifest.step, manifest.stage, manifest.num_experts) == (3, 1, 8)
    for name in ("optimizer_step", "scheduler", "data", "tokens", "layout", "health"):
        assert getattr(manifest, name) == getattr(old_manifest, name), name
    assert ExpansionPlan.from_dict(plan).dense is not None
    begun = [{"layer": n, "experts": list(range(8)), "exp_avg": 3, "exp_avg_sq": 3} for n in (1, 2)]
    assert manifest.ages == {"restarts": begun, "rates": []}


def test_virtual_groups_cut_and_scale(dense: Path, made: dict[str, Path]) -> None:
    """Gates sum to one: c = G = 4, so up and down are doubled; moments follow the weights."""
    old, new = _tensors(_start(dense)), _tensors(made["groups"])
    _check_carried(old, new, (1,))
    assert f"{_MLP}router.expert_bias" not in new
    for state, factor in zip(_STATES, (2.0, 2.0, 1 / 2, 1 / 4), strict=True):
        # Weights are their masters, rounded.
        read = "optimizer.state.param." if state == "" else state
        gate, up = old[f"{read}{_MLP}linear_fc1.weight"].chunk(2)
        down = old[f"{read}{_MLP}linear_fc2.weight"]
        fc1, fc2 = (new[f"{state}{_MLP}experts.experts.linear_{fc}.weight"] for fc in ("fc1", "fc2"))
        for expert in range(8):
            cut = slice(16 * (expert % 4), 16 * (expert % 4) + 16)
            assert torch.equal(fc1[expert], torch.cat([gate[cut], up[cut] * factor]).to(fc1.dtype))
            assert torch.equal(fc2[expert], (down[:, cut] * factor).to(fc2.dtype))
    rows = new[f"{_MLP}router.weight"]
    assert torch.equal(rows, rows[[0, 0, 0, 0, 4, 4, 4, 4]]) and not torch.equal(rows[0], rows[4])
    manifest = read_manifest(made["groups"])
    every = [{"layer": 2, "experts": list(range(8)), "exp_avg": 3, "exp_avg_sq": 3}]
    assert manifest.ages == {"restarts": [], "rates": [], "routers": every}


def test_drop_upcycling_draws_matching_units(dense: Path, made: dict[str, Path], tmp_path: Path) -> None:
    old, new = _tensors(_start(dense)), _tensors(made["drop"])
    _check_carried(old, new, (0, 1))
    masters, seen = "optimizer.state.param.", set()
    gate, up = old[f"{masters}{_MLP}linear_fc1.weight"].chunk(2)
    down = old[f"{masters}{_MLP}linear_fc2.weight"].T
    deviations, seed = [], read_manifest(made["drop"]).plans[0]["seed"]
    for expert in range(4):
        fc1, fc2 = (new[f"{masters}{_MLP}experts.experts.linear_{fc}.weight"][expert] for fc in ("fc1", "fc2"))
        changed = []
        for ours, theirs in zip((*fc1.chunk(2), fc2.T), (gate, up, down), strict=True):
            units = (ours != theirs).any(dim=1)
            # Nothing of a unit stays.
            assert (ours != theirs)[units].all()
            changed.append(units)
            replaced, n = theirs[units].double(), theirs[units].numel()
            mean, deviation = replaced.mean(), replaced.std(correction=0)
            # Five standard errors of mean and deviation.
            assert abs(ours[units].double().mean() - mean) < 5 * deviation / n**0.5
            assert abs(ours[units].double().std() - deviation) < 5 * deviation / (2 * n) ** 0.5
            deviations.append(float(deviation))
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        units = redrawn_units(f"upcycling/{seed}/2/{expert}/units", 64, 0.3)
        assert changed[0].nonzero().flatten().tolist() == units.tolist() and len(units) == 19
        seen.add(tuple(units.tolist()))
    assert len(seen) == 4 and min(deviations) > 0
    for key, tensor in new.items():
        if "experts.experts" in key and not key.startswith(OPTIMIZER_PREFIX):
            assert _same_bits(tensor, new[masters + key].bfloat16())
    # The same bits in pieces of any size.
    from train.offline.from_dense import make_from_dense, open_dense, plan_of_dense
    from upcycle.dense import DenseRules

    source = open_dense(_start(dense), experts=4, top_k=2, granularity=1, overrides=[])
    plan = plan_of_dense(source, DenseRules(method="drop", redraw_share=0.3))
    again = make_from_dense(source, plan, tmp_path / "again", chunk_bytes=1000, say=lambda line: None)
    assert again.fingerprints == read_manifest(made["drop"]).fingerprints
    assert all(_same_bits(tensor, new[key]) for key, tensor in _tensors(tmp_path / "again").items())


def test_runs_go_on_and_grow_further(
    dense: Path, made: dict[str, Path], weights_only: Path, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    """On two expert-parallel ranks, moments verified; a fresh model of the same configuration has the same keys."""
    imported = tmp_path / "imported"
    assert main(["from-dense", str(weights_only), *_MOE["copy"], "--output", str(imported)]) == 0
    # What is printed is what the run needs.
    *_, told = capsys.readouterr().out.splitlines()
    words = shlex.split(told.partition(" and ")[2])
    assert {*_SETTINGS["copy"], "model.hidden_size=32", f"run.resume={imported}", "checkpoint.load=model_only"} <= {
        *words
    }
    assert [p.name for p in (imported / "huggingface").iterdir()] == ["tokenizer.json"]
    ep, grow = "parallel.expert=2", "upcycle.stages=[{at_step: 5, factor: 2, selection: greedy, scoring_batches: 1}]"
    more = {
        "copy": [*_SETTINGS["copy"], f"run.resume={made['copy']}", grow, "run.stop_at_step=7"],
        "groups": [*_SETTINGS["groups"], f"run.resume={made['groups']}", "run.stop_at_step=4"],
        "imported": [*words, "run.stop_at_step=1"],
        "fresh": [*_SETTINGS["copy"], "run.stop_at_step=1"],
    }  # fmt: skip
    runs = [_run(corpus, tmp_path / "runs" / name, ep, *words) for name, words in more.items()]
    # And once more, from its own checkpoint.
    runs.append([*runs[0], "run.stop_at_step=8"])
    run_distributed(train_in_turn, 2, runs, timeout=300)
    # The same batch, and the function of the dense model: only bf16 rounds differently.
    expected = metrics(dense)[4]["lm_loss"]
    for name in ("copy", "groups"):
        found = metrics(tmp_path / "runs" / name)
        assert abs(found[4]["lm_loss"] - expected) < expected * 2.0**-8, name
        assert all(m["lm_loss"] == m["lm_loss"] < 10 for m in found.values())
    assert metrics(tmp_path / "runs" / "imported")[1]["lm_loss"] < 10
    grown = read_manifest(list_checkpoints(tmp_path / "runs" / "copy")[-1])
    assert (grown.step, grown.stage, grown.num_experts, len(grown.plans)) == (8, 2, 16, 2)

    theirs = list_checkpoints(tmp_path / "runs" / "fresh")[-1]
    mine, other = read_manifest(made["copy"]), read_manifest(theirs)
    assert mine.experts == other.experts
    assert {k: len(v) for k, v in mine.fingerprints.items()} == {k: len(v) for k, v in other.fingerprints.items()}
    with StoredTensors(made["copy"] / "tensors") as a, StoredTensors(theirs / "tensors") as b:
        assert a.tensors == b.tensors

    page = write_report(tmp_path / "runs" / "copy", tmp_path / "page.html").read_text()
    assert "Family tree of the experts" in page and "Older stages belong to the run this one was started from" in page
    assert write_report(tmp_path / "runs" / "groups", tmp_path / "other.html").exists()
    assert sorted(RunFiles(tmp_path / "runs" / "copy").read_plans()) == [3, 5]
    capsys.readouterr()
    # Restored outside of the job, right after and after a growth of its own.
    plan = ["plan", str(tmp_path / "runs" / "groups"), "--factor", "2", "--mode", "exact", "--selection", "greedy"]
    assert main([*plan, "--scoring-batches", "1"]) == 0
    assert "8 -> 16 experts" in capsys.readouterr().out
    assert main(["plan", str(tmp_path / "runs" / "copy"), *plan[2:4], "--placement", "spread"]) == 0
    assert "16 -> 32 experts" in capsys.readouterr().out
    assert main(["lineage", str(tmp_path / "runs" / "copy")]) == 0
    assert "stage 1, after step 3: the feed-forward of a dense model -> 8 experts (copy)" in capsys.readouterr().out


def _exists(dense: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    return [str(dense), *_MOE["copy"], "--output", str(tmp_path / "there")]


_Words = Callable[[Path, Path], list[str]]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (lambda d, t: ["/nowhere", *_MOE["copy"]], 4, "/nowhere is neither a complete checkpoint nor a run directory"),
        (lambda d, t: ["model.top_k=2", *_MOE["copy"]], 2, "model.top_k=2 is no checkpoint: name one before the settings"),
        (lambda d, t: [str(d), "model.top_k=2", *_MOE["copy"]], 2, "model.top_k=2 follows from --top-k: leave it out"),
        (lambda d, t: [str(d), "--num-experts", "1", "--top-k", "1"], 2, "--num-experts=1 must be 2 or more"),
        (lambda d, t: [str(d), "--num-experts", "4", "--top-k", "5"], 2, "model.top_k=5 is above model.num_experts=4"),
        (lambda d, t: [str(d), *_MOE["copy"], "--granularity", "0"], 2, "--granularity=0 must be 1 or more"),
        (lambda d, t: [str(d), *_MOE["copy"], "--method", "mix"], 2, "--method=mix is unknown"),
        (lambda d, t: [str(d), *_MOE["copy"], "--dense-first", "2"], 2, "leave no MoE layer among model.layers=2"),
        (lambda d, t: [str(d), *_MOE["copy"], "--router-score", "softmax"], 2, "model.balancing=loss_free needs"),
        (lambda d, t: [str(d), *_MOE["copy"], "--chunk-mib", "0"], 2, "--chunk-mib=0 must be 1 or more"),
        (_exists, 4, "exists and is not empty: choose another folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    dense: Path, tmp_path: Path, words: _Words, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = words(dense, tmp_path)
    told += [] if "--output" in told else ["--output", str(tmp_path / "made")]
    before = sorted(tmp_path.iterdir())
    assert main(["from-dense", *told]) == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_other_checkpoints_are_refused(
    made: dict[str, Path], weights_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "made")]
    assert main(["from-dense", str(made["copy"]), *_MOE["copy"], *output]) == 2
    assert "has 8 experts per layer, and from-dense starts from a dense model" in capsys.readouterr().err
    assert main(["from-dense", str(weights_only), *_MOE["copy"], "--optimizer-rule", "copy", *output]) == 2
    assert "has no optimizer state to copy: use --optimizer-rule reset" in capsys.readouterr().err
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(read_manifest(made["copy"]).plans[0]))
    assert main(["expand", str(made["copy"]), "--plan", str(plan), *output]) == 5
    assert "the plan makes experts of a dense model" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]


def test_what_does_not_verify_is_not_published(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits that are not those of the manifest: of what is carried over, and of a feed-forward's weights."""
    for number, key in enumerate(("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc2.weight")):
        bad = tmp_path / f"bad-{number}"
        shutil.copytree(_start(dense), bad)
        names = read_manifest(bad).fingerprints
        rewrite_manifest(bad, fingerprints=names | {f"weight/{key}": [names[f"weight/{key}"][0] + 1]})
        assert main(["from-dense", str(bad), *_MOE["copy"], "--output", str(tmp_path / "made")]) == (5, 4)[number]
        told = ("is not what the plan says; nothing was published", f"{key} is not what was saved")[number]
        assert told in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad-0", "bad-1"]
