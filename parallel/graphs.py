"""CUDA graphs of one stage's layers, from their capture to their end, by mcore's helper and Transformer Engine.

    graphs = LayerGraphs.of(wrapped, config, optimizer, ...)   # with the stage; captures nothing
    if graphs.due():                                           # before every step: counts it
        graphs.capture()                                       # collective
    graphs.drop()                                              # before anything that they point at goes or moves

A graph holds addresses: of weights, of gradients where they are added up inside it, of communicators. So it goes before the
stage does, and before gradient buffers are given back. mcore's layers run without graphs as soon as theirs are gone.
Run on an H200, on one rank (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.devices import held_bytes
from parallel.errors import ConfigError, LaunchError

_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_REGISTER = "NCCL_GRAPH_REGISTER"


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep NCCL from registering what graphs captured where segments of memory grow; before the first group is made.

    Memory registered so is read where it no longer lies: mcore refuses to capture without this (0.16.1 and 0.19.2).

    Args:
        environment: of the process, changed in place.

    Raises:
        ConfigError: if it asks for the opposite.
    """
    growing = [name for name in _ALLOCATORS if "expandable_segments:true" in environment.get(name, "").lower()]
    if not growing:
        return
    asked = environment.setdefault(_REGISTER, "0")
    if asked != "0":
        raise ConfigError(
            f"performance.cuda_graphs=attention cannot be with {_REGISTER}={asked} and {growing[0]}="
            f"{environment[growing[0]]}: leave {_REGISTER} out, or set an allocator without expandable_segments"
        )


def leave_default_stream() -> None:
    """Have this thread compute on a stream of its own from here on.

    Gradients are added up on the stream that was current when a parameter was wrapped. The default stream waits for all
    others, which ends a capture; none of what this process does may be on it.
    """
    torch.cuda.set_stream(torch.cuda.Stream())


def seed_replayed_streams(seed: int) -> None:
    """Start mcore's generator streams anew, as generators that a graph can replay: Transformer Engine's tracker keeps them.

    Its attention refuses to be captured with another one, dropout or not. The tracker stays the same object, because
    attention that is built already asks that one.

    Args:
        seed: from which mcore derives the seed of each stream.

    Raises:
        LaunchError: if mcore does not take Transformer Engine's.
    """
    from megatron.core.extensions.transformer_engine import TECudaRNGStatesTracker
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    there = isinstance(get_cuda_rng_tracker(), TECudaRNGStatesTracker)
    model_parallel_cuda_manual_seed(seed, te_rng_tracker=True, force_reset_rng=not there)
    if not isinstance(get_cuda_rng_tracker(), TECudaRNGStatesTracker):
        raise LaunchError(
            "performance.cuda_graphs=attention: megatron-core does not take Transformer Engine's generators here: use "
            "performance.cuda_graphs=none"
        )


@contextlib.contextmanager
def _micro_batches(count: int) -> Iterator[None]:
    """Tell mcore the micro-batches of a step, inside; it has one global number for that, which nothing else here reads."""
    from megatron.core import num_microbatches_calculator as calculator

    # Any sizes that make this quotient; a rank other than 0 prints nothing.
    calculator.init_num_microbatches_calculator(
        rank=1, rampup_batch_size=None, global_batch_size=count, micro_batch_size=1, data_parallel_size=1
    )
    try:
        yield
    finally:
        calculator.destroy_num_microbatches_calculator()


@dataclass(frozen=True)
class Captured:
    """What a capture made on this rank.

    Attributes:
        graphs: of layers and micro-batches, forward and backward counted as one.
        seconds: that it took.
        held: bytes of the device that it holds from then on.
    """

    graphs: int
    seconds: float
    held: int


