"""The executor of dense-to-MoE plans needs a few pieces of memory, whatever the size of a feed-forward."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from parallel.regions import Box
from parallel.sharded_load import mark_complete
from parallel.stream_files import TensorWriter
from tests.distributed import run_distributed
from upcycle.dense import DenseRules, plan_from_dense
from upcycle.dense_stream import opened_dense
from upcycle.dense_verify import verify_from_dense
from upcycle.stream import NewTensor, write_tensors

_HIDDEN, _FFN = 512, 8192
_MODEL = ModelConfig(layers=1, hidden_size=_HIDDEN, ffn_hidden_size=_FFN, attention_heads=4, num_experts=4, top_k=2)


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peak_mib(source: Path, target: Path, rules: DenseRules, chunk_bytes: int) -> float:
    """By how much the memory of this process grew at most, making and verifying."""
    model = dataclasses.replace(_MODEL, expert_ffn_hidden_size=_FFN // rules.granularity)
    plan = plan_from_dense(rules, model, step=0, seed=1, itemsize=4)
    with opened_dense(source, plan, model) as dense:
        before = write_tensors(
            target.with_name("same"),
            {key: NewTensor(tensor, 1) for key, tensor in dense.stored.tensors.items()},
            dense.stored.read,
            chunk_bytes=chunk_bytes,
        )
        # Starts the record of the peak anew.
        Path("/proc/self/clear_refs").write_text("5")
        resident = _memory_mib("VmRSS")
        found = dense.write(target, chunk_bytes=chunk_bytes)
        verify_from_dense(before, found, dense, chunk_bytes=chunk_bytes)
        return _memory_mib("VmHWM") - resident


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak of a process' memory")
@pytest.mark.parametrize(
    "rules", [DenseRules("virtual_group", 2), DenseRules("drop", redraw_share=0.1)], ids=lambda rules: rules.method
)
def test_memory_does_not_grow_with_the_feed_forward(tmp_path: Path, rules: DenseRules) -> None:
    """Every matrix in one piece on disk, as one rank saves it."""
    source = tmp_path / "dense"
    source.mkdir()
    with TensorWriter(source) as writer:
        for name, shape in (("linear_fc1", (2 * _FFN, _HIDDEN)), ("linear_fc2", (_HIDDEN, _FFN))):
            writer.add(f"decoder.layers.0.mlp.{name}.weight", shape, Box((0, 0), shape), torch.randn(shape))
        writer.finish()
    mark_complete(source)
    (grown,) = run_distributed(_peak_mib, 1, source, tmp_path / "moe", rules, 1 << 20, init=False)
    # A matrix has 32 or 16 MiB, twice or four times as much in the new checkpoint; pieces have 1, in fp64 twice that.
    assert grown < 24
