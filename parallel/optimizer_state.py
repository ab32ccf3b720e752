"""What mcore's optimizers hold for each model parameter, seen alike whether state is sharded over data ranks or not.

Three optimizers occur: the distributed one (ZeRO-1: each rank holds a flat range of every parameter), bf16 with fp32
masters on every rank, and plain fp32. `optimizer_views` hides the difference; checkpoints, fingerprints and the switch
read and write state through it. Adam's step count is a number per optimizer in mcore's formats, so it is handled apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer

from parallel.errors import CheckpointError

# Moments of Adam; mcore calls the fp32 master "param".
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimizerView:
    """State of one model parameter on this rank.

    Attributes:
        param: the model parameter.
        start: first element of the flattened parameter that this rank's state covers.
        tensors: `param` (the fp32 master; the weight itself where the model is fp32), `exp_avg`, `exp_avg_sq`: same
            number of elements each. No moments before the first step.
        sharded: whether other data ranks hold the rest.
        inner: the torch optimizer that steps it.
        key: the tensor under which `inner` keeps its moments.
    """

    param: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]
    sharded: bool
    inner: torch.optim.Optimizer
    key: torch.Tensor

    def moment(self, name: str) -> torch.Tensor:
        """A moment, [numel of the master] fp32; made with unset values where the optimizer has none yet."""
        state = self.inner.state[self.key]
        if name not in state:
            state[name] = torch.empty_like(self.key, memory_format=torch.preserve_format)
        self.tensors[name] = state[name]
        return self.tensors[name]

    def rows(self, number: int) -> Iterator[tuple[int, int, int]]:
        """The rows that this state covers, whole or in part: (row, first element here, one past the last).

        Args:
            number: rows of the whole parameter, equal in size.
        """
        size, numel = self.param.numel() // number, self.tensors["param"].numel()
        for row in range(self.start // size, -(-(self.start + numel) // size) if numel else 0):
            yield row, max(0, row * size - self.start), min(numel, (row + 1) * size - self.start)


def chained(optimizer: Any) -> list[Any]:
    """The optimizers behind mcore's facade: dense parameters first, expert parameters second where they are apart."""
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def optimizer_views(optimizer: Any) -> Iterator[OptimizerView]:
    """Every model parameter that this rank holds state for."""
    for single in chained(optimizer):
        if isinstance(single, DistributedOptimizer):
            yield from _distributed_views(single)
        elif isinstance(single, Float16OptimizerWithFloat16Params):
            for params, masters in zip(single.float16_groups, single.fp32_from_float16_groups, strict=True):
                for param, master in zip(params, masters, strict=True):
                    yield _whole_view(single, param, master)
            for group in single.fp32_from_fp32_groups:
                for param in group:
                    yield _whole_view(single, param, param)
        elif isinstance(single, FP32Optimizer):
            for group in single.optimizer.param_groups:
                for param in group["params"]:
                    yield _whole_view(single, param, param)
        else:
            raise TypeError(f"unknown optimizer {type(single).__name__}: teach parallel/optimizer_state.py about it")


def _whole_view(single: Any, param: torch.nn.Parameter, master: torch.Tensor) -> OptimizerView:
    tensors = {"param": master} | _moments(single, master)
    return OptimizerView(param, 0, tensors, sharded=False, inner=single.optimizer, key=master)


def _moments(single: Any, key: torch.Tensor) -> dict[str, torch.Tensor]:
    state = single.optimizer.state.get(key, {})
    return {name: state[name] for name in MOMENTS if name in state}


def _distributed_views(single: DistributedOptimizer) -> Iterator[OptimizerView]:
    for param, (group, index) in single.model_param_group_index_map.items():
        main = single.optimizer.param_groups[group]["params"][index]
        owned = single._get_model_param_range_map(param)["param"]
        tensors = {"param": main} | _moments(single, main)
        yield OptimizerView(param, owned.start, tensors, sharded=True, inner=single.optimizer, key=main)


def allocate_state(optimizer: Any) -> None:
    """Make Adam's tensors exist, with unset values, so that a checkpoint can be loaded into a fresh optimizer.

    mcore's own way is a step on zero gradients, which have to be allocated too, and which may move masters.
    """
    for view in optimizer_views(optimizer):
        for name in MOMENTS:
            view.moment(name)
    set_step(optimizer, 0)


