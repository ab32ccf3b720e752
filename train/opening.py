"""Opens a run: what it starts from is found and checked, its stage is built and loaded, and the start is written down.

`Run.open` is both halves; `Run.restore` is the first alone, for what looks at a run and does not continue it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from train.checkpoint.folder import Manifest
from train.course import follow
from train.evaluation import open_evaluation
from train.guard import refuse_tripped
from train.health import read_skipped
from train.hf.start import begin
from train.record import record_start
from train.run_lock import lock_run
from train.settings import settings_to_dict, write_yaml
from train.stage import build_stage
from train.start import find_start
from train.status import tell_status
from train.tracking import open_tracker

if TYPE_CHECKING:
    from train.run import Run


def restore_state(run: "Run") -> tuple[Path | None, Manifest | None]:
    """Build and load the state that a run starts from, without its tracker and its records; collective.

    Args:
        run: as it was made.

    Returns:
        The checkpoint that the state comes from, with its manifest; None for a fresh start.

    Raises:
        CoppiceError: if the run directory is of another run, or a checkpoint cannot be used.
    """
    # Before anything is chosen that another job might change; a folder that is not there yet is nobody's.
    _lock_folder(run, only_if_there=True)
    source, run.skipped = find_start(run)
    manifest = run.persistence.check_start(source)
    number = manifest.stage if manifest else 0
    follow(run, source, manifest)
    with run.layout.together("preparing run.dir"):
        if run.layout.rank == 0:
            run.files.prepare()
    _lock_folder(run)
    layout = run.enter_layout(number)
    full = not (manifest and source) or run.persistence.enter(source, manifest)
    run.stage = build_stage(
        run.settings,
        number,
        layout,
        run.vocab_size,
        manifest.plans if manifest else (),
        schedule_begins=run.schedule_begins,
    )
    with layout.together("looking for samples to leave out"):
        left_out_here = read_skipped(run.files.run_dir) if layout.rank == 0 else []
    known = [(first, count) for first, count in manifest.skipped_data] if manifest else []
    run.skipped_data = sorted({*layout.from_rank_zero(left_out_here), *known})
    run.open_data(manifest)
    run.evaluation = open_evaluation(run)
    if manifest and source:
        run.persistence.load(source, manifest, full=full)
    begin(run, source, manifest)
    return source, manifest


def write_start(run: "Run", source: Path | None, manifest: Manifest | None) -> None:
    """Write down that a run begins or goes on, and with what; collective.

    Args:
        run: restored.
        source: the checkpoint it goes on from.
        manifest: of that checkpoint.

    Raises:
        CoppiceError: if the guard has stopped the run, its folder cannot be written, or has no room for a checkpoint.
    """
    refuse_tripped(run)
    with run.layout.together("writing config.yaml"):
        if run.layout.rank == 0:
            write_yaml(run.given, run.files.config, manifest.step if manifest else 0)
            if manifest is None:
                # A start that was killed before its first checkpoint leaves steps that are trained anew now.
                run.files.truncate_after(0)
    run.tracker = open_tracker(
        run.given.tracking,
        run.files,
        manifest.tracker_id if manifest else None,
        settings_to_dict(run.given),
        run.layout.rank,
        run.step,
    )
    record_start(run, source, manifest)
    run.persistence.check_space()
    tell_status(run, "running")


def _lock_folder(run: "Run", *, only_if_there: bool = False) -> None:
    """Keep other jobs off the run directory until the run is closed; collective."""
    with run.layout.together("locking run.dir"):
        if run.layout.rank == 0 and run.lock is None and (run.files.run_dir.is_dir() or not only_if_there):
            run.lock = lock_run(run.files.run_dir)
