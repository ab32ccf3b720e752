"""Drop-Upcycling (arXiv 2502.19261): a share of every expert's intermediate units is drawn anew, a piece at a time.

The same units in all matrices of an expert: rows of gate and up, columns of down. Each matrix draws from the normal
distribution with the mean and the standard deviation of what is replaced in it.
"""

from collections.abc import Iterable

import torch

from parallel.regions import Box
from parallel.stream_files import StoredTensors, pieces
from upcycle.dense_draw import UnitSums, draw_rows, redrawn_units
from upcycle.dense_keys import Place, changed_source
from upcycle.slices import DenseOrigin, generator_name


class Redraw:
    """What is drawn anew in the experts of a model.

    Args:
        stored: the dense checkpoint.
        origin: how experts are made of it.
        seed: root seed of the run.
        width: hidden size.
    """

    def __init__(self, stored: StoredTensors, origin: DenseOrigin, seed: int, width: int) -> None:
        self._stored, self._origin, self._seed, self._width = stored, origin, seed, width
        self._moments: dict[tuple[int, str], UnitSums] = {}
        self._units: dict[tuple[int, int], torch.Tensor] = {}

    def units(self, layer: int, expert: int) -> torch.Tensor:
        """The intermediate units of an expert that are drawn anew, ascending; none but under `drop`."""
        if (layer, expert) not in self._units:
            name = generator_name(self._seed, layer, f"{expert}/units")
            self._units[layer, expert] = redrawn_units(name, self._origin.ffn_hidden_size, self._origin.redraw_share)
        return self._units[layer, expert]

    def moments(self, layer: int, expert: int, matrix: str) -> tuple[float, float]:
        """Mean and standard deviation of what is replaced in one matrix of an expert."""
        return self._moments[layer, matrix].moments(self.units(layer, expert))

    def apply(self, layer: int, expert: int, matrix: str, box: Box, part: torch.Tensor) -> None:
        """Draw anew what a box of a dense matrix holds of an expert's units, in place.

        Rows are drawn whole as they lie in the tensor: of gate and up a unit, of down the redrawn units of one output.
        """
        units, moments = self.units(layer, expert), self.moments(layer, expert, matrix)
        name = generator_name(self._seed, layer, f"{expert}/{matrix}")
        (row, column), (rows, columns) = box
        if matrix == "down":
            inside = torch.nonzero((units >= column) & (units < column + columns)).flatten()
            if len(inside):
                picked = slice(int(inside[0]), int(inside[-1]) + 1)
                drawn = draw_rows(name, torch.arange(row, row + rows), len(units), picked, moments)
                part[:, units[picked] - column] = drawn.to(part.dtype)
            return
        row %= self._origin.ffn_hidden_size
        mine = units[(units >= row) & (units < row + rows)]
        width = self._width
        part[mine - row] = draw_rows(name, mine, width, slice(column, column + columns), moments).to(part.dtype)

    def measure(self, layers: Iterable[int], chunk_bytes: int) -> None:
        """Sum up the weights of every unit of some layers' feed-forwards; before anything is drawn in them."""
        for layer in layers:
            for module in ("fc1", "fc2"):
                place = Place(layer, module, "weight")
                weight = f"decoder.layers.{layer - 1}.mlp.linear_{module}.weight"
                key = changed_source(self._stored, self._origin, weight, place)
                shape = self._stored.tensors[key].shape
                boxes = list(pieces(shape, torch.float64.itemsize, chunk_bytes))
                largest = max(float(self._stored.read(key, box).abs().max()) for box in boxes)
                matrices = ("down",) if module == "fc2" else tuple(m for m in self._origin.matrices if m != "down")
                units, width = self._origin.ffn_hidden_size, self._width
                for matrix in matrices:
                    self._moments[layer, matrix] = UnitSums(units, width, largest)
                for box in boxes:
                    part = self._stored.read(key, box)
                    if module == "fc2":
                        self._moments[layer, "down"].add(box.offset[1], part.T)
                        continue
                    for index, matrix in enumerate(matrices):
                        begin = max(box.offset[0], index * units)
                        stop = min(box.offset[0] + box.shape[0], (index + 1) * units)
                        if begin < stop:
                            rows = part[begin - box.offset[0] : stop - box.offset[0]]
                            self._moments[layer, matrix].add(begin - index * units, rows)
