"""Builds the GPT-MoE model of a stage from mcore layer specs.

`build_chunks` returns this rank's GPTModel chunks (one, or several under the interleaved pipeline schedule), not yet
wrapped in DDP. Expert modules, norms and every option come from `ModelConfig`; the number of experts is an argument,
because it changes from stage to stage while the rest of the configuration does not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from model import choices, fp8, recompute
from model.attention import LatentDotProductAttention
from model.config import ModelConfig, padded_vocab_size
from model.experts import GroupedExperts
from model.graphs import WARMUP_STEPS
from model.mcore_config import make_config
from model.mcore_fields import refuse_without_engine
from model.mcore_values import (
    expert_values,
    latent_values,
    layout_values,
    network_values,
    precision_values,
    unset_values,
)
from model.norm import AllKeysNorm, AllQueriesNorm, CoppiceNorm
from model.performance import PerformanceConfig
from parallel.compat import (
    can_discard_outputs,
    graph_fields,
    is_moe_layer,
    layer_submodules,
    norms_uncompressed_queries,
    unmark_whole_weights,
    use_experts,
)
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.layout import Layout
from parallel.machine import have_apex_gradients
from parallel.transformer_engine import add_gradients_in_products, have_transformer_engine

# Under latent attention mcore's specs for Transformer Engine make norms part of the linear layers after them, and call them
# otherwise in checkpoints than its torch specs do. Ours have the torch names, whatever computes them.
_LATENT_NORM_KEYS = {
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def uses_engine(model: ModelConfig) -> bool:
    """Whether layers, norms and attention are Transformer Engine's here; a run has decided it (`model/choices.py`).

    Raises:
        ConfigError: if it is asked for and not usable.
    """
    there = have_transformer_engine() and torch.cuda.is_available()
    for key, value, its in (
        ("transformer_impl", model.transformer_impl, "transformer_engine"),
        ("experts", model.experts, "te"),
    ):
        if value == its and not there:
            raise ConfigError(
                f"model.{key}={value} needs Transformer Engine and a CUDA device: install both (docs/gpu.md) or use "
                f"model.{key}=auto"
            )
    return there and model.transformer_impl != "local"


def experts_kind(model: ModelConfig) -> str:
    """The expert module here: te, grouped or sequential; a run has decided it (`model/choices.py`).

    Raises:
        ConfigError: if Transformer Engine is asked for and not usable.
    """
    engine = uses_engine(model)
    if model.experts == "auto":
        return "te" if engine else "grouped"
    return model.experts


def transformer_config(
    model: ModelConfig,
    num_experts: int,
    parallel: ParallelConfig,
    precision: str,
    *,
    device: torch.device | None = None,
    initialise: bool = True,
    performance: PerformanceConfig | None = None,
) -> TransformerConfig:
    """mcore's configuration of one stage on this machine.

    Args:
        model: the network.
        num_experts: experts per MoE layer in this stage; 0 for a dense model.
        parallel: its sizes.
        precision: `bf16` or `fp32`.
        device: of this rank; None while none is chosen, and then nothing is asked of a GPU.
        initialise: whether layers draw initial weights.
        performance: what was decided for the machine (`model/choices.py`); None for nothing that needs deciding.

    Raises:
        ConfigError: if this machine or mcore cannot do what is asked for, there in mcore's words.
    """
    kind = experts_kind(model)
    _refuse_here(model, parallel, kind, precision, engine=uses_engine(model))
    if model.fp8 != "none" and device is not None:
        fp8.check_device(
            model.fp8, model.fp8_recipe, torch.cuda.get_device_capability(device), torch.cuda.get_device_name()
        )
    return config_anywhere(model, num_experts, parallel, precision, kind, initialise, performance)


def config_anywhere(
    model: ModelConfig,
    num_experts: int,
    parallel: ParallelConfig,
    precision: str,
    kind: str,
    initialise: bool = True,
    performance: PerformanceConfig | None = None,
) -> TransformerConfig:
    """mcore's configuration of one stage, whatever machine this is.

    Args:
        model: the network.
        num_experts: experts per MoE layer.
        parallel: sizes.
        precision: `bf16` or `fp32`.
        kind: the expert module: te, grouped or sequential.
        initialise: as for `transformer_config`.
        performance: as for `transformer_config`.

    Raises:
        ConfigError: if mcore refuses a combination.
    """
    performance = performance or PerformanceConfig()
    values = (
        network_values(model)
        | precision_values(precision)
        | layout_values(parallel)
        | latent_values(model)
        | expert_values(model, num_experts, kind == "te")
        | choices.mcore_fields(model, performance)
        | recompute.mcore_fields(model, kind)
        | fp8.mcore_fields(model)
    )
    if not have_apex_gradients():
        # mcore's output layer refuses it then; Transformer Engine's are told when they are built.
        values["gradient_accumulation_fusion"] = False
    if not initialise:
        values |= unset_values()
    if performance.cuda_graphs == "attention":
        values |= graph_fields(WARMUP_STEPS)
    config = make_config(model, values)
    recompute.tell_experts(config, model)
    return config


def _refuse_here(model: ModelConfig, parallel: ParallelConfig, kind: str, precision: str, *, engine: bool) -> None:
    """Refuse what the libraries of this machine cannot do.

    Args:
        model: the network.
        parallel: sizes.
        kind: the expert module in use.
        precision: of the run.
        engine: whether layers are Transformer Engine's.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if parallel.context > 1 and not engine:
        raise ConfigError(
            f"parallel.context={parallel.context} needs the attention of Transformer Engine on a GPU: install it "
            "(docs/gpu.md) or use parallel.context=1"
        )
    if model.qk_norm_all_heads and parallel.tensor > 1:
        raise ConfigError(
            f"model.qk_norm_all_heads=true needs parallel.tensor=1, not {parallel.tensor}: the norm runs over heads of all "
            "tensor ranks"
        )
    if model.attention == "mla" and model.qk_norm and not model.mla_query_rank and norms_uncompressed_queries():
        raise ConfigError(
            "model.mla_query_rank=null with model.qk_norm=true: this mcore normalises uncompressed queries as well, as no "
            "published model does: use mcore 0.16, or a query rank"
        )
    if model.fp8 != "none" and kind != "te":
        raise ConfigError(
            f"model.fp8={model.fp8} needs Transformer Engine and a CUDA device: install both (docs/gpu.md), and use "
            "model.experts=auto, or use model.fp8=none"
        )
    if not engine:
        refuse_without_engine(model, precision == "bf16")
    recompute.check_modules(model, kind, can_discard_outputs())


