"""The single checks of `python -m launch preflight`; each answers with a line and never raises.

`ok` needs no thought, `warning` may be meant, `problem` would stop a run or spoil it and names its remedy.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.footprint import checkpoint_bytes
from launch.plan_inputs import vocabulary
from launch.plan_tables import size
from model.network import count, network_chunks
from parallel.compiler import compile_obstacle
from parallel.errors import CoppiceError, DataError
from parallel.transformer_engine import version_problem
from train.config import RunSettings

# What decides how a run behaves.
PACKAGES = ("torch", "megatron-core", "transformer-engine", "deep-ep", "numpy")
STATES = ("ok", "warning", "problem")
# Clocks further apart than the first make logs of ranks hard to read; than the second, something is wrong with one.
SKEW_WARNING_SECONDS, SKEW_PROBLEM_SECONDS = 1.0, 60.0
_YEARS = range(2024, 2100)
# Time a network file system may take to show another node's file.
_VISIBLE_SECONDS = 10.0


@dataclass(frozen=True)
class Check:
    """One answer.

    Attributes:
        name: of the check.
        state: one of `STATES`.
        text: what was found, and the remedy of a problem.
    """

    name: str
    state: str
    text: str

    def line(self) -> str:
        """As it is printed."""
        return f"{self.state:<8} {self.name}: {self.text}"


def guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """The answers of a check; an error of its own is a problem like any other."""
    try:
        return check()
    except (CoppiceError, OSError) as e:
        return [Check(name, "problem", " ".join(str(e).split()))]


# ---- versions and devices --------------------------------------------------------------------------------------------


def check_versions(found: Mapping[str, str], has_gpu: bool) -> list[Check]:
    """Python, torch and mcore, and the optional parts with what their absence means."""
    missing = [package for package in ("torch", "megatron-core") if package not in found]
    checks = []
    if missing:
        checks.append(
            Check("versions", "problem", f"{' and '.join(missing)} not installed: `make setup`, or pip install -e .")
        )
    else:
        told = ", ".join(f"{package} {found[package]}" for package in ("python", "torch", "megatron-core"))
        checks.append(Check("versions", "ok", told))
    if "transformer-engine" in found:
        problem = version_problem(found["transformer-engine"]) if has_gpu else None
        state = "problem" if problem else "ok"
        checks.append(Check("transformer engine", state, problem or found["transformer-engine"]))
    else:
        text = "absent: attention keeps its scores, no context parallelism, no FP8 (docs/gpu.md)"
        checks.append(Check("transformer engine", "warning" if has_gpu else "ok", text if has_gpu else "absent"))
    obstacle = compile_obstacle() if has_gpu else None
    if obstacle:
        text = f"kernels cannot be compiled, so some run in more passes over memory: {obstacle} (docs/gpu.md)"
        checks.append(Check("triton", "warning", text))
    checks.append(_apex())
    deep_ep = importlib.util.find_spec("deep_ep") is not None
    checks.append(Check("deepep", "ok", "present" if deep_ep else "absent: only model.dispatcher=flex needs it"))
    return checks


def _apex() -> Check:
    found = importlib.util.find_spec("apex")
    if found is None:
        return Check("nvidia apex", "ok", "absent: not needed")
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    if any((folder / "optimizers").is_dir() for folder in folders):
        return Check("nvidia apex", "ok", "present")
    text = "the installed package apex is not NVIDIA's: pip uninstall apex (docs/gpu.md)"
    return Check("nvidia apex", "problem", text)


@dataclass(frozen=True)
class Gpus:
    """What this process sees.

    Attributes:
        names: kind of every GPU.
        memory_bytes: of every GPU.
        driver: version of NVIDIA's; empty if nobody says.
        unused: a driver is there although torch sees no GPU.
    """

    names: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    driver: str = ""
    unused: bool = False


def find_gpus() -> Gpus:
    """Ask torch for the GPUs and nvidia-smi for the driver."""
    import torch

    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
            driver = answer.stdout.strip().split("\n")[0] if answer.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
    if not torch.cuda.is_available():
        return Gpus(driver=driver, unused=bool(driver))
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Gpus(tuple(g.name for g in seen), tuple(int(g.total_memory) for g in seen), driver)


def check_gpus(gpus: Gpus, local_processes: int | None) -> list[Check]:
    """Number, kind and memory of this node's GPUs.

    Args:
        gpus: what was found.
        local_processes: processes on this node; None if unknown.
    """
    if not gpus.names:
        if gpus.unused:
            text = f"driver {gpus.driver} is here and torch sees no GPU: install a CUDA build of torch (docs/gpu.md)"
            return [Check("gpus", "problem", text)]
        return [Check("gpus", "ok", "none: this machine trains on CPU over gloo")]
    kinds = {name: gpus.names.count(name) for name in dict.fromkeys(gpus.names)}
    told = ", ".join(f"{n} x {name}" for name, n in kinds.items())
    told += f", {size(min(gpus.memory_bytes))} each at least" + (f", driver {gpus.driver}" if gpus.driver else "")
    checks = [Check("gpus", "warning" if len(kinds) > 1 else "ok", told + (": mixed kinds" if len(kinds) > 1 else ""))]
    if local_processes is not None and local_processes > len(gpus.names):
        text = f"{local_processes} processes on this node and {len(gpus.names)} GPUs: start one process per GPU"
        checks.append(Check("gpus", "problem", text))
    return checks


# ---- files -----------------------------------------------------------------------------------------------------------


def check_corpus(settings: RunSettings) -> list[Check]:
    """Corpora, validation sets and a published model that a run could open, and their tokenizer."""
    from train.inputs import open_inputs

    corpora = open_inputs(settings)
    manifest = corpora[0][1]
    manifest.tokenizer()
    tokens = sum(m.tokens("train") for _, m in corpora)
    wanted = settings.tokens_per_step() * settings.run.steps
    text = (
        f"{len(corpora)} with {tokens:,} training tokens, tokenizer {manifest.tokenizer_spec}; the run takes {wanted:,}"
    )
    return [Check("corpus", "ok", text)]


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the closest one above it that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def check_run_dir(settings: RunSettings) -> list[Check]:
    """Whether files can be written, renamed and read back where the run will write, by nobody but its owner."""
    from train.run_files import refuse_open_folder

    run_dir = Path(settings.run.dir)
    refuse_open_folder(run_dir)
    folder = nearest_folder(run_dir)
    try:
        write_read(folder, f".preflight-{uuid.uuid4().hex}")
    except OSError as e:
        raise DataError(
            f"run.dir={run_dir}: {folder} cannot be written ({e.strerror or e}): check permissions and quota, or choose "
            "another run.dir"
        ) from None
    there = "" if folder == run_dir.absolute() else f" (the run will create {run_dir})"
    return [Check("run.dir", "ok", f"{folder}: write, flush, rename and read back{there}")]


def write_read(folder: Path, name: str) -> None:
    """Write a file, flush it, rename it, read it back, and take it away.

    Raises:
        OSError: if any of it fails, or what is read is not what was written.
    """
    staging, final, content = folder / f"{name}.tmp", folder / name, os.urandom(64)
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(final)
        if final.read_bytes() != content:
            raise OSError("what was read back is not what was written")
    finally:
        staging.unlink(missing_ok=True)
        final.unlink(missing_ok=True)


def check_space(settings: RunSettings) -> list[Check]:
    """Free space against the checkpoints that a run would keep (`launch plan`)."""
    vocab, _ = vocabulary(settings, None)
    sizes = []
    for stage, experts in enumerate(settings.upcycle.expert_counts(settings.model.num_experts)):
        chunks = network_chunks(settings.model, experts, settings.parallel_of(stage), vocab, 2)
        sizes.append(checkpoint_bytes(count(settings.model, experts, chunks).total, settings.run.precision))
    options, upcycle = settings.checkpoint, settings.upcycle
    # The next one is written before the oldest goes.
    kept = (options.keep_last + 1) * max(sizes) if options.keep_last else 0
    if upcycle.save_before or upcycle.path == "checkpoint":
        kept += sum(sizes[:-1])
    if upcycle.save_after or upcycle.path == "checkpoint":
        kept += sum(sizes[1:])
    free = shutil.disk_usage(nearest_folder(Path(settings.run.dir))).free
    told = f"{size(free)} free, a checkpoint takes {size(max(sizes))}"
    if free < max(sizes):
        remedy = "free space, or choose another run.dir"
        return [Check("space", "problem", f"{told}: {remedy}")]
    if not options.keep_last or options.keep_every_steps:
        return [Check("space", "ok", f"{told}; how many are kept grows with the run")]
    told += f", those kept at once up to {size(kept)}"
    return [Check("space", "ok" if kept <= free else "warning", told)]


def check_clock() -> list[Check]:
    """Whether wall and monotonic clock agree on a moment, and the year is one."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.05)
    apart = abs((time.time() - wall) - (time.monotonic() - steady))
    year = time.gmtime().tm_year
    told = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if year not in _YEARS:
        return [Check("clock", "problem", f"{told}: the clock is wrong: set it (chrony, ntp)")]
    if apart > 0.5:
        return [Check("clock", "warning", f"{told}; it jumped by {apart:.2f} s while it was watched")]
    return [Check("clock", "ok", told)]


