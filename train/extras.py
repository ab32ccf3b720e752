"""Optional packages: one message for all of them, with the `pip install` that brings the package."""

import importlib
from typing import Any

from parallel.errors import ConfigError


def optional_package(package: str, asker: str, extra: str | None = None) -> Any:
    """Imports a package that an extra of Coppice installs.

    Args:
        package: name to import.
        asker: what the user gave that needs it, such as `--tokenizer=tiktoken:x`.
        extra: name of the extra; None if it is the package's own.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.partition(".")[0]
        raise ConfigError(f"{asker}: needs the {name} package: pip install 'coppice[{extra or name}]'") from error
