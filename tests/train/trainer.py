"""Helpers of the run tests: a small corpus and whole runs inside the ranks of `run_distributed`."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

from parallel.compat import prepare_megatron
from tests.train.texts import write_texts
from train.corpus.build import CorpusRequest, build_corpus
from train.job import run_settings
from train.settings import load_settings

# The smallest network that still has everything: two MoE layers, loss-free balancing, grouped-query attention.
SMALL = [
    "experiment=demo", "model=tiny", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.attention_heads=4",
    "model.kv_heads=2", "model.expert_ffn_hidden_size=32", "data.sequence_length=32", "data.micro_batch_size=2",
    "data.global_batch_size=8", "run.steps=6", "schedule.warmup_steps=1", "schedule.decay_steps=2", "checkpoint=ends",
    "evaluation.batches=1", "evaluation.interval_steps=null", "tracking=none", "run.log_interval_steps=100",
    "upcycle.stages=[{at_step: 3, factor: 2, selection: greedy, scoring_batches: 2}]", "model.bias_update_rate=0.05",
]  # fmt: skip


def small_corpus(folder: Path) -> Path:
    """A corpus of bytes, of a fixed text of half a megabyte: enough for every small run."""
    prefix = folder / "corpus"
    if not Path(f"{prefix}.json").exists():
        texts = write_texts(folder / "corpus-texts")
        request = CorpusRequest(inputs=(str(texts),), output=str(prefix), validation_fraction=0.2)
        build_corpus(request, say=lambda line: None)
    return prefix


def train_here(overrides: list[str], *, report: bool = False) -> str:
    """One whole run on this rank; the environment says which rank this is.

    Args:
        overrides: Hydra overrides.
        report: draw the report at the end, which takes longer than a small run (`test_report.py` has it drawn).
    """
    prepare_megatron()
    with contextlib.nullcontext() if report else mock.patch("train.report.write_report"):
        return run_settings(load_settings(overrides))


def train_in_turn(runs: list[list[str]]) -> list[str]:
    """Several whole runs one after another in the same processes."""
    return [train_here(overrides) for overrides in runs]


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> what metrics.jsonl says about it; refuses a step that occurs twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines}
    assert len(found) == len(lines), "metrics.jsonl has a step twice"
    return found


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """Events of one name."""
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    """Change what a checkpoint says of itself, as whoever wrote it might have: the seal fits."""
    from train.checkpoint.files import MANIFEST, MARKER

    text = json.dumps(json.loads((checkpoint / MANIFEST).read_text()) | changes)
    (checkpoint / MANIFEST).write_text(text)
    (checkpoint / MARKER).write_text(json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))


def reseal(checkpoint: Path) -> None:
    """Make a checkpoint whose files were changed on purpose one that its writer might have left like this."""
    from train.checkpoint.files import digests, file_names

    rewrite_manifest(checkpoint, files=digests(checkpoint, file_names(checkpoint)))


def tensor_digests(checkpoint: Path) -> dict[str, str]:
    """Key -> SHA-256 of shape, dtype and bytes of every tensor in a checkpoint: what "bit for bit" means in these tests."""
    from tests.distributed import run_distributed

    return run_distributed(_tensor_digests, 1, str(checkpoint / "tensors"))[0]


def _tensor_digests(tensors: str) -> dict[str, str]:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from parallel.sharded_load import checkpoint_tensors, load_sharded

    stored = checkpoint_tensors(tensors)
    wanted = {
        k: ShardedTensor.from_rank_offsets(k, torch.empty(shape, dtype=dtype)) for k, (shape, dtype) in stored.items()
    }
    loaded, _, _ = load_sharded(wanted, tensors)
    digests = {}
    for key, tensor in loaded.items():
        digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests[key] = digest.hexdigest()
    return digests
