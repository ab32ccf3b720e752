"""One checkpoint on its way to the disk: planned by all ranks, written by each in a thread, published by all together.

The state is copied to host memory first, so training goes on while it is written; a rank holds its share of one
checkpoint twice for as long. Saves do not overlap.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.compat import save_without_crc
from parallel.errors import CheckpointError
from parallel.sharded_save import SaveInProgress
from train import random_state
from train.checkpoint.folder import CheckpointFolder, Manifest


class SaveTask:
    """A save between its plan and its publication.

    Args:
        folder: of the run's checkpoints.
        name: of this one.
        manifest: what it says about itself.
        save: of the tensors.
        generators: their states (`random_state.capture`), which belong to the moment of the plan.
    """

    def __init__(
        self, folder: CheckpointFolder, name: str, manifest: Manifest, save: SaveInProgress, generators: dict[str, Any]
    ) -> None:
        self.folder, self.name, self.manifest = folder, name, manifest
        self._save, self._generators = save, generators
        self._files: Mapping[str, Sequence[Any]] = {}
        self._failure: CheckpointError | None = None
        self._thread: threading.Thread | None = None
        self._began = time.perf_counter()

    def run(self) -> None:
        """Write this rank's files and read them back; in any thread. A failure is kept for `finish`."""
        save_without_crc()
        self._save.write()
        try:
            random_state.save(self.folder.staging(self.name) / "rng", self.folder.layout.rank, self._generators)
            self._files = self.folder.read_back(self.name)
        except CheckpointError as e:
            self._failure = e

    def start(self) -> None:
        """The same in the background."""
        # A rank that fails elsewhere must not wait for its disk to end.
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this rank has written."""
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> tuple[Path, float]:
        """Wait for all ranks and publish; collective.

        Returns:
            The folder, and the seconds since the save began.

        Raises:
            CheckpointError: on all ranks, if any could not write; nothing is published then.
        """
        self.wait()
        self._save.finish()
        with self.folder.layout.together("writing a checkpoint"):
            if self._failure is not None:
                raise self._failure
        return self.folder.publish(self.name, self.manifest, self._files), time.perf_counter() - self._began
