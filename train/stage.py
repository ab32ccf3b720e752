"""One stage of a run: the model of E experts wrapped for data parallelism, its optimizer and its schedule.

`build_stage` makes everything that is sized by the number of experts; an expansion throws a stage away and builds the
next. What outlives stages (data, files, trackers) lives in `train/run.py`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from model.build import MoEPart, build_chunks, moe_parts
from model.choices import Choice
from model.family_routing import install_family_routing
from model.load import ExpertLoad, count_exactly
from parallel.compat import forget_models
from parallel.devices import empty_cache
from parallel.gradients import NoGradientsYet, release, require_stand_ins, restore
from parallel.graphs import LayerGraphs
from parallel.layout import Layout
from parallel.optimizer_state import use_fused_update
from train.acceleration import accelerated
from train.config import RunSettings
from train.data.batches import micro_batches
from upcycle.optimizer_rules import rewarm_factor
from upcycle.plan import last_growth


@dataclass
class Network:
    """A model that can be run.

    Attributes:
        chunks: the bare GPTModel chunks of this rank (what checkpoints and expansions see).
        wrapped: the same chunks in Float16Module (bf16) and, where they train, DistributedDataParallel.
    """

    chunks: list[GPTModel]
    wrapped: list[Any]


@dataclass
class Stage(Network):
    """A model with its optimizer and schedule, for one number of experts.

    Attributes:
        number: position in the run, from 0.
        num_experts: experts per MoE layer; 0 for a dense model.
        optimizer: mcore's optimizer; a chain of two where experts are parallel.
        scheduler: learning rate and weight decay over optimizer steps.
        load: tokens per expert since the last reading.
        choices: what was decided for the machine, and why.
        graphs: CUDA graphs of its layers; None where none are wanted.
    """

    number: int
    num_experts: int
    optimizer: Any
    scheduler: OptimizerParamScheduler
    load: ExpertLoad
    choices: tuple[Choice, ...] = ()
    graphs: LayerGraphs | None = None

    def moe_parts(self) -> list[MoEPart]:
        """MoE layers on this rank."""
        return moe_parts(self.chunks)

    def gather_parameters(self) -> None:
        """Make every rank's weights those of the last step; collective.

        With overlapped parameter gathering a step leaves each data rank its own part fresh and the rest to the next
        forward pass; whoever reads weights in between has to ask for them.
        """
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def release_gradients(self) -> None:
        """Free the gradient buffers; `restore_gradients` brings them back elsewhere, zeroed. Graphs that know them go."""
        if self.graphs is not None:
            self.graphs.drop()
        for chunk in self.wrapped:
            release(chunk)

    def restore_gradients(self) -> None:
        """Allocate the gradient buffers again, or for the first time in a blank stage."""
        for chunk in self.wrapped:
            restore(chunk)

    def release(self) -> None:
        """Drop every reference this object holds, so that memory is free before the next stage is built."""
        if self.graphs is not None:
            self.graphs.drop()
            self.graphs.abandon()
            self.graphs = None
        self.load.remove()
        # mcore's modules keep tensors of the last step's graph, and hooks on it that lead back to them: a cycle through
        # autograd, which Python's collector cannot see. The model would stay for ever, and its process groups with it.
        for chunk in self.wrapped:
            for module in list(chunk.modules()):
                vars(module).clear()
        self.chunks, self.wrapped = [], []
        self.optimizer = self.scheduler = self.load = None  # type: ignore[assignment]
        forget_models()


def build_stage(
    settings: RunSettings,
    number: int,
    layout: Layout,
    vocab_size: int,
    plans: Sequence[Mapping[str, Any]] = (),
    *,
    schedule_begins: int = 0,
    blank: bool = False,
) -> Stage:
    """Build the model, DDP buffers, optimizer and schedule of stage `number`, freshly initialised.

    Args:
        settings: of the run.
        number: which stage.
        layout: its process groups.
        vocab_size: tokens of the tokenizer.
        plans: of the stages up to this one, as dicts; the last expansion's families route together in exact mode.
        schedule_begins: step of the run from which the schedule counts.
        blank: leave weights and masters unset, to be filled from another stage; no rank talks to another then, and
            gradients have no memory until `restore_gradients`.

    Raises:
        ConfigError: if mcore refuses the combination.
    """
    num_experts = settings.experts_of(number)
    settings, choices = _on_this_machine(settings, num_experts, layout, plans)
    chunks = _build_chunks(settings, num_experts, layout, vocab_size, plans, initialise=not blank)
    if blank and settings.optimizer.distributed:
        _let_go_of_weights(chunks)
        empty_cache(layout.device)
    with NoGradientsYet(settings.optimizer.distributed) if blank else contextlib.nullcontext():
        wrapped = _in_ddp(settings, chunks)
    count_exactly(moe_parts(chunks))
    for chunk in wrapped:
        if blank:
            require_stand_ins(chunk)
        else:
            chunk.broadcast_params()
    optimizer = get_megatron_optimizer(_optimizer_config(settings), wrapped)
    use_fused_update(optimizer)
    _bind(chunks[0].config, wrapped, optimizer, settings)
    graphs = _graphs(settings, layout, wrapped, optimizer)
    return Stage(
        number=number,
        num_experts=num_experts,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(settings, optimizer, number, schedule_begins),
        load=ExpertLoad(moe_parts(chunks), settings.model.moe_layer_numbers(), num_experts, layout.device),
        choices=choices,
        graphs=graphs,
    )


def build_network(
    settings: RunSettings, num_experts: int, layout: Layout, vocab_size: int, plans: Sequence[Mapping[str, Any]]
) -> Network:
    """Build a model to be filled from a checkpoint and run forwards: no gradients, optimizer or schedule.

    Args:
        settings: of the run.
        num_experts: experts per MoE layer; 0 for a dense model.
        layout: its process groups.
        vocab_size: tokens of the tokenizer.
        plans: as for `build_stage`.

    Raises:
        ConfigError: if mcore refuses the combination.
    """
    # These two are of training alone, and what is only evaluated may be where they cannot be.
    performance = replace(settings.performance, cuda_graphs="none", expert_parallel_overlap=False)
    settings, _ = _on_this_machine(replace(settings, performance=performance), num_experts, layout, plans)
    chunks = _build_chunks(settings, num_experts, layout, vocab_size, plans, initialise=True)
    return Network(chunks=chunks, wrapped=[_in_precision(settings, chunk) for chunk in chunks])


def _on_this_machine(
    settings: RunSettings, num_experts: int, layout: Layout, plans: Sequence[Mapping[str, Any]]
) -> tuple[RunSettings, tuple[Choice, ...]]:
    """The settings of a stage with every `auto` decided where it runs, and the decisions."""
    families = families_of(plans) is not None
    return accelerated(settings, num_experts, layout.config, layout.machine(), layout.world_size, families=families)


def _build_chunks(
    settings: RunSettings,
    num_experts: int,
    layout: Layout,
    vocab_size: int,
    plans: Sequence[Mapping[str, Any]],
    *,
    initialise: bool,
) -> list[GPTModel]:
    """The bare chunks of this rank, routing in families where the last expansion was made in exact mode."""
    forget_models()
    chunks = build_chunks(
        settings.model,
        num_experts,
        layout,
        vocab_size=vocab_size,
        sequence_length=settings.data.sequence_length,
        precision=settings.run.precision,
        initialise=initialise,
        performance=settings.performance,
    )
    families = families_of(plans)
    if families:
        install_family_routing(chunks, families)
    return chunks


def _in_precision(settings: RunSettings, chunk: GPTModel) -> Any:
    """A chunk as it computes: in Float16Module for bf16."""
    return Float16Module(chunk.config, chunk) if settings.run.precision == "bf16" else chunk


def _in_ddp(settings: RunSettings, chunks: list[GPTModel]) -> list[Any]:
    """Chunks as they train: in mcore's DDP, with gradients in fp32."""
    options = settings.optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=options.distributed,
        overlap_grad_reduce=options.overlap_grad_reduce is True,
        overlap_param_gather=options.overlap_param_gather is True,
    )
    return [
        DistributedDataParallel(
            config=chunks[0].config,
            ddp_config=ddp,
            module=_in_precision(settings, chunk),
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]


def _optimizer_config(settings: RunSettings) -> OptimizerConfig:
    options, bf16 = settings.optimizer, settings.run.precision == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.schedule.learning_rate,
        min_lr=settings.schedule.min_learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.epsilon,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=options.distributed,
        overlap_param_gather=options.overlap_param_gather is True,
    )


