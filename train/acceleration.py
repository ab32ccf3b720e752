"""What a stage of a run is computed with on a machine: its settings with every `auto` decided (`model/choices.py`)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from model.choices import Choice, Situation, choose, resolved
from parallel.config import ParallelConfig
from parallel.machine import Machine
from train.config import RunSettings


def accelerated(
    settings: RunSettings,
    num_experts: int,
    parallel: ParallelConfig,
    machine: Machine,
    world_size: int,
    *,
    families: bool,
) -> tuple[RunSettings, tuple[Choice, ...]]:
    """Decide what makes a stage fast.

    Args:
        settings: of the run.
        num_experts: experts per MoE layer in the stage; 0 for a dense model.
        parallel: layout of the stage.
        machine: where it runs.
        world_size: processes.
        families: whether it routes in families (exact mode).

    Returns:
        The settings with the decisions in place, for this stage alone, and the decisions.

    Raises:
        ConfigError: naming a key that was set to what cannot be, and the remedy.
    """
    at = Situation(
        model=settings.model,
        num_experts=num_experts,
        performance=settings.performance,
        overlap_grad_reduce=settings.optimizer.overlap_grad_reduce,
        overlap_param_gather=settings.optimizer.overlap_param_gather,
        sharded=settings.optimizer.distributed,
        parallel=parallel,
        world_size=world_size,
        bf16=settings.run.precision == "bf16",
        families=families,
        documents=settings.data.document_attention,
        machine=machine,
    )
    choices = choose(at)
    model, performance = resolved(at, choices)
    overlaps = {c.key.split(".")[1]: bool(c.value) for c in choices if c.key.startswith("optimizer.")}
    optimizer = replace(settings.optimizer, **overlaps)  # type: ignore[arg-type]
    return replace(settings, model=model, performance=performance, optimizer=optimizer), choices


def routes_in_families(settings: RunSettings, number: int) -> bool:
    """Whether, as configured, the last expansion up to a stage is made in exact mode."""
    growths = [stage for stage in settings.upcycle.stages[:number] if stage.grows()]
    return bool(growths) and growths[-1].mode == "exact"


def choice_lines(choices: Sequence[Choice]) -> Iterator[str]:
    """A table of decisions: key, value, reason."""
    widest = max((len(c.key) for c in choices), default=0)
    for c in choices:
        value = str(c.value).lower() if isinstance(c.value, bool) else c.value
        yield f"  {c.key:<{widest}}  {value:<9}  {c.why}"


def changed(before: Sequence[Choice], after: Sequence[Choice]) -> list[Choice]:
    """The decisions of a stage that are not those of the stage before it."""
    known = {c.key: c.value for c in before}
    return [c for c in after if known.get(c.key) != c.value]
