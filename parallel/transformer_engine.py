"""Whether NVIDIA Transformer Engine is here, of a version that this mcore works with, and usable.

mcore takes it wherever it can be imported, does without it silently where it cannot, and looks at no upper end of versions:
a build for another torch or CUDA then shows as a layer that is missing, or as a wrong argument deep in a step. A run on
GPUs asks here first.

And two things about its layers that mcore has no word for.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from parallel.errors import LaunchError

if TYPE_CHECKING:
    import torch

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


def add_gradients_in_products(module: "torch.nn.Module") -> int:
    """Have its layers add weight gradients to the fp32 buffers of mcore's DDP inside their matrix products.

    mcore's own switch for it (`gradient_accumulation_fusion`) is refused by its output layer where NVIDIA Apex is missing,
    which these layers do not need.

    Args:
        module: built, and not run yet.

    Returns:
        How many layers were told.
    """
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
        if not layer.config.fp8:
            # Without 8-bit weights to keep it need not know which micro-batch is the first, in which it would write over the
            # buffer: CUDA graphs are captured as if it were that one, and each replay would drop what was added before.
            layer.disable_parameter_transpose_cache = True
    return len(layers)


@contextlib.contextmanager
def counted_as_one_step(wrapped: Sequence[Any]) -> Iterator[None]:
    """Gradients of several calls of mcore's schedule are added up inside, whatever layers they are of.

    In 8 bits mcore tells its layers at every call which micro-batch is the first. There they make their 8-bit weights anew,
    and where they add weight gradients in their products, they write over the buffer.

    Args:
        wrapped: the model chunks in DDP, gradients zeroed; weights do not change inside.
    """
    for chunk in wrapped:
        chunk.set_is_first_microbatch()
        # In front of the method of its class, until it is deleted.
        chunk.set_is_first_microbatch = lambda: None
    try:
        yield
    finally:
        for chunk in wrapped:
            del chunk.set_is_first_microbatch
