"""Between a run and its checkpoints: what is saved, what a checkpoint must be to be resumed, what is verified.

`train/checkpoint/folder.py` knows folders, `model/sharded_state.py` knows tensors; this file knows the run.
"""

import contextlib
import json
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.build import count_parameters
from model.fingerprint import first_difference, take_fingerprints
from model.sharded_state import begin_save_tensors, expert_keys, load_tensors
from parallel.compat import versions
from parallel.errors import CheckpointError, ConfigError
from parallel.layout import Layout
from parallel.optimizer_ages import OptimizerAges
from parallel.optimizer_state import get_step
from parallel.sharded_save import KnownPlan
from train import random_state
from train.checkpoint.folder import (
    CheckpointFolder,
    Manifest,
    belongs_to,
    checkpoint_name,
    list_checkpoints,
    need_space,
    read_manifest,
)
from train.checkpoint.save_task import SaveTask
from train.config import RunSettings
from train.data.blends import Phase, changed
from train.data.sample_order import Blend
from train.data.stream import phases_of
from train.guard import Guard
from train.health import Health
from train.hf.start import check_imported
from train.record import record_checkpoint
from train.settings import settings_to_dict
from train.stage import Stage
from train.start import model_identity, takes_optimizer
from upcycle.optimizer_rules import attach

if TYPE_CHECKING:
    from train.run import Run


@dataclass
class _SameForStage:
    """What is the same for all saves of one stage, and takes words between ranks to find out.

    Attributes:
        stage: whose.
        experts: keys that run over experts.
        counts: parameters.
        plan: who writes what.
    """

    stage: weakref.ref[Stage]
    experts: dict[str, dict[str, Any]]
    counts: dict[str, int]
    plan: KnownPlan = field(default_factory=KnownPlan)


