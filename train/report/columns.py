"""The metrics of a run as columns of numbers, read in blocks: a long run's lines would not fit as Python objects.

Shape suffix: S recorded steps.

Usage: `steps_S, columns = load_columns(RunFiles(run_dir))`
"""

import itertools
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from parallel.errors import DataError
from train.run_files import RunFiles, numbered_records

Floats = npt.NDArray[np.float64]

# Parameter groups whose norms a run may record, in the order of the model; on some steps only.
NORM_GROUPS = ("embedding", "attention", "router", "experts", "shared_experts", "dense_mlp", "norms", "output")
METRICS = (
    "tokens",
    "lm_loss",
    "grad_norm",
    "learning_rate",
    "step_seconds",
    "tokens_per_second",
    "data_seconds",
    "forward_backward_seconds",
    "all_to_all_seconds",
    "optimizer_seconds",
    "memory_bytes",
    "tflops_per_device",
    "mfu",
    "step_flops",
    "expert_load_max",
    "expert_load_min",
    "expert_load_entropy",
    "expert_load_p10",
    "expert_load_p50",
    "expert_load_p90",
    "router_entropy",
    "bias_min",
    "bias_max",
    "dead_experts",
    *(f"{kind}_norm_{group}" for kind in ("grad", "param") for group in NORM_GROUPS),
)


def load_columns(files: RunFiles) -> tuple[Floats, dict[str, Floats]]:
    """The metrics as columns, sorted by step, each step once (the last line wins), null and absent as NaN.

    Returns:
        The steps, and a column for `stage`, `num_experts` and each of METRICS.

    Raises:
        DataError: no line yet, or naming file:line, a value that is not a number.
    """
    keys = ("step", "stage", "num_experts", *METRICS)
    blocks: list[Floats] = []
    # In blocks: a long run's metrics as Python numbers would take ten times their size as an array.
    records = numbered_records(files.metrics)
    while block := list(itertools.islice(records, 10_000)):
        try:
            blocks.append(_table([record for _, record in block], keys))
        except (TypeError, ValueError):
            raise _bad_metric(files, block, keys) from None
        if not np.isfinite(blocks[-1][:, 0]).all():
            raise _bad_metric(files, block, keys)
    if not blocks:
        raise DataError(f"{files.metrics}: empty: the run has not finished its first step, so there is nothing to show")
    table = np.concatenate(blocks)
    # The sort is stable: of several lines with one step the last written stands.
    table = table[np.argsort(table[:, 0], kind="stable")]
    table = table[np.append(table[1:, 0] != table[:-1, 0], True)]
    columns = {key: np.ascontiguousarray(table[:, i]) for i, key in enumerate(keys)}
    return columns.pop("step"), columns


def _table(records: list[dict[str, Any]], keys: tuple[str, ...]) -> Floats:
    """The values of these keys, a row per record. Records with the same keys, nearly all of a run, are read together."""
    table = np.full((len(records), len(keys)), np.nan)
    alike: dict[tuple[str, ...], list[int]] = {}
    for row, record in enumerate(records):
        alike.setdefault(tuple(record), []).append(row)
    for present, rows in alike.items():
        columns = [i for i, key in enumerate(keys) if key in present]
        if columns:
            # The first key twice: for a single one, itemgetter would not give a tuple.
            read = itemgetter(keys[columns[0]], *(keys[i] for i in columns))
            values = np.array([read(records[row]) for row in rows], dtype=np.float64)
            table[np.ix_(rows, columns)] = values[:, 1:]
    return table


def step_parts(columns: dict[str, Floats]) -> dict[str, Floats]:
    """Seconds of each part of every step, which add up to `step_seconds`; nothing for a run that timed no part.

    Steps without times are NaN in every part. The exchange of tokens between experts is part of the forward and the
    backward pass, and is taken out of it where it was timed by itself.
    """
    step = columns["step_seconds"]
    recorded = {
        "data": columns["data_seconds"],
        "forward, backward": columns["forward_backward_seconds"],
        "all-to-all": columns["all_to_all_seconds"],
        "optimizer": columns["optimizer_seconds"],
    }
    timed = np.isfinite(step) & np.any([np.isfinite(part) for part in recorded.values()], axis=0)
    if not timed.any():
        return {}
    parts = {
        name: np.where(timed, np.nan_to_num(part), np.nan) for name, part in recorded.items() if np.isfinite(part).any()
    }
    if "all-to-all" in parts and "forward, backward" in parts:
        parts["forward, backward"] = np.maximum(0.0, parts["forward, backward"] - parts["all-to-all"])
    # Clocks that overlap by a rounding must not make a negative rest.
    parts["other"] = np.maximum(0.0, step - sum(parts.values()))
    return parts


def _bad_metric(files: RunFiles, block: list[tuple[int, dict[str, Any]]], keys: tuple[str, ...]) -> DataError:
    """The error for the first value of a block that is not a number, or the first line without a step."""
    for line, record in block:
        for key in keys:
            value = record.get(key)
            if not isinstance(value, int | float) and not (value is None and key != "step"):
                return DataError(f"{files.metrics}:{line}: {key}={value!r} is not a number: remove this line")
    return DataError(f"{files.metrics}: holds a value that is not a number")