# ---- between ranks ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankFacts:
    """What one rank tells the others.

    Attributes:
        host: its machine.
        versions: of `PACKAGES`.
        gpus: kinds that it sees.
        seconds: its wall clock right after a barrier.
        checks: answers of its local checks.
    """

    host: str
    versions: Mapping[str, str]
    gpus: tuple[str, ...]
    seconds: float
    checks: tuple[Check, ...]


def compare_ranks(facts: Sequence[RankFacts]) -> list[Check]:
    """Versions, kinds of GPU and clocks over all ranks."""
    checks = []
    hosts = len({f.host for f in facts})
    checks.append(Check("ranks", "ok", f"all {len(facts)} answered, on {hosts} {'node' if hosts == 1 else 'nodes'}"))
    reference, odd = facts[0].versions, []
    for rank, fact in enumerate(facts):
        for package in sorted(reference.keys() | fact.versions.keys()):
            mine, theirs = reference.get(package, "absent"), fact.versions.get(package, "absent")
            if mine != theirs:
                odd.append(f"rank {rank} ({fact.host}) has {package} {theirs}, rank 0 {mine}")
    if odd:
        more = f", and {len(odd) - 1} more" if len(odd) > 1 else ""
        checks.append(Check("same versions", "problem", f"{odd[0]}{more}: install the same on all nodes"))
    else:
        checks.append(Check("same versions", "ok", "on all ranks"))
    kinds = {kind for fact in facts for kind in fact.gpus}
    if len(kinds) > 1:
        checks.append(
            Check("same gpus", "warning", f"mixed kinds: {', '.join(sorted(kinds))}; the slowest sets the pace")
        )
    times = [fact.seconds for fact in facts]
    skew = max(times) - min(times)
    state = STATES[(skew > SKEW_WARNING_SECONDS) + (skew > SKEW_PROBLEM_SECONDS)]
    late = facts[times.index(min(times))].host, facts[times.index(max(times))].host
    told = f"at most {skew:.2f} s apart"
    if state != "ok":
        told += f" ({late[0]} behind {late[1]}): set the clocks (chrony, ntp)"
    return [*checks, Check("same time", state, told)]


