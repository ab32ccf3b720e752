"""Checkpoints on disk: where they lie, what makes one complete, which one to resume from, which ones to keep.

    RUN_DIR/checkpoints/step-00000100/            after step 100 (the last of a stage if an expansion follows)
    RUN_DIR/checkpoints/step-00000100-stage1/     the same step, expanded into stage 1
        tensors/        torch_dist: weights, masters, moments (any layout can read it)
        rng/            generator states per rank (read on the same layout only)
        manifest.json   everything that is not a tensor, and the size and digest of every file
        complete.json   the digest of the manifest; written last, removed first: its presence means complete

A checkpoint is written under a name ending in `.partial` and renamed when complete. A failed save never touches an older
one. One run at a time may use the folder.
"""

import contextlib
import json
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError
from parallel.layout import Layout
from train.checkpoint.files import (
    MANIFEST,
    MARKER,
    broken_seal,
    digests,
    file_names,
    is_sealed,
    place_of,
    seal,
    written_by,
)
from train.schema.checkpoint import CheckpointConfig

FORMAT = 4


class DamagedCheckpoint(CheckpointError):
    """The files are not those that were written.

    Attributes:
        problem: what is wrong, without the name of the checkpoint and the remedy.
    """

    def __init__(self, message: str, problem: str = "") -> None:
        super().__init__(message)
        self.problem = problem or message


@dataclass
class Manifest:
    """What a checkpoint says about itself."""

    step: int
    stage: int
    num_experts: int
    # Adam's step count.
    optimizer_step: int
    # What the network looks like, apart from the number of experts (`model_identity`).
    model: dict[str, Any]
    vocab_size: int
    layout: dict[str, int]
    # Layout-free numbers of every tensor; verified after each load.
    fingerprints: dict[str, list[int]]
    # Checkpoint keys that run over experts.
    experts: dict[str, dict[str, Any]]
    # Samples consumed; blends of the training stream and the seed of its shuffles (`train/data/sample_order.py`); tokenizer.
    data: dict[str, Any]
    scheduler: dict[str, Any]
    # Plans of all expansions so far, oldest first.
    plans: list[dict[str, Any]] = field(default_factory=list)
    # The rules of each of them and where it came from (`upcycle.course.Entry`), in the same order.
    stages: list[dict[str, Any]] = field(default_factory=list)
    # What the guard of the last expansion has seen (`train/guard.py`).
    guard: dict[str, Any] | None = None
    # What the last steps were like (`train/health.py`).
    health: dict[str, Any] = field(default_factory=dict)
    # Stretches of the training stream that are left out: first sample, number of samples.
    skipped_data: list[list[int]] = field(default_factory=list)
    # An evaluation was due at this step, and a request to stop broke it off.
    owes_evaluation: bool = False
    # Checkpoint of another run that this run began with.
    started_from: str | None = None
    # Checkpoint that was last continued with fresh moments.
    model_only: str | None = None
    # The published model that it was imported from; it has weights alone then, and no moments by design.
    imported: dict[str, str] | None = None
    # Step from which the schedule counts.
    schedule_begins: int = 0
    # The configuration of the run that wrote it.
    config: dict[str, Any] = field(default_factory=dict)
    # Every other file: size in bytes and SHA-256 (`train/checkpoint/files.py`).
    files: dict[str, list[Any]] = field(default_factory=dict)
    # When optimizer state that is younger than Adam's step count began (`parallel/optimizer_ages.py`).
    ages: dict[str, Any] = field(default_factory=dict)
    tracker_id: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    format: int = FORMAT


def _format(file: Path) -> Any:
    """The format that a manifest names, whatever else is wrong with it; None if it names none."""
    try:
        return json.loads(file.read_text()).get("format")
    except (OSError, ValueError, AttributeError):
        return None


def checkpoint_name(step: int, stage: int, expanded: bool) -> str:
    """Folder name of a checkpoint; `expanded` marks the one an expansion has just made."""
    return f"step-{step:08d}" + (f"-stage{stage}" if expanded else "")


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; of one step, the expanded one is newer."""
    return [path for path in _named(run_dir) if is_sealed(path)]


def unsealed(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's final name and are not complete, oldest first."""
    return [path for path in _named(run_dir) if not is_sealed(path)]


def _named(run_dir: Path) -> list[Path]:
    root = run_dir / "checkpoints"
    found = {path: place_of(path) for path in (root.iterdir() if root.is_dir() else ())}
    return sorted((path for path, place in found.items() if place is not None), key=lambda path: (found[path], path))


