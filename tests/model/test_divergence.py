"""Divergence of siblings on real experts: families in any order, over expert-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import run_distributed

# Experts 2, 4 and 5 are replicas; none but 4 stands beside its family.
PARENTS = [0, 1, 0, 2, 2, 0]


def _divergence(turned: dict[int, float]) -> Any:
    """Divergence of a model whose experts equal their parents, except some, turned by an angle."""
    from model.build import build_chunks, expert_rows, moe_parts
    from model.config import ModelConfig
    from model.divergence import Siblings
    from parallel.config import ParallelConfig
    from parallel.layout import Layout

    layout = Layout.create(ParallelConfig(expert=torch.distributed.get_world_size()), seed=3)
    model = ModelConfig(layers=1, hidden_size=32, ffn_hidden_size=32, attention_heads=4, expert_ffn_hidden_size=16)
    chunks = build_chunks(model, len(PARENTS), layout, vocab_size=64, sequence_length=8, precision="fp32")
    for part in moe_parts(chunks):
        for p, first, count in expert_rows(part, layout):
            rows = p.detach().reshape(count, -1)
            # Two vectors without a common coordinate, so that a mixture has exactly the cosine of its angle to the first.
            half = torch.arange(rows.shape[1]) % 2 == 0
            for i in range(count):
                parent, angle = PARENTS[first + i], torch.tensor(turned.get(first + i, 0.0))
                rows[i] = (1 + parent) * torch.where(half, torch.cos(angle), torch.sin(angle))
    found = Siblings(chunks, layout, {1: PARENTS}).weights()
    assert Siblings(chunks, layout, {1: list(range(len(PARENTS)))}).weights() is None
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_families_need_not_be_neighbours(world: int) -> None:
    assert all(
        value == pytest.approx(0, abs=1e-6) for d in run_distributed(_divergence, world, {}) for value in d.values()
    )
    # Expert 5 is at 120 degrees to expert 0 (1 - cos = 1.5), expert 4 at 90 to 3 (1.0); 2 is where its parent is.
    for found in run_distributed(_divergence, world, {5: 2 * torch.pi / 3, 4: torch.pi / 2}):
        # Weights are fp32: each of the cosines is off by a few times 2^-24.
        assert found == {
            "mean": pytest.approx(2.5 / 3, abs=1e-6),
            "max": pytest.approx(1.5, abs=1e-6),
            "min": pytest.approx(0, abs=1e-6),
        }