def _graphs(settings: RunSettings, layout: Layout, wrapped: list[Any], optimizer: Any) -> LayerGraphs | None:
    """What captures the layers of a stage; None where no graphs are wanted."""
    if settings.performance.cuda_graphs != "attention":
        return None
    return LayerGraphs.of(
        wrapped,
        wrapped[0].config,
        optimizer,
        sequence_length=settings.data.sequence_length,
        micro_batch_size=settings.data.micro_batch_size,
        micro_batches=micro_batches(settings.data, layout),
        device=layout.device,
    )


def families_of(plans: Sequence[Mapping[str, Any]]) -> dict[int, list[int]] | None:
    """Parents [M] per layer number if the last expansion was made in exact mode; its release may be over."""
    grown = last_growth(plans)
    if grown is None or grown.get("mode", "plain") == "plain":
        return None
    return {layer["layer"]: layer["parents"] for layer in grown["layers"]}


def _let_go_of_weights(chunks: list[GPTModel]) -> None:
    """Put one shared number in place of every weight: DDP gives them memory of its own and would hold both for a while."""
    for chunk in chunks:
        for p in chunk.parameters():
            p.data = torch.zeros(1, dtype=p.dtype, device=p.device).expand(p.shape)


def _bind(config: Any, wrapped: list[Any], optimizer: Any, settings: RunSettings) -> None:
    """Give mcore's schedules the functions of this stage; they hold the old stage's otherwise."""
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.timers = None
    one = len(wrapped) == 1
    if settings.optimizer.overlap_grad_reduce is True:
        config.no_sync_func = wrapped[0].no_sync if one else [w.no_sync for w in wrapped]
    if settings.optimizer.overlap_param_gather is True:
        sync = [w.start_param_sync for w in wrapped]
        config.param_sync_func = sync[0] if one else sync


