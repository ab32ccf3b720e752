"""Expert-parallel overlap: two micro-batches woven together, so that tokens of one travel while the other computes.

mcore's combined 1F1B takes layers apart and runs the exchange of tokens on a stream of its own (`combined_1f1b.py`). Here is
what stands in its way: mcore's own conditions (0.16.1 and 0.19.2, `transformer_config.py`), and those that it lacks. None of
it has been run on a GPU yet.
"""

from typing import Any

from model.recompute import modules_of
from parallel.config import ParallelConfig
from parallel.errors import ConfigError

KEY = "performance.expert_parallel_overlap"


def nothing_to_hide(num_experts: int, parallel: ParallelConfig) -> str | None:
    """Why no tokens travel in a stage; None where they do.

    Such a stage is not refused: a run that spreads its experts at a switch may ask for the overlap from its start.
    """
    if not num_experts:
        return "the model is dense"
    if parallel.expert == 1:
        return "every rank has all experts (parallel.expert=1)"
    return None


def refuse_overlap(
    model: Any, performance: Any, num_experts: int, parallel: ParallelConfig, *, bf16: bool, gpu: bool = True
) -> None:
    """Refuse the overlap in a stage where it cannot be.

    Args:
        model: a `ModelConfig`; its dispatcher may still be `auto`.
        performance: a `PerformanceConfig`.
        num_experts: experts per MoE layer in the stage.
        parallel: layout of the stage.
        bf16: precision of the run.
        gpu: whether there is one; True while that is not known.

    Raises:
        ConfigError: naming what stands in the way.
    """
    if not performance.expert_parallel_overlap or nothing_to_hide(num_experts, parallel):
        return
    obstacle = _obstacle(model, performance, num_experts, parallel, bf16, gpu)
    if obstacle:
        raise ConfigError(f"{KEY}=true cannot be here: {obstacle}: use {KEY}=false (docs/gpu.md)")


def _obstacle(
    model: Any, performance: Any, num_experts: int, parallel: ParallelConfig, bf16: bool, gpu: bool
) -> str | None:
    if not gpu:
        return "it needs the streams of a GPU"
    if not bf16:
        return "mcore does it in bf16 only, and the run is fp32"
    if parallel.pipeline > 1 and parallel.chunks() == 1:
        return f"with parallel.pipeline={parallel.pipeline} it needs parallel.virtual_pipeline of 2 or more"
    if model.dispatcher == "allgather":
        return "model.dispatcher=allgather sends all tokens at once"
    if num_experts == parallel.expert and parallel.expert_tensor == 1 and model.dispatcher == "alltoall":
        # What arrives is the expert's input as it is; of several experts, or parts of them, mcore makes a copy first.
        return (
            f"with {num_experts} experts on parallel.expert={parallel.expert} ranks each has one, and mcore frees the "
            "tokens that it got before its backward pass has read them"
        )
    if model.recompute == "full":
        return (
            "model.recompute=full computes whole layers again, and it takes them apart: use model.recompute=selective"
        )
    if "moe" in modules_of(model):
        return "model.recompute_modules has moe, which it takes apart"
    if performance.shared_expert_overlap is True:
        return "performance.shared_expert_overlap=true hides the same exchange under something else"
    if performance.cuda_graphs != "none":
        return f"performance.cuda_graphs={performance.cuda_graphs} has not been tried with it"
    return None