class Persistence:
    """Saves, finds and loads the checkpoints of one run."""

    def __init__(self, run: "Run") -> None:
        self.run = run
        # Step, stage and folder of the newest checkpoint that holds the current state.
        self._saved: tuple[int, int, Path] | None = None
        # A save that is planned, and perhaps being written.
        self._task: SaveTask | None = None
        # Name of the last checkpoint that room was asked for.
        self._reserved: str | None = None
        self._same: _SameForStage | None = None
        # Checkpoint whose optimizer state this job did not take.
        self.left_behind: Path | None = None
        # What the configuration says of the data that the checkpoint did not, in words.
        self.data_changed: str | None = None

    @property
    def settings(self) -> RunSettings:
        """What the run follows; its stages may grow in number."""
        return self.run.settings

    @property
    def layout(self) -> Layout:
        """The layout of the run's current stage."""
        return self.run.layout

    @property
    def folder(self) -> CheckpointFolder:
        """The run's folder of checkpoints."""
        return CheckpointFolder(Path(self.settings.run.dir), self.layout, self.settings.checkpoint)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of this run; rank 0 asks the disk."""
        own = list_checkpoints(Path(self.settings.run.dir))
        return own[-1] if own else None

    # ---- starting ---------------------------------------------------------------------------------------------------

    def check_start(self, source: Path | None) -> Manifest | None:
        """Read the manifest to resume from and check it against the length and the data of this run.

        Raises:
            CoppiceError: naming what does not fit.
        """
        manifest = None
        with self.layout.together("checking the checkpoint"):
            if source:
                manifest = read_manifest(source)
                if manifest.step > self.settings.run.steps:
                    raise ConfigError(
                        f"run.steps={self.settings.run.steps} ends before checkpoint {source.name} (step {manifest.step}): "
                        "raise it"
                    )
                self._check_data(source, manifest)
        return manifest

    def _check_data(self, path: Path, manifest: Manifest) -> None:
        tokenizer = self.run.corpora[0][1].tokenizer_digest
        if manifest.imported is not None:
            check_imported(path, manifest, self.run.corpora[0][1])
            return
        if manifest.data["tokenizer"] != tokenizer:
            raise CheckpointError(
                f"checkpoint {path} was trained on tokens of another tokenizer (digest {manifest.data['tokenizer'][:12]}, "
                f"that of the data is {tokenizer[:12]}): its embeddings mean nothing here; build the corpora with its "
                "tokenizer"
            )
        self.data_changed = changed(self._known_phases(manifest), phases_of(self.settings.data, self.run.corpora))
        if self.data_changed and not self.settings.data.allow_change:
            raise CheckpointError(
                f"checkpoint {path} was trained on other data: {self.data_changed}: use the same corpora, weights and "
                "schedule, or data.allow_change=true to go on with these; no sample comes twice within an epoch"
            )
        length = manifest.data["sequence_length"]
        if length != self.settings.data.sequence_length:
            raise CheckpointError(
                f"data.sequence_length={self.settings.data.sequence_length}, but checkpoint {path} counted its position in "
                f"samples of {length} tokens: use data.sequence_length={length}"
            )

    def known_blends(self, manifest: Manifest | None) -> list[Blend]:
        """What the training stream of a checkpoint is made of."""
        return [Blend.from_dict(values) for values in manifest.data["blends"]] if manifest else []

    def _known_phases(self, manifest: Manifest) -> list[Phase]:
        """The blends of the configuration that a checkpoint was trained with; of older ones the last is known."""
        if "phases" in manifest.data:
            return [Phase.from_dict(values) for values in manifest.data["phases"]]
        return [Phase(self.known_blends(manifest)[-1].shares)]

    def check_space(self) -> None:
        """Refuse to start where not even one checkpoint of the current stage fits.

        Raises:
            CheckpointError: naming the folder and the room it needs.
        """
        needed = self.needed_bytes()
        with self.layout.together("checking free space"):
            if self.layout.rank == 0:
                need_space(self.run.files.run_dir, needed, "one checkpoint")

    # ---- loading ----------------------------------------------------------------------------------------------------

    def enter(self, path: Path, manifest: Manifest, *, full: bool | None = None) -> bool:
        """Take from a manifest what its stage is built with.

        Args:
            path: of the checkpoint.
            manifest: its own.
            full: with its optimizer state; None as the settings say.

        Returns:
            Whether to load its optimizer state.

        Raises:
            ConfigError: if the schedule is to begin anew and does not fit into what is left of the run.
        """
        run = self.run
        full = takes_optimizer(run, path, manifest) if full is None else full
        run.schedule_begins, run.model_only = manifest.schedule_begins, manifest.model_only
        if not full:
            self.left_behind, run.model_only = path, str(path.absolute())
            if self.settings.checkpoint.reset_schedule:
                self.settings.check_schedule(manifest.step)
                run.schedule_begins = manifest.step
        return full

    def load(self, path: Path, manifest: Manifest, *, full: bool) -> None:
        """Load a checkpoint into the current stage and verify that every tensor arrived.

        Args:
            path: of the checkpoint.
            manifest: its own.
            full: with its optimizer state.

        Raises:
            CheckpointError: if keys are missing, or anything differs from what was saved.
        """
        run, stage = self.run, self.run.stage
        self.load_stage(path / "tensors", manifest.optimizer_step, full)
        if full or manifest.imported is not None:
            self.verify(path, manifest)
        if run.schedule_begins == manifest.schedule_begins and manifest.imported is None:
            stage.scheduler.load_state_dict(manifest.scheduler)
        run.step, run.samples = manifest.step, manifest.data["samples"]
        if manifest.layout == self.layout.describe():
            with self.layout.together("loading generator states"):
                random_state.load(path / "rng", self.layout.rank)
        else:
            # Its streams mean nothing here; those this layout was formed with would begin the run's over again.
            run.seed_streams()
        run.plans = list(manifest.plans)
        run.guard = Guard(**manifest.guard) if manifest.guard else None
        run.owes_evaluation = manifest.owes_evaluation
        run.health = Health(**manifest.health)
        # Fresh moments are all of one age.
        run.ages = OptimizerAges.from_dict(manifest.ages) if full else OptimizerAges()
        attach(run.ages, stage.optimizer, stage.chunks, self.layout)
        # With fresh moments the state is not that of the files any more.
        self._saved = (manifest.step, manifest.stage, path) if full else None
        with self.layout.together("going on with the files of run.dir"):
            if self.layout.rank == 0:
                run.files.truncate_after(manifest.step)
                run.tracker.go_back(manifest.step, run.files.repeated_steps())
                self.folder.set_aside_after(path)
                for plan in manifest.plans:
                    run.files.plans.joinpath(f"step-{plan['step']:08d}.json").write_text(json.dumps(plan))

    def load_stage(self, tensors: Path, optimizer_step: int, with_optimizer: bool = True) -> None:
        """Fill the current stage's model and optimizer from a folder of tensors."""
        stage = self.run.stage
        # What is read for a while takes less room than the gradients.
        stage.release_gradients()
        load_tensors(
            tensors, stage.chunks, stage.optimizer, self.layout, step=optimizer_step, with_optimizer=with_optimizer
        )
        stage.restore_gradients()

    def verify(self, path: Path, manifest: Manifest) -> None:
        """Compare what was loaded with the fingerprints taken at the save.

        Raises:
            CheckpointError: naming the first tensor that differs.
        """
        found = take_fingerprints(self.run.stage.chunks, self.run.stage.optimizer, self.layout)
        if manifest.imported is not None:
            found = {name: numbers for name, numbers in found.items() if name.startswith("weight/")}
        name = first_difference(manifest.fingerprints, found)
        if name is not None:
            raise CheckpointError(
                f"checkpoint {path} was loaded, but {name} is not what was saved: the files are damaged or of another run; "
                "use an older checkpoint (run.resume=PATH)"
            )

    # ---- saving -----------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Describe the current state; collective."""
        run, stage = self.run, self.run.stage
        stage.gather_parameters()
        return Manifest(
            step=run.step,
            stage=stage.number,
            num_experts=stage.num_experts,
            optimizer_step=max(self.layout.gather_objects(get_step(stage.optimizer))),
            model=model_identity(self.settings, run.vocab_size),
            vocab_size=run.vocab_size,
            layout=self.layout.describe(),
            fingerprints=take_fingerprints(stage.chunks, stage.optimizer, self.layout),
            experts=self._of_stage().experts,
            data={
                "samples": run.samples,
                "seed": run.data.seed,
                "blends": [blend.to_dict() for blend in run.data.order.blends],
                "phases": [phase.to_dict() for phase in phases_of(self.settings.data, run.corpora)],
                "tokenizer": run.corpora[0][1].tokenizer_digest,
                "sequence_length": self.settings.data.sequence_length,
            },
            scheduler=stage.scheduler.state_dict(),
            plans=list(run.plans),
            stages=[entry.to_dict() for entry in run.course.entries[: run.course.begun]],
            guard=run.guard.to_dict() if run.guard else None,
            health=run.health.to_dict(),
            skipped_data=[list(stretch) for stretch in run.skipped_data],
            owes_evaluation=run.owes_evaluation,
            started_from=run.started_from,
            model_only=run.model_only,
            schedule_begins=run.schedule_begins,
            config=settings_to_dict(run.given),
            ages=run.ages.to_dict(),
            tracker_id=run.tracker.run_id,
            versions=versions(),
            tokens=run.tokens,
        )

    def _of_stage(self) -> _SameForStage:
        """What saves need to know of the current stage; collective the first time."""
        stage = self.run.stage
        if self._same is None or self._same.stage() is not stage:
            counts = count_parameters(self.settings.model, stage.chunks, self.layout)
            self._same = _SameForStage(weakref.ref(stage), expert_keys(stage.chunks, self.layout), counts)
        return self._same

    def needed_bytes(self, growth: float = 1.0) -> int:
        """Estimate of one checkpoint's size: weights, masters and two moments; collective.

        Args:
            growth: experts afterwards over experts now.
        """
        counts = self._of_stage().counts
        parameters = counts["parameters_total"] + (growth - 1) * counts["parameters_experts"]
        weight = 2 if self.settings.run.precision == "bf16" else 4
        return int(parameters * (weight + 12))

    def save_unless_saved(self, *, own: bool = False) -> Path:
        """Save the current state as an ordinary checkpoint, unless it is on disk already; collective.

        Args:
            own: do not take a checkpoint of another run for this one's.

        Returns:
            The folder that holds the current state; of another run right after a start from there.
        """
        self.settle()
        here = (self.run.step, self.run.stage.number)
        if self._saved and self._saved[:2] == here and (not own or belongs_to(self.run.files.run_dir, self._saved[2])):
            return self._saved[2]
        with self.run.watchdog.act(f"saving after step {self.run.step}"):
            self._task = self._begin(copy=False)
            self._task.run()
            return self._publish(self._task)

    def _begin(self, *, copy: bool) -> SaveTask:
        """Plan a save of the current state; collective."""
        run, stage = self.run, self.run.stage
        expanded = bool(run.plans) and run.plans[-1]["step"] == run.step
        name = checkpoint_name(run.step, stage.number, expanded)
        manifest, folder = self.manifest(), self.folder
        self._reserved = name
        staging = folder.reserve(name, self.needed_bytes())
        generators = random_state.capture()
        save = begin_save_tensors(
            staging / "tensors", stage.chunks, stage.optimizer, self.layout, copy=copy, known=self._of_stage().plan
        )
        return SaveTask(folder, name, manifest, save, generators)

    def _publish(self, task: SaveTask) -> Path:
        self._task = None
        path, seconds = task.finish()
        self.saved(path, seconds, task.manifest)
        return path

    def writing(self) -> bool:
        """Whether this rank is still writing a checkpoint in the background."""
        return self._task is not None and self._task.running

    def settle(self) -> None:
        """Wait for a save in the background, and publish it; collective.

        Raises:
            CheckpointError: on all ranks, if it failed and `checkpoint.on_failure` is stop.
        """
        if self._task is not None:
            with self._may_fail(), self.run.watchdog.act("ending a save in the background"):
                self._publish(self._task)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        """Let a save at an interval fail where `checkpoint.on_failure` says so; all ranks have agreed on the failure."""
        try:
            yield
        except CheckpointError as e:
            failed, self._task = self._reserved, None
            if self.settings.checkpoint.on_failure == "stop":
                raise
            if failed is not None:
                # Where the disk is full, what is left of it would keep it full.
                self.folder.discard(failed)
            self.run.event("checkpoint_failed", error=str(e))
            self.run.console.say(f"step {self.run.step}: {e}; training goes on, older checkpoints are as they were")

    def saved(self, path: Path, seconds: float, manifest: Manifest) -> None:
        """Take note of a published checkpoint, and retire old ones."""
        self._saved = (manifest.step, manifest.stage, path)
        record_checkpoint(self.run, path, seconds, manifest.step)
        for name, reason in self.folder.retire({plan["step"] for plan in self.run.plans}).items():
            self.run.event("checkpoint_not_removed", checkpoint=name, reason=reason)
            self.run.console.say(f"old checkpoint {name} could not be removed ({reason}): it is tried again later")

    def save_if_due(self, written: bool) -> None:
        """Publish what has been written in the background, and save at the configured interval; collective.

        The end of a run is saved by `Run`.

        Args:
            written: whether no rank was writing any more after the last step; the same on all.
        """
        if written:
            self.settle()
        config, run = self.settings.checkpoint, self.run
        if run.health.bad:
            # Nothing that a rollback could go back to is retired for a state that may be spoilt.
            return
        if not config.interval_steps or run.step % config.interval_steps or run.step >= self.settings.run.steps:
            return
        self.settle()
        if self._saved and self._saved[:2] == (run.step, run.stage.number):
            return
        if not config.asynchronous:
            with self._may_fail():
                self.save_unless_saved()
            return
        began = time.perf_counter()
        with self._may_fail(), run.watchdog.act(f"copying for a save after step {run.step}"):
            self._task = self._begin(copy=True)
            self._task.start()
        if self._task is not None:
            stall = time.perf_counter() - began
            run.console.say(f"step {run.step}: saving in the background, after a stop of {stall:.2f} s")

    def abandon(self) -> None:
        """Let go of a save that will not be published, as the run ends with an error; waits for this rank's disk."""
        if self._task is not None:
            self._task.wait()
            self._task = None
