"""Which checkpoint a run starts from: found, checked file by file by all ranks, and refused or passed over by name.

`auto` takes the newest checkpoint of the run that is whole, and tells of every newer one why it was not taken. Where there
are checkpoints and none is whole the run does not start: it never begins anew behind the back of its user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import HOW_IT_RUNS, ModelConfig, padded_vocab_size
from parallel.errors import CheckpointError
from parallel.layout import Layout
from parallel.optimizer_ages import NEVER, OptimizerAges
from train.checkpoint.files import extra_files, wrong_files
from train.checkpoint.folder import (
    DamagedCheckpoint,
    Manifest,
    belongs_to,
    list_checkpoints,
    read_manifest,
    resolve,
    unsealed,
)
from train.config import RunSettings

if TYPE_CHECKING:
    from train.run import Run

# Keys of the model group that may differ between a checkpoint and the run that continues it: they change how the
# network is computed or trained, not which tensors it has or what they mean. The number of experts has rules of its own
# (`upcycle/course.py`).
_FREE = HOW_IT_RUNS | {"num_experts"}


def model_identity(settings: RunSettings, vocab_size: int) -> dict[str, Any]:
    """What must be equal for a checkpoint to belong to a run, as dotted keys."""
    values = {f"model.{k}": v for k, v in asdict(settings.model).items() if k not in _FREE}
    values["run.precision"] = settings.run.precision
    values["padded vocabulary"] = padded_vocab_size(settings.model, vocab_size)
    return values


def find_start(run: "Run") -> tuple[Path | None, list[dict[str, str]]]:
    """The checkpoint to start from, agreed on by all ranks; nothing is written yet.

    Returns:
        The checkpoint, None for a fresh start; and those that were passed over, with what is wrong with each.

    Raises:
        CoppiceError: if run.resume names none, run.dir holds a run that cannot be continued, or no checkpoint is whole.
    """
    candidates: list[Path] = []
    with run.layout.together("looking for a checkpoint"):
        if run.layout.rank == 0:
            candidates = _candidates(run)
    skipped: list[dict[str, str]] = []
    for path in run.layout.from_rank_zero(candidates):
        problem = examine(run, path)
        if problem is None:
            return path, skipped
        skipped.append({"checkpoint": path.name, "problem": problem})
    if not skipped:
        return None, []
    first = skipped[0]
    if len(skipped) == 1:
        raise DamagedCheckpoint(
            f"checkpoint {first['checkpoint']}: {first['problem']}: use an older checkpoint (run.resume=PATH)"
        )
    raise DamagedCheckpoint(
        f"none of the {len(skipped)} checkpoints in run.dir={run.settings.run.dir} is whole; the newest, "
        f"{first['checkpoint']}: {first['problem']}: restore one, or start anew in another run.dir"
    )


def _candidates(run: "Run") -> list[Path]:
    """What may be started from, the best first; one checkpoint where it was named."""
    settings = run.settings.run
    run_dir = Path(settings.dir)
    own = list_checkpoints(run_dir)
    if settings.resume == "auto":
        if not own and unsealed(run_dir):
            # Says that it is not complete, or of another format. A fresh start would be silent about it.
            read_manifest(unsealed(run_dir)[-1])
        return own[::-1]
    if own and settings.resume != "never" and _began_with(own, Path(settings.resume)):
        # The same command again: the run has come further since, and what it began with may be gone.
        return own[::-1]
    found = resolve(run_dir, settings.resume)
    if found is None:
        return []
    if own and found.parent != own[-1].parent:
        raise CheckpointError(
            f"run.resume={settings.resume} is of another run, but run.dir={settings.dir} holds checkpoints of its own: "
            "choose another run.dir"
        )
    return [found]


def _began_with(own: Sequence[Path], named: Path) -> bool:
    """Whether a run, whose checkpoints are `own`, once began with a checkpoint of another, or with the run it is of."""
    for path in reversed(own):
        try:
            began = read_manifest(path).started_from
        except DamagedCheckpoint:
            continue
        return began is not None and named.resolve() in (Path(began), Path(began).parent.parent)
    return False


def examine(run: "Run", path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if they are what was written; collective.

    Raises:
        CheckpointError: if it is whole, and of another model or format.
    """
    problem, manifest = None, None
    with run.layout.together("checking the checkpoint"):
        if run.layout.rank == 0:
            try:
                manifest = read_manifest(path)
            except DamagedCheckpoint as e:
                problem = e.problem
            else:
                check_identity(run.settings, run.vocab_size, path, manifest)
                if takes_optimizer(run, path, manifest):
                    check_moments(path, manifest)
    files, problem = run.layout.from_rank_zero((manifest.files if manifest else {}, problem))
    if problem is not None:
        return str(problem)
    problem = damage(run.layout, path, files, run.settings.checkpoint.verify)
    with run.layout.together("looking at the checkpoint's folder"):
        extra = extra_files(path, files) if run.layout.rank == 0 and problem is None else []
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            run.console.say(f"checkpoint {path.name}: not its own files, left unread: {', '.join(extra[:3])}{more}")
    return problem


