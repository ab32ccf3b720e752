"""TensorBoard: event files under the run directory, one history whatever was trained twice."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.tracking.queue import Position

FOLDER = "tensorboard"
_FLUSH_SECONDS = 10
# A plan of a large model is longer than anybody reads on a page.
_TEXT_BYTES = 1 << 16
# TensorBoard's number for red, green, blue and opacity.
_RGBA = 4


class TensorboardSink:
    """Event files of one run.

    Args:
        run_dir: files go to run_dir/tensorboard.
        step: that the run goes on from; what an earlier job wrote of later ones is not shown any more.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._folder = run_dir / FOLDER
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that starts anew makes its first evaluation again, which may be of step 0.
        first = step + 1 if step else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=first, flush_secs=_FLUSH_SECONDS)

    def numbers(self, at: Position, values: Mapping[str, float]) -> None:
        """Write figures of a step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add([Summary.Value(tag=name, simple_value=value) for name, value in values.items()], at.step)

    def _add(self, values: list[Any], step: int) -> None:
        """Write all in one event: `add_scalar` per figure takes twenty times as long, in which the step waits for Python."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def summary(self, at: Position, values: Mapping[str, Any]) -> None:
        """Write values as a table among the texts."""
        group = next(iter(values)).rpartition("/")[0]
        rows = "\n".join(f"| {name.rpartition('/')[2]} | {value} |" for name, value in values.items())
        self._writer.add_text(group, f"| | |\n|---|---|\n{rows}", at.step)

    def picture(self, at: Position, name: str, png: bytes) -> None:
        """Write a picture of a step, as it is."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        # A PNG file begins with 16 bytes that are always the same, its width and its height.
        width, height = struct.unpack_from(">II", png, 16)
        image = Summary.Image(width=width, height=height, colorspace=_RGBA, encoded_image_string=png)
        self._add([Summary.Value(tag=name, image=image)], at.step)

    def keep(self, at: Position, path: Path, kind: str) -> None:
        """Write a file as text, or where it lies if it is long."""
        short = path.stat().st_size <= _TEXT_BYTES
        self._writer.add_text(kind, f"```\n{path.read_text()}\n```" if short else f"`{path}`", at.step)

    def go_back(self, step: int) -> None:
        """Take back what was written of later steps."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()
