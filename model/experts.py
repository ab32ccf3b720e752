"""`GroupedExperts`: all experts of a rank in stacked weights, in place of Megatron's `SequentialMLP`.

Why: Megatron runs experts one after the other unless Transformer Engine (GPU only) is there; its torch-based grouped
module was dropped after 0.16. This one runs on CPU and GPU, in bf16 and fp32, under mcore 0.16.1 and 0.19.2, and its
checkpoints, optimizer state included, are interchangeable with `SequentialMLP`'s in both directions.

How to use: `parallel.compat.use_experts(layer_spec, GroupedExperts)`; the options are those of `TransformerConfig`.
The arithmetic is in `model/grouped_mm.py`.

Shapes: `E` experts of the layer, `e` of this rank, `T` tokens routed to them, `H` hidden, `F` expert ffn of this
expert-tensor rank, `G` = 2F for gated activations (gate rows first, then up rows) and F otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from model.alignment import ROW_BYTES
from model.grouped_mm import activated_linear, collect, group_tokens, grouped_linear, per_token, spread, weighted_swiglu
from parallel.errors import CheckpointError, ConfigError


class ExpertBias(torch.nn.Module):
    """A bias per expert. A module of its own, so that the name ends in `.bias`: mcore then applies no weight decay."""

    def __init__(self, num_local_experts: int, width: int, **kwargs: Any) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(num_local_experts, width, **kwargs))


class GroupedExperts(MegatronModule):
    """The experts of one MoE layer on this rank, computed together.

    Parameters: `weight1 [e, G, H]`, `weight2 [e, H, F]`; with `config.add_bias_linear` also `bias1.bias [e, G]` and
    `bias2.bias [e, H]`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        """Allocates and initialises the weights.

        Args:
            num_local_experts: experts on this rank.
            config: of the whole model.
            submodules: ignored; mcore passes the spec's, which name linear layers of other expert modules.
            pg_collection: with groups `ep`, `expt_tp`, `expt_dp`. Required; optional only in mcore's signature.
            name: ignored; path of this module, passed by mcore 0.19.

        Raises:
            ConfigError: the config asks for something that this module or grouped_mm cannot do.
        """
        super().__init__(config=config)
        if pg_collection is None:
            raise ValueError("GroupedExperts needs pg_collection (MoELayer passes it)")
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.width = config.hidden_size if config.moe_latent_size is None else config.moe_latent_size
        self.ffn = self._ffn_per_rank()
        self._check_supported()
        selective = config.recompute_granularity == "selective"
        self.recomputes_activation = selective and "moe_act" in (config.recompute_modules or ())
        on_gpu = torch.cuda.is_available() and not config.use_cpu_initialization
        kwargs: dict[str, Any] = {"dtype": config.params_dtype, "device": "cuda" if on_gpu else "cpu"}
        fc1_rows = 2 * self.ffn if config.gated_linear_unit else self.ffn
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, fc1_rows, self.width, **kwargs))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, self.width, self.ffn, **kwargs))
        self.bias1 = ExpertBias(num_local_experts, fc1_rows, **kwargs) if config.add_bias_linear else None
        self.bias2 = ExpertBias(num_local_experts, self.width, **kwargs) if config.add_bias_linear else None
        self._mark_parameters()
        if config.perform_initialization:
            self._initialise()
        self.register_load_state_dict_pre_hook(_drop_extra_state)

    def _ffn_per_rank(self) -> int:
        ffn, ranks = self.config.moe_ffn_hidden_size, self.tp_group.size()
        if ffn % ranks:
            raise ConfigError(
                f"moe_ffn_hidden_size={ffn} is not divisible by expert_tensor_parallel_size={ranks}: "
                f"use {ffn + -ffn % ranks}, or another expert_tensor_parallel_size"
            )
        return ffn // ranks

    def _check_supported(self) -> None:
        config, ranks = self.config, self.tp_group.size()
        multiple = ROW_BYTES // config.params_dtype.itemsize
        width = "hidden_size" if config.moe_latent_size is None else "moe_latent_size"
        ffn = config.moe_ffn_hidden_size
        for key, size, step in ((width, self.width, multiple), ("moe_ffn_hidden_size", ffn, multiple * ranks)):
            if size % step:
                raise ConfigError(
                    f"{key}={size} must be a multiple of {step} for grouped experts ({config.params_dtype}, "
                    f"expert_tensor_parallel_size={ranks}): use {size + -size % step}"
                )
        for key in ("fp8", "fp4", "use_te_activation_func"):
            if getattr(config, key):
                raise ConfigError(f"{key}={getattr(config, key)} needs the experts of Transformer Engine: use those")
        if config.moe_apply_probs_on_input and config.moe_router_topk != 1:
            raise ConfigError(f"moe_apply_probs_on_input=True needs moe_router_topk=1, not {config.moe_router_topk}")
        if config.add_bias_linear and ranks > 1:
            # Each rank would add the whole bias, and the dispatcher then sums the ranks.
            raise ConfigError(
                f"add_bias_linear=True does not go with expert_tensor_parallel_size={ranks}: use 1, or no biases"
            )

    def _mark_parameters(self) -> None:
        """Sets the attributes by which mcore's DDP, gradient norm and optimizer treat a parameter."""
        config = self.config
        # Expert gradients go over the expert-data-parallel group wherever it differs from the data-parallel one: 0.19's
        # rule. 0.16 looks at EP only, and lets copies on tensor-parallel ranks drift apart at EP = 1, TP > expert TP.
        expert_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        gate_and_up = 2 if config.gated_linear_unit else 1
        for name, parameter in self.named_parameters():
            dim, stride = {"weight1": (1, gate_and_up), "weight2": (2, 1), "bias1.bias": (1, gate_and_up)}.get(
                name, (-1, 1)
            )
            # bias2 too: with biases there is no expert TP, so no parameter here is a copy of another TP rank's.
            set_tensor_model_parallel_attributes(parameter, True, dim, stride)
            parameter.allreduce = not expert_groups

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draws the weights expert by expert, fc1 then fc2: the order and the stream of mcore's linear layers."""
        config = self.config
        if not config.use_cpu_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for fc1, fc2 in zip(self.weight1, self.weight2, strict=True):
                    config.init_method(fc1)
                    config.output_layer_init_method(fc2)
            return
        # The CPU stream is the same on all ranks. mcore cuts expert-TP shards out of whole matrices; here every rank
        # also draws the other ranks' experts, so that experts differ and no layout changes them.
        first = self.ep_group.rank() * self.num_local_experts
        for expert in range(self.ep_group.size() * self.num_local_experts):
            fc1 = torch.empty(self.weight1.shape[1] * self.tp_group.size(), self.width, dtype=torch.float32)
            fc2 = torch.empty(self.width, self.ffn * self.tp_group.size(), dtype=torch.float32)
            config.init_method(fc1)
            config.output_layer_init_method(fc2)
            if first <= expert < first + self.num_local_experts:
                shards = fc1.view(-1, self.tp_group.size(), self.ffn, self.width)  # [gate and up, expert TP, F, H]
                self.weight1[expert - first].copy_(shards[:, self.tp_group.rank()].flatten(0, 1))
                self.weight2[expert - first].copy_(fc2.chunk(self.tp_group.size(), 1)[self.tp_group.rank()])

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Applies each expert to its tokens.

        Args:
            permuted_local_hidden_states: `[T, H]`, sorted by expert.
            tokens_per_expert: `[e]`, on CPU or device; sums to T.
            permuted_probs: `[T]`, routing probabilities.

        Returns:
            `[T, H]`, weighted by the probabilities. With expert TP each rank's share of a sum that the dispatcher
            takes. And None, the bias that mcore would add later.
        """
        rows, probs = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            rows = (probs.unsqueeze(-1) * rows).to(rows.dtype)
            probs = torch.ones_like(probs)
        groups = group_tokens(tokens_per_expert, rows, self.weight1[0].numel())
        spread_probs = spread(probs, groups)
        fc1 = grouped_linear(spread(rows, groups), self.weight1, groups)
        if self.bias1 is not None:
            fc1 = fc1 + spread(per_token(self.bias1.bias, groups, len(rows)), groups)
        if self.recomputes_activation and self.training:
            fc2 = activated_linear(self._activation, fc1, spread_probs, self.weight2, groups)
        else:
            fc2 = grouped_linear(self._activation(fc1, spread_probs), self.weight2, groups)
        output = collect(fc2, groups)
        if self.bias2 is not None:
            output = (output + per_token(self.bias2.bias, groups, len(rows)) * probs.unsqueeze(-1)).to(output.dtype)
        return output, None

    def _activation(self, fc1: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """`[..., G]` -> `[..., F]`, times the probabilities: the formulas and roundings of mcore's MLP."""
        config = self.config
        clamp, offset = config.activation_func_clamp_value, config.glu_linear_offset
        if config.gated_linear_unit:
            if config.activation_func is F.silu and clamp is None and not offset:
                if config.bias_activation_fusion and fc1.is_cuda:
                    return weighted_bias_swiglu_impl(
                        fc1, None, probs.unsqueeze(-1), config.activation_func_fp8_input_store
                    )
                return weighted_swiglu(fc1, probs)
            gate, up = fc1.chunk(2, -1)
            if clamp is not None:
                gate, up = gate.clamp(max=clamp), up.clamp(min=-clamp, max=clamp)
            activated = config.activation_func(gate) * (up + offset)
        else:
            activated = config.activation_func(fc1)
        return (activated * probs.unsqueeze(-1)).to(fc1.dtype)

    def backward_dw(self) -> None:
        """Does nothing: weight gradients are part of the backward pass. mcore's expert modules have this method."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describes the stacks as regions of the tensors that `SequentialMLP` checkpoints: `[..., E, rows, columns]`.

        The data of each description is the parameter itself: mcore's optimizer finds its state by that identity.

        Args:
            prefix: of the keys.
            sharded_offsets: (axis, index, size) of leading axes, the layer's under pipeline parallelism.
            metadata: of the checkpoint; `singleton_local_shards` must not be set.

        Raises:
            CheckpointError: one key per expert is asked for.
        """
        if (metadata or {}).get("singleton_local_shards", False):
            raise CheckpointError(
                "checkpoint metadata singleton_local_shards=True is not supported by grouped experts: set it to False"
            )
        axis = len(sharded_offsets)  # of the experts
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        offsets = (*sharded_offsets, (axis, self.ep_group.rank(), self.ep_group.size()))
        columns, rows = (axis + 1, tp_rank, tp_size), (axis + 2, tp_rank, tp_size)
        key, replica, gated = f"{prefix}experts.linear_", (0, 0, self.dp_group.rank()), self.config.gated_linear_unit
        state: dict[str, Any] = {
            f"{prefix}weight1": _sharded(f"{key}fc1.weight", self.weight1, offsets, replica, columns, gated),
            f"{prefix}weight2": _sharded(f"{key}fc2.weight", self.weight2, offsets, replica, rows),
        }
        if self.bias1 is not None and self.bias2 is not None:
            state |= {
                f"{prefix}bias1.bias": _sharded(f"{key}fc1.bias", self.bias1.bias, offsets, replica, columns, gated),
                f"{prefix}bias2.bias": _sharded(f"{key}fc2.bias", self.bias2.bias, offsets, replica),
            }
        # mcore's linear layers store an empty object per expert and refuse to load without it.
        first, experts = self.ep_group.rank() * self.num_local_experts, self.ep_group.size() * self.num_local_experts
        leading = sorted(sharded_offsets)
        for expert in range(first, first + self.num_local_experts):
            shape = (*(size for _, _, size in leading), experts)
            offset = (*(index for _, index, _ in leading), expert)
            for linear in ("fc1", "fc2"):
                state[f"{prefix}{expert}.{linear}._extra_state"] = ShardedObject(
                    f"{key}{linear}._extra_state", None, shape, offset, (0, tp_rank, self.dp_group.rank())
                )
        return state