def has_moments(optimizer: Any) -> bool:
    """Whether this rank's optimizer keeps any moments yet; they come with the first step or a load."""
    return any(name in view.tensors for view in optimizer_views(optimizer) for name in MOMENTS)


def clear_moments(optimizer: Any) -> None:
    """Set both moments of every parameter to zero, as before the first step."""
    for view in optimizer_views(optimizer):
        for name in MOMENTS:
            if name in view.tensors:
                view.tensors[name].zero_()


def use_fused_update(optimizer: Any) -> None:
    """Let torch's Adam update each parameter in one pass; mcore asks for it nowhere.

    On CPU the default walks stacked expert weights several times (4 to 5 times as slow, benchmarks/README.md).
    """
    for single in chained(optimizer):
        if _keeps_step_per_parameter(single):
            for group in single.optimizer.param_groups:
                group["fused"] = True


def adam_name(optimizer: Any) -> str:
    """Which Adam mcore has chosen by what is installed: Transformer Engine's, NVIDIA Apex's or torch's."""
    inner = type(chained(optimizer)[0].optimizer)
    owner = {"transformer_engine": "Transformer Engine", "apex": "NVIDIA Apex", "torch": "torch"}
    fused = ", fused" if _keeps_step_per_parameter(chained(optimizer)[0]) else ""
    return f"{inner.__name__} of {owner.get(inner.__module__.split('.')[0], inner.__module__)}{fused}"


def get_step(optimizer: Any) -> int:
    """Adam's step count, equal for all parameters in mcore's formats; 0 before the first step.

    Raises:
        CheckpointError: if parameters disagree.
    """
    steps = set()
    for single in chained(optimizer):
        if _keeps_step_per_parameter(single):
            steps |= {int(s["step"]) for s in single.optimizer.state.values() if "step" in s}
        else:
            steps |= {int(g["step"]) for g in single.optimizer.param_groups if "step" in g and g["params"]}
    if len(steps) > 1:
        raise CheckpointError(f"optimizer parameters disagree on Adam's step count: {sorted(steps)}")
    return steps.pop() if steps else 0


def set_step(optimizer: Any, step: int) -> None:
    """Set Adam's step count. Each parameter gets its own tensor: torch advances a shared one once per parameter."""
    for single in chained(optimizer):
        if _keeps_step_per_parameter(single):
            for param, state in single.optimizer.state.items():
                # On the parameter's device, as the fused update wants it.
                state["step"] = torch.tensor(float(step), device=param.device)
        for group in single.optimizer.param_groups:
            if _keeps_step_per_parameter(single):
                # Left behind by mcore's state_dict; nothing advances it.
                group.pop("step", None)
            else:
                group["step"] = step


def _keeps_step_per_parameter(single: Any) -> bool:
    """torch's Adam counts per parameter, Transformer Engine's and Apex's per parameter group."""
    return isinstance(single.optimizer, torch.optim.Adam | torch.optim.AdamW)


def adam_step(inner: torch.optim.Optimizer, group: Mapping[str, Any], key: torch.Tensor) -> int:
    """Adam's step count as one parameter has it; 0 before the first step."""
    owner: Mapping[str, Any] = inner.state[key] if isinstance(inner, torch.optim.Adam) else group
    return int(owner.get("step", 0))


def adam_betas(inner: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[float, float]:
    """The betas as the optimizer computes with them: torch's in fp64, those of the other two in fp32.

    1 - 0.999 differs by 1.3e-5 between the two, and so would every correction.
    """
    first, second = (float(beta) for beta in group["betas"])
    if isinstance(inner, torch.optim.Adam):
        return first, second
    return tuple(torch.tensor((first, second), dtype=torch.float32).tolist())  # type: ignore[return-value]


def forget_step(optimizer: Any) -> None:
    """Drop torch Adam's step tensors; mcore's loader of distributed state stumbles over them (call `set_step` after)."""
    for single in chained(optimizer):
        for state in single.optimizer.state.values():
            state.pop("step", None)
