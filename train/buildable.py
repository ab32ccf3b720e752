"""Whether the network of every stage can be built, asked of mcore before any process group or GPU is touched.

mcore judges a network when its config is made, which needs neither. A run asks so for all of its stages, on its machine;
a plan and a submission, made elsewhere, ask what holds on every machine.
"""

import os
from collections.abc import Iterator

import torch

from model.attention_backend import refuse_other_attention
from model.build import config_anywhere, transformer_config
from parallel.errors import ConfigError
from parallel.machine import Machine, machines_to_be
from parallel.transformer_engine import have_transformer_engine
from train.acceleration import accelerated, routes_in_families
from train.config import RunSettings

# Fields for which mcore asks the version of Transformer Engine, beside those of 8-bit floats.
_OF_ENGINE = ("symmetric_ar_type",)


def refuse_unbuildable(settings: RunSettings, world_size: int) -> None:
    """Refuse settings with a stage that cannot be built on this machine; nothing is asked of its GPUs.

    Args:
        settings: checked settings.
        world_size: processes of the job.

    Raises:
        ConfigError: naming the stage, in mcore's words where it is mcore that refuses; or a variable of the environment.
    """
    refuse_other_attention(settings.model)
    machines = machines_to_be(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    for number, key in _stages(settings):
        refused: list[ConfigError] = []
        for machine in machines:
            try:
                check_stage(settings, number, machine, world_size)
            except ConfigError as e:
                refused.append(e)
        # What can be on some GPU is let through: the rank judges again with the one it has.
        if len(refused) == len(machines):
            raise _named(key, refused[0])


def refuse_anywhere(settings: RunSettings) -> None:
    """Refuse settings with a stage that no machine can build.

    Args:
        settings: checked settings.

    Raises:
        ConfigError: naming the stage, in mcore's words.
    """
    model = settings.model
    if not have_transformer_engine() and (model.fp8 != "none" or any(map(model.mcore.get, _OF_ENGINE))):
        # mcore would judge them by what is missing here.
        return
    kind = "te" if model.experts == "auto" else model.experts
    for number, key in _stages(settings):
        try:
            config_anywhere(
                model, settings.experts_of(number), settings.parallel_of(number), settings.run.precision, kind
            )
        except ConfigError as e:
            raise _named(key, e) from None


def check_stage(
    settings: RunSettings, number: int, machine: Machine, world_size: int, device: torch.device | None = None
) -> None:
    """Refuse a stage that cannot be built on a machine.

    Args:
        settings: of the run.
        number: which stage.
        machine: where it would be built.
        world_size: processes.
        device: of this rank; None while none is chosen.

    Raises:
        ConfigError: in mcore's words where it is mcore that refuses.
    """
    parallel = settings.parallel_of(number)
    families = routes_in_families(settings, number)
    experts = settings.experts_of(number)
    concrete, _ = accelerated(settings, experts, parallel, machine, world_size, families=families)
    transformer_config(
        concrete.model, experts, parallel, settings.run.precision, device=device, performance=concrete.performance
    )


def _stages(settings: RunSettings) -> Iterator[tuple[int, str | None]]:
    """Every stage with the key at which it is configured; the first has none."""
    yield 0, None
    for i in range(len(settings.upcycle.stages)):
        yield i + 1, f"upcycle.stages[{i}]"


def _named(key: str | None, error: ConfigError) -> ConfigError:
    return ConfigError(f"{key}: {error}") if key else error
