"""The real mcore on CPU: a tiny MoE model trains, and layouts that gloo alone refuses give the same numbers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from parallel.cpu_runtime import cpu_runtime_in_thread, install_cpu_runtime
from parallel.errors import LaunchError
from tests.distributed import run_distributed
from tests.parallel.tiny_gpt import Layout, build, prepare_training, train, train_step


def train_layouts(layouts: list[Layout], steps: int, **changes: Any) -> list[tuple[list[float], list[float]]]:
    return [train(layout, steps, **changes) for layout in layouts]


def assert_same_training(results: list[tuple[list[float], list[float]]]) -> None:
    """All layouts train alike: only the order of fp32 sums differs, over a few updates (fp32 resolution is 1e-7)."""
    *others, (reference, reference_norms) = results
    for losses, norms in others:
        assert losses == pytest.approx(reference, rel=2e-6)
        assert norms == pytest.approx(reference_norms, rel=2e-6)


def test_moe_model_trains_on_two_ranks() -> None:
    for results in run_distributed(train_layouts, 2, [Layout(expert=2), Layout()], 4):
        losses, _ = results[0]
        assert losses[-1] < losses[0] - 1.0
        assert_same_training(results)


def test_expert_tensor_parallel_equals_plain_layout() -> None:
    """With the alltoall dispatcher expert tensor parallelism gathers unequal token counts, which gloo refuses."""
    layouts = [Layout(tensor=2, expert=2, expert_tensor=2), Layout(expert=2, expert_tensor=2), Layout()]
    for results in run_distributed(train_layouts, 4, layouts, 3):
        assert_same_training(results)


def test_expert_tensor_parallel_without_expert_parallel_equals_plain_layout() -> None:
    """mcore 0.16.1 gets these gradients wrong unless the experts' parameters are marked, as `build` does."""
    for results in run_distributed(train_layouts, 4, [Layout(tensor=2), Layout(expert_tensor=2), Layout()], 3):
        assert_same_training(results)


def test_pipeline_and_tensor_parallel_equal_plain_layout() -> None:
    layouts = [Layout(tensor=2, expert_tensor=2, pipeline=2), Layout()]
    assert_same_training(run_distributed(train_layouts, 4, layouts, 3)[-1])  # the last rank has the last stage


def _train_with_everything() -> None:
    """Touches the parts that talk: dropout in RNG contexts, aux loss, expert bias, the fused functions."""
    changes = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "bias_dropout_fusion": True,
    }
    wrapped, optimizer = prepare_training(build(Layout(expert=2), **changes))
    for _ in range(2):
        train_step(wrapped, optimizer)


def test_training_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    run_distributed(_train_with_everything, 2)
    assert capfd.readouterr().out == ""


def _draw_in_and_out_of_a_fork() -> tuple[list[float], list[float]]:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    plain = torch.rand(2).tolist()
    tensor_parallel.model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    first = torch.rand(1).item()
    with tensor_parallel.get_cuda_rng_tracker().fork(tensor_parallel.get_expert_parallel_rng_tracker_name()):
        forked = torch.rand(2).tolist()
    assert [first, torch.rand(1).item()] == plain  # the fork left the default generator alone
    return plain, forked


def test_generators_of_experts_differ_between_expert_ranks() -> None:
    (plain_0, forked_0), (plain_1, forked_1) = run_distributed(_draw_in_and_out_of_a_fork, 2)
    assert forked_0 != forked_1
    assert plain_0 != forked_0
    assert plain_1 == plain_0


def _make_cuda_tensor_in_threads() -> list[str]:
    outcomes = []

    def make() -> None:
        try:
            outcomes.append(str(torch.ones(2, device="cuda").cuda().device))
        except (RuntimeError, AssertionError) as error:
            outcomes.append(type(error).__name__)

    def make_inside() -> None:
        with cpu_runtime_in_thread():
            make()

    for target in (make, make_inside):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    make()
    return outcomes


def test_other_threads_need_the_context() -> None:
    [(bare, inside, main)] = run_distributed(_make_cuda_tensor_in_threads, 1)
    assert bare in ("RuntimeError", "AssertionError")
    assert inside == main == "cpu"


def _install_with_cuda() -> None:
    torch.cuda.is_available = lambda: True
    install_cpu_runtime()


def test_refuses_where_cuda_is_available() -> None:
    with pytest.raises(LaunchError, match="CUDA is available"):
        run_distributed(_install_with_cuda, 1, init=False)


def _install_without_a_name() -> bool:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    del token_dispatcher.maybe_move_tensor_to_cpu
    before = random._get_cuda_rng_state, torch.cuda.current_device
    with pytest.raises(LaunchError, match=r"megatron-core \d.*token_dispatcher\.maybe_move_tensor_to_cpu"):
        install_cpu_runtime()
    return (random._get_cuda_rng_state, torch.cuda.current_device) == before


def test_a_name_that_mcore_dropped_is_reported_before_anything_is_replaced() -> None:
    assert run_distributed(_install_without_a_name, 1, init=False) == [True]


def _install_twice() -> bool:
    install_cpu_runtime()
    from megatron.core.tensor_parallel import mappings

    gather = mappings._gather_along_first_dim
    install_cpu_runtime()
    return mappings._gather_along_first_dim is gather


def test_installing_twice_changes_nothing() -> None:
    assert run_distributed(_install_twice, 1, init=False) == [True]
