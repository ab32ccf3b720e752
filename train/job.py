"""Runs checked settings as one job: joins the process group, opens the run, trains, reports, leaves."""

import os
import time
from pathlib import Path

import torch

from parallel.devices import out_of_memory
from parallel.errors import CoppiceError, LaunchError
from parallel.layout import Layout, join_job, leave_job
from train.buildable import refuse_unbuildable
from train.config import RunSettings
from train.graphs import wants_graphs
from train.inputs import open_inputs
from train.run import Run
from train.signals import StopRequest
from train.status import tell_failed_start, tell_failure
from train.timeouts import explain_timeout, watch_for_timeouts
from train.tracking import refuse_missing


def run_settings(settings: RunSettings) -> str:
    """Train one run to its end or to a request to stop; collective over the job's processes.

    The caller has called `parallel.compat.prepare_megatron`.

    Args:
        settings: checked settings.

    Returns:
        Why the run ended: finished, stop_at_step or requested.

    Raises:
        CoppiceError: for anything a user can mend.
    """
    refuse_missing(settings.tracking)
    refuse_unbuildable(settings, int(os.environ.get("WORLD_SIZE", "1")))
    corpora = open_inputs(settings)
    graphs = wants_graphs(settings)
    joined = join_job(settings.parallel.timeout_seconds, Path(settings.run.dir), graphs=graphs)
    try:
        layout = Layout.create(settings.parallel, settings.run.seed, graphs=graphs)
        # Before the run is opened: reading corpora and a checkpoint may take long.
        with StopRequest(Path(settings.run.dir), layout.rank) as stop:
            try:
                run = Run.open(settings, layout, corpora, stop)
            except torch.OutOfMemoryError as e:
                raise out_of_memory(e, layout.rank, "building or loading the model", Path(settings.run.dir)) from e
            except CoppiceError as e:
                # Another job's run is not ours to speak of.
                if layout.rank == 0 and not isinstance(e, LaunchError):
                    tell_failed_start(Path(settings.run.dir), e)
                raise
            try:
                run.watchdog.start(run)
                with watch_for_timeouts(run):
                    reason = run.train()
            except BaseException as e:
                if isinstance(e, torch.OutOfMemoryError):
                    full = out_of_memory(e, run.layout.rank, run.watchdog.doing or "the run", run.files.run_dir)
                    run.watchdog.end(full)
                    tell_failure(run, full, here=True)
                    raise full from e
                lost = run.watchdog.explain(e)
                # Of a time-out every rank speaks, and rank 0 writes, as of other errors.
                here = lost.speaks if lost else None
                lost = lost or explain_timeout(run, e)
                run.watchdog.end(lost or e)
                tell_failure(run, lost or e, here=here)
                if lost is not None:
                    raise lost from e
                raise
            finally:
                run.watchdog.end()
                run.close()
        if run.layout.rank == 0:
            _report(Path(settings.run.dir))
        run.layout.barrier()
    finally:
        leave_job(joined)
    return reason


def _report(run_dir: Path) -> None:
    """Draw the report and print one screen of results; a report that cannot be drawn does not undo a finished run."""
    # Here and not above: the drawing library takes a second, and only rank 0 draws.
    from train.report import write_report
    from train.report.data import load_run
    from train.report.text import summary_lines

    began = time.perf_counter()
    print()
    try:
        record = load_run(run_dir)
        write_report(record)
        for line in summary_lines(record):
            print(line)
    except Exception as e:
        # Whatever it is, the run is finished and its files are whole.
        print(
            f"the report could not be drawn ({type(e).__name__}: {e}); try again with `python -m train.report {run_dir}`",
            flush=True,
        )
    else:
        print(f"report drawn in {time.perf_counter() - began:.1f} s", flush=True)
