"""The loss of a checkpoint on validation sets, without a training job: weights alone, in any layout, nothing written.

The same sets, samples and loop as a run's own evaluation (`train/evaluation.py`): in the layout that the run had, the
numbers are those that it logged at that step, bit for bit.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.family_routing import set_release
from model.fingerprint import first_difference, take_fingerprints
from model.sharded_state import load_weights
from parallel.config import ParallelConfig
from parallel.errors import CheckpointError, ConfigError
from parallel.layout import Layout, join_job, leave_job
from train.buildable import refuse_unbuildable
from train.checkpoint.folder import DamagedCheckpoint
from train.config import RunSettings
from train.data.index_files import drop_broken
from train.data.stream import open_corpora
from train.evaluation import Evaluation, Figures, ValidationSet, open_set, open_sets, refuse_other_tokenizer
from train.hf.start import check_imported
from train.offline.expand import Source, open_source
from train.schema.evaluation import EvaluationSet
from train.settings import explain
from train.stage import Network, build_network
from train.start import check_identity, damage
from upcycle.config import UpcycleConfig


@dataclass(frozen=True)
class Task:
    """What is to be evaluated, checked as far as one process can.

    Attributes:
        source: the checkpoint.
        settings: of its run, in the layout of this job, with the experts of the checkpoint's stage.
        sets: opened.
    """

    source: Source
    settings: RunSettings
    sets: Sequence[ValidationSet]


def prepare(
    path: Path, overrides: Sequence[str], entries: Sequence[EvaluationSet], batches: int | None, *, every: bool
) -> Task:
    """Open a checkpoint and the sets, and refuse what cannot be, before any process group.

    Args:
        path: a checkpoint, or a run, of which the newest checkpoint counts.
        overrides: `KEY=VALUE` on top of the checkpoint's configuration.
        entries: sets to evaluate on; empty takes those of the run.
        batches: global batches per set; None takes `evaluation.batches`.
        every: as many batches as each set fills instead.

    Raises:
        CoppiceError: naming what does not fit.
    """
    mine = [word for word in overrides if word.startswith("parallel.")]
    source = open_source(path, [word for word in overrides if word not in mine])
    imported = source.manifest.imported is not None
    if imported and entries and not source.settings.data.blend:
        # It comes from no run, and so from no corpus.
        data = replace(source.settings.data, corpus=entries[0].prefix)
        source = replace(source, settings=replace(source.settings, data=data))
    data, config = source.settings.data, source.settings.evaluation
    count = None if every else batches or config.batches
    if entries:
        sets = [open_set(entry, f"--data {entry.name}", data, count) for entry in entries]
    else:
        sets = open_sets(config, data, open_corpora(data))
        if not sets:
            raise ConfigError(f"the run of {source.path} has no validation set: name one with --data NAME=PREFIX")
    for opened in sets:
        if imported:
            for part, _ in opened.corpora:
                check_imported(source.path, source.manifest, part)
            continue
        refuse_other_tokenizer(opened, source.manifest.data["tokenizer"], f"checkpoint {source.path}")
    settings = _settings(source, mine)
    check_identity(settings, source.manifest.vocab_size, source.path, source.manifest)
    return Task(source, settings, sets)


def _settings(source: Source, overrides: list[str]) -> RunSettings:
    """The settings of the checkpoint's stage alone, in the layout of this job.

    One process takes no layout, several that of the checkpoint's stage; what is given of `parallel` goes on top.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    base = ParallelConfig(timeout_seconds=source.settings.parallel.timeout_seconds)
    if world > 1:
        base = source.settings.following(source.course).parallel_of(source.course.begun)
    try:
        given = OmegaConf.create({"parallel": OmegaConf.structured(base)})
        parallel = OmegaConf.to_object(OmegaConf.merge(given, OmegaConf.from_dotlist(overrides)).parallel)
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{' '.join(overrides)} is no YAML: {' '.join(str(e).split())}") from None
    assert isinstance(parallel, ParallelConfig)
    model = replace(source.settings.model, num_experts=source.manifest.num_experts)
    settings = replace(source.settings, model=model, parallel=parallel, upcycle=UpcycleConfig())
    settings.check(world)
    # As `build_network` builds it.
    refuse_unbuildable(replace(settings, performance=replace(settings.performance, cuda_graphs="none")), world)
    return settings


def evaluate_checkpoint(task: Task, cache: Path | None) -> tuple[dict[str, Figures], dict[str, int]]:
    """Load the weights of a checkpoint and evaluate them; collective over the job's processes.

    Args:
        task: what `prepare` returned.
        cache: folder for mcore's index files that all processes see; None makes one, which is removed.

    Returns:
        Figures by the name of the set, and the sizes of the layout.

    Raises:
        CoppiceError: if the checkpoint is not what was saved.
    """
    settings, manifest = task.settings, task.source.manifest
    tokenizer = task.sets[0].corpora[0][1].tokenizer()
    joined = join_job(settings.parallel.timeout_seconds)
    try:
        layout = Layout.create(settings.parallel, settings.run.seed)
        network = _load(task, layout)
        with _folder(layout, cache) as folder:
            seed, records = manifest.data["seed"], layout.rank == 0
            evaluation = Evaluation(task.sets, settings.data, tokenizer, seed, folder, records=records)
            return evaluation.measure(network, layout, lambda: None), layout.describe()
    finally:
        leave_job(joined)


def _load(task: Task, layout: Layout) -> Network:
    """The model of a checkpoint, with every weight compared with what was saved; collective."""
    source, settings = task.source, task.settings
    path, manifest = source.path, source.manifest
    problem = damage(layout, path, manifest.files, settings.checkpoint.verify)
    if problem is not None:
        raise DamagedCheckpoint(f"checkpoint {path}: {problem}: use an older checkpoint", problem)
    network = build_network(settings, manifest.num_experts, layout, manifest.vocab_size, manifest.plans)
    load_weights(path / "tensors", network.chunks, layout)
    expected = {name: rows for name, rows in manifest.fingerprints.items() if name.startswith("weight/")}
    name = first_difference(expected, take_fingerprints(network.chunks, None, layout))
    if name is not None:
        raise CheckpointError(
            f"checkpoint {path} was loaded, but {name} is not what was saved: the files are damaged: use an older checkpoint"
        )
    stages = source.settings.following(source.course).upcycle
    set_release(network.chunks, stages.release_fraction(manifest.stage, manifest.step))
    return network


@contextmanager
def _folder(layout: Layout, cache: Path | None) -> Iterator[Path]:
    """The folder for index files: the given one, or one that rank 0 makes and removes; collective."""
    made: Any = None
    with layout.together("making a folder for index files"):
        if layout.rank == 0 and cache is None:
            made = tempfile.mkdtemp(prefix="coppice-evaluate-")
        elif layout.rank == 0 and cache is not None:
            drop_broken(cache)
    made = layout.from_rank_zero(made)
    try:
        yield Path(made) if cache is None else cache
        # No rank may still read what rank 0 removes.
        layout.barrier()
    finally:
        if made is not None and layout.rank == 0:
            shutil.rmtree(made, ignore_errors=True)