def merge_local(facts: Sequence[RankFacts]) -> list[Check]:
    """The local answers of all ranks: rank 0's, and those of others that differ in state, once per node and text."""
    found = list(facts[0].checks)
    told = {(c.name, c.state) for c in facts[0].checks}
    for rank, fact in enumerate(facts):
        for check in fact.checks:
            if check.state != "ok" and (check.name, check.state) not in told:
                told.add((check.name, check.state))
                found.append(Check(check.name, check.state, f"rank {rank} ({fact.host}): {check.text}"))
    return found


def host() -> str:
    """Name of this machine."""
    return socket.gethostname()


def read_when_visible(path: Path) -> str | None:
    """Contents of a file that another rank has written; None if it does not appear in time."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            return path.read_text()
        except FileNotFoundError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        except OSError:
            return None


def check_shared_files(layout: Any, folder: Path) -> list[Check]:
    """Whether all ranks see one file system: rank 0 writes for all, all write for rank 0; collective.

    Args:
        layout: of the job (`parallel.layout.Layout`).
        folder: where.
    """
    token = layout.from_rank_zero(uuid.uuid4().hex)
    # A network file system shows a whole file only once it has its name.
    mine = folder / f".preflight-{token}-{layout.rank}"
    failed = ""
    try:
        staging = mine.with_suffix(".tmp")
        staging.write_text(f"{token} {layout.rank}")
        staging.replace(mine)
    except OSError as e:
        failed = f"cannot write in {folder} ({e.strerror or e})"
    layout.barrier()
    if not failed and read_when_visible(folder / f".preflight-{token}-0") != f"{token} 0":
        failed = f"does not see what rank 0 writes in {folder}"
    told = layout.gather_objects((host(), failed))
    unseen: list[int] = []
    if layout.rank == 0:
        wrote = [rank for rank, (_, text) in enumerate(told) if not text]
        unseen = [r for r in wrote if read_when_visible(folder / f".preflight-{token}-{r}") != f"{token} {r}"]
    unseen = layout.from_rank_zero(unseen)
    mine.unlink(missing_ok=True)
    problems = [f"rank {rank} ({name}) {text}" for rank, (name, text) in enumerate(told) if text]
    problems += [f"rank 0 does not see what rank {r} ({told[r][0]}) writes in {folder}" for r in unseen]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        remedy = "run.dir must lie on a file system that all nodes share"
        return [Check("shared files", "problem", f"{problems[0]}{more}: {remedy}")]
    return [Check("shared files", "ok", f"every rank reads rank 0's file in {folder} and rank 0 theirs")]