def _block_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Layer specs of this rank's chunk: Transformer Engine's, or mcore's of torch with our norms; and the experts."""
    kind = experts_kind(model)
    if uses_engine(model):
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in {id(spec): spec for spec in block.layer_specs}.values():
            if kind != "te" and is_moe_layer(layer):
                use_experts(layer, GroupedExperts if kind == "grouped" else _one_by_one())
            if model.qk_norm_all_heads:
                _normalise_all_heads(layer)
            if model.attention == "mla":
                parts = layer_submodules(layer)
                parts.sharded_state_dict_keys_map = {**parts.sharded_state_dict_keys_map, **_LATENT_NORM_KEYS}
        return block
    # Of the whole block for a dense model too: the final norm of a bare layer's spec cannot split sequences.
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=model.normalization, vp_stage=vp_stage
    )
    for layer in {id(spec): spec for spec in block.layer_specs}.values():
        parts = layer_submodules(layer)
        if is_moe_layer(layer):
            # Under Transformer Engine's specs the norm before an MoE layer is a module of its own, not part of a linear
            # layer, and keeps its name; without this the two kinds of checkpoint would differ in it.
            parts.sharded_state_dict_keys_map = {
                k: v for k, v in parts.sharded_state_dict_keys_map.items() if k != "pre_mlp_layernorm."
            }
        parts.input_layernorm = CoppiceNorm
        parts.pre_mlp_layernorm = CoppiceNorm
        attention = layer_submodules(parts.self_attention)
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if model.qk_norm and hasattr(attention, name):
                setattr(attention, name, CoppiceNorm)
        if model.qk_norm_all_heads:
            _normalise_all_heads(layer)
        if model.attention == "mla":
            attention.core_attention = LatentDotProductAttention
        if kind == "grouped" and is_moe_layer(layer):
            use_experts(layer, GroupedExperts)
    block.layer_norm = CoppiceNorm
    return block


def _one_by_one() -> Any:
    """mcore's experts of its torch layers, which Transformer Engine's specs have with its linear layers."""
    return layer_submodules(get_moe_module_spec(use_te=False, num_experts=1)).experts


def _normalise_all_heads(layer: Any) -> None:
    attention = layer_submodules(layer_submodules(layer).self_attention)
    attention.q_layernorm, attention.k_layernorm = AllQueriesNorm, AllKeysNorm


