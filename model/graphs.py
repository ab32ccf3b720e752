"""CUDA graphs of attention: what stands in their way, what mcore is told, what they hold.

A graph replays the kernels of a layer's attention without the Python that launched them, on the addresses it was captured
with. Of a layer only attention is captured: routers carry hooks that count tokens, family routing and biases that move, all
of it Python that a replay would leave out, and experts get another number of tokens in every step. mcore's own helper
captures after the first steps of a stage, drops at its end (`train/graphs.py`). Run on an H200 (docs/gpu.md).
"""

from collections.abc import Mapping
from typing import Any

from model.recompute import modules_of
from parallel.config import ParallelConfig
from parallel.errors import ConfigError, shown

GRAPHS = ("none", "attention")
KEY = "performance.cuda_graphs"
# Steps of a stage before its graphs are captured, as mcore's own default has it: kernels are chosen and libraries are awake.
WARMUP_STEPS = 3

_OFF = (None, False, "none")
# Parts that are computed again inside attention, where the graph is.
_INSIDE = ("core_attn", "layernorm", "mla_up_proj")
# mcore's fields that change what a captured layer takes, gives or leaves behind in Python at every step.
_UNLIKE = (
    "attention_dropout",
    "hidden_dropout",
    "fp4",
    "fp32_residual_connection",
    "qk_clip",
    "log_max_attention_logit",
    "variable_seq_lengths",
    "cpu_offloading",
    "fine_grained_activation_offloading",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "batch_invariant_mode",
)


def refuse_graph_fields(fields: Mapping[str, Any]) -> None:
    """Refuse fields of mcore that would switch CUDA graphs on, or off, past the key.

    Args:
        fields: `model.mcore`, passed to mcore's TransformerConfig.

    Raises:
        ConfigError: naming the field and the key.
    """
    for name, value in fields.items():
        if "cuda_graph" in name:
            raise ConfigError(
                f"model.mcore.{name}={shown(value)}: CUDA graphs have a key of their own, which captures attention alone "
                f"and drops the graphs before a switch: use {KEY}=attention (docs/gpu.md), and leave model.mcore.{name} out"
            )


def refuse_graphs(
    model: Any,
    wish: str,
    *,
    bf16: bool,
    documents: bool,
    context: int = 1,
    gpu: bool = True,
    engine: bool = True,
) -> None:
    """Refuse graphs where they cannot be.

    Args:
        model: a `ModelConfig`.
        wish: the key.
        bf16: precision of the run.
        documents: whether attention keeps documents apart.
        context: ranks that share a sequence, in the stage that has most.
        gpu: whether there is one; True while that is not known.
        engine: whether Transformer Engine is there; True while that is not known.

    Raises:
        ConfigError: naming what stands in the way.
    """
    obstacle = _obstacle(model, bf16, documents, context, gpu, engine) if wish != "none" else None
    if obstacle:
        raise ConfigError(f"{KEY}={wish} cannot be here: {obstacle}: use {KEY}=none (docs/gpu.md)")


def _obstacle(model: Any, bf16: bool, documents: bool, context: int, gpu: bool, engine: bool) -> str | None:
    if not gpu:
        return "it needs a GPU"
    if not engine:
        return "it needs Transformer Engine, whose attention is captured"
    if model.transformer_impl == "local":
        return "model.transformer_impl=local keeps Transformer Engine and its attention out"
    if not bf16:
        return "mcore captures inputs in bf16, and the run is fp32"
    if documents:
        return "data.document_attention=true tells attention of every batch where its documents begin, which no graph takes"
    if context > 1:
        return (
            f"a context size of {context} sends keys and values between ranks on streams of their own inside attention, and "
            "no graph of that has been seen yet"
        )
    if model.attention == "mla":
        return (
            "model.attention=mla reads its rotation from a cache of mcore that lets go of tables, and a graph would go on "
            "reading them"
        )
    if model.dropout:
        return f"model.dropout={model.dropout} would draw other numbers than the same run without graphs"
    if model.fp8 != "none":
        return f"model.fp8={model.fp8} updates scales outside of the graph, and neither of the two has been run yet"
    if model.recompute == "full":
        return "model.recompute=full computes attention again: use model.recompute=selective without it"
    inside = [name for name in modules_of(model) if name in _INSIDE]
    if inside:
        return f"model.recompute_modules has {inside[0]}, which is computed again inside attention: leave it out"
    for name, value in model.mcore.items():
        if name in _UNLIKE and value not in _OFF:
            return f"model.mcore.{name}={shown(value)} does not go with it"
    return None


def input_bytes(model: Any, parallel: ParallelConfig, sequence_length: int, micro_batch_size: int) -> int:
    """Bytes of the inputs that the graph of one layer and one micro-batch keeps for itself.

    mcore gives every graph hidden states in bf16 and a mask of one byte per pair of positions, which Transformer Engine's
    causal attention does not read (0.16.1 and 0.19.2, `TransformerLayer.get_layer_static_inputs`).
    """
    length = sequence_length // parallel.context
    hidden = length // parallel.tensor * micro_batch_size * model.hidden_size * 2
    return hidden + micro_batch_size * length * sequence_length