def _sharded(
    key: str,
    parameter: torch.nn.Parameter,
    offsets: tuple[tuple[int, int, int], ...],
    replica_id: tuple[int, int, int],
    tensor_offset: tuple[int, int, int] | None = None,
    gated: bool = False,
) -> ShardedTensor | ShardedTensorFactory:
    """One stacked parameter as a region of the global tensor, or as two where its halves are apart there.

    Args:
        key: of the global tensor.
        parameter: `[e, ...]`.
        offsets: (axis, index, size) of the leading axes and of the expert axis, the last of them.
        replica_id: (pipeline, expert tensor, expert data) index of this copy.
        tensor_offset: the same for the axis that expert TP splits.
        gated: the second axis holds gate and up. Globally all gates come first, so a rank's halves are apart.
    """
    prepended = len(offsets) - 1  # axes that the global tensor has and the parameter has not

    def region(key: str, tensor: torch.Tensor, replica_id: Any, split: tuple[int, int, int] | None) -> ShardedTensor:
        splits = offsets if split is None else (*offsets, split)
        return ShardedTensor.from_rank_offsets(key, tensor, *splits, replica_id=replica_id, prepend_axis_num=prepended)

    if not gated or tensor_offset is None or tensor_offset[2] == 1:
        return region(key, parameter, replica_id, tensor_offset)
    axis, rank, size = tensor_offset

    @torch.no_grad()
    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        # On the meta device the halves stay views: `model/holdings.py` reads from them where they lie.
        gate, up = (half if half.is_meta else half.contiguous() for half in tensor.chunk(2, dim=1))
        return [
            region(key, gate, replica_id, (axis, rank, 2 * size)),
            region(key, up, replica_id, (axis, size + rank, 2 * size)),
        ]

    def merge(halves: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(halves, dim=1)

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)


def _drop_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *args: object) -> None:
    """Takes the empty objects of mcore's linear layers out of a state dict that is about to be loaded."""
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith("._extra_state")]:
        del state_dict[key]
