"""Publishing what no job wrote: made under a staging name, renamed when complete.

with staged(output) as staging:
    need_space(staging, size, ..., output=output)
    ...                                   # write tensors/ into it
    carry_over_files(source, manifest.files, staging)
    seal_alone(staging, manifest)
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.errors import CheckpointError, LaunchError
from train.checkpoint.files import digests, file_names, refuse_inside, seal
from train.checkpoint.folder import Manifest
from train.run_lock import Held, hold


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write in; takes that name at the end, or is gone if the block raises.

    Args:
        output: must not exist, or be empty, and lie in no checkpoint.

    Raises:
        CheckpointError: if there is something already, or the disk fails.
        LaunchError: if another command is writing the same.
    """
    output = output.absolute()
    _refuse_used(output)
    refuse_inside("--output", output)
    staging = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _alone(output):
            # Another command may have ended just now.
            _refuse_used(output)
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(mode=0o700)
                yield staging
                if output.exists():
                    output.rmdir()
                staging.rename(output)
            except BaseException:
                # A full disk needs the room.
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except OSError as e:
        raise CheckpointError(
            f"--output {output} cannot be written ({e.strerror or e}): choose another folder"
        ) from None


def _refuse_used(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output {output} exists and is not empty: choose another folder")


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other commands off what is written as `output`."""
    path = output.with_name(f".{output.name}.lock")
    try:
        lock = hold(path)
    except Held as e:
        raise LaunchError(
            f"--output {output} is being written by {e}: wait for it, stop it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        # While it is held, so that nobody takes it for one that keeps others off.
        path.unlink(missing_ok=True)
        if lock is not None:
            lock.close()


def carry_over_files(
    source: Path, files: Mapping[str, Sequence[Any]], staging: Path, *, but: Collection[str] = ()
) -> None:
    """Copy what a checkpoint holds beside its tensors: generator states, and whatever else was put there.

    Args:
        source: the checkpoint.
        files: from its manifest; they must be those that were written.
        staging: of the new one.
        but: what is left behind.

    Raises:
        CheckpointError: if one is damaged.
    """
    names = [name for name in files if not name.startswith("tensors/") and name not in but]
    for name, told in digests(source, names).items():
        if told != files[name]:
            raise CheckpointError(f"checkpoint {source}: {name} is damaged: use an older checkpoint")
    (staging / "rng").mkdir()
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, staging / name)


def seal_alone(staging: Path, manifest: Manifest) -> None:
    """Seal a checkpoint that one process has written: it takes the digest of every file itself.

    Args:
        staging: of the new checkpoint, with all of its files.
        manifest: of the new checkpoint.
    """
    seal(staging, manifest, digests(staging, file_names(staging), flush=True))
