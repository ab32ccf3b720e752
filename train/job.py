"""Runs checked settings as one job: joins the process group, opens the run, trains, reports, leaves."""

import time
from pathlib import Path

from parallel.errors import CoppiceError
from parallel.layout import Layout, join_job, leave_job
from train.config import RunSettings
from train.data import open_corpora
from train.report import summary_lines, write_report
from train.run import Run


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
    corpora = open_corpora(settings.data)
    joined = join_job(settings.parallel.timeout_seconds)
    try:
        layout = Layout.create(settings.parallel, settings.run.seed)
        run = Run.open(settings, layout, corpora)
        try:
            reason = run.train()
        except CoppiceError as e:
            run.event("stop", reason="failed", error=str(e))
            raise
        finally:
            run.close()
        if layout.rank == 0:
            _report(Path(settings.run.dir))
        layout.barrier()
    finally:
        leave_job(joined)
    return reason


def _report(run_dir: Path) -> None:
    """Draw the report and print one screen of results; a report that cannot be drawn does not undo a finished run."""
    began = time.perf_counter()
    print()
    try:
        write_report(run_dir)
        for line in summary_lines(run_dir):
            print(line)
    except Exception as e:
        # Whatever it is, the run is finished and its files are whole.
        print(
            f"the report could not be drawn ({type(e).__name__}: {e}); try again with `python -m train.report {run_dir}`",
            flush=True,
        )
    else:
        print(f"report drawn in {time.perf_counter() - began:.1f} s", flush=True)
