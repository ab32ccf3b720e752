"""What can happen to the files of a checkpoint: named, seeded, and applied to a copy."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from train.checkpoint.files import MANIFEST, MARKER, file_names

Corruption = Callable[[Path, Path, random.Random], str]


def copy_checkpoint(source: Path, target: Path) -> None:
    """A copy that shares the files; whoever changes one must replace it (`_own`)."""
    shutil.copytree(source, target, copy_function=os.link)


def _own(path: Path) -> Path:
    """The file itself and not one shared with the original."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def _pick(folder: Path, rng: random.Random, *ends: str) -> Path:
    return folder / rng.choice([n for n in file_names(folder) if not ends or n.endswith(ends)])


def flip_a_bit(folder: Path, other: Path, rng: random.Random) -> str:
    path = _own(_pick(folder, rng))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "is damaged: its contents are not what was written"


def cut(folder: Path, other: Path, rng: random.Random) -> str:
    path = _own(_pick(folder, rng))
    os.truncate(path, rng.randrange(path.stat().st_size))
    return "bytes instead of"


def grow(folder: Path, other: Path, rng: random.Random) -> str:
    path = _own(_pick(folder, rng))
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 99)))
    return "bytes instead of"


def lose(folder: Path, other: Path, rng: random.Random) -> str:
    _pick(folder, rng).unlink()
    return "is missing"


def add(folder: Path, other: Path, rng: random.Random) -> str:
    """A file that a start would read because it is there; others do no harm (`test_corruption.py`)."""
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / rng.choice(["config.json", "tokenizer.json"])).write_text("{}")
    return "huggingface/.* does not belong to it"


def swap_ranks(folder: Path, other: Path, rng: random.Random) -> str:
    """Two ranks' files under each other's names; of equal size, or the sizes tell."""
    a, b = rng.sample([folder / n for n in file_names(folder) if n.endswith((".distcp", ".pt"))], 2)
    x, y = a.read_bytes(), b.read_bytes()
    a.unlink(), b.unlink()
    a.write_bytes(y), b.write_bytes(x)
    return "" if x == y else "bytes instead of|is damaged"


def metadata_of_another(folder: Path, other: Path, rng: random.Random) -> str:
    (folder / "tensors" / ".metadata").unlink()
    shutil.copy(other / "tensors" / ".metadata", folder / "tensors" / ".metadata")
    return "bytes instead of|is damaged"


def shards_of_another(folder: Path, other: Path, rng: random.Random) -> str:
    """The tensors of another run or step, optimizer and all, under this manifest."""
    for name in file_names(folder):
        if name.startswith("tensors/"):
            (folder / name).unlink()
    for name in file_names(other):
        if name.startswith("tensors/"):
            shutil.copy(other / name, folder / name)
    return "bytes instead of|is damaged|is missing|does not belong"


def empty_marker(folder: Path, other: Path, rng: random.Random) -> str:
    _own(folder / MARKER).write_text(
        rng.choice(["", "{}", "null", "[]", '{"manifest_sha256": 3}', '{"manifest_sha256":'])
    )
    return f"{MARKER} is empty or damaged|{MANIFEST} is not the one that was written"


def change_the_manifest(folder: Path, other: Path, rng: random.Random) -> str:
    path = _own(folder / MANIFEST)
    values = json.loads(path.read_text())
    key = rng.choice(["step", "optimizer_step", "num_experts", "tokens"])
    path.write_text(json.dumps(values | {key: values[key] + 1}))
    return f"{MANIFEST} is not the one that was written"


def manifest_of_another(folder: Path, other: Path, rng: random.Random) -> str:
    (folder / MANIFEST).unlink()
    shutil.copy(other / MANIFEST, folder / MANIFEST)
    return f"{MANIFEST} is not the one that was written"


def lose_the_manifest(folder: Path, other: Path, rng: random.Random) -> str:
    (folder / MANIFEST).unlink()
    return f"it has no {MANIFEST}"


ALL: tuple[Corruption, ...] = (
    flip_a_bit, cut, grow, lose, add, swap_ranks, metadata_of_another, shards_of_another, empty_marker,
    change_the_manifest, manifest_of_another, lose_the_manifest,
)  # fmt: skip
