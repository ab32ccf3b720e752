"""Fingerprints: the arithmetic against exact integers, the same numbers in every layout, replicas that disagree."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from model.fingerprint import Part, sums_of, tensor_sums
from parallel.errors import CheckpointError, ExpansionError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL

_C32, _C64 = 0x9E3779B1, 0x9E3779B97F4A7C15


def _signed(number: int) -> int:
    """A number modulo 2^64 as torch's int64 shows it."""
    return (number + 2**63) % 2**64 - 2**63


def _exact(tensor: torch.Tensor, start: int, row_numel: int, rows: int) -> list[int]:
    """The definition, element by element, in Python's integers."""
    sums = [0] * rows
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for place, x in enumerate(tensor.flatten().view(bits).tolist(), start):
        if tensor.element_size() == 2:
            value = (x * x + _C32 * x) << 32
        elif tensor.element_size() == 4:
            value = x * x + _C64 * x
        else:
            low, high = _half(x), _half(x >> 32)
            value = low * low + _C64 * low + high * high + _C64 * high
        sums[place // row_numel] += value
    return [_signed(s) for s in sums]


def _half(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def _noise(numel: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the arithmetic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(("start", "numel", "row_numel", "rows"), [
    (0, 600, 600, 1), (0, 600, 100, 6), (37, 401, 100, 6), (99, 1, 100, 6), (100, 100, 100, 6), (5, 0, 100, 6), (3, 4, 1, 8),
])  # fmt: skip
def test_the_numbers_are_those_of_the_definition(
    dtype: torch.dtype, start: int, numel: int, row_numel: int, rows: int
) -> None:
    tensor = _noise(numel, dtype) * (1000 if dtype == torch.int64 else 1)
    assert tensor_sums(tensor, start, row_numel, rows).tolist() == _exact(tensor, start, row_numel, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("row_numel", [300_007, 4_097, 1_500_000])
def test_parts_add_up_wherever_they_are_cut(dtype: torch.dtype, row_numel: int) -> None:
    # More elements than are widened at a time, in rows that are longer and shorter than that.
    numel = 1_500_000
    rows = -(-numel // row_numel)
    tensor = _noise(numel, dtype)
    whole = tensor_sums(tensor, 0, row_numel, rows)
    draw = random.Random(row_numel)
    cuts = [0, *sorted(draw.sample(range(numel), 4)), numel]
    parts = [tensor_sums(tensor[a:b], a, row_numel, rows) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(sum(parts), whole)
    wide = tensor.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).to(torch.int64)
    values = (wide * wide + _C32 * wide) << 32 if dtype == torch.bfloat16 else wide * wide + _signed(_C64) * wide
    assert whole.tolist() == [row.sum().item() for row in values.split(row_numel)]


def test_zeros_have_the_number_zero_and_order_does_not_matter() -> None:
    assert tensor_sums(torch.zeros(50), 0, 10, 5).tolist() == [0] * 5
    assert tensor_sums(torch.zeros(50) * -1.0, 0, 50, 1).item() != 0
    tensor = _noise(1000, torch.float32)
    turned = tensor_sums(tensor.flip(0), 0, 1000, 1)
    assert torch.equal(turned, tensor_sums(tensor, 0, 1000, 1))


def test_every_16_bit_value_counts_differently() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert len(set(tensor_sums(every, 0, 1, 2**16).tolist())) == 2**16


def test_a_changed_32_bit_element_is_seen_whatever_the_change() -> None:
    # Every single bit, and the changes by a power of two, at values where sums could meet.
    edges = [0, 1, -1, 2, -2, 2**30, -(2**30), 2**31 - 1, -(2**31), -(2**31) + 1, 0x3F800000]
    draw = random.Random(3)
    for x in edges + [draw.randrange(-(2**31), 2**31) for _ in range(50)]:
        others = {_half(x ^ (1 << bit)) for bit in range(32)} | {
            _half(x + s * 2**k) for k in range(32) for s in (1, -1)
        }
        values = [x, *sorted(others), -x if x != -(2**31) else 0]
        numbers = tensor_sums(torch.tensor(values, dtype=torch.int64).to(torch.int32), 0, 1, len(values)).tolist()
        assert all(n != numbers[0] for n, v in zip(numbers[1:], values[1:], strict=True) if v != x), x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_that_cancel_in_a_plain_sum_are_seen(dtype: torch.dtype) -> None:
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    tensor = _noise(1000, dtype)
    number = tensor_sums(tensor, 0, 1000, 1)
    draw = random.Random(1)
    for bit in range(bits.itemsize * 8 - 1):
        # The bit set in one element and cleared in another.
        words = tensor.clone().view(bits)
        off = [i for i, x in enumerate(words.tolist()) if not x >> bit & 1]
        on = [i for i, x in enumerate(words.tolist()) if x >> bit & 1]
        if not off or not on:
            continue
        a, b = draw.choice(off), draw.choice(on)
        words[a] ^= 1 << bit
        words[b] ^= 1 << bit
        assert words.sum() == tensor.view(bits).sum()
        traded = sorted(words.tolist()) == sorted(tensor.view(bits).tolist())
        assert torch.equal(tensor_sums(words.view(dtype), 0, 1000, 1), number) == traded, bit
    assert not torch.equal(tensor_sums(-tensor, 0, 1000, 1), number)


def test_threads_share_the_tensors_out_and_leave_torch_as_it_was() -> None:
    parts = [Part(_noise(5000, torch.float32, seed), seed, 1000, 6) for seed in range(9)]
    expected = [tensor_sums(*part) for part in parts]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(sums_of(parts), expected, strict=True))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_memory_is_bounded() -> None:
    # 32 Mi elements would take 256 MiB when widened at once; torch counts nothing on CPU, so ask the kernel.
    growth = run_distributed(_peak_growth, 1, init=False)[0]
    assert growth < 32 << 20


def _peak_growth() -> int:
    import resource

    tensor = torch.ones(1 << 25)
    tensor_sums(tensor[:1000], 0, 1000, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor_sums(tensor, 0, 1 << 20, 32)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


# ---- in every layout ----------------------------------------------------------------------------------------------------


def _stage(overrides: list[str]) -> tuple[Any, Any]:
    from parallel.compat import prepare_megatron
    from parallel.layout import Layout
    from train.settings import load_settings
    from train.stage import build_stage

    prepare_megatron()
    settings = load_settings([*SMALL, "upcycle.stages=[]", *overrides])
    layout = Layout.create(settings.parallel, 1)
    return build_stage(settings, 0, layout, 300), layout


def _train_one_step(stage: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for chunk in stage.chunks:
        for p in chunk.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
    assert stage.optimizer.step()[0]


def _save(folder: str, overrides: list[str]) -> dict[str, list[int]]:
    from model.fingerprint import take_fingerprints
    from model.sharded_state import save_tensors

    stage, layout = _stage(overrides)
    _train_one_step(stage, 5)
    for part in stage.moe_parts():
        part.layer.router.expert_bias.copy_(torch.arange(8) * 0.01)
    Path(folder).mkdir()
    save_tensors(Path(folder), stage.chunks, stage.optimizer, layout)
    return take_fingerprints(stage.chunks, stage.optimizer, layout)


def _load_in_turn(folder: str, cases: list[list[str]]) -> list[dict[str, list[int]]]:
    from model.fingerprint import take_fingerprints
    from model.sharded_state import load_tensors

    found = []
    for overrides in cases:
        stage, layout = _stage(overrides)
        load_tensors(Path(folder), stage.chunks, stage.optimizer, layout, step=1)
        found.append(take_fingerprints(stage.chunks, stage.optimizer, layout))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_numbers_are_the_same_in_every_layout(tmp_path: Path, precision: str) -> None:
    common = [f"run.precision={precision}", "model.tie_embeddings=true"]
    saved = run_distributed(_save, 1, str(tmp_path / "saved"), common)[0]
    for name in ("weight", "param", "exp_avg", "exp_avg_sq"):
        experts = saved[f"{name}/decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
        assert len(set(experts)) == 8 and 0 not in experts
        assert len(saved[f"{name}/decoder.layers.1.mlp.router.weight"]) == 8
        assert len(saved[f"{name}/embedding.word_embeddings.weight"]) == 1
    assert len(set(saved["weight/decoder.layers.1.mlp.router.expert_bias"])) == 8
    cases = [
        [*common, "parallel.expert=2"],
        [*common, "parallel.expert=2", "optimizer.distributed=false"],
        [*common, "model.experts=sequential"],
        [*common, "parallel.tensor=2"],
        [*common, "parallel.tensor=2", "parallel.expert_tensor=2", "optimizer.distributed=false"],
        [*common, "parallel.pipeline=2"],
    ]
    for found in run_distributed(_load_in_turn, 2, str(tmp_path / "saved"), cases):
        for case, numbers in zip(cases, found, strict=True):
            assert numbers == saved, case


# ---- replicas -----------------------------------------------------------------------------------------------------------

_EXPERTS = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
_NORM = "decoder.layers.0.pre_mlp_layernorm.weight"
_BIAS = "decoder.layers.1.mlp.router.expert_bias"


def _parameter(stage: Any, ending: str) -> torch.Tensor:
    tensors = stage.chunks[0].state_dict(keep_vars=True)
    return next(t for name, t in tensors.items() if name.endswith(ending))


def _break_in_turn(
    overrides: list[str], rank: int, what: list[tuple[str, str]]
) -> list[tuple[type[Exception], str] | None]:
    """Change one element on one rank, name by name, and put it back; what was raised each time, and at the end."""
    from model.fingerprint import take_fingerprints
    from parallel.optimizer_state import optimizer_views

    stage, layout = _stage(overrides)
    _train_one_step(stage, 5)
    found: list[tuple[type[Exception], str] | None] = []
    for state, ending in [*what, ("", "")]:
        element = torch.zeros(1)
        if state == "buffer":
            element = dict(stage.chunks[0].named_buffers())[ending].view(-1)[-1:]
        elif state == "weight":
            element = _parameter(stage, ending).detach().view(-1)[-1:]
        elif state:
            of = _parameter(stage, ending)
            view = next(v for v in optimizer_views(stage.optimizer) if v.param is of)
            element = view.tensors[state].detach().view(-1)[-1:]
        before = element.clone()
        if layout.rank == rank:
            element += 1.0
        try:
            take_fingerprints(stage.chunks, stage.optimizer, layout, error=ExpansionError)
            found.append(None)
        except ExpansionError as e:
            found.append((type(e), str(e)))
        element.copy_(before)
    return found


def _agree_on(results: list[Any]) -> list[Any]:
    assert all(r == results[0] for r in results), "ranks raised different errors"
    return results[0]


def test_data_parallel_replicas_that_disagree_are_named_on_all_ranks() -> None:
    # Two copies: the one that speaks, rank 0, is broken or the other one.
    for rank in (0, 1):
        cases = [("weight", "layers.0.mlp.experts.weight1"), ("weight", "layers.0.pre_mlp_layernorm.weight"),
                 ("weight", "layers.1.mlp.router.expert_bias"), ("exp_avg", "layers.0.mlp.experts.weight1"),
                 ("param", "layers.0.pre_mlp_layernorm.weight")]  # fmt: skip
        names = [f"expert 7 of weight/{_EXPERTS}", f"weight/{_NORM}", f"expert 7 of weight/{_BIAS}",
                 f"expert 7 of exp_avg/{_EXPERTS}", f"param/{_NORM}"]  # fmt: skip
        found = _agree_on(run_distributed(_break_in_turn, 2, ["optimizer.distributed=false"], rank, cases))
        assert found.pop() is None
        for raised, name in zip(found, names, strict=True):
            assert raised is not None
            assert raised[1].startswith(f"replicas disagree: {name} has other bits on rank 1 (data 1, tensor 0, ")
            assert "than on rank 0 (data 0, tensor 0, context 0, pipeline 0, expert 0)" in raised[1]


def test_tensor_parallel_copies_and_one_of_four_are_found() -> None:
    # EP 2 on 4 ranks: experts 4 to 7 lie on ranks 1 and 3; of four copies of a norm the odd one is named.
    cases = [("weight", "layers.0.mlp.experts.weight1"), ("weight", "layers.0.pre_mlp_layernorm.weight")]
    experts, norm, last = _agree_on(run_distributed(_break_in_turn, 4, ["parallel.expert=2"], 3, cases))
    assert f"expert 7 of weight/{_EXPERTS} has other bits on rank 3 " in experts[1] and "than on rank 1 " in experts[1]
    assert f"weight/{_NORM} has other bits on rank 3 " in norm[1] and "than on rank 0 " in norm[1]
    assert last is None
    norm, split, last = _agree_on(
        run_distributed(_break_in_turn, 2, ["parallel.tensor=2"], 1,
                        [("weight", "layers.0.pre_mlp_layernorm.weight"), ("weight", "embedding.word_embeddings.weight")])
    )  # fmt: skip
    assert f"weight/{_NORM} has other bits on rank 1 (data 0, tensor 1, " in norm[1]
    assert split is None and last is None, "shards are no copies"


def test_what_is_rank_local_is_not_compared() -> None:
    cases = [("buffer", "decoder.layers.0.mlp.router.local_tokens_per_expert")]
    assert _agree_on(run_distributed(_break_in_turn, 2, [], 1, cases)) == [None, None]


def test_the_default_error_is_that_of_checkpoints() -> None:
    assert _agree_on(run_distributed(_drifted, 2)) == "CheckpointError"


def _drifted() -> str:
    from model.fingerprint import take_fingerprints

    stage, layout = _stage([])
    with torch.no_grad():
        _parameter(stage, "final_layernorm.weight").add_(math.pi * layout.rank)
    with pytest.raises(CheckpointError, match="final_layernorm") as caught:
        take_fingerprints(stage.chunks, stage.optimizer, layout)
    return caught.typename
