"""Composes a run's settings from `configs/` and the command line, and turns Hydra's errors into one clear line.

`load_settings(["model=tiny", "run.steps=20"])` returns the typed `RunSettings`. Unknown keys are refused with the nearest
known one, wrong types with the type that was expected.
"""

import dataclasses
import importlib
import importlib.metadata
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import ModelConfig
from model.mcore_fields import refuse_values
from parallel.errors import ConfigError, DataError, nearest, shown
from train.checkpoint.files import PUBLISHED
from train.config import RunSettings
from train.schema.data import BlendPhase, CorpusWeight
from train.schema.evaluation import EvaluationSet
from train.typed import can_be_given, check_value, declared, words
from upcycle.stage_config import StageConfig


def register_schema() -> None:
    """Make the typed schema known to Hydra, as the base of `configs/config.yaml`."""
    ConfigStore.instance().store(name="schema", node=RunSettings)


def config_groups() -> dict[str, list[str]]:
    """The presets on disk: group name -> option names."""
    root = Path(__file__).resolve().parent.parent / "configs"
    return {d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(root.iterdir()) if any(d.glob("*.yaml"))}


# Elements of the schema's lists.
_ELEMENTS = (StageConfig, CorpusWeight, BlendPhase, EvaluationSet)


def known_keys(cls: type = RunSettings, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, without those inside elements of lists."""
    keys = []
    for f in dataclasses.fields(cls):
        kind = f.type
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(kind) and kind not in _ELEMENTS:
            keys += known_keys(typing.cast(type, kind), f"{prefix}{f.name}.")
    return keys


def _nearest_by_last_word(word: str) -> str:
    """`nearest` for a key without its group; of an element of a list in a preset OmegaConf leaves out where it is."""
    lasts = {f.name: f.name for cls in _ELEMENTS for f in dataclasses.fields(cls)}
    lasts |= {key.rsplit(".", 1)[-1]: key for key in known_keys()}
    return nearest(word, lasts, 0.7)


def _rule_keys() -> list[str]:
    """Keys of `upcycle.on_load`, which has those of an element of `upcycle.stages`."""
    return [f"upcycle.on_load.{f.name}" for f in dataclasses.fields(StageConfig)]


def explain(error: BaseException) -> str:
    """One line for an error of Hydra or OmegaConf: the key, the value and the remedy."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for e in chain:
        if isinstance(e, OmegaConfBaseException) and e.full_key:
            key = str(e.full_key)
            text = (e.msg or str(e)).splitlines()[0]
            if "not in struct" in str(e) or ("not in" in text and "Key" in text):
                if key.startswith("model.mcore."):
                    return f"{key} is a field of mcore's own: add it with a plus, +{key}=VALUE"
                near = nearest(key, [*known_keys(), *_rule_keys()]) if "." in key else _nearest_by_last_word(key)
                return f"unknown key {key}{near or '; see `python -m train --cfg job` for all keys'}"
            kind = declared(RunSettings, key)
            return f"{key} must be {words(kind)}: {text}" if kind else f"{key}: {text}"
    text = " ".join(str(error).split())
    option = re.search(r"Could not find '([\w/]+)/([^']*)'", text)
    if option:
        group, name = option.groups()
        options = config_groups().get(group, [])
        return f"{group}={name} is unknown: use one of {', '.join(options) or 'none'}{nearest(name, options)}"
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        return f"unknown key {override.group(1)}{nearest(override.group(1), known_keys())}"
    return text.split(" See https")[0]


def _parsed(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as e:
        raise ConfigError(f"{word} is not KEY=VALUE as Hydra reads it: {explain(e)}") from None


def _check_override(override: Override) -> None:
    """Check one word of the command line by itself: the preset it names, or the type of its value.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    key, options = str(override.key_or_group), config_groups().get(str(override.key_or_group))
    if not key or key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(f"{override.input_line} sets no key of a run: see `python -m train --cfg job` for all keys")
    kind = declared(RunSettings, key)
    if override.is_delete():
        if options is None and kind is not None:
            raise ConfigError(f"{override.input_line}: a run needs every key: give it a value, {key}=VALUE")
        return
    if override.is_add() and kind is not None:
        raise ConfigError(f"{override.input_line}: {key} is there already: leave out the plus")
    if override.is_sweep_override():
        raise ConfigError(
            f"{override.input_line} gives several values: use one, a list [A,B], or -m for a sweep (python -m launch)"
        )
    value = override.value()
    if options is not None and not isinstance(value, str):
        raise ConfigError(f"{key}={shown(value)} names no preset: use one of {', '.join(options)}")
    if options is None and kind is not None:
        try:
            check_value(key, value, kind)
        except ConfigError:
            if isinstance(value, bool) and kind in (str, str | None):
                _name_choices(key, value)
            raise


def _name_choices(key: str, value: bool) -> None:
    """Refuse a switch for a key of fixed words by the check of its group, which names them; nothing for another key.

    Raises:
        ConfigError: naming the key, the value and the words.
    """
    group, _, name = key.rpartition(".")
    owner = declared(RunSettings, group)
    if dataclasses.is_dataclass(owner) and isinstance(owner, type):
        owner(**{name: shown(value)})


def compose_settings(overrides: list[str]) -> Any:
    """The merged OmegaConf tree for a list of Hydra overrides.

    Raises:
        ConfigError: for an unknown key or preset, or a value of the wrong type.
    """
    register_schema()
    if GlobalHydra.instance().is_initialized():
        GlobalHydra.instance().clear()
    try:
        for word in overrides:
            _check_override(_parsed(word))
        with initialize_config_module(config_module="configs", version_base="1.3"):
            tree = compose(config_name="config", overrides=overrides)
        # Presets and what one key takes from another.
        check_value("", OmegaConf.to_container(tree, resolve=True), RunSettings)
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(explain(e)) from None
    begun = (Path(tree.run.dir) / PUBLISHED).is_dir()
    if begun or tree.model.init_from is not None or tree.run.resume not in ("auto", "never", ""):
        # Here and not above: it reads checkpoints, and planning is quick without torch and mcore.
        from parallel.compat import quiet_megatron

        quiet_megatron()
        from train.hf.start import with_architecture

        with_architecture(tree, overrides)
    return tree


def to_settings(tree: Any) -> RunSettings:
    """Turn a merged tree into the typed settings, running the checks of every group.

    Raises:
        ConfigError: for a value that is impossible, or still missing.
    """
    try:
        settings = OmegaConf.to_object(tree)
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None
    if not isinstance(settings, RunSettings):
        raise TypeError(f"configs/config.yaml no longer starts from the schema: got {type(settings)}")
    _check_passed_on(settings.model)
    return settings


def _mcore_loads() -> bool:
    """Whether mcore can be imported here, which takes seconds.

    Transformer Engine without the libraries of a GPU keeps it from that. A submission and a plan may be made on such a
    machine: what only mcore can say is then said where the job runs.
    """
    # Here and not above: planning is quick without torch and mcore.
    from parallel.compat import before_megatron

    before_megatron()
    try:
        importlib.import_module("model.mcore_config")
    except ImportError:
        raise
    except Exception:
        return False
    return True


def _check_passed_on(model: ModelConfig) -> None:
    """Check the fields of `model.mcore` and their values by what the installed mcore declares of them.

    Raises:
        ConfigError: naming the field, its value and what it must be, or the nearest field that mcore has.
    """
    if not model.mcore or not _mcore_loads():
        return
    from model.mcore_config import config_class, declared_fields

    kinds = declared_fields(model)
    for name, value in model.mcore.items():
        key = f"model.mcore.{name}"
        if name not in kinds:
            near = nearest(str(name), list(kinds)) or ": leave it out"
            version = importlib.metadata.version("megatron-core")
            raise ConfigError(
                f"{key}={shown(value)}: {config_class(model).__name__} of megatron-core {version} has no such field{near}"
            )
        if value is not None and not can_be_given(kinds[name]):
            raise ConfigError(
                f"{key}={shown(value)} stands for an object of mcore's that no setting can name: leave it out"
            )
        check_value(key, value, kinds[name], exact=True)
    refuse_values(model, kinds)


def refuse_passed_on(settings: RunSettings) -> None:
    """Refuse fields of `model.mcore` that no machine can build a stage with: for commands that do not run the settings.

    Where no field is passed on it costs nothing. Otherwise it loads torch and mcore, as typing them does.

    Args:
        settings: checked settings.

    Raises:
        ConfigError: naming the stage and the fields, in mcore's words.
    """
    if settings.model.mcore and _mcore_loads():
        from train.buildable import refuse_anywhere

        refuse_anywhere(settings)


def load_settings(overrides: list[str], world_size: int | None = None) -> RunSettings:
    """Compose, type and check the settings of a run.

    Args:
        overrides: Hydra overrides, as on the command line.
        world_size: processes of the job; read from WORLD_SIZE when not given.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    settings = to_settings(compose_settings(overrides))
    settings.check(int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size)
    return settings


def settings_to_dict(settings: RunSettings) -> dict[str, Any]:
    """Plain dicts and lists, for `config.yaml` and checkpoints."""
    return dataclasses.asdict(settings)


def settings_from_dict(values: dict[str, Any]) -> RunSettings:
    """The inverse of `settings_to_dict`, with all checks."""
    check_value("", values, RunSettings)
    try:
        return to_settings(OmegaConf.merge(OmegaConf.structured(RunSettings), values))
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None


def stage_from_dict(values: Mapping[str, Any], name: str) -> StageConfig:
    """One element of `upcycle.stages` from plain values, typed; what it means is not checked.

    Args:
        values: its keys.
        name: what messages call it.

    Raises:
        ConfigError: for an unknown key or a value of the wrong type.
    """
    try:
        check_value("", dict(values), StageConfig)
        stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StageConfig), dict(values)))
    except (ConfigError, OmegaConfBaseException) as e:
        raise ConfigError(f"{name}: {explain(e)}") from None
    assert isinstance(stage, StageConfig)
    return stage


def read_yaml(path: Path) -> RunSettings:
    """The settings that `write_yaml` wrote, with all checks of their groups.

    Raises:
        CoppiceError: if the file cannot be read, or is of another version.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, yaml.YAMLError) as e:
        raise DataError(f"{path} cannot be read: {e}") from None
    return settings_from_dict(values if isinstance(values, dict) else {})


def write_yaml(settings: RunSettings, path: Path, step: int) -> None:
    """Write the resolved configuration; one that a resume replaces is kept beside it.

    Args:
        settings: what the run goes on with.
        path: `config.yaml` of the run directory.
        step: step the run goes on from, for the name of the configuration that held until then.

    Raises:
        DataError: if the folder cannot be written.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(settings_to_dict(settings)))
    try:
        if path.exists() and path.read_text() != text:
            kept, number = path.with_name(f"config.until-step-{step:08d}.yaml"), 1
            while kept.exists():
                number += 1
                kept = path.with_name(f"config.until-step-{step:08d}-{number}.yaml")
            path.rename(kept)
        path.write_text(text)
    except OSError as e:
        raise DataError(f"run.dir: cannot write {path}: {e.strerror}: choose another run.dir") from None
