"""The stages of a run: which experts and which layout each has, and what is refused by the key that decides."""

import pytest

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from upcycle.config import UpcycleConfig
from upcycle.stage_config import StageConfig, StageParallel


def test_layouts_and_expert_counts_accumulate() -> None:
    upcycle = UpcycleConfig(
        [
            StageConfig(at_step=10, factor=3, parallel=StageParallel(expert=4)),
            StageConfig(at_step=20, parallel=StageParallel(tensor=2, pipeline=2, virtual_pipeline=2)),
            StageConfig(at_step=30, num_experts=32, selection="greedy"),
            StageConfig(at_step=40, parallel=StageParallel(pipeline=1, virtual_pipeline=1, expert=2, expert_tensor=2, context=1)),
        ]
    )  # fmt: skip
    base = ParallelConfig(expert=2, timeout_seconds=30)
    assert upcycle.expert_counts(8) == [8, 24, 24, 32, 32]
    layouts = upcycle.layouts(base)
    assert layouts[0] is base
    assert [(x.tensor, x.pipeline, x.chunks(), x.expert, x.expert_tensor) for x in layouts] == [
        (1, 1, 1, 2, 1), (1, 1, 1, 4, 1), (2, 2, 2, 4, 1), (2, 2, 2, 4, 1), (2, 1, 1, 2, 2),
    ]  # fmt: skip
    assert {x.timeout_seconds for x in layouts} == {30}
    assert base == ParallelConfig(expert=2, timeout_seconds=30)
    upcycle.check(ModelConfig(num_experts=8), base, 100)


def test_a_dense_model_may_change_its_layout_but_not_grow() -> None:
    dense, change = ModelConfig(num_experts=0), StageConfig(at_step=3, parallel=StageParallel(tensor=2))
    UpcycleConfig([change]).check(dense, ParallelConfig(), 100)
    with pytest.raises(ConfigError, match=r"upcycle\.stages needs experts: model\.num_experts=0"):
        UpcycleConfig([change, StageConfig(at_step=4, factor=2)]).check(dense, ParallelConfig(), 100)
    with pytest.raises(ConfigError, match=r"stages\[0\]\.parallel\.expert=2 needs experts"):
        UpcycleConfig([StageConfig(at_step=3, parallel=StageParallel(expert=2))]).check(dense, ParallelConfig(), 100)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"parallel": {"expert": 3}}], r"upcycle\.stages\[0\]\.parallel\.expert=3 does not divide the 8 experts of this stage"),
        ([{"factor": 2, "parallel": {"expert": 3}}], r"factor x experts=16 is not divisible by upcycle\.stages\[0\]\.parallel\.expert=3"),
        # The key that decides is the last one that was set, wherever it stands.
        ([{"parallel": {"expert": 8}}, {"num_experts": 12, "selection": "greedy"}], r"stages\[1\]\.num_experts=12 is not divisible by upcycle\.stages\[0\]\.parallel\.expert=8"),
        ([{"num_experts": 9, "selection": "greedy"}], r"stages\[0\]\.num_experts=9 is not divisible by parallel\.expert=2"),
        ([{"parallel": {"tensor": 2}}, {"parallel": {"pipeline": 1, "virtual_pipeline": 2}}], r"stages\[1\]\.parallel: parallel\.virtual_pipeline=2 needs parallel\.pipeline"),
    ],
)  # fmt: skip
def test_each_stage_is_checked_against_its_own_layout(stages: list[dict], message: str) -> None:
    made = [
        StageConfig(at_step=number, **{**stage, "parallel": StageParallel(**stage.get("parallel", {}))})
        for number, stage in enumerate(stages, start=1)
    ]
    with pytest.raises(ConfigError, match=message):
        UpcycleConfig(made).check(ModelConfig(num_experts=8), ParallelConfig(expert=2), 100)


def test_a_target_that_only_the_new_layout_holds_is_accepted() -> None:
    """3 x 8 experts do not fit the 16 ranks before, but the 8 of the new stage."""
    stage = StageConfig(at_step=1, factor=3, parallel=StageParallel(expert=8))
    UpcycleConfig([stage]).check(ModelConfig(num_experts=16), ParallelConfig(expert=16), 100)


def test_the_bias_rate_is_raised_for_a_window_and_falls_back_linearly() -> None:
    stage = StageConfig(at_step=10, factor=2, bias_rate_multiplier=5.0, bias_rate_steps=4)
    config = UpcycleConfig(stages=[stage])
    assert [config.bias_rate_factor(1, step) for step in (10, 11, 12, 13, 14, 99)] == [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    assert config.bias_rate_factor(0, 5) == 1.0
    with pytest.raises(ConfigError, match=r"s\.bias_rate_multiplier=2 has no effect with s\.bias_rate_steps=0"):
        StageConfig(at_step=1, factor=2, bias_rate_multiplier=2).check("s")