class LayerGraphs:
    """The graphs of a stage: none in its first steps, then captured once, and gone before anything they point at.

    Args:
        helper: mcore's, for these chunks (`of`).
        wrapped: the chunks in DistributedDataParallel.
        micro_batches: of a step.
        device: of this rank.
        warmup_steps: before the capture.
    """

    def __init__(
        self, helper: Any, wrapped: Sequence[Any], *, micro_batches: int, device: torch.device, warmup_steps: int
    ) -> None:
        self._helper, self._wrapped = helper, list(wrapped)
        self._micro_batches, self._device, self._wait = micro_batches, device, warmup_steps
        self._steps, self.captured = 0, False

    @classmethod
    def of(
        cls,
        wrapped: Sequence[Any],
        config: Any,
        optimizer: Any,
        *,
        sequence_length: int,
        micro_batch_size: int,
        micro_batches: int,
        device: torch.device,
    ) -> LayerGraphs:
        """Get ready to capture the attention of every layer of these chunks.

        Args:
            wrapped: the chunks in DistributedDataParallel.
            config: their TransformerConfig, made with `parallel.compat.graph_fields`.
            optimizer: mcore's; a capture leaves gradients behind, which it clears.
            sequence_length: tokens of every sequence.
            micro_batch_size: sequences of every micro-batch.
            micro_batches: of every step.
            device: of this rank.

        Raises:
            LaunchError: if mcore would not capture, or would leave out a layer.
        """
        helper = _mcore_helper(list(wrapped), config, sequence_length, micro_batch_size, [optimizer])
        layers = sum(len(chunk.module.module.decoder.layers) for chunk in wrapped)
        found = len(helper.flattened_callables)
        if found != layers or not found:
            raise LaunchError(
                f"performance.cuda_graphs=attention: this megatron-core would capture {found} of {layers} layers: use "
                "performance.cuda_graphs=none"
            )
        return cls(
            helper,
            wrapped,
            micro_batches=micro_batches,
            device=device,
            warmup_steps=config.cuda_graph_warmup_steps,
        )

    def due(self) -> bool:
        """Take note that a step of the stage begins; True, on all ranks alike, if graphs are to be captured for it."""
        if self._helper is None:
            return False
        due = self._steps == self._wait
        self._steps += 1
        return due

    def capture(self) -> Captured:
        """Capture between two steps; collective where layers are divided over ranks. Gradients are zero afterwards.

        Raises:
            torch.OutOfMemoryError: if there is no room.
            Exception: of torch, Transformer Engine and mcore, where something cannot be captured.
        """
        began = time.perf_counter()
        # What the capture itself collects is not to count against it.
        gc.collect()
        before = held_bytes(self._device)
        # Hooks that wait for weights on their way run in Python: none may be there during the capture, and a replay runs
        # none of those inside a layer, so mcore runs them by itself.
        hooked = [chunk for chunk in self._wrapped if chunk.ddp_config.overlap_param_gather]
        for chunk in hooked:
            chunk.disable_forward_pre_hook(param_sync=False)
        with _micro_batches(self._micro_batches):
            self._helper.create_cudagraphs()
        self.captured = True
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        if hooked:
            self._helper.cuda_graph_set_manual_hooks()
        seconds = time.perf_counter() - began
        graphs = sum(len(layer.cuda_graphs) for layer in self._helper.flattened_callables)
        return Captured(graphs, seconds, max(0, held_bytes(self._device) - before))

    def drop(self) -> int | None:
        """Delete the graphs, if there are any, and give their memory back; the stage runs without from then on.

        Returns:
            Bytes of the device that this gave back; None if there was nothing to drop.
        """
        if not self.captured:
            return None
        if self._device.type == "cuda":
            # None may be on its way.
            torch.cuda.synchronize(self._device)
        before = held_bytes(self._device)
        self.abandon()
        # What they keep refers to itself in a circle, which holds their memory and that of the communicators in them.
        gc.collect()
        return max(0, before - held_bytes(self._device))

    def abandon(self) -> None:
        """Let go of everything, asking the device nothing: an error may have come from it."""
        helper, self._helper, self._wrapped = self._helper, None, []
        if self.captured:
            self.captured = False
            helper.delete_cuda_graphs()


def _mcore_helper(wrapped: list[Any], config: Any, length: int, micro_batch_size: int, optimizers: list[Any]) -> Any:
    """mcore's helper, which finds the layers to capture.

    Raises:
        LaunchError: in mcore's words.
    """
    # Here and not above: it imports Transformer Engine.
    from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

    try:
        return TECudaGraphHelper(
            model=wrapped, config=config, seq_length=length, micro_batch_size=micro_batch_size, optimizers=optimizers
        )
    except AssertionError as e:
        raise LaunchError(f"performance.cuda_graphs=attention: megatron-core refuses ({e}): use none") from None
