"""Utilities of experts against plain autograd in float64, in every layout: the same stage, batches and scores."""

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from parallel.errors import ConfigError
from tests.distributed import run_distributed
from tests.train.trainer import SMALL

_VOCABULARY, _SEQUENCE, _SAMPLES, _BATCHES, _EXPERTS = 300, 16, 8, 2, 8
_COMMON = [
    *SMALL, "upcycle.stages=[]", "run.precision=fp32", "model.aux_loss_coeff=0", f"data.sequence_length={_SEQUENCE}",
    f"data.global_batch_size={_SAMPLES}", "data.micro_batch_size=2",
]  # fmt: skip
# The scores come out of fp32 gradients: each is a chain of some twenty operations, each rounding by up to 6e-8 of its
# terms, and norms of vectors of 2,048 elements average most of that out. Twice, for the square.
_RELATIVE = 2 * 20 * 6e-8
Scores = dict[int, list[float]]


def _stage(overrides: list[str]) -> tuple[Any, Any]:
    from parallel.compat import prepare_megatron
    from parallel.layout import Layout
    from train.settings import load_settings
    from train.stage import build_stage

    prepare_megatron()
    settings = load_settings([*_COMMON, *overrides])
    layout = Layout.create(settings.parallel, 1)
    return build_stage(settings, 0, layout, _VOCABULARY), layout


def _tokens(batch: int) -> torch.Tensor:
    """A global batch, [samples, sequence + 1]; Zipf-like, so that experts differ in load."""
    noise = torch.rand(_SAMPLES, _SEQUENCE + 1, generator=torch.Generator().manual_seed(batch))
    return (_VOCABULARY**noise).long() - 1


def _reference(folder: str) -> dict[str, Scores]:
    """Scores of a stage on one process by autograd alone, and the stage's tensors in `folder` for the other layouts."""
    from model.sharded_state import save_tensors

    stage, layout = _stage(["model.experts=sequential"])
    for part in stage.moe_parts():
        # Unequal routers and selection biases, or all experts would score alike.
        with torch.no_grad():
            part.layer.router.weight.mul_(30.0)
        part.layer.router.expert_bias.copy_(torch.linspace(-0.1, 0.1, _EXPERTS))
    for p in stage.chunks[0].parameters():
        p.main_grad.zero_()
    assert stage.optimizer.step()[0]  # moments, which a checkpoint has
    Path(folder).mkdir()
    save_tensors(Path(folder), stage.chunks, stage.optimizer, layout)

    model = stage.chunks[0].double()
    logits = [
        model(tokens[:, :-1], torch.arange(_SEQUENCE).expand(_SAMPLES, -1), None)
        for tokens in map(_tokens, range(_BATCHES))
    ]
    loss = torch.stack([
        F.cross_entropy(x.flatten(0, 1), _tokens(batch)[:, 1:].flatten()) for batch, x in enumerate(logits)
    ]).mean()  # fmt: skip
    assert loss.dtype == torch.float64
    experts = {
        (part.number, expert): list(module.parameters())
        for part in stage.moe_parts()
        for expert, module in enumerate(part.layer.experts.local_experts)
    }
    parameters = [p for mine in experts.values() for p in mine]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    squares = {p: g.square().sum().item() for p, g in zip(parameters, gradients, strict=True)}
    found: dict[str, Scores] = {"grad_norm": {}, "saliency": {}, "weight_norm": {}}
    for (layer, _), mine in experts.items():
        g, w = sum(squares[p] for p in mine), sum(p.detach().square().sum().item() for p in mine)
        for utility, score in (("grad_norm", g), ("saliency", math.sqrt(g) * math.sqrt(w)), ("weight_norm", w)):
            found[utility].setdefault(layer, []).append(score)
    return found


def _accumulate(stage: Any, layout: Any) -> None:
    """Forward and backward over all batches, this rank's part, through mcore's schedule; nothing is reduced."""
    from train.step import run_micro_batches

    config = stage.chunks[0].config
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    config.no_sync_func = contextlib.nullcontext
    with contextlib.ExitStack() as stack:
        for chunk in stage.wrapped:
            stack.enter_context(chunk.no_sync())
        for number in range(_BATCHES):
            mine = _tokens(number).chunk(layout.data_size)[layout.data_rank]
            batches = [
                {
                    "tokens": tokens[:, :-1].contiguous(),
                    "labels": tokens[:, 1:].contiguous(),
                    "position_ids": torch.arange(_SEQUENCE).expand(len(tokens), -1),
                    "loss_mask": torch.ones(len(tokens), _SEQUENCE),
                }
                for tokens in mine.split(2)
            ]
            run_micro_batches(stage, layout, batches, forward_only=False)
    config.finalize_model_grads_func = finalize


def _score_in_turn(folder: str, cases: list[list[str]]) -> list[dict[str, Scores]]:
    from model.sharded_state import load_tensors
    from upcycle.utility import gradient_scores, weight_scores

    found = []
    for overrides in cases:
        stage, layout = _stage(overrides)
        # As in a run, where steps precede: what the optimizer leaves behind in parameters must not get into scores.
        assert stage.optimizer.step()[0]
        load_tensors(Path(folder), stage.chunks, stage.optimizer, layout, step=1)
        biases = [part.layer.router.expert_bias.clone() for part in stage.moe_parts()]
        scores = {
            utility: gradient_scores(
                stage.chunks, stage.wrapped, layout, _EXPERTS, lambda s=stage, at=layout: _accumulate(s, at), _BATCHES, utility
            )
            for utility in ("grad_norm", "saliency")
        }  # fmt: skip
        scores["weight_norm"] = weight_scores(stage.chunks, layout, _EXPERTS)
        found.append(scores)
        # Scoring leaves no trace.
        assert all(not p.main_grad.any() for chunk in stage.chunks for p in chunk.parameters())
        for part, bias in zip(stage.moe_parts(), biases, strict=True):
            assert torch.equal(part.layer.router.expert_bias, bias)
            assert not part.layer.router.local_tokens_per_expert.any()
    return found


def test_scores_are_those_of_autograd_in_every_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    expected = run_distributed(_reference, 1, folder)[0]
    for utility, layers in expected.items():
        assert list(layers) == [1, 2], utility
        # Experts must differ by more than the tolerance, or nothing is shown.
        assert all(max(row) > 1.5 * min(row) for row in layers.values()) or utility == "weight_norm", layers
    everywhere = "optimizer.distributed=false"
    one = run_distributed(_score_in_turn, 1, folder, [
        [], [everywhere], ["model.experts=sequential"], ["model.experts=sequential", everywhere],
    ])  # fmt: skip
    two = run_distributed(_score_in_turn, 2, folder, [
        ["parallel.expert=2"], ["parallel.expert=2", everywhere], [], ["parallel.tensor=2"],
        ["parallel.tensor=2", "parallel.expert_tensor=2"], ["parallel.tensor=2", "parallel.expert=2"], ["parallel.pipeline=2"],
    ])  # fmt: skip
    assert two[0] == two[1], "ranks disagree"
    for scores in one[0] + two[0]:
        for utility, layers in expected.items():
            for number, row in layers.items():
                assert scores[utility][number] == pytest.approx(row, rel=_RELATIVE, abs=0), utility


def test_an_unknown_utility_is_refused() -> None:
    from upcycle.utility import gradient_scores

    with pytest.raises(ConfigError, match="utility=weight_norm is unknown: use one of grad_norm, saliency"):
        gradient_scores([], [], None, 8, lambda: None, 1, "weight_norm")  # type: ignore[arg-type]