def damage(layout: Layout, path: Path, files: Mapping[str, Sequence[Any]], level: str) -> str | None:
    """What is wrong with the files of a checkpoint, looked at by all ranks; None if nothing; collective.

    Args:
        layout: of the job.
        path: of the checkpoint.
        files: what its manifest says of them.
        level: sizes or digests.
    """
    found = layout.gather_objects(wrong_files(path, files, level, (layout.rank, layout.world_size)))
    return next((problem for problem in found if problem is not None), None)


def takes_optimizer(run: "Run", path: Path, manifest: Manifest) -> bool:
    """Whether a start takes a checkpoint's optimizer state.

    `checkpoint.load=model_only` is for the checkpoint that a run begins or goes on with once. The same command again, as
    a batch system gives it, finds checkpoints with moments made since; only one that is named is taken without them again.
    """
    if manifest.imported is not None:
        return False
    if run.settings.checkpoint.load == "full":
        return True
    made_since = manifest.model_only is not None and belongs_to(run.files.run_dir, path)
    return made_since and Path(run.settings.run.resume).resolve() != path.resolve()


def check_identity(settings: RunSettings, vocab_size: int, path: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint of another model.

    Args:
        settings: that it shall fit.
        vocab_size: tokens of the tokenizer.
        path: of the checkpoint.
        manifest: its own.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    mine = model_identity(settings, vocab_size)
    # What a checkpoint does not know of was as it is by default.
    there = {f"model.{f.name}": f.default for f in fields(ModelConfig) if f.name not in _FREE} | manifest.model
    for key in sorted(mine.keys() | there.keys()):
        if mine.get(key) != there.get(key):
            raise CheckpointError(
                f"checkpoint {path} is of another model: {key} was {there.get(key)} there and is "
                f"{mine.get(key)} here: choose another run.dir, or the settings it was made with"
            )


def check_moments(path: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint whose optimizer is not that of its model, or was started anew without a record of it.

    Every parameter has both of Adam's moments, and after steps neither is zero. A single expert may have none to speak of,
    if no token ever came its way; all experts of a layer cannot.

    Raises:
        CheckpointError: naming the first moment at fault, and the flag to go on knowingly.
    """
    steps = manifest.optimizer_step
    if steps == 0:
        return
    ages = OptimizerAges.from_dict(manifest.ages)
    begun = ages.begun()
    for name in manifest.fingerprints:
        kind, key = name.split("/", 1)
        place = manifest.experts.get(key, {})
        # What balances the load is moved by rule, not by the optimizer.
        if kind != "weight" or place.get("kind") == "selection_bias":
            continue
        for number, moment in enumerate(("exp_avg", "exp_avg_sq")):
            rows = manifest.fingerprints.get(f"{moment}/{key}")
            if rows is None:
                fault = f"has no {moment}/{key}: its optimizer is not that of the model"
            else:
                since = [
                    begun.get(place["layer"], {}).get(row, NEVER) if place else ages.others for row in range(len(rows))
                ]
                # A tensor of zeros has the fingerprint 0 (`model/fingerprint.py`).
                old = [row for row, start in zip(rows, since, strict=True) if start[number] != steps]
                if not old or any(old):
                    continue
                fault = f"has made {steps} optimizer steps, but {moment}/{key} is zero: its optimizer was started anew"
            raise CheckpointError(
                f"checkpoint {path} {fault}: use an older checkpoint, or checkpoint.load=model_only to go on with fresh "
                "moments"
            )
