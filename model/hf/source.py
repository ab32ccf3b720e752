"""A published model on disk: its config.json, and slices of its safetensors. Nothing in it is run, nothing is unpickled.

How to use:

    source = PublishedModel(Path("Mixtral-8x7B-v0.1"))
    rows = source.read("model.embed_tokens.weight", (100, 0), (8, 4096))
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from parallel.errors import CheckpointError, ConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What belongs to a model besides its weights: carried over from an import to an export.
_CARRIED = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.json",
    "chat_template.jinja", "preprocessor_config.json",
)  # fmt: skip
# Files whose digest says which tokens a model knows.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OPEN_FILES = 16


class PublishedTensor(NamedTuple):
    """A tensor in a folder: its extent, type, and the file it lies in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


def all_finite(block: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    # The sum takes a fraction of the time and nearly always tells; large numbers may be too much for it.
    return bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read ({e}): use a complete folder of a published model") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object: use a complete folder of a published model")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a published model.

    Raises:
        ConfigError: if there is no such folder.
        CheckpointError: if it has no readable config.json.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder: download the model first (huggingface-cli download NAME --local-dir DIR) and name DIR"
        )
    return read_json(folder / CONFIG)


def carry_over(folder: Path, target: Path) -> list[str]:
    """Copy config.json, tokenizer files and the like; gives the names of what was there."""
    target.mkdir(parents=True, exist_ok=True)
    found = [name for name in _CARRIED if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, target / name)
    return found


class PublishedModel:
    """The tensors of a folder.

    Args:
        folder: with config.json and safetensors.

    Attributes:
        config: config.json.
        tensors: name -> what is there.

    Raises:
        ConfigError: if it is no folder, or its weights are quantised.
        CheckpointError: if a file is missing or cannot be read, or there are no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read_config(folder)
        self._open: dict[str, Any] = {}
        self.tensors: dict[str, PublishedTensor] = {}
        told = self._files()
        for file in sorted(set(told.values())) if told else [SINGLE]:
            self._look_into(file)
        for name, file in told.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise CheckpointError(f"{folder / file} lacks {name}, which {INDEX} says it holds: download it again")

    def _files(self) -> dict[str, str]:
        """Name -> file as the index says; empty where one file holds all."""
        if (self.folder / INDEX).is_file():
            told = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(told, dict) or not told or not all(isinstance(file, str) for file in told.values()):
                raise CheckpointError(f"{self.folder / INDEX} has no weight_map: download it again")
            for file in sorted(set(told.values())):
                # A name is a name: never a way out of the folder.
                if Path(file).name != file or not (self.folder / file).is_file():
                    raise CheckpointError(f"{self.folder / file} is missing, which {INDEX} names: download it again")
            return told
        if (self.folder / SINGLE).is_file():
            return {}
        pickled = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise CheckpointError(
                f"{self.folder} has its weights as pickles ({pickled[0]}), which may run code and are not read: take a "
                "version with safetensors, or convert it where you trust it (transformers: from_pretrained, then "
                "save_pretrained)"
            )
        raise CheckpointError(f"{self.folder} has neither {INDEX} nor {SINGLE}: use a complete folder")

    def _look_into(self, file: str) -> None:
        try:
            opened = self._file(file)
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ConfigError(
                        f"{name} in {self.folder / file} is of type {part.get_dtype()}: only {', '.join(DTYPES)} can be "
                        "trained; take an unquantised version of the model"
                    )
                if name in self.tensors:
                    raise CheckpointError(f"{name} is in both {self.tensors[name].file} and {file} of {self.folder}")
                self.tensors[name] = PublishedTensor(tuple(part.get_shape()), dtype, file)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{self.folder / file} cannot be read ({e}): download it again") from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.clear()
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A block of a tensor; nothing else of it is read.

        Raises:
            CheckpointError: if the file cannot be read, or holds numbers that are not finite.
        """
        file = self.tensors[name].file
        try:
            part = self._file(file).get_slice(name)
            block: torch.Tensor = part[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{self.folder / file} cannot be read ({e}): download it again") from None
        if not all_finite(block):
            raise CheckpointError(
                f"{name} in {self.folder / file} has numbers that are infinite or NaN, with which nothing can be trained: "
                "download it again, or take another version"
            )
        return block

    def main_dtype(self) -> torch.dtype:
        """The type of most of its bytes."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        return max(sizes, key=lambda dtype: sizes[dtype])
