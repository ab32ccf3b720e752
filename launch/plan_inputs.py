"""What a plan is made of: settings, the size of the vocabulary and the corpora, any of which may not be there yet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, DataError
from train.config import RunSettings
from train.settings import compose_settings, refuse_passed_on, to_settings


def settings_without_corpus(overrides: list[str], processes: int) -> RunSettings:
    """The checked settings of a run that may not name a corpus yet, every stage with its step.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    settings = to_settings(compose_settings(overrides))
    check_without_corpus(settings, processes)
    return settings.resolved()


def check_without_corpus(settings: RunSettings, processes: int) -> None:
    """Check settings that may not name a corpus.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    if not settings.data.corpus and not settings.data.blend:
        settings = replace(settings, data=replace(settings.data, corpus="none"))
    settings.check(processes)
    refuse_passed_on(settings)


def vocabulary(settings: RunSettings, given: int | None) -> tuple[int, str]:
    """Tokens of the tokenizer, and who says so.

    Raises:
        DataError: if neither the command line nor a corpus does.
    """
    if given is not None:
        return given, "--vocab-size"
    # Here, because it imports the tokenizers.
    from train.data.manifest import load_manifest

    try:
        manifest = load_manifest(settings.data.corpora()[0].prefix)
    except (ConfigError, DataError) as e:
        what = str(e).split(": build one")[0]
        raise DataError(f"the size of the vocabulary is not known ({what}): give --vocab-size") from None
    return manifest.vocab_size, f"corpus {manifest.prefix}"


def data_table(settings: RunSettings, needed: bool) -> list[dict[str, Any]] | None:
    """What the run reads, where its corpora are here.

    Args:
        settings: of the run, every stage with its step.
        needed: whether to refuse a plan without its corpora.

    Raises:
        DataError: if a corpus is not there and needed, or all corpora are used up before the end of the run.
    """
    data = settings.data
    if not data.corpus and not data.blend:
        return None
    listed = [part.prefix for parts in data.blends() for _, part in parts]
    if not needed and not all(Path(f"{prefix}.json").is_file() for prefix in listed):
        return None
    # Here, because it loads torch and mcore.
    from parallel.compat import quiet_megatron

    quiet_megatron()
    from train.data.stream import planned_table

    return planned_table(settings)


def attention_is_flash(settings: RunSettings, on_gpu: bool) -> bool:
    """Whether attention keeps no scores: Transformer Engine's, which `auto` takes on GPUs that have it."""
    wish = settings.model.transformer_impl
    return wish == "transformer_engine" or (wish == "auto" and on_gpu)
