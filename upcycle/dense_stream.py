"""Makes a checkpoint of experts out of a dense one on disk, in bounded memory: the executor of `upcycle/dense.py`'s plans.

Everything outside the feed-forwards is carried over bit for bit; norms before a layer that gets experts change their key,
because mcore names them differently there. Experts are read shard by shard from where the dense matrices lie. Where a
matrix is scaled or partly drawn anew that is done to its fp32 master, and the weight is the master rounded, so that the
two agree; a checkpoint without masters is changed in its weights.

    with opened_dense(checkpoint / "tensors", plan) as dense:
        found = dense.write(output / "tensors", chunk_bytes=64 << 20)
        verify_from_dense(manifest.fingerprints, found, dense, ...)      # upcycle/dense_verify.py

Shapes: M experts, G shards, F units of the dense feed-forward, f = F / G of an expert, H hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.config import ModelConfig
from model.fingerprint import Fingerprints
from model.sharded_state import MASTER_PREFIX, OPTIMIZER_PREFIX, parameter_of
from parallel.errors import ExpansionError
from parallel.optimizer_state import MOMENTS
from parallel.regions import Box
from parallel.sharded_load import require_complete
from parallel.stream_files import StoredTensor, StoredTensors
from upcycle.dense_draw import draw_rows
from upcycle.dense_keys import Place, changed_source, factor_of, moe_key, place_of, scaled, unit_axis
from upcycle.dense_redraw import Redraw
from upcycle.plan import ExpansionPlan
from upcycle.slices import generator_name
from upcycle.stream import NewTensor, quiet, write_tensors


class _Made(NamedTuple):
    """A tensor of the new checkpoint and how a box of it is made."""

    new: NewTensor
    part: Callable[[Box], torch.Tensor]


@contextlib.contextmanager
def opened_dense(source: Path, plan: ExpansionPlan, model: ModelConfig) -> Iterator["DenseCheckpoint"]:
    """A dense checkpoint, with what a plan makes of it.

    Args:
        source: tensors, as `model.sharded_state.save_tensors` wrote them; with or without optimizer state.
        plan: made by `upcycle.dense.plan_from_dense`.
        model: the network that shall come out.

    Raises:
        ExpansionError: if checkpoint and plan do not fit.
        CheckpointError: if the source is not complete, or cannot be read.
    """
    require_complete(source)
    with StoredTensors(source) as stored:
        yield DenseCheckpoint(stored, plan, model, source)


class DenseCheckpoint:
    """A dense checkpoint and the plan that makes experts of it; made by `opened_dense`.

    Attributes:
        stored: its tensors.
        plan: the plan.
        origin: how, from the plan.
        where: its folder, for messages.
        redraw: what is drawn anew under `drop`; measured once the checkpoint has been written.
        experts: keys of the new checkpoint that run over experts (`model.sharded_state.expert_keys`).
    """

    def __init__(self, stored: StoredTensors, plan: ExpansionPlan, model: ModelConfig, where: Path) -> None:
        assert plan.dense is not None, "the plan is not one that starts from a dense model"
        self.stored, self.plan, self.origin, self.where = stored, plan, plan.dense, where
        self._model, self._chunk_bytes = model, 1 << 20
        self._layers = {layer.layer for layer in plan.layers}
        self.redraw = Redraw(stored, plan.dense, plan.seed, model.hidden_size)
        self.experts: dict[str, dict[str, Any]] = {}
        self._made = {key: made for layer in plan.layers for key, made in self._new_rows(layer.layer).items()}
        for key, tensor in stored.tensors.items():
            name, made = self._converted(key, tensor)
            self._made[name] = made
        self.experts = dict(sorted(self.experts.items()))

    @property
    def nbytes(self) -> int:
        """Size of the new checkpoint's tensors."""
        return sum(made.new.tensor.nbytes for made in self._made.values())

    @property
    def has_moments(self) -> bool:
        """Whether the checkpoint has optimizer state."""
        return any(key.startswith(f"{OPTIMIZER_PREFIX}{MOMENTS[0]}.") for key in self.stored.tensors)

    def write(self, target: Path, *, chunk_bytes: int, say: Callable[[str], None] = quiet) -> Fingerprints:
        """Write the tensors of the new checkpoint.

        Args:
            target: folder for them; made, or empty. Gone again if this raises.
            chunk_bytes: size of what is read, changed and written at once.
            say: told of progress.

        Returns:
            The fingerprints of what was written, as `model.fingerprint.take_fingerprints` gives them once it is loaded.

        Raises:
            CheckpointError: if the source cannot be read, or the target not be written.
        """
        if self.origin.method == "drop":
            say(f"measuring the feed-forwards of {self.where}")
            self.redraw.measure(sorted(self._layers), chunk_bytes)
        self._chunk_bytes = chunk_bytes
        new = {key: made.new for key, made in self._made.items()}
        return write_tensors(target, new, lambda key, box: self._made[key].part(box), chunk_bytes=chunk_bytes, say=say)

    # ---- what becomes of each tensor --------------------------------------------------------------------------------

    def _converted(self, key: str, tensor: StoredTensor) -> tuple[str, _Made]:
        """The new key of a dense tensor, and what lies there."""
        state, parameter = parameter_of(key)
        place = place_of(parameter)
        if place is None or place.layer not in self._layers:
            return key, _Made(NewTensor(tensor, 1), lambda box: self.stored.read(key, box))
        name = key.removesuffix(parameter) + moe_key(place)
        if place.module == "norm":
            return name, _Made(NewTensor(tensor, 1), lambda box: self.stored.read(key, box))
        experts, f = self.plan.experts_after, self.origin.shard_units
        shape = list(tensor.shape)
        axis = unit_axis(place)
        if axis is not None:
            shape[axis] = shape[axis] // self.origin.ffn_hidden_size * f
        new = StoredTensor((experts, *shape), tensor.dtype)
        self.experts[moe_key(place)] = {"layer": place.layer, "kind": "expert"}
        if state in MOMENTS and self.plan.optimizer_rule == "reset":
            return name, _zeros(new)
        return name, _Made(NewTensor(new, experts), lambda box: self._expert_part(key, place, box))

    def _new_rows(self, layer: int) -> dict[str, _Made]:
        """The router of a layer, by checkpoint key, with as much optimizer state as the layer's feed-forward has.

        Raises:
            ExpansionError: if the layer has no dense feed-forward of the width that the plan says.
        """
        mlp, origin, model = f"decoder.layers.{layer - 1}.mlp.", self.origin, self._model
        halves = len(origin.matrices) - 1
        shapes: dict[str, tuple[int, ...]] = {
            "linear_fc1.weight": (halves * origin.ffn_hidden_size, model.hidden_size),
            "linear_fc2.weight": (model.hidden_size, origin.ffn_hidden_size),
        }
        for name, shape in shapes.items():
            found = self.stored.tensors.get(mlp + name)
            if found is None or found.shape != shape:
                what = "lacks it" if found is None else f"has it as {list(found.shape)}"
                raise ExpansionError(
                    f"the plan needs {mlp}{name} as {list(shape)}, checkpoint {self.where} {what}: it is of another model"
                )
        made: dict[str, _Made] = {}
        dtype = self.stored.tensors[f"{mlp}linear_fc1.weight"].dtype
        experts = self.plan.experts_after
        parameters: dict[str, tuple[int, ...]] = {"weight": (experts, model.hidden_size)}
        parameters |= {"bias": (experts,)} if model.linear_bias else {}
        for name, shape in parameters.items():
            key = f"{mlp}router.{name}"
            self.experts[key] = {"layer": layer, "kind": "router"}
            for prefix in ("", *(f"{OPTIMIZER_PREFIX}{state}." for state in ("param", *MOMENTS))):
                of = self.stored.tensors.get(f"{prefix}{mlp}linear_fc1.weight")
                if of is None:
                    continue
                new = StoredTensor(shape, of.dtype if prefix else dtype)
                drawn = name == "weight" and prefix in ("", MASTER_PREFIX)
                made[prefix + key] = self._router_rows(new, layer) if drawn else _zeros(new)
        if model.balancing == "loss_free":
            key = f"{mlp}router.expert_bias"
            self.experts[key] = {"layer": layer, "kind": "selection_bias"}
            made[key] = _zeros(StoredTensor((experts,), torch.float32))
        return made

    def _router_rows(self, new: StoredTensor, layer: int) -> _Made:
        """Rows of N(0, init_std); where the shards of a copy go together they have one row."""
        name, width = generator_name(self.plan.seed, layer, "router"), new.shape[1]

        def part(box: Box) -> torch.Tensor:
            (first, column), (count, columns) = box
            rows = torch.tensor([self.origin.router_row(expert) for expert in range(first, first + count)])
            drawn = draw_rows(name, rows, width, slice(column, column + columns), (0.0, self.origin.router_std))
            return drawn.to(new.dtype)

        return _Made(NewTensor(new, new.shape[0]), part)

    # ---- experts ----------------------------------------------------------------------------------------------------

    def _expert_part(self, key: str, place: Place, box: Box) -> torch.Tensor:
        """A box of a tensor of experts, [M, ...]."""
        state, _ = parameter_of(key)
        origin, dtype = self.origin, self.stored.tensors[key].dtype
        source = changed_source(self.stored, origin, key, place)
        part = torch.empty(box.shape, dtype=self.stored.tensors[source].dtype)
        for row in range(box.shape[0]):
            expert = box.offset[0] + row
            inner = Box(box.offset[1:], box.shape[1:])
            for matrix, at, there in self._origins(place, inner, expert % origin.granularity):
                into = part[row]
                if at is not None:
                    into = into.narrow(0, *at)
                self._read(source, there, into)
                if origin.method == "drop" and place.name == "weight" and state not in MOMENTS:
                    self.redraw.apply(place.layer, expert, matrix, there, into)
                factor = factor_of(origin, state, matrix)
                if factor != 1.0:
                    into.copy_(scaled(into, factor))
        return part.to(dtype)

    def _origins(self, place: Place, box: Box, shard: int) -> Iterator[tuple[str, tuple[int, int] | None, Box]]:
        """Where the parts of a box of one expert come from.

        Args:
            place: of the tensor.
            box: of the expert's tensor.
            shard: of the feed-forward.

        Yields:
            Matrix; (first row, rows) inside the box, None for all of it; the box in the dense tensor.
        """
        f, total = self.origin.shard_units, self.origin.ffn_hidden_size
        if place.module == "fc2":
            columns = () if place.name == "bias" else (box.offset[1] + shard * f,)
            yield "down_bias" if place.name == "bias" else "down", None, Box((box.offset[0], *columns), box.shape)
            return
        first, end = box.offset[0], box.offset[0] + box.shape[0]
        for index, matrix in enumerate(m for m in self.origin.matrices if m != "down"):
            begin, stop = max(first, index * f), min(end, (index + 1) * f)
            if begin < stop:
                row = index * total + shard * f + begin - index * f
                yield matrix, (begin - first, stop - begin), Box((row, *box.offset[1:]), (stop - begin, *box.shape[1:]))

    def _read(self, key: str, box: Box, into: torch.Tensor) -> None:
        """Fill a part from a box of a dense tensor; columns of it are cut out of whole rows, which lie in one piece."""
        shape = self.stored.tensors[key].shape
        if len(shape) == 1 or box.shape[1] == shape[1] or box.shape[0] == 1:
            self.stored.read_into(key, box, into)
            return
        (first, column), (count, columns) = box
        step = max(1, self._chunk_bytes // (shape[1] * into.element_size()))
        for begin in range(0, count, step):
            rows = min(step, count - begin)
            whole = self.stored.read(key, Box((first + begin, 0), (rows, shape[1])))
            into[begin : begin + rows] = whole[:, column : column + columns]


def _zeros(new: StoredTensor) -> _Made:
    return _Made(NewTensor(new, new.shape[0]), lambda box: torch.zeros(box.shape, dtype=new.dtype))
