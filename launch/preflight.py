"""Looks for what would stop a run, before one waits in a queue for it: `python -m launch preflight`.

One line per check and an exit code: 0 if nothing is a problem (warnings are told and do not count), 1 if anything is, 6 if
the ranks did not find each other. Alone it checks this machine, the settings and the files. Under torchrun or srun
(WORLD_SIZE is set) every rank does, and together they check what they share: that all answer, by the backend of the run,
the file system, versions and clocks. A rank that is missing ends it with one line after `--timeout-seconds`.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import checks
from launch.checks import Check, RankFacts, guarded
from launch.plan_inputs import settings_without_corpus
from parallel.errors import ConfigError, CoppiceError, LaunchError
from parallel.installed import installed
from train.config import RunSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m launch preflight`."""
    parser.allow_abbrev = False
    parser.add_argument("--processes", type=int, help="processes of the run; by default WORLD_SIZE, or 1")
    parser.add_argument("--timeout-seconds", type=int, default=60, help="wait this long for the other ranks (60)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    parser.add_argument("overrides", nargs="*", help="settings, as for `python -m train`")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `python -m launch preflight`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    processes = arguments.processes or world
    for name in ("processes", "timeout_seconds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be 1 or more")
    if "WORLD_SIZE" in os.environ and processes != world:
        raise ConfigError(
            f"--processes={processes} and WORLD_SIZE={world} differ: leave --processes out under a launcher"
        )
    mine = look_here(arguments.overrides, processes)
    found = with_others(mine, arguments.timeout_seconds) if world > 1 else mine.checks
    if os.environ.get("RANK", "0") == "0":
        tell(found, arguments.json)
    return exit_code(found)


def exit_code(found: Sequence[Check]) -> int:
    """0 without a problem, else 1."""
    return int(any(check.state == "problem" for check in found))


def tell(found: Sequence[Check], as_json: bool) -> None:
    """Print the answers."""
    counts = {state: sum(check.state == state for check in found) for state in checks.STATES}
    if as_json:
        print(json.dumps({"checks": [asdict(check) for check in found], "counts": counts}, indent=1))
        return
    for check in found:
        print(check.line())
    print(f"{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} ok")


@dataclass(frozen=True)
class Here:
    """What one process finds out by itself.

    Attributes:
        checks: its answers.
        versions: of `checks.PACKAGES`.
        gpus: kinds that it sees.
        settings: of the run; None if they cannot be.
    """

    checks: list[Check]
    versions: Mapping[str, str]
    gpus: tuple[str, ...] = ()
    settings: RunSettings | None = None


def look_here(overrides: list[str], processes: int) -> Here:
    """Everything that one process can find out by itself."""
    versions = installed(checks.PACKAGES)
    if "torch" not in versions or "megatron-core" not in versions:
        # Nothing else can be imported.
        return Here(checks.check_versions(versions, has_gpu=False), versions)
    from parallel.compat import quiet_megatron

    quiet_megatron()
    gpus = checks.find_gpus()
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    found = checks.check_versions(versions, has_gpu=bool(gpus.names))
    found += checks.check_gpus(gpus, int(here) if here and here.isdigit() else None)
    found += guarded("clock", checks.check_clock)
    settings: RunSettings | None = None
    try:
        settings = settings_without_corpus(overrides, processes)
    except CoppiceError as e:
        found.append(Check("settings", "problem", str(e)))
    if settings is None:
        return Here(found, versions, gpus.names)
    found.append(Check("settings", "ok", f"valid for {processes} {'process' if processes == 1 else 'processes'}"))
    found += guarded("corpus", lambda: checks.check_corpus(settings))
    found += guarded("run.dir", lambda: checks.check_run_dir(settings))
    # Without a corpus the vocabulary is unknown, which was told.
    if not any(check.name == "corpus" and check.state == "problem" for check in found):
        found += guarded("space", lambda: checks.check_space(settings))
    return Here(found, versions, gpus.names, settings)


def with_others(mine: Here, timeout_seconds: int) -> list[Check]:
    """What all ranks find together; collective.

    Raises:
        LaunchError: if a rank is missing or goes away.
    """
    # Late, because they take seconds to import and a machine without them has been told so.
    from parallel.compat import prepare_megatron
    from parallel.config import ParallelConfig
    from parallel.layout import Layout, join_job, leave_job

    with _Deadline(timeout_seconds) as deadline:
        prepare_megatron()
        joined = join_job(timeout_seconds)
        deadline.renew("all ranks had met")
        try:
            layout = Layout.create(ParallelConfig(timeout_seconds=timeout_seconds), 0)
            layout.barrier()
            now = time.time()
            facts: list[RankFacts] = layout.gather_objects(
                RankFacts(checks.host(), mine.versions, mine.gpus, now, tuple(mine.checks))
            )
            found = [*checks.merge_local(facts), *checks.compare_ranks(facts)]
            found.append(
                Check("backend", "ok", f"{'NCCL and ' if layout.device.type == 'cuda' else ''}gloo groups formed")
            )
            if mine.settings is None:
                # Alike on all ranks, and told.
                return found
            folder = layout.from_rank_zero(str(checks.nearest_folder(Path(mine.settings.run.dir))))
            return [*found, *checks.check_shared_files(layout, Path(folder))]
        except RuntimeError as e:
            rank = os.environ.get("RANK", "0")
            first = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise LaunchError(
                f"rank {rank}: another rank does not answer any more ({first}): look at its output"
            ) from None
        finally:
            leave_job(joined)


class _Deadline:
    """Ends the process with one line if the ranks have not got through in time: some waits inside torch cannot be bounded.

    Args:
        seconds: allowed for meeting, and again for what follows.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds, self._after = seconds, ""
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "_Deadline":
        self.renew("")
        return self

    def renew(self, after: str) -> None:
        """Begin to count again."""
        self._stop()
        self._after = after
        # Later than torch's own time-outs, whose messages say more.
        self._timer = threading.Timer(self._seconds + 15, self._end)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *unused: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        when = f" after {self._after}" if self._after else ""
        print(
            f"error: rank {rank}: not all of the {world} ranks answered within {self._seconds} s{when}: check that every "
            "process was started and that nodes reach MASTER_ADDR:MASTER_PORT",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LaunchError.exit_code)
