"""When a run captures the CUDA graphs of its stage, when it drops them, and what it says of both (docs/gpu.md)."""

from typing import TYPE_CHECKING

import torch

from model.graphs import KEY, refuse_graphs
from parallel.errors import LaunchError
from parallel.graphs import prepare_environment
from parallel.transformer_engine import have_transformer_engine
from train.config import RunSettings

if TYPE_CHECKING:
    from train.run import Run


def wants_graphs(settings: RunSettings) -> bool:
    """Whether a run is to capture graphs.

    Refuses them where this machine or its environment stands in the way, before a process group is made or a device is
    touched; the environment of the process has what they need afterwards.

    Raises:
        ConfigError: naming what stands in the way and the remedy.
    """
    wish = settings.performance.cuda_graphs
    if wish == "none":
        return False
    refuse_graphs(
        settings.model,
        wish,
        bf16=settings.run.precision == "bf16",
        documents=settings.data.document_attention,
        context=max(settings.parallel_of(stage).context for stage in range(len(settings.upcycle.stages) + 1)),
        gpu=torch.cuda.is_available(),
        engine=have_transformer_engine(),
    )
    prepare_environment()
    return True


def capture_when_due(run: "Run") -> None:
    """Capture the graphs of a run's stage, if the next step is the first after its warm-up; collective.

    A rank that cannot tells of it by its end: the others may wait in a collective of the capture itself, so there is none
    in which ranks could agree. The launcher ends them, or the watchdog with this rank's words.

    Raises:
        LaunchError: if they cannot be captured.
        torch.OutOfMemoryError: if there is no room; explained as in a step.
    """
    graphs = run.stage.graphs
    if graphs is None or not graphs.due():
        return
    # Nothing else of this process may be at work: a call of CUDA in another thread ends a capture.
    run.persistence.settle()
    # The name is told where memory is not enough.
    with run.watchdog.act(f"capturing CUDA graphs ({KEY}=none needs none)"):
        try:
            made = graphs.capture()
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            # Whatever it is: of CUDA, or an argument that one library hands to another which does not know it.
            failed = LaunchError(
                f"rank {run.layout.rank} could not capture CUDA graphs of attention ({_cause(e)}): use {KEY}=none; the run "
                "goes on from its newest checkpoint"
            )
            # This rank knows; the others wait for it in a collective.
            failed.speaks = True
            raise failed from e
        # Nobody goes on before all have theirs.
        told = run.layout.gather_objects((made.graphs, made.seconds, made.held))
    count, seconds, held = sum(t[0] for t in told), max(t[1] for t in told), max(t[2] for t in told)
    run.event("graphs_captured", stage=run.stage.number, graphs=count, seconds=seconds, bytes=held)
    run.console.say(
        f"captured {count} CUDA graphs of attention over all ranks in {seconds:.1f} s; they hold {held / 2**20:.0f} MiB "
        "on the fullest rank"
    )


def _cause(error: BaseException) -> str:
    """The first error of a chain in one line: a capture that has failed fails again when it is ended, and says less."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def drop_graphs(run: "Run", reason: str) -> None:
    """Drop the graphs of a run's stage, if there are any; collective.

    Args:
        run: between two steps.
        reason: for the log and the events.
    """
    graphs = run.stage.graphs
    if graphs is None or not graphs.captured:
        return
    freed = max(run.layout.gather_objects(graphs.drop() or 0))
    run.event("graphs_dropped", stage=run.stage.number, reason=reason, bytes=freed)
    run.console.say(f"dropped the CUDA graphs before {reason}: {freed / 2**20:.0f} MiB given back on the fullest rank")
