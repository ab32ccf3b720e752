"""One run: everything that lives longer than a stage, and the loop over its steps.

`Run.open` prepares or resumes; `Run.train` is the loop one can read aloud. The expansion is one line in it
(`train/expansion.py` carries it out between two optimizer steps, on all ranks or none).
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from model.family_routing import set_release
from parallel.errors import CoppiceError, DataError
from parallel.layout import Layout
from parallel.optimizer_ages import OptimizerAges
from train import random_state
from train.checkpoint.folder import Manifest
from train.checkpoint.persistence import Persistence
from train.config import RunSettings
from train.console import Console
from train.course import settings_on
from train.data.blends import Position, refuse_used_up, stream_blends
from train.data.index_files import drop_broken
from train.data.sample_order import Blend, SampleOrder
from train.data.stream import DataStream, phases_of
from train.evaluation import Evaluated, Evaluation, evaluate
from train.expansion import expand
from train.graphs import capture_when_due, drop_graphs
from train.guard import Guard, watch
from train.health import Health, Stretch, attend, beyond, left_out
from train.named import named
from train.observation import Observer
from train.opening import restore_state, write_start
from train.profile import Profiler
from train.record import record_step
from train.requests import RequestFolder, refuse_waiting, take_request
from train.run_files import RunFiles
from train.signals import Stopping, StopRequest
from train.stage import Stage
from train.status import tell_status
from train.step import optimizer_step
from train.tracking import Tracker
from train.watchdog import Watchdog
from upcycle.course import Course
from upcycle.plan import last_growth


def _quiet(error: CoppiceError) -> CoppiceError:
    """Mark an error whose cause another rank prints."""
    error.speaks = False
    return error


class Run:
    """State of a run between steps: the stage, the position, and where results go. Make it with `Run.open`."""

    def __init__(self, settings: RunSettings, layout: Layout, corpora: list[Any]) -> None:
        # As the user gave them; `settings` is what they mean on the run's course.
        self.given = settings
        self.settings = settings
        # Nobody listens until the job hands over one that does.
        self.stop = StopRequest(Path(settings.run.dir), layout.rank)
        self.course = Course(settings.model.num_experts, ())
        self.layout = layout
        self.corpora = corpora
        self.vocab_size: int = corpora[0][1].vocab_size
        self.files = RunFiles(settings.run.dir)
        self.console = Console(layout.rank, settings.run)
        self.step = 0
        self.samples = 0
        self.plans: list[dict[str, Any]] = []
        # Optimizer state that is younger than Adam's step count.
        self.ages = OptimizerAges()
        # What has been seen since the last expansion.
        self.guard: Guard | None = None
        # Checkpoint of another run that this one began with.
        self.started_from: str | None = None
        # The last one, of whichever run, that was continued with fresh moments; and the step the schedule counts from.
        self.model_only: str | None = None
        self.schedule_begins = 0
        # Whether all ranks know that a request waits.
        self._asked = False
        # Whether no rank was writing a checkpoint in the background when the last step ended.
        self._all_written = True
        # What the last steps were like, what is left out of the training stream, and how often this job has gone back.
        self.health = Health()
        self.skipped_data: list[Stretch] = []
        self.rollbacks = 0
        # Watches nothing until the job starts it.
        self.watchdog = Watchdog()
        self.profiler = Profiler(self)
        # Checkpoints that were passed over at the start, and why.
        self.skipped: list[dict[str, str]] = []
        # Keeps other jobs off the run directory.
        self.lock: IO[str] | None = None
        # Whether an evaluation that is due at this step was broken off by a request to stop.
        self.owes_evaluation = False
        # What could not be written on this rank since the last step.
        self._unwritten: CoppiceError | None = None
        # What measures the steps of a stage.
        self._observer: tuple[Stage, Observer] | None = None
        # The last evaluation.
        self.evaluated: Evaluated | None = None
        self.tracker: Tracker = Tracker()
        self.stage: Stage
        self.data: DataStream
        self.evaluation: Evaluation
        self.persistence = Persistence(self)

    @classmethod
    def open(cls, settings: RunSettings, layout: Layout, corpora: list[Any], stop: StopRequest | None = None) -> "Run":
        """Prepare a fresh run, or resume one from a checkpoint, ready to train.

        Args:
            settings: checked settings.
            layout: process groups of the first stage; a run that is resumed in a later one changes them.
            corpora: opened corpora (`train.data.stream.open_corpora`).
            stop: hears requests to stop.

        Raises:
            CoppiceError: if the run directory is of another run, or a checkpoint cannot be used.
        """
        run, source, manifest = cls.restore(settings, layout, corpora)
        run.stop = stop or run.stop
        write_start(run, source, manifest)
        return run

    @classmethod
    def restore(
        cls, settings: RunSettings, layout: Layout, corpora: list[Any]
    ) -> tuple["Run", Path | None, Manifest | None]:
        """The state a run starts from, built and loaded, without its tracker and its records.

        Args:
            settings: checked settings.
            layout: process groups of the first stage.
            corpora: opened corpora.

        Returns:
            The run, and the checkpoint that its state comes from with its manifest.

        Raises:
            CoppiceError: as `open`.
        """
        run = cls(settings, layout, corpora)
        return run, *restore_state(run)

    def take_course(self, course: Course) -> None:
        """Follow a course from here on, if all of what is to come can be done.

        Raises:
            ConfigError: naming the stage, in mcore's words where it is mcore that refuses; nothing has changed then.
        """
        settings = settings_on(course, self.given, self.layout)
        if hasattr(self, "data"):
            # A blend may begin with a stage.
            self.data.follow(self._order_of(settings, self.data.order.blends, self.position()))
        self.course, self.settings = course, settings

    def enter_stage(self, plans: list[dict[str, Any]]) -> None:
        """Take note that the next stage holds the run's state now; `plans` are those of all stages entered."""
        self.plans, self.course = plans, self.course.entered()

    def enter_layout(self, number: int) -> Layout:
        """Go over to the parallel layout of a stage, on the same processes; collective.

        Where the layout stays nothing is touched. Otherwise nothing may be left of a stage that was built in the old one:
        its process groups are destroyed, the generators start anew, and batches are read for other coordinates.

        Args:
            number: of the stage.

        Returns:
            The layout to build the stage in.
        """
        config = self.settings.parallel_of(number)
        if config.describe(self.layout.world_size) != self.layout.describe():
            self.layout = self.layout.change(config, self._stream_seed(number))
            if hasattr(self, "data"):
                self.data.enter(self.layout)
                self.console.layout(self.settings, self.layout.describe(), self.data.micro_batches)
        return self.layout

    def seed_streams(self) -> None:
        """Start the generators of the current stage anew; what was drawn while it was built does not count then."""
        self.layout.seed_streams(self._stream_seed(self.stage.number))

    def _stream_seed(self, number: int) -> int:
        """Seed of the generators in a layout that begins in stage `number` at the current step.

        Another one than that of the run, or dropout would repeat what it drew at the run's beginning.
        """
        return random_state.named_seed(f"layout/{self.settings.run.seed}/{number}/{self.step}")

    def open_data(self, manifest: Manifest | None) -> None:
        """Read from where a checkpoint stands, or from the beginning."""
        data, here = self.settings.data, self.position(manifest)
        with self.layout.together("looking at the index of the samples"):
            if self.layout.rank == 0 and (broken := drop_broken(self.files.run_dir / "cache")):
                more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
                self.console.say(
                    f"index files that are not what was written are made again: {', '.join(broken[:3])}{more}"
                )
        order = self._order_of(self.settings, self.persistence.known_blends(manifest), here)
        self.data = DataStream(
            data,
            self.corpora,
            order.blends,
            # The order a run began with stays, whatever run.seed says later.
            manifest.data["seed"] if manifest and not manifest.imported else self.settings.run.seed,
            self.layout,
            self.files.run_dir / "cache",
        )

    def position(self, manifest: Manifest | None = None) -> Position:
        """Where the run stands in its training stream, or where a checkpoint does; the beginning before it has data."""
        step, sample, tokens = self.step, self.samples, self.tokens
        if manifest is not None:
            step, sample, tokens = manifest.step, manifest.data["samples"], manifest.tokens
        batch, per_step = self.settings.data.global_batch_size, self.settings.tokens_per_step()
        return Position(step, sample, tokens, batch, per_step, tuple(self.skipped_data))

    def _order_of(self, settings: RunSettings, known: Sequence[Blend], here: Position) -> SampleOrder:
        """The training stream from here on as settings with all of their stages have it.

        Raises:
            DataError: if it has nothing left before the end of the run.
        """
        phases = phases_of(settings.data, self.corpora)
        order = SampleOrder(stream_blends(phases, known, here, [stage.at_step for stage in settings.upcycle.stages]))
        refuse_used_up(order, here, settings.run.steps)
        return order

    def reopen_data(self, manifest: Manifest) -> None:
        """Go back to where a checkpoint stands."""
        self.data.close()
        self.open_data(manifest)
        # What was found at a step that is trained again is not known of the state that it leads to now.
        self.evaluated = None

    def event(self, name: str, **details: Any) -> None:
        """Record something that happened; rank 0 writes."""
        if self.layout.rank == 0:
            self.write(lambda: self.files.append_event(name, self.step, **details))

    def write(self, act: Callable[[], None]) -> None:
        """Write to the run directory on this rank alone; a failure is raised by all ranks together after the next step."""
        try:
            act()
        except CoppiceError as e:
            self._unwritten = self._unwritten or e

    def train(self) -> str:
        """Train to the end of the run, or to a request to stop.

        Returns:
            Why it ended: finished, stop_at_step or requested.
        """
        run = self.settings.run
        known = {"step": self.step, "stage": self.stage.number, "num_experts": self.stage.num_experts}
        self.console.open_panel(lambda: self.watchdog.doing, known, self.settings)
        try:
            self.stop.raise_if_agreed(self.layout)
            if self.owes_evaluation or (self.guard is not None and not self.guard.losses):
                # The job ended before an evaluation that was due here.
                evaluate(self)
                watch(self)
            while self.step < run.steps:
                if self.expansion_due():
                    with named("the switch"):
                        expand(self)
                capture_when_due(self)
                with self.profiler.step(self.step + 1):
                    stopping = self._one_step()
                self._evaluate_if_due()
                watch(self)
                self.persistence.save_if_due(self._all_written)
                if stopping:
                    raise Stopping
                if self.step == run.stop_at_step:
                    return self._finish("stop_at_step")
        except Stopping:
            return self._finish("requested")
        return self._finish("finished")

    def expansion_due(self) -> bool:
        """Whether the next stage begins here, between this step and the next: as configured, or as requested."""
        stages = self.settings.upcycle.stages
        if self.stage.number < len(stages) and stages[self.stage.number].at_step == self.step:
            return True
        asked, self._asked = self._asked, False
        return asked and take_request(self)

    def _one_step(self) -> bool:
        """Train one step and record it; True if any rank was asked to stop."""
        self.watchdog.begin(f"step {self.step + 1}")
        began = time.perf_counter()
        observer = self._observe()
        observer.begin(self.step + 1)
        batch = self.settings.data.global_batch_size
        self.samples = beyond(self.samples, batch, self.skipped_data)
        with observer.clock.part("data"):
            batches = self.data.train(self.samples)
        learning_rate, released = self.stage.optimizer.param_groups[0]["lr"], self.let_go()
        rate = self.settings.model.bias_update_rate
        # mcore reads it from the model's configuration when it moves the biases at the end of a step.
        self.stage.chunks[0].config.moe_router_bias_update_rate = rate * self.settings.upcycle.bias_rate_factor(
            self.stage.number, self.step
        )
        loss, grad_norm, made = optimizer_step(self.stage, self.layout, batches, observer.clock)
        share_LE = self.stage.load.take(self.layout)
        flags = [self.stop.wanted(), self._unwritten is not None, self._request_waits(), self.persistence.writing()]
        sums = self.layout.sum_over_world(torch.cat([loss[None], torch.tensor(flags, device=loss.device).double()]))
        total, stopping, failed, asked, writing = sums.tolist()
        self._asked, self._all_written = asked > 0, writing == 0
        seen = (self.samples, batch)
        self.step += 1
        self.samples += batch
        mean = total / (self.data.micro_batches * self.layout.data_size)
        figures = {"lm_loss": mean, "grad_norm": grad_norm, "learning_rate": learning_rate, "released": released}
        seconds = time.perf_counter() - began
        record_step(self, figures | observer.figures(self.step, seconds, grad_norm), seconds, share_LE)
        if failed:
            raise self._unwritten or _quiet(DataError("run.dir cannot be written on rank 0"))
        attend(self, self.health.judge(self.settings.health, self.step, mean, made, seen), seen)
        return stopping > 0

    def _observe(self) -> Observer:
        """What measures the steps of the stage that trains."""
        if self._observer is None or self._observer[0] is not self.stage:
            self._observer = (self.stage, Observer(self.settings, self.stage, self.layout, self.vocab_size))
        return self._observer[1]

    @property
    def tokens(self) -> int:
        """Training tokens seen; samples that are left out do not count."""
        return (self.samples - left_out(self.samples, self.skipped_data)) * self.settings.data.sequence_length

    def _request_waits(self) -> bool:
        """Whether this rank, which must be rank 0, sees a request that nobody has decided on."""
        found: list[Path | None] = [None]
        if self.layout.rank == 0:
            # A folder that cannot be read is told of by all ranks together, after this step.
            self.write(lambda: found.__setitem__(0, RequestFolder(self.files.run_dir).waiting()))
        return found[0] is not None

    def let_go(self) -> float:
        """Set how far the model has let go of family routing at this step; 1 is plain top-K."""
        fraction = self.settings.upcycle.release_fraction(self.stage.number, self.step)
        set_release(self.stage.chunks, fraction)
        return fraction

    def parents(self) -> list[list[int]] | None:
        """Parent of each expert at the last expansion, per MoE layer; None before any."""
        grown = last_growth(self.plans)
        return [layer["parents"] for layer in grown["layers"]] if grown else None

    def next_event(self) -> str:
        stages = self.settings.upcycle.stages[self.stage.number :]
        if stages:
            return f"{'expansion' if stages[0].grows() else 'layout change'} after step {stages[0].at_step}"
        return f"end at {self.settings.run.steps}"

    def _evaluate_if_due(self) -> None:
        interval = self.settings.evaluation.interval_steps
        if self.step == self.settings.run.steps or (interval and self.step % interval == 0):
            evaluate(self)
            self.tracker.draw_load(self.step)

    def _finish(self, reason: str) -> str:
        self.profiler.end()
        self.watchdog.begin("the end of the run")
        drop_graphs(self, "the end of the run")
        self.persistence.settle()
        if self.step and (self.settings.checkpoint.save_final or reason != "finished"):
            self.persistence.save_unless_saved()
        if reason == "finished":
            refuse_waiting(self, f"the run has finished at step {self.step}")
        asked = self.stop.told(self.layout) if reason == "requested" else None
        self.event("stop", reason=reason, request=asked)
        self.tracker.draw_load(self.step, always=True)
        tell_status(self, "finished" if reason == "finished" else "stopped", reason=asked or reason, exit_code=0)
        with self.layout.together("ending the run"):
            if self.layout.rank == 0:
                self.stop.clear()
        self.console.say(f"stopped after step {self.step}: {asked or reason}")
        return reason

    def close(self) -> None:
        """End the threads of this run."""
        self.console.close()
        self.profiler.abandon()
        self.persistence.abandon()
        if hasattr(self, "stage") and self.stage.graphs is not None:
            # Before their communicators are.
            self.stage.graphs.abandon()
        self.tracker.close()
        if hasattr(self, "data"):
            self.data.close()
        if self.lock is not None:
            self.lock.close()
