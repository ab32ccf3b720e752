"""Random numbers of dense-to-MoE plans, the same on any machine, and wherever in a tensor one begins to read.

Counter-based generators (Philox) named by (seed, layer, what): row n of a matrix starts at a counter of its own, so a
piece of a tensor is drawn without what lies before it. NumPy rather than torch: torch's normal numbers on CPU depend on
the processor's vector instructions. Mean and standard deviation are summed in integers, whose sum knows no order.

    units = redrawn_units(generator_name(seed, layer, f"{expert}/units"), 14336, 0.5)
    row = normal_row(generator_name(seed, layer, f"{expert}/gate"), units[0], 4096)
"""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Bits that a value keeps, as a whole number of steps of the largest magnitude.
_BITS = 30


def _generator(name: str, row: int) -> np.random.Generator:
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key, counter=row << 128))


def redrawn_units(name: str, count: int, share: float) -> torch.Tensor:
    """Which of `count` intermediate units are drawn anew: floor(share * count) of them, ascending, int64."""
    # A share such as 0.29 is a little less than it looks in binary.
    chosen = _generator(name, 0).permutation(count)[: math.floor(share * count + 1e-9)]
    return torch.from_numpy(np.sort(chosen).astype(np.int64))


def normal_row(name: str, row: int, count: int) -> npt.NDArray[np.float64]:
    """Row `row` of a matrix of N(0, 1)."""
    return _generator(name, row).standard_normal(count)


class UnitSums:
    """Sums over the weights of each intermediate unit, from which mean and deviation of any set of units follow.

    Args:
        units: number of units.
        width: weights per unit.
        largest: largest magnitude of a weight.
    """

    def __init__(self, units: int, width: int, largest: float) -> None:
        self._width, self._exponent = width, math.frexp(largest)[1]
        self._sums = torch.zeros(2, units, dtype=torch.int64)

    def add(self, first: int, weights: torch.Tensor) -> None:
        """Count some weights of the units `first`, `first` + 1, ...

        Args:
            first: number of the first unit.
            weights: [units, any]; every weight is to be given once.
        """
        # Powers of two: nothing is rounded but to whole steps.
        scaled = weights.double() * 2.0**-self._exponent
        for sums, values in zip(self._sums, (scaled, scaled * scaled), strict=True):
            sums[first : first + len(weights)] += (values * 2.0**_BITS).round().long().sum(dim=1)

    def moments(self, units: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation of the weights of some units.

        Args:
            units: their numbers, int64.
        """
        count = len(units) * self._width
        total, squares = (int(n) for n in self._sums[:, units].sum(dim=1))
        mean = total / (count << _BITS)
        deviation = math.sqrt(max(0.0, squares / (count << _BITS) - mean * mean))
        return math.ldexp(mean, self._exponent), math.ldexp(deviation, self._exponent)


def draw_rows(name: str, rows: torch.Tensor, width: int, columns: slice, moments: tuple[float, float]) -> torch.Tensor:
    """Rows of a matrix of N(mean, deviation), [rows, columns] fp32.

    Args:
        name: of the generator.
        rows: numbers of the rows, int64.
        width: numbers in a whole row.
        columns: which of them are wanted.
        moments: mean and standard deviation.
    """
    found: npt.NDArray[Any] = np.empty((len(rows), len(range(*columns.indices(width)))))
    for place, row in enumerate(rows.tolist()):
        found[place] = normal_row(name, row, width)[columns]
    return torch.from_numpy((moments[0] + moments[1] * found).astype(np.float32))
