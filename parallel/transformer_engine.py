"""Whether NVIDIA Transformer Engine is here, of a version that this mcore works with, and usable.

mcore takes it wherever it can be imported, does without it silently where it cannot, and looks at no upper end of versions:
a build for another torch or CUDA then shows as a layer that is missing, or as a wrong argument deep in a step. A run on
GPUs asks here first.
"""

import importlib
import importlib.metadata
import importlib.util

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from parallel.errors import LaunchError

# The oldest that anybody has used with our code; mcore's metadata may ask for more, and names the newest.
_LEAST = SpecifierSet(">=2.9")


def have_transformer_engine() -> bool:
    """Whether NVIDIA Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def supported_versions() -> SpecifierSet:
    """The versions that the installed mcore asks for in the metadata of its extras."""
    asked = _LEAST
    for line in importlib.metadata.requires("megatron-core") or ():
        requirement = Requirement(line)
        if requirement.name.lower().replace("_", "-") == "transformer-engine":
            asked &= requirement.specifier
    return asked


def version_problem(version: str) -> str | None:
    """What is wrong with a version, and the remedy; None if it is one to use.

    Args:
        version: of Transformer Engine, as installed.
    """
    supported = supported_versions()
    # The release alone: a build's own suffix (2.11.0+c188b53, 2.9.0.dev0) says nothing of what it can do.
    if supported.contains(Version(version).base_version):
        return None
    core = importlib.metadata.version("megatron-core")
    return (
        f"Transformer Engine {version} is installed, and megatron-core {core} works with {_in_words(supported)}: install "
        "one of these, or uninstall it to train without (docs/gpu.md)"
    )


def _in_words(versions: SpecifierSet) -> str:
    """A range for a message, the narrowest of its lower ends alone."""
    lower = [Version(s.version) for s in versions if s.operator == ">="]
    others = sorted(str(s) for s in versions if s.operator != ">=")
    return ",".join([f">={max(lower).base_version}" if lower else "", *others]).strip(",")


def refuse_unusable() -> None:
    """Refuse a Transformer Engine of a wrong version, or one that cannot be imported; nothing to say where it is absent.

    Touches no device: importing it loads libraries and makes no context.

    Raises:
        LaunchError: naming what is wrong and the remedy.
    """
    if not have_transformer_engine():
        return
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        # A source tree on the path: the import has the word.
        version = None
    problem = version_problem(version) if version else None
    if problem is None:
        problem = _import_problem()
    if problem:
        raise LaunchError(problem)


def _import_problem() -> str | None:
    """Why its PyTorch part cannot be imported, and the remedy; None if it can be."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    # A library for another CUDA is an OSError, a missing symbol an ImportError, a broken installation anything.
    except Exception as e:
        first = str(e).splitlines()[0] if str(e) else "no details"
        return (
            f"Transformer Engine is installed and cannot be used ({type(e).__name__}: {first}): build it for the torch and "
            "CUDA that are installed, or uninstall it to train without (docs/gpu.md)"
        )
    return None
