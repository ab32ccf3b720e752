"""Submits a run to SLURM: checks it, writes a batch script that a person can read, and hands that to sbatch.

Settings are checked before anything is written or submitted. The script requeues the job at its time limit and after
failures that a restart mends (`launch/requeue.py`); it lies in `RUN_DIR/launch.sbatch`. `--dry-run` prints it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm_script import SlurmJob, render
from launch.sweep import add_flag, missing_inputs, plan_sweep
from parallel.errors import DataError, LaunchError
from train.run_files import make_directory
from train.settings import load_settings, refuse_passed_on

SCRIPT = "launch.sbatch"
# Options of sbatch that the script sets, and what sets them here.
_OURS = {
    "array": "--chain", "chdir": "the folder you submit from", "cpus-per-task": "--cpus-per-task",
    "gpus-per-node": "--gpus-per-node", "job-name": "--job-name", "nodes": "--nodes", "no-requeue": "--chain 1",
    "ntasks": "--processes-per-node", "ntasks-per-node": "--processes-per-node", "open-mode": "append, always",
    "output": "--output", "requeue": "always, but for --chain", "signal": "--grace", "time": "--time",
    "dependency": "--chain, or sbatch with the script",
}  # fmt: skip
# CPU cores per GPU where nobody says otherwise.
_CPUS_PER_GPU = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m launch slurm`."""
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="nodes (default 1)")
    add("--gpus-per-node", type=int, help="GPUs of each; 0 for CPU")
    add("--processes-per-node", type=int, help="ranks on each; one per GPU by default")
    add("--cpus-per-task", type=int, help="cores of each node, for all its ranks (default 4 per GPU, or 1 per rank)")
    add("--mem", help="memory of each node, as sbatch takes it")
    add("--time", help="time limit: MINUTES, H:M:S, D-H or D-H:M:S")
    add("--partition")
    add("--account")
    add("--qos")
    add("--job-name", help="by default the name of the run's folder")
    add("--output", help="log file; RUN_DIR/slurm-%%j.log by default")
    add("--container", metavar="IMAGE", help="run in this image (enroot and pyxis)")
    add("--container-mount", action="append", default=[], metavar="SOURCE:TARGET", help="may be repeated")
    add("--venv", type=Path, metavar="PATH", help="virtual environment; the one that runs this by default")
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="export to the ranks; may be repeated")
    add("--network-interface", metavar="NAME", help="for NCCL and gloo, such as ib0")
    add("--rendezvous-host", metavar="HOST", help="where the ranks meet; the first node by default")
    add("--port", type=int, help="where the ranks meet; one that depends on the job's id by default")
    add(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="ask for a stop so long before the limit (default 300)",
    )
    add("--max-restarts-without-progress", type=int, default=2, metavar="N",
        help="requeues in a row in which no checkpoint is made (default 2)")  # fmt: skip
    add("--chain", type=int, metavar="N", help="N jobs, each after the other, instead of requeueing one")
    add("--sbatch-option", action="append", default=[], metavar="NAME[=VALUE]", help="any other; may be repeated")
    add_flag(parser)
    add("--dry-run", action="store_true", help="print the script, write and submit nothing")
    add("overrides", nargs="*", help="settings, as for `python -m train`")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `python -m launch slurm`."""
    if arguments.multirun:
        return _submit_sweep(arguments)
    job = plan_job(arguments, Path.cwd())
    length = arguments.chain or 1
    if arguments.dry_run:
        print(render(job), end="")
        _print_commands(job, length)
        return 0
    _need_sbatch()
    ids = " ".join(submit_job(job, length))
    ranks = f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.processes} = {job.nodes * job.processes} ranks"
    print(f"submitted {ids} ({ranks}); script {job.run_dir / SCRIPT}, log {job.output}; end with scancel {ids}")
    return 0


def _submit_sweep(arguments: argparse.Namespace) -> int:
    """Submit a job, or a chain, for every point of a sweep that has not finished; all are checked before the first."""
    _check_numbers(arguments)
    _, processes = _sizes(arguments.gpus_per_node, arguments.processes_per_node)
    sweep = plan_sweep(arguments.overrides, arguments.nodes * processes)
    left = [point for point in sweep.points if not point.finished()]
    jobs = [
        plan_job(argparse.Namespace(**vars(arguments) | {"overrides": list(p.overrides)}), Path.cwd()) for p in left
    ]
    missing = missing_inputs(sweep)
    if missing:
        # Not refused: the nodes of the job may have folders that this one has not.
        print(
            f"warning: {len(missing)} of {len(sweep.points)} points do not find here what they read, first {missing[0]}",
            file=sys.stderr,
        )
    length = arguments.chain or 1
    passed = (
        f", {len(sweep.points) - len(left)} of them finished and passed over" if len(left) < len(sweep.points) else ""
    )
    if arguments.dry_run:
        print(f"# {len(sweep.points)} points{passed}; the script of each differs in its folder and its overrides:")
        if jobs:
            print(render(jobs[0]), end="")
        for job in jobs:
            _print_commands(job, length)
        return 0
    _need_sbatch()
    sweep.write()
    submitted: list[str] = []
    for job in jobs:
        ids = submit_job(job, length, submitted)
        print(f"{job.run_dir.name}: submitted {' '.join(ids)}")
        submitted += ids
    print(
        f"{len(sweep.points)} points in {sweep.folder}{passed}; how they stand: python -m launch sweep {sweep.folder}"
    )
    if submitted:
        print(f"end them all with scancel {' '.join(submitted)}")
    return 0


def _need_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch is not on the PATH: submit from a node of the cluster, or use --dry-run")


def _print_commands(job: SlurmJob, length: int) -> None:
    for i in range(length):
        print("#", shlex.join(sbatch_command(job.run_dir / SCRIPT, "FIRST" if i else None, "PREVIOUS")))


def submit_job(job: SlurmJob, length: int, before: Sequence[str] = ()) -> list[str]:
    """Write the script of a run and submit it.

    Args:
        job: the run.
        length: jobs of its chain.
        before: ids of what this command has submitted already, for the message of a refusal.

    Returns:
        Ids of the jobs.

    Raises:
        CoppiceError: if the script cannot be written, or sbatch refuses.
    """
    script = job.run_dir / SCRIPT
    make_directory(job.run_dir)
    try:
        script.write_text(render(job))
    except OSError as e:
        raise DataError(f"{script}: cannot write ({e.strerror}): free space or check permissions") from None
    submitted: list[str] = []
    for _ in range(length):
        submitted.append(_submit(script, submitted, before))
    return submitted


def plan_job(arguments: argparse.Namespace, folder: Path) -> SlurmJob:
    """Check options and settings, and derive the job.

    Args:
        arguments: of the command line.
        folder: that relative paths start from.

    Raises:
        CoppiceError: naming the option or key, its value and the remedy.
    """
    given = arguments
    _check_numbers(given)
    gpus, processes = _sizes(given.gpus_per_node, given.processes_per_node)
    if given.grace > 65535:
        raise LaunchError(f"--grace={given.grace} is more than SLURM takes: use 65535 seconds or less")
    limit = time_limit_seconds(given.time) if given.time else None
    if limit is not None and given.grace >= limit:
        raise LaunchError(f"--grace={given.grace} seconds leave nothing of --time={given.time}: use less, or more time")
    python = _python(given.venv, given.container)
    environment = tuple(_variable(text) for text in given.env)
    settings = load_settings(given.overrides, world_size=given.nodes * processes)
    refuse_passed_on(settings)
    run_dir = Path(os.path.normpath(folder / settings.run.dir))
    root = Path(__file__).resolve().parents[1]
    options = [f"--{name}={getattr(given, name)}" for name in ("time", "partition", "account", "qos", "mem")
               if getattr(given, name)]  # fmt: skip
    job = SlurmJob(
        name=given.job_name or run_dir.name, nodes=given.nodes, processes=processes, gpus=gpus,
        cpus=given.cpus_per_task or (gpus * _CPUS_PER_GPU if gpus else processes),
        run_dir=run_dir, folder=folder, root=root, steps=settings.run.steps, overrides=tuple(given.overrides),
        output=given.output or str(run_dir).replace("%", "%%") + "/slurm-%j.log",
        grace=given.grace, bound=given.max_restarts_without_progress, python=python, container=given.container,
        mounts=_mounts(given.container, given.container_mount, (folder, root, run_dir)), environment=environment,
        interface=given.network_interface, host=given.rendezvous_host, port=given.port, chained=given.chain is not None,
        options=(*options, *map(_option, given.sbatch_option)),
    )  # fmt: skip
    _check_lines(job)
    return job


def _check_numbers(given: argparse.Namespace) -> None:
    """Refuse options that are out of range."""
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("processes_per_node", 1), ("cpus_per_task", 1), ("grace", 1),
                        ("max_restarts_without_progress", 0), ("chain", 1), ("port", 1024)):  # fmt: skip
        value = getattr(given, name)
        if value is not None and value < least:
            raise LaunchError(f"--{name.replace('_', '-')}={value} must be {least} or more")
    if given.port is not None and given.port > 65535:
        raise LaunchError(f"--port={given.port} is no port: use 1024 to 65535, or leave it out")


def time_limit_seconds(text: str) -> int | None:
    """Seconds of a time limit as sbatch takes it; None for no limit.

    Raises:
        LaunchError: if it is none.
    """
    if text.lower() in ("unlimited", "infinite"):
        return None
    day = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", text)
    if day:
        days, hours, minutes, seconds = (int(x or 0) for x in day.groups())
    else:
        days, plain = 0, re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)|(\d+)", text)
        if plain is None:
            raise LaunchError(f"--time={text} is no time limit: use MINUTES, H:M:S, D-H or D-H:M:S")
        hours, minutes, seconds = int(plain[1] or 0), int(plain[2] or plain[4]), int(plain[3] or 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise LaunchError(f"--time={text} is no time at all: use unlimited, or leave it out for the partition's limit")
    return total


def sbatch_command(script: Path, first: str | None, previous: str) -> list[str]:
    """The command that submits one job.

    Args:
        script: that it runs.
        first: id of the chain's first job; None for that job itself.
        previous: id of the job it waits for, if it is not the first.
    """
    if first is None:
        return ["sbatch", "--parsable", str(script)]
    return ["sbatch", "--parsable", f"--dependency=afterany:{previous}", str(script), first]


def _submit(script: Path, submitted: list[str], before: Sequence[str]) -> str:
    """Submit the next job of a chain; its id."""
    command = sbatch_command(script, submitted[0] if submitted else None, submitted[-1] if submitted else "")
    answer = subprocess.run(command, capture_output=True, text=True)
    number = answer.stdout.strip().split(";")[0]
    if answer.returncode or not number:
        words = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in answer.stderr.splitlines())
        known = [*before, *submitted]
        left = f"; submitted before it: {' '.join(known)} (scancel ends them)" if known else ""
        raise LaunchError(f"sbatch refuses: {words or f'exit code {answer.returncode}'}{left}")
    if answer.stderr.strip():
        print(answer.stderr.strip(), file=sys.stderr)
    return number


def _sizes(gpus: int | None, processes: int | None) -> tuple[int, int]:
    """GPUs and ranks per node."""
    if gpus is None:
        raise LaunchError("--gpus-per-node is not given: say how many GPUs each node has, 0 for CPU")
    if gpus == 0 and processes is None:
        raise LaunchError("--gpus-per-node=0 says nothing of how many ranks to start: give --processes-per-node")
    if processes is None:
        return gpus, gpus
    if gpus and processes > gpus:
        raise LaunchError(
            f"--processes-per-node={processes} is more than --gpus-per-node={gpus}: one rank per GPU at most"
        )
    return gpus, processes


def _python(venv: Path | None, container: str | None) -> str:
    """The interpreter of the ranks."""
    if container is not None:
        if venv is not None:
            raise LaunchError(
                f"--container={container} and --venv={venv} exclude each other: the image brings its Python"
            )
        return "python"
    if venv is None:
        return sys.executable
    python = Path(os.path.abspath(venv)) / "bin" / "python"
    if not python.exists():
        raise LaunchError(f"--venv={venv} is no virtual environment: {python} does not exist")
    return str(python)


def _mounts(container: str | None, given: list[str], own: tuple[Path, ...]) -> tuple[str, ...]:
    """What the user mounts, and this run's own folders where they lie."""
    if container is None:
        if given:
            raise LaunchError(f"--container-mount={given[0]} needs --container")
        return ()
    for mount in given:
        if not re.fullmatch(r"[^:,]+:[^:,]+(:[^:,]+)?", mount):
            raise LaunchError(f"--container-mount={mount} must be SOURCE:TARGET")
    wanted: list[Path] = []
    for path in sorted(set(own)):
        if not any(path.is_relative_to(p) for p in wanted):
            wanted.append(path)
    return (*given, *(f"{path}:{path}" for path in wanted))


def _variable(text: str) -> tuple[str, str]:
    """Name and value of --env."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise LaunchError(f"--env={text} must be KEY=VALUE, such as --env NCCL_DEBUG=INFO")
    return name, value


def _option(text: str) -> str:
    """An option for sbatch that is not one of ours."""
    name = text.lstrip("-").partition("=")[0]
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise LaunchError(f"--sbatch-option={text} must be NAME or NAME=VALUE, such as constraint=h100")
    if name in _OURS:
        raise LaunchError(f"--sbatch-option={text} is set by {_OURS[name]}: use that")
    return f"--{text.lstrip('-')}"


def _check_lines(job: SlurmJob) -> None:
    """Refuse what would break the lines that sbatch reads."""
    words = {"--job-name": job.name, "--output": job.output, "run.dir": str(job.run_dir), "the folder": str(job.folder)}
    for name, text in (*words.items(), *((option.split("=")[0], option) for option in job.options)):
        if any(ord(c) < 32 for c in text):
            raise LaunchError(f"{name}={text!r} holds a control character: leave it out")
