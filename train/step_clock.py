"""Where the time of a step goes, on the rank that asks.

On CPU parts are told apart by the wall clock. On a GPU the host runs ahead, so an event is recorded at both ends of each
part and read after the step, when the host has waited for the loss anyway: nothing is waited for on its account.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from train.named import named

# The parts of a step, in order; all_to_all happens inside forward_backward.
PARTS = ("data", "forward_backward", "all_to_all", "optimizer")


class StepClock:
    """Seconds of the parts of the step that runs.

    Args:
        device: where the work happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """This moment: a number of seconds, or an event in the stream."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, begin: Any) -> None:
        """Count the time since a mark as part `name`."""
        self._marks.append((name, begin, self.mark()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as part `name`, which is its name in traces too."""
        begin = self.mark()
        with named(name):
            yield
        self.add(name, begin)

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call, without those that did not occur; on a GPU the step must be complete."""
        seconds: dict[str, float] = {}
        for name, begin, end in self._marks:
            took = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + took
        self._marks.clear()
        return seconds

    def watch_exchanges(self, layer: Any) -> None:
        """Count an MoE layer's exchanges of tokens as part all_to_all, forward and backward, while it trains.

        Args:
            layer: mcore's MoELayer.
        """
        for name in ("token_dispatch", "token_combine"):
            setattr(layer.token_dispatcher, name, self._timed(layer, getattr(layer.token_dispatcher, name)))

    def _timed(self, layer: Any, exchange: Callable[..., Any]) -> Callable[..., Any]:
        # Weakly: a dispatcher that refers to itself would keep tensors of a stage that is over.
        trained, original = weakref.ref(layer), weakref.WeakMethod(exchange)

        def timed(tokens: torch.Tensor, *arguments: Any) -> Any:
            of, call = trained(), original()
            assert of is not None and call is not None
            if not of.training:
                return call(tokens, *arguments)
            begin = self.mark()
            with named("all_to_all"):
                result = call(tokens, *arguments)
            self.add("all_to_all", begin)
            received = result[0] if isinstance(result, tuple) else result
            if received.requires_grad and tokens.requires_grad and received is not tokens:
                self._watch_backward(tokens, received)
            return result

        return timed

    def _watch_backward(self, sent: torch.Tensor, received: torch.Tensor) -> None:
        """Gradients travel from what was received to what was sent: count from the one's being there to the other's."""
        begun: list[Any] = []
        received.register_hook(lambda gradient: begun.append(self.mark()))
        sent.register_hook(lambda gradient: self.add("all_to_all", begun.pop()) if begun else None)