def step_of(checkpoint: Path) -> int:
    """Step of one of the checkpoints that `list_checkpoints` gives."""
    place = place_of(checkpoint)
    assert place is not None
    return place[0]


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, unreadable or of an unknown format; a `DamagedCheckpoint` if it is not what was
            written.
    """
    file = path / MANIFEST
    problem = broken_seal(path)
    if problem is not None and _format(file) in (None, FORMAT):
        raise DamagedCheckpoint(f"checkpoint {path}: {problem}: use an older checkpoint", problem)
    values = json.loads(file.read_text())
    if values.get("format") != FORMAT:
        writer = values.get("versions", {}).get("coppice", "of an unknown version")
        raise CheckpointError(
            f"{file} has format {values.get('format')}, written by coppice {writer}; this version reads format {FORMAT}: "
            "go on with the coppice that wrote it, or start anew in another run.dir"
        )
    return Manifest(**values)


def belongs_to(run_dir: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint lies in the folder of a run, by whatever name either was given."""
    return checkpoint.resolve().parent.parent == run_dir.resolve()


def resolve(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from: newest of the run for `auto`, None for a fresh start, or a given path.

    Args:
        run_dir: folder of the run.
        resume: `auto`, `never`, or the path of a checkpoint or of a run.

    Raises:
        CheckpointError: if a path holds none, or `never` meets a run directory in use.
    """
    own = list_checkpoints(run_dir)
    if resume == "auto":
        return own[-1] if own else None
    if resume == "never":
        if own or (run_dir / "metrics.jsonl").exists():
            raise CheckpointError(
                f"run.resume=never, but run.dir={run_dir} holds a run{f' up to {own[-1].name}' if own else ''}: choose "
                "another run.dir, move that folder, or use run.resume=auto"
            )
        return None
    path = Path(resume)
    if is_sealed(path):
        # By whatever name it was given, a checkpoint of this run is one of its own.
        return next((mine for mine in own if mine.samefile(path)), path)
    theirs = own if own and path.is_dir() and path.samefile(run_dir) else list_checkpoints(path)
    if not theirs:
        raise CheckpointError(
            f"run.resume={resume} is neither auto, never, a complete checkpoint, nor a run directory with one"
        )
    return theirs[-1]


def need_space(folder: Path, needed_bytes: int, what: str, *, output: Path | None = None) -> None:
    """Refuse to start writing what will not fit.

    Args:
        folder: on the disk.
        needed_bytes: of what is to be written.
        what: it is.
        output: as given to a command; None for what a run writes.

    Raises:
        CheckpointError: naming the folder, what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        # A lower keep_last alone frees nothing before the next save is there.
        where = f"run.dir={folder}"
        remedy = (
            "free space (folders of older checkpoints may be removed), or choose another run.dir; with a lower "
            "checkpoint.keep_last less is kept from the next save on"
        )
        if output is not None:
            where, remedy = f"--output {output}", "free space, or choose another folder"
        raise CheckpointError(
            f"{where}: {what} needs {needed_bytes / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are free: {remedy}"
        )


class CheckpointFolder:
    """Reserve, publish and retire checkpoints of one run. Every method is called by all ranks."""

    def __init__(self, run_dir: Path, layout: Layout, config: CheckpointConfig) -> None:
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.layout = layout
        self.config = config

    def staging(self, name: str) -> Path:
        """Where a checkpoint lies until it is published."""
        return self.root / f"{name}.partial"

    def reserve(self, name: str, needed_bytes: int) -> Path:
        """Make the staging folder of a checkpoint, if there is room for it.

        Args:
            name: folder name.
            needed_bytes: estimate, checked before anything is written.

        Raises:
            CheckpointError: if there is no room or the disk fails.
        """
        staging = self.staging(name)
        with self.layout.together("preparing a checkpoint"):
            if self.layout.rank == 0:
                self._prepare(staging, needed_bytes, name)
        return staging

    def read_back(self, name: str, known: Mapping[str, list[Any]] | None = None) -> dict[str, list[Any]]:
        """Sizes and digests of the files that this rank has written, which are on the disk then; no collectives.

        Args:
            name: folder name.
            known: those of some of them, which are not read again.

        Raises:
            CheckpointError: if one cannot be read, or not be flushed.
        """
        known = known or {}
        return {**known, **self._digests(name, [file for file in self._mine(name) if file not in known])}

    @contextlib.contextmanager
    def reading_back(self, name: str) -> Iterator[Callable[[], dict[str, list[Any]]]]:
        """A block in whose background this rank's files of before it are flushed and digested; it may read them.

        Yields:
            What waits for that, and gives what `read_back` does of all files of this rank; it raises alike.
        """
        early = self._mine(name)
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(self._digests, name, early)
            yield lambda: self.read_back(name, found.result())

    def _mine(self, name: str) -> list[str]:
        return written_by(file_names(self.staging(name)), self.layout.rank)

    def _digests(self, name: str, files: Sequence[str]) -> dict[str, list[Any]]:
        try:
            return digests(self.staging(name), files, flush=True)
        except OSError as e:
            raise CheckpointError(f"checkpoint {name} could not be read back: {e.strerror or e}") from e

    def publish(self, name: str, manifest: Manifest, mine: Mapping[str, Sequence[Any]]) -> Path:
        """Seal a checkpoint that all ranks have written, and give it its name.

        Args:
            name: folder name.
            manifest: what it says about itself; equal on all ranks.
            mine: what `read_back` found on this rank; rank 0 adds what was written since.

        Raises:
            CheckpointError: if the disk fails; older checkpoints are untouched.
        """
        staging, final = self.staging(name), self.root / name
        files = {key: value for theirs in self.layout.gather_objects(dict(mine)) for key, value in theirs.items()}
        with self.layout.together("publishing a checkpoint"):
            if self.layout.rank == 0:
                files |= self._digests(name, [n for n in file_names(staging) if n not in files])
                self._publish(staging, final, manifest, files)
        return final

    def _prepare(self, staging: Path, needed_bytes: int, name: str) -> None:
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.rmtree(staging, ignore_errors=True)
            need_space(self.root, needed_bytes, f"checkpoint {name}")
            (staging / "tensors").mkdir(parents=True)
            (staging / "rng").mkdir()
        except OSError as e:
            raise CheckpointError(f"run.dir={self.run_dir} cannot be written ({e.strerror}): choose another") from e

    def _publish(self, staging: Path, final: Path, manifest: Manifest, files: dict[str, list[Any]]) -> None:
        try:
            _deny_others(staging)
            seal(staging, manifest, dict(sorted(files.items())))
            if final.exists():
                # A run continued with fresh moments, or without a manifest, writes the same step twice.
                final.rename(free_name(final, "superseded"))
            staging.rename(final)
        except OSError as e:
            raise CheckpointError(f"checkpoint {final} could not be published: {e.strerror or e}") from e

    def discard(self, name: str) -> None:
        """Remove what a failed save has left under its staging name; collective."""
        with self.layout.together("removing what a failed save has left"):
            if self.layout.rank == 0:
                shutil.rmtree(self.staging(name), ignore_errors=True)

    def set_aside_after(self, start: Path) -> list[str]:
        """Rename checkpoints of this run that are newer than the one it starts from, so that `auto` never goes there.

        Called on rank 0, when a run goes back to an older checkpoint of its own. Nothing is removed.

        Returns:
            Names of what was set aside.
        """
        own = list_checkpoints(self.run_dir)
        newer = own[own.index(start) + 1 :] if start in own else []
        # The newest first: a kill in between leaves no newer one behind.
        for path in reversed(newer):
            path.rename(free_name(path, "superseded"))
        return [path.name for path in newer]

    def retire(self, kept_steps: set[int]) -> dict[str, str]:
        """Remove ordinary checkpoints beyond `keep_last`; those of `kept_steps` (around expansions) and every
        `keep_every_steps` stay.

        Returns:
            Names of what could not be removed, with the reason; each is tried again after the next save.
        """
        stuck = {}
        with self.layout.together("removing old checkpoints"):
            if self.layout.rank == 0 and self.config.keep_last is not None:
                steps = {path: step_of(path) for path in list_checkpoints(self.run_dir)}
                every = self.config.keep_every_steps
                ordinary = [p for p, s in steps.items() if s not in kept_steps and not (every and s % every == 0)]
                for path in ordinary[: -self.config.keep_last]:
                    # Without its marker it is no checkpoint any more; what a network file system holds on to may stay.
                    try:
                        (path / MARKER).unlink()
                    except OSError as e:
                        stuck[path.name] = e.strerror or str(e)
                        continue
                    shutil.rmtree(path, ignore_errors=True)
        return dict(self.layout.from_rank_zero(stuck))


def _deny_others(folder: Path) -> None:
    """Keep what the ranks have written from being written to by everybody, whatever their umask."""
    files = [folder / name for name in file_names(folder)]
    for path in {folder, *(file.parent for file in files), *files}:
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH:
            path.chmod(stat.S_IMODE(mode) & ~stat.S_IWOTH)


def free_name(path: Path, mark: str) -> Path:
    """The first of `NAME.mark-1`, `NAME.mark-2`, ... beside a path that does not exist yet."""
    number = 1
    while (free := path.with_name(f"{path.name}.{mark}-{number}")).exists():
        number += 1
    return free


def folder_bytes(path: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum((path / name).stat().st_size for name in (*file_names(path), MANIFEST, MARKER))
