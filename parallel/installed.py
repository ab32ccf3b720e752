"""Which packages are here. Only their metadata is looked at: nothing is imported."""

import importlib.metadata
import platform
from collections.abc import Sequence


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of packages by the names they are installed under; absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