class _Rewarmed(OptimizerParamScheduler):
    """mcore's schedule, rising again from near zero after the switch into the current stage.

    Args:
        first_step: optimizer step of the switch.
        rewarm_steps: length of the rise; 0 for none.
    """

    def __init__(self, *arguments: Any, first_step: int, rewarm_steps: int, **options: Any) -> None:
        # Before the base, which asks for the first learning rate at once.
        self._first_step, self._rewarm_steps = first_step, rewarm_steps
        super().__init__(*arguments, **options)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        rate: float = super().get_lr(param_group)
        return rate * rewarm_factor(max(0, self.num_steps - self._first_step), self._rewarm_steps)


def build_scheduler(settings: RunSettings, optimizer: Any, number: int, begins: int) -> OptimizerParamScheduler:
    """mcore's schedule of learning rate and weight decay, counted in optimizer steps.

    Args:
        settings: of the run.
        optimizer: whose parameter groups it sets.
        number: of the stage; one with `rewarm_steps` warms up again.
        begins: step of the run from which it counts.
    """
    schedule, steps = settings.schedule, settings.run.steps - begins
    wsd = schedule.style == "wsd"
    begun = settings.upcycle.stages[number - 1] if number else None
    return _Rewarmed(
        optimizer,
        first_step=begun.at_step - begins if begun else 0,
        rewarm_steps=begun.rewarm_steps if begun else 0,
        init_lr=0.0,
        max_lr=schedule.learning_rate,
        min_lr=schedule.min_learning_rate,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if wsd else schedule.style,
        start_wd=settings.optimizer.weight_decay,
        end_wd=settings.optimizer.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=(schedule.decay_steps or max(1, steps // 10)) if wsd else None,
        lr_wsd_decay_style="linear" if wsd else None,
    )