def build_chunks(
    model: ModelConfig,
    num_experts: int,
    layout: Layout,
    *,
    vocab_size: int,
    sequence_length: int,
    precision: str,
    initialise: bool = True,
    performance: PerformanceConfig | None = None,
) -> list[GPTModel]:
    """Build this rank's model chunks on its device.

    Args:
        model: the network.
        num_experts: experts per MoE layer in this stage.
        layout: process groups and sizes.
        vocab_size: tokens of the tokenizer (padded here).
        sequence_length: longest sequence.
        precision: `bf16` or `fp32`.
        initialise: False leaves the weights unset, for a model that is filled from elsewhere.
        performance: as for `transformer_config`.

    Raises:
        ConfigError: if mcore refuses the combination.
    """
    config = transformer_config(
        model,
        num_experts,
        layout.config,
        precision,
        device=layout.device,
        initialise=initialise,
        performance=performance,
    )
    chunks = []
    for index in range(layout.config.chunks()):
        vp_stage = index if layout.config.interleaved() else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_block_spec(model, config, vp_stage),
            vocab_size=padded_vocab_size(model, vocab_size),
            max_sequence_length=sequence_length,
            pre_process=layout.is_first_stage and index == 0,
            post_process=layout.is_last_stage and index == layout.config.chunks() - 1,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_percent=model.rope_percent,
            rotary_base=model.rope_base,
            rope_scaling=model.rope_scaling == "llama3",
            rope_scaling_factor=model.rope_scaling_factor,
            vp_stage=vp_stage,
        )
        unmark_whole_weights(chunk)
        if performance is not None and performance.gradient_accumulation_fusion is True:
            add_gradients_in_products(chunk)
        chunks.append(chunk.to(layout.device))
    _mark_expert_parameters(chunks, layout)
    return chunks


def _mark_expert_parameters(chunks: list[GPTModel], layout: Layout) -> None:
    """Send expert gradients over the expert-data-parallel group wherever it differs from the data-parallel one.

    mcore marks them only for an expert-parallel size above 1; with tensor parallelism and an unsplit expert the copies on
    the tensor ranks see different tokens and would drift apart unreduced.
    """
    if layout.groups.expt_dp.size() == layout.groups.dp_cp.size():
        return
    for part in moe_parts(chunks):
        for p in part.layer.experts.parameters():
            p.allreduce = False


@dataclass(frozen=True)
class MoEPart:
    """One MoE layer that lives on this rank."""

    # Number of the layer in the whole network, from 1.
    number: int
    layer: MoELayer
    # Prefix of its keys in a sharded checkpoint.
    prefix: str


def moe_parts(chunks: list[GPTModel]) -> list[MoEPart]:
    """The MoE layers of this rank's chunks, in order, found in the module tree."""
    return [
        MoEPart(number=layer.layer_number, layer=layer.mlp, prefix=f"decoder.layers.{layer.layer_number - 1}.mlp.")
        for chunk in chunks
        for layer in chunk.decoder.layers
        if isinstance(layer.mlp, MoELayer)
    ]


def expert_rows(part: MoEPart, layout: Layout) -> list[tuple[torch.nn.Parameter, int, int]]:
    """The parameters of a layer's experts with the experts they hold: (parameter, first global id, how many).

    Grouped modules stack experts on the first axis; others hold one parameter per expert.
    """
    layer = part.layer
    first = layout.groups.ep.rank() * layer.num_local_experts
    rows: list[tuple[torch.nn.Parameter, int, int]] = []
    if hasattr(layer.experts, "local_experts"):
        for index, expert in enumerate(layer.experts.local_experts):
            rows += [(p, first + index, 1) for p in expert.parameters()]
        return rows
    for name, p in layer.experts.named_parameters():
        index = name.rstrip("0123456789")
        if index.endswith((".weight", ".bias")) and index != name:
            rows.append((p, first + int(name[len(index) :]), 1))
        else:
            rows.append((p, first, layer.num_local_experts))
    return rows


def count_parameters(model: ModelConfig, chunks: list[GPTModel], layout: Layout) -> dict[str, int]:
    """Parameters of the whole network: all, those one token passes (embeddings included), those of routed experts.

    Each rank counts what it holds, divided by how many ranks hold it, so the sum over the world is exact.
    """
    expert_copies = layout.groups.expt_dp.size()
    dense_copies = layout.groups.dp.size() * layout.groups.cp.size()
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for part in moe_parts(chunks):
        size = sum(p.numel() for p in part.layer.experts.parameters())
        total[0] += size / expert_copies
    in_experts = {id(p) for part in moe_parts(chunks) for p in part.layer.experts.parameters()}
    for chunk in chunks:
        for p in chunk.parameters():
            if id(p) in in_experts or getattr(p, "shared", False):
                continue
            sharded = getattr(p, "tensor_model_parallel", False)
            total[1] += p.numel() / dense_copies / (1 if sharded else layout.groups.tp.size())
    layout.sum_over_world(total)
    experts, dense = round(total[0].item()), round(total[1].item())
    count = chunks[0].config.num_moe_experts or 1
    return {
        "parameters_total": experts + dense,
        "parameters_active": dense + experts * model.top_k // count,
        "parameters_experts": experts,
    }
