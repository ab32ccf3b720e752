"""Typed schema of the `performance` group: what makes a step faster and changes nothing of what is trained.

Every key but `cuda_graphs` and `expert_parallel_overlap` is `auto` unless set: what that becomes depends on the machine, the
layout and what is installed, and the run and `python -m launch plan` say it with the reason. On CPU all of it is off.
"""

from dataclasses import dataclass

from model.config import one_of, toggle
from model.graphs import GRAPHS

FLEX_BACKENDS = ("auto", "deepep", "hybridep")


@dataclass
class PerformanceConfig:
    """What makes a step faster without changing what is trained: `auto` lets Coppice choose and say why."""

    # Permute tokens for their experts in one kernel of Transformer Engine: auto, true or false.
    permute_fusion: bool | str = "auto"
    # Choose the top K experts and their balancing loss in one kernel of Transformer Engine: auto, true or false.
    router_fusion: bool | str = "auto"
    # Rotate queries and keys in one kernel of Transformer Engine: auto, true or false.
    rope_fusion: bool | str = "auto"
    # Compute the loss over the vocabulary in one compiled function of mcore: auto, true or false.
    cross_entropy_fusion: bool | str = "auto"
    # Add weight gradients straight to the fp32 buffers inside the matrix product: auto, true or false.
    gradient_accumulation_fusion: bool | str = "auto"
    # Compute shared experts while tokens travel to the routed ones: auto, true or false.
    shared_expert_overlap: bool | str = "auto"
    # Compute the backward pass of one micro-batch while tokens of the next travel to their experts, and the other way round
    # (docs/gpu.md; keeps more activations, and has not been run on several GPUs yet).
    expert_parallel_overlap: bool = False
    # Library of the flex dispatcher: DeepEP, HybridEP, or whichever is installed and fits the GPU.
    flex_backend: str = "auto"
    # Replay the kernels of attention from CUDA graphs, captured after the first steps of a stage: none, or attention
    # (docs/gpu.md; needs Transformer Engine).
    cuda_graphs: str = "none"

    def __post_init__(self) -> None:
        """Check every value that can be checked without knowing the machine.

        Raises:
            ConfigError: naming the key, the value and the remedy.
        """
        for key in (
            "permute_fusion",
            "router_fusion",
            "rope_fusion",
            "cross_entropy_fusion",
            "gradient_accumulation_fusion",
            "shared_expert_overlap",
        ):
            toggle(f"performance.{key}", getattr(self, key))
        one_of("performance.flex_backend", self.flex_backend, FLEX_BACKENDS)
        one_of("performance.cuda_graphs", self.cuda_graphs, GRAPHS)
