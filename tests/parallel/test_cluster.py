"""The arithmetic of `parallel/cluster.py` against real stages: mcore's groups, tensor-parallel slices and ZeRO-1 ranges."""

import itertools

import pytest

from parallel.cluster import LogicalTensor, coordinates, describe_rank
from parallel.config import ParallelConfig
from parallel.reshard_plan import Holding
from tests.distributed import run_distributed

# Parameters of the test's network by the end of their key: split axis, halves.
_SPLITS = {
    "word_embeddings.weight": (0, 1),
    "linear_proj.weight": (1, 1),
    "linear_qkv.weight": (0, 1),
    "output_layer.weight": (0, 1),
    "mlp.linear_fc1.weight": (0, 2),
    "mlp.linear_fc2.weight": (1, 1),
    "experts.linear_fc1.weight": (1, 2),
    "experts.linear_fc2.weight": (2, 1),
}


def _describe(parallel: ParallelConfig) -> tuple[dict[str, Holding], list[LogicalTensor], tuple[int, ...]]:
    """What a real stage on this rank holds, the network's parameters in module order, and this rank's coordinates."""
    from model.config import ModelConfig
    from model.holdings import describe_stage
    from model.sharded_state import model_state, sharded_leaves
    from parallel.compat import prepare_megatron
    from parallel.layout import Layout
    from train.config import RunSettings
    from train.stage import build_stage

    prepare_megatron()
    settings = RunSettings(
        parallel=parallel,
        model=ModelConfig(
            layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            attention_heads=4,
            kv_heads=4,
            num_experts=8,
            top_k=2,
            expert_ffn_hidden_size=48,
            moe_period=2,
        ),
    )
    layout = Layout.create(parallel, 1)
    stage = build_stage(settings, 0, layout, 100)
    held = describe_stage(stage.chunks, stage.optimizer, layout, moments=True).holdings()
    tensors = []
    for part in model_state(stage.chunks, layout).values():
        keys = {id(leaf.data): leaf for _, leaf in sharded_leaves(part)}
        for p in stage.chunks[0].parameters():
            leaf = keys[id(p)]
            built = [x for _, x in sharded_leaves(leaf.build())] if hasattr(leaf, "build") else [leaf]
            split, halves = next((v for k, v in _SPLITS.items() if leaf.key.endswith(k)), (None, 1))
            expert = ".experts." in leaf.key
            tensors.append(
                LogicalTensor(leaf.key, tuple(built[0].global_shape), p.element_size(), 0, expert, split, halves)
            )
    g = layout.groups
    at = (g.tp.rank(), g.cp.rank(), g.dp.rank(), g.pp.rank(), g.expt_tp.rank(), g.ep.rank(), g.expt_dp.rank())
    return held, tensors, at


def _elements(holding: Holding) -> set[tuple[int, ...]]:
    """The indices that a rank holds."""
    return {
        index
        for box in holding.boxes
        for index in itertools.product(*(range(o, o + n) for o, n in zip(*box, strict=True)))
    }


@pytest.mark.parametrize(
    ("world", "sizes"),
    [(2, {"expert": 2}), (4, {"tensor": 2, "expert": 2}), (4, {"tensor": 2, "expert_tensor": 2, "expert": 2}), (4, {})],
)
def test_arithmetic_equals_a_real_stage(world: int, sizes: dict[str, int]) -> None:
    config = ParallelConfig(**sizes)
    for rank, (held, tensors, at) in enumerate(run_distributed(_describe, world, config)):
        assert coordinates(rank, config, world) == at
        expected = describe_rank(rank, world, config, tensors)
        # Buffers (the selection bias) are no parameters.
        real = {key: holding for key, holding in held.items() if not key.endswith("expert_bias")}
        assert real.keys() == expected.keys()
        for key in real:
            # Gate and up may be two boxes or one.
            assert _elements(real[key]) == _elements(expected[key]), key
            assert real[key].itemsize == expected[key].itemsize


def test_coordinates_with_pipeline() -> None:
    config = ParallelConfig(tensor=2, pipeline=2, expert=4)
    assert [coordinates(r, config, 16).pipeline for r in range(16)] == [0] * 8 + [1] * 8
    assert [coordinates(r, config, 16).expert for r in range(16)] == [0, 1, 2, 3, 0, 1, 2, 3] * 2
    assert [coordinates(r, config, 16).expert_data for r in range(16)] == [0, 0, 0, 0, 1, 1, 1, 1] * 2
    assert [coordinates(r, config, 16).data for r in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
