"""Transformer Engine's own Adam in mcore's optimizers: its count of steps per group, the switch, checkpoints, ages.

The class is the real one. Only its CUDA kernel has a stand-in (`tests/model/te.py`), so that `step` runs on CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.transformer_engine import have_transformer_engine
from tests.distributed import run_distributed
from tests.model import te

pytestmark = [
    pytest.mark.requires_te,
    pytest.mark.skipif(not have_transformer_engine(), reason="needs Transformer Engine"),
]

NETWORK: dict[str, Any] = te.NETWORKS["gqa"] | {"balancing": "loss_free", "router_score": "sigmoid"}
BEFORE, AFTER = 5, 4
LR, EPS, DECAY, BETAS = 1e-3, 1e-8, 0.01, (0.9, 0.999)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def _gradient(name: str, step: int, shape: Sequence[int]) -> torch.Tensor:
    # Small enough that the norm is never clipped: what is compared is Adam.
    noise = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    return torch.randn(shape, generator=noise) * 1e-4


def _steps(chunks: list[Any], optimizer: Any, first: int, last: int) -> None:
    """Steps of mcore's optimizer on made-up gradients; every rank of an expert or a dense weight has the same."""
    with te.steps_on_cpu():
        for step in range(first, last + 1):
            for chunk in chunks:
                for name, p in chunk.named_parameters():
                    p.main_grad.copy_(_gradient(name, step, p.shape))
            done, norm, _ = optimizer.step()
            assert done and norm < 1.0
            optimizer.zero_grad()


def _tensors(chunks: list[Any], optimizer: Any, layout: Any) -> dict[str, torch.Tensor]:
    """State of this rank by name and place, in fp64."""
    from model.holdings import describe_stage

    state = describe_stage(chunks, optimizer, layout, moments=True)
    found = {}
    for key, holding in state.holdings().items():
        for box in holding.boxes:
            tensor = state.view(key, box)
            # An fp32 weight is its own master; one in bf16 follows from it.
            if tensor.dtype == torch.float32 and "expert_bias" not in key:
                found[f"{key.replace('weight/', 'param/', 1)} {box.offset}"] = tensor.double().clone()
    return found


def _story(folder: str, sizes: dict[str, int], distributed: bool, rule: str, precision: str) -> dict[str, Any]:
    """Train, grow in memory by a rule, train on, with a checkpoint on the way; once more from the checkpoint."""
    from model.config import ModelConfig
    from model.holdings import describe_stage
    from model.sharded_state import expert_keys, load_tensors, save_tensors
    from parallel.optimizer_ages import OptimizerAges
    from parallel.optimizer_state import get_step, has_moments, set_step
    from upcycle.live import move_state
    from upcycle.optimizer_rules import ages_after, apply_rule, attach
    from upcycle.plan import plan_expansion
    from upcycle.stage_config import OptimizerRule, StageConfig
    from upcycle.verify import verify_expansion

    layout = te.layout(**sizes)
    stage = StageConfig(at_step=BEFORE, factor=2, optimizer_rule=rule)
    plan = plan_expansion(
        stage, ModelConfig(**(te.SIZES | NETWORK)), stage=1, experts_before=4, scores=None, seed=0,
        ep_ranks=sizes.get("expert", 1),
    )  # fmt: skip

    def fresh(experts: int) -> tuple[list[Any], Any]:
        chunks = te.built("te", NETWORK, layout, experts, precision)
        return chunks, te.optimizer(chunks, distributed=distributed)

    small, optimizer = fresh(4)
    assert not has_moments(optimizer) and get_step(optimizer) == 0
    _steps(small, optimizer, 1, BEFORE)
    assert has_moments(optimizer) and get_step(optimizer) == BEFORE
    before, experts = te.state(small, optimizer, layout), expert_keys(small, layout)
    old = describe_stage(small, optimizer, layout, moments=True)
    large, grown = fresh(8)
    new = describe_stage(large, grown, layout, moments=True)
    old.free_as_it_goes()
    move_state(old, new, plan, experts, layout, chunk_bytes=1 << 20)
    set_step(grown, BEFORE)
    verify_before_the_rule = te.state(large, grown, layout)
    apply_rule(plan, OptimizerRule(rule), large, grown, layout)
    if rule == "copy":
        verify_expansion(before, verify_before_the_rule, plan, experts)
    assert get_step(grown) == BEFORE
    ages = ages_after(OptimizerAges(), plan, OptimizerRule(rule), BEFORE)
    start = _tensors(large, grown, layout)
    attach(ages, grown, large, layout)
    _steps(large, grown, BEFORE + 1, BEFORE + AFTER - 1)
    save_tensors(Path(folder) / "tensors", large, grown, layout)
    _steps(large, grown, BEFORE + AFTER, BEFORE + AFTER)
    assert get_step(grown) == BEFORE + AFTER
    ended = te.state(large, grown, layout)

    again, loaded = fresh(8)
    with te.steps_on_cpu():
        load_tensors(Path(folder) / "tensors", again, loaded, layout, step=BEFORE + AFTER - 1)
    assert get_step(loaded) == BEFORE + AFTER - 1
    attach(OptimizerAges.from_dict(ages.to_dict()), loaded, again, layout)
    _steps(again, loaded, BEFORE + AFTER, BEFORE + AFTER)
    assert te.state(again, loaded, layout) == ended, "resumed, it is another run"

    bare, model_only = fresh(8)
    with te.steps_on_cpu():
        load_tensors(Path(folder) / "tensors", bare, model_only, layout, step=8, with_optimizer=False)
    assert get_step(model_only) == 0
    _steps(bare, model_only, 1, 1)
    assert get_step(model_only) == 1
    return {
        "its": te.is_its_adam(grown),
        "start": start,
        "end": _tensors(large, grown, layout),
        "model_only": _tensors(bare, model_only, layout),
        "young": {layer.layer: sorted(layer.replicas()) for layer in plan.layers},
    }


