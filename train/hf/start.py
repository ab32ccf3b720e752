"""A run that begins with a published model (`model.init_from=hf:DIR`), or with a checkpoint imported from one.

Its architecture comes from config.json: `with_architecture` puts it into the configuration before anything is checked. Its
weights and masters are read by every rank (`begin`). Moments are fresh by design, the schedule begins at its start. What
belongs to the model besides weights is kept in RUN_DIR/huggingface, from where an export takes it; a run that is started
again with the same command reads config.json there if the source is gone, and goes on with its own checkpoints.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import HF_PREFIX, ModelConfig, padded_vocab_size
from model.hf.registry import family_of
from model.hf.source import CONFIG, TOKENIZER_FILES, carry_over, read_config
from parallel.errors import CheckpointError, ConfigError, DataError
from train.checkpoint.files import PUBLISHED as KEPT
from train.checkpoint.files import is_sealed
from train.checkpoint.folder import DamagedCheckpoint, Manifest, belongs_to, list_checkpoints, read_manifest, resolve
from train.config import RunSettings
from train.data.tokenizers import tokens_digest

if TYPE_CHECKING:
    from train.run import Run

# About training: the family's way of it replaces the preset's, but not what the command line says.
_TRAINED = ("balancing", "aux_loss_coeff", "bias_update_rate", "init_std")


def with_architecture(tree: Any, overrides: Sequence[str]) -> None:
    """Put the architecture of the published model, where a configuration names one, into its `model` group.

    Args:
        tree: composed configuration; changed in place.
        overrides: of the command line. A key of the architecture must not say something else there.

    Raises:
        CoppiceError: if the model cannot be read or expressed, or the command line contradicts it.
    """
    found = _named_model(tree)
    if found is None:
        return
    folder, experts, told_before = found
    config = read_config(folder)
    family = family_of(config)
    said = {word.lstrip("+").split("=", 1)[0] for word in overrides}
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in _TRAINED}
    before = {k: v for k, v in told_before.get("model", {}).items() if k in _TRAINED}
    training = defaults | family.training_values(config) | before
    values = {k: v for k, v in training.items() if f"model.{k}" not in said}
    architecture = family.architecture_values(config)
    if experts is not None:
        architecture["num_experts"] = experts
    for name, value in architecture.items():
        told = tree.model[name]
        free = name == "num_experts" and experts is not None
        if f"model.{name}" in said and told != value and not free:
            raise ConfigError(f"model.{name}={told}, but {folder / CONFIG} makes it {value}: leave the key out")
        values[name] = told if free and f"model.{name}" in said else value
    for name, value in values.items():
        try:
            OmegaConf.update(tree, f"model.{name}", value)
        except OmegaConfBaseException as e:
            raise ConfigError(f"{folder / CONFIG} makes model.{name}={value!r}: {str(e).splitlines()[0]}") from None
    if "run" in told_before and "run.precision" not in said:
        tree.run.precision = told_before["run"]["precision"]


class _Named(NamedTuple):
    """What a configuration says of a published model.

    Attributes:
        folder: with its config.json.
        experts: of the checkpoint that the run goes on from, which may have been expanded; None for those of config.json.
        told_before: the configuration of that checkpoint; empty where there is none.
    """

    folder: Path
    experts: int | None = None
    told_before: Mapping[str, Any] = MappingProxyType({})


def _named_model(tree: Any) -> _Named | None:
    """What a configuration names: a folder, an imported checkpoint, or a run that once began with either."""
    run_dir, resume = Path(str(tree.run.dir)), Path(str(tree.run.resume))
    own = list_checkpoints(run_dir) if (run_dir / KEPT / CONFIG).is_file() else []
    if tree.model.init_from is not None:
        name = str(tree.model.init_from).removeprefix(HF_PREFIX)
        if name in ("", str(tree.model.init_from)):
            # Of no form that is known: `ModelConfig` says so.
            return None
        folder = Path(name)
        return _Named(run_dir / KEPT if own and not (folder / CONFIG).is_file() else folder)
    if is_sealed(resume) and (resume / KEPT / CONFIG).is_file():
        manifest = read_manifest(resume)
        if manifest.imported is not None:
            return _Named(resume / KEPT, manifest.num_experts, manifest.config)
    for path in reversed(own):
        try:
            manifest = read_manifest(path)
        except DamagedCheckpoint:
            continue
        first = manifest.plans[0]["experts_before"] if manifest.plans else manifest.num_experts
        return _Named(run_dir / KEPT, first, manifest.config)
    return None


def check_published(settings: RunSettings, corpora: Sequence[Any]) -> None:
    """Check a published model against the corpora and the configuration, before anything is joined or built.

    Raises:
        CoppiceError: naming what is missing, unknown, of another shape, or of another tokenizer.
    """
    from model.hf.read import PublishedReader
    from model.hf.source import PublishedModel

    corpus = corpora[0][1]
    # Refuses a tokenizer with more tokens than the model has rows.
    padded_vocab_size(settings.model, corpus.vocab_size)
    named = settings.model.init_from
    if named is None or list_checkpoints(Path(settings.run.dir)):
        return
    if settings.run.resume not in ("auto", "never"):
        path = resolve(Path(settings.run.dir), settings.run.resume)
        # A checkpoint of a run that began with the same model has no other source of weights behind it.
        if path is not None and read_manifest(path).config.get("model", {}).get("init_from") != named:
            raise ConfigError(
                f"run.resume={settings.run.resume} and model.init_from={named} both say what the run begins with: use one"
            )
        return
    folder = Path(named.removeprefix(HF_PREFIX))
    PublishedReader(PublishedModel(folder), settings.model)
    check_tokenizer(folder, corpus)


def begin(run: "Run", source: Path | None, manifest: Manifest | None) -> None:
    """Fill the model of a run that begins with a published one, and keep what belongs to it; collective.

    Args:
        run: its first stage is built; a checkpoint, if it starts from one, is loaded.
        source: the checkpoint it starts from.
        manifest: of that checkpoint.

    Raises:
        CoppiceError: if the weights cannot be read, or do not fit.
    """
    named = run.settings.model.init_from
    own = source is not None and belongs_to(run.files.run_dir, source)
    if source is None and named is not None:
        _fill(run, Path(named.removeprefix(HF_PREFIX)))
    elif source is not None and not own:
        if (source / KEPT).is_dir():
            _keep(run, source / KEPT)
        if manifest is not None and manifest.imported is not None:
            run.console.say(
                f"{source} was imported from {manifest.imported['source']}: weights and masters are its own, Adam's moments "
                "are fresh, as it has none"
            )


def _fill(run: "Run", folder: Path) -> None:
    from model.hf.fill import fill
    from model.hf.read import PublishedReader
    from model.hf.source import PublishedModel

    began = time.perf_counter()
    with run.layout.together("opening the published model"):
        reader = PublishedReader(PublishedModel(folder), run.settings.model)
    fill(reader, run.stage.chunks, run.stage.optimizer, run.layout)
    _keep(run, folder)
    family, size = reader.family.model_type, reader.bytes_read() / 2**20
    if reader.left_out:
        run.console.say(f"{folder}: {len(reader.left_out)} tensors are left out, first {reader.left_out[0]}")
    run.console.say(
        f"began with {folder} ({family}, {len(reader.tensors)} tensors, {size:,.1f} MiB) in "
        f"{time.perf_counter() - began:.1f} s: weights and masters are its own, Adam's moments are fresh"
    )
    run.event("published_model", source=str(folder.absolute()), family=family, left_out=len(reader.left_out))


def _keep(run: "Run", folder: Path) -> None:
    """Carry config.json, tokenizer files and the like over into the run directory."""
    with run.layout.together("keeping the files of the published model"):
        if run.layout.rank == 0:
            try:
                carry_over(folder, run.files.run_dir / KEPT)
            except OSError as e:
                raise DataError(
                    f"run.dir={run.files.run_dir} cannot be written ({e.strerror}): choose another"
                ) from None


def check_tokenizer(folder: Path, corpus: Any) -> None:
    """Refuse a corpus of other tokens than those that a model knows, where its folder says which.

    Args:
        folder: of the published model.
        corpus: manifest of the corpus.

    Raises:
        DataError: naming both.
    """
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    digests = [tokens_digest(file.read_bytes(), corpus.eod) for file in files]
    if digests and corpus.tokenizer_digest not in digests:
        raise DataError(
            f"corpus {corpus.prefix} holds tokens of {corpus.tokenizer_spec}, not of the tokenizer in {folder}: build it "
            f"with `python -m train.corpus ... --tokenizer huggingface:{folder / TOKENIZER_FILES[0]}`"
        )


def check_imported(path: Path, manifest: Manifest, corpus: Any) -> None:
    """`check_tokenizer` for an imported checkpoint.

    Raises:
        CoppiceError: naming what does not fit.
    """
    # What came of a dense import by from-dense has no config.json, and so nothing where there was no tokenizer either.
    if not any(name.startswith(f"{KEPT}/") for name in manifest.files):
        return
    if not (path / KEPT).is_dir():
        raise CheckpointError(
            f"checkpoint {path} was imported from {manifest.imported} and lacks {KEPT}: import it again"
        )
    check_tokenizer(path / KEPT, corpus)