def _both(
    folder: str, sizes: dict[str, int], distributed: bool, rule: str, precision: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    with te.its_adam():
        theirs = _story(f"{folder}/theirs", sizes, distributed, rule, precision)
    return theirs, _story(f"{folder}/torchs", sizes, distributed, rule, precision)


def _fresh_adam(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """AdamW in fp64 from moments of zero (arXiv 1711.05101, algorithm 2)."""
    p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate((g.double() for g in gradients), start=1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        p = p - LR * (m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS) + DECAY * p)
    return p


def _young(folder: str) -> float:
    """How far replicas that were reset are from an Adam of their own, over the length of an update."""
    with te.its_adam():
        found = _story(folder, {}, True, "reset", "bf16")
    (layer, young), worst = next(iter(found["young"].items())), 0.0
    key = f"param/decoder.layers.{layer - 1}.mlp.experts.experts.linear_fc2.weight"
    for expert in young:
        name = f"decoder.layers.{layer - 1}.mlp.experts.linear_fc2.weight{expert}"
        start, end = found["start"][f"{key} {(expert, 0, 0)}"][0], found["end"][f"{key} {(expert, 0, 0)}"][0]
        gradients = [_gradient(name, BEFORE + step, end.shape) for step in range(1, AFTER + 1)]
        worst = max(worst, (_fresh_adam(start, gradients) - end).abs().max().item() / (AFTER * LR))
    return worst


def test_reset_replicas_step_as_an_adam_of_their_own(tmp_path: Path) -> None:
    [distance] = run_distributed(_young, 1, str(tmp_path))
    # fp32 betas and masters, as below; without the correction it is 0.1 to 1.
    assert distance < 1e-3


@pytest.mark.parametrize(
    ("sizes", "distributed", "rule", "precision"),
    [
        ({}, True, "copy", "bf16"),
        ({}, True, "reset", "bf16"),
        ({}, True, "reset_momentum", "bf16"),
        ({}, True, "scale", "bf16"),
        ({}, False, "reset", "bf16"),
        ({}, False, "reset", "fp32"),
        ({}, True, "reset", "fp32"),
        ({"expert": 2}, True, "reset", "bf16"),
        ({"expert": 2}, False, "reset", "bf16"),
        ({"tensor": 2, "expert_tensor": 2}, True, "reset", "bf16"),
    ],
    ids=str,
)
def test_its_adam_goes_through_the_switch_as_torchs_does(
    sizes: dict[str, int], distributed: bool, rule: str, precision: str, tmp_path: Path
) -> None:
    ranks = 2 if sizes else 1
    for theirs, torchs in run_distributed(_both, ranks, str(tmp_path), sizes, distributed, rule, precision):
        assert theirs["its"] and not torchs["its"]
        for when in ("start", "end", "model_only"):
            assert theirs[when].keys() == torchs[when].keys()
            for name, tensor in theirs[when].items():
                other = torchs[when][name]
                # Betas in fp32 differ from those in fp64 by 1.3e-5 of 1 - beta2, so moments by that, updates by half of it.
                # Each side rounds a master once or twice a step.
                distance, size = (tensor - other).abs().max().item(), other.abs().max().item()
                steps = BEFORE + AFTER if when == "end" else BEFORE
                allowed = steps * (LR * 2e-5 + 2.0**-23 * size) if name.startswith("param/") else 3e-5 * size
                if when == "model_only" and name.startswith("param/"):
                    # From weights in bf16, which two masters that hardly differ may be rounded apart to.
                    allowed = 2.0**-8 * size
                assert distance <= allowed, (when, name, distance, allowed)
