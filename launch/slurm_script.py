"""The batch script of a run under SLURM, as text: nothing is read, written or started here.

    print(render(SlurmJob(name="grow", nodes=2, processes=8, ...)))

The script starts torchrun once per node and waits. SIGUSR1, which SLURM sends to the script alone some time before the
limit, becomes a file `RUN_DIR/stop` that the run looks for: torchrun's agent would die of the signal itself. Afterwards
`launch/requeue.py` reads what became of the run and says whether the job goes back into the queue.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.environment import DEFAULTS, NEWER

# What sbatch and bash take literally.
_PLAIN = re.compile(r"[\w./:=,@%+^-]", re.ASCII)
# Seconds that srun waits for the other nodes after the first has ended; torchrun's agents wait as long for each other.
_WAIT_SECONDS = 300


@dataclass(frozen=True)
class SlurmJob:
    """Everything the script depends on.

    Attributes:
        name: of the job.
        nodes: how many.
        processes: ranks on each node.
        gpus: on each node; 0 for CPU.
        cpus: on each node, for all of its ranks.
        run_dir: of the run, absolute.
        folder: where the run starts, for relative paths in the overrides; absolute.
        root: folder of this package's sources; absolute.
        steps: that the run is to make.
        overrides: Hydra overrides.
        output: file of the log, with SLURM's patterns.
        grace: seconds before the time limit at which the run is asked to stop.
        bound: requeues in a row without a new checkpoint.
        python: interpreter, on every node the same.
        container: image for pyxis; None runs on the host.
        mounts: of the container, SOURCE:TARGET each.
        environment: names and values to export.
        interface: network interface of NCCL and gloo.
        host: of the rendezvous; None takes the first node.
        port: of the rendezvous; None takes one that depends on the job's id.
        chained: the next job of a chain goes on, not this one.
        options: further options of sbatch, name and value as written; sizes, partition and the like.
    """

    name: str
    nodes: int
    processes: int
    gpus: int
    cpus: int
    run_dir: Path
    folder: Path
    root: Path
    steps: int
    overrides: tuple[str, ...]
    output: str
    grace: int = 300
    bound: int = 2
    python: str = "python"
    container: str | None = None
    mounts: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    interface: str | None = None
    host: str | None = None
    port: int | None = None
    chained: bool = False
    options: tuple[str, ...] = ()


def directive(option: str) -> str:
    """An option as a line that sbatch reads: quotes keep blanks together, in them a backslash makes any character plain."""
    if all(map(_PLAIN.match, option)):
        return f"#SBATCH {option}"
    return '#SBATCH "' + "".join(c if c == " " or _PLAIN.match(c) else f"\\{c}" for c in option) + '"'


def render(job: SlurmJob) -> str:
    """The script, readable from top to bottom."""
    parts = [_head(job), _SETTINGS.format(run_dir=shlex.quote(str(job.run_dir))), _environment(job), _helpers(job)]
    parts += [_BEGIN.format(steps=job.steps, bound=job.bound), _step(job), _WAIT]
    parts.append(_END.format(bound=job.bound) + (_NEXT if job.chained else _REQUEUE))
    return "\n".join(parts)


def _head(job: SlurmJob) -> str:
    options = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={job.cpus}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []), *job.options,
        f"--chdir={job.folder}", f"--output={job.output}", "--open-mode=append",
        "--no-requeue" if job.chained else "--requeue", f"--signal=B:USR1@{job.grace}",
    ]  # fmt: skip
    written = "# Written by `python -m launch slurm`. `sbatch` with this file, from any folder, goes on with the run."
    return "\n".join(["#!/bin/bash", written, *map(directive, options), "set -u", ""])


def _environment(job: SlurmJob) -> str:
    given = dict(job.environment)
    if job.interface:
        given = {"NCCL_SOCKET_IFNAME": job.interface, "GLOO_SOCKET_IFNAME": job.interface} | given
    lines = [f"export PYTHONPATH={shlex.quote(str(job.root))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    for name, value in DEFAULTS.items():
        if name not in given:
            default = f"${{{NEWER[name]}:-{value}}}" if name in NEWER else value
            lines.append(f'export {name}="${{{name}:-{default}}}"')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
    return "\n".join([*lines, ""])


def _helpers(job: SlurmJob) -> str:
    python = shlex.quote(job.python)
    if job.container is None:
        return f"tell=({python} -m launch.requeue)\n"
    words = [f"--container-image={job.container}", f"--container-workdir={job.folder}"]
    words += [f"--container-mounts={','.join(job.mounts)}"]
    lines = ["container=(", *(f"    {shlex.quote(word)}" for word in words), ")"]
    lines.append(f'tell=(srun --nodes=1 --ntasks=1 --overlap "${{container[@]}}" {python} -m launch.requeue)')
    return "\n".join([*lines, ""])


def _step(job: SlurmJob) -> str:
    port = str(job.port) if job.port is not None else "$((20000 + SLURM_JOB_ID % 10000))"
    if job.host is None:
        # A node's name need not be one that the network knows; its address is what SLURM itself calls.
        lines = [
            'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "address=$(scontrol --oneliner show node \"$head\" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')",
            f'endpoint="${{address:-$head}}:{port}"',
        ]
    else:
        lines = [f"endpoint={shlex.quote(job.host)}:{port}"]
    srun = [
        f"srun --nodes={job.nodes} --ntasks-per-node=1 --cpus-per-task={job.cpus} --kill-on-bad-exit=0"
        f" --wait={_WAIT_SECONDS}" + ("" if job.container is None else ' "${container[@]}"'),
        f"{shlex.quote(job.python)} -m torch.distributed.run --nnodes={job.nodes} --nproc-per-node={job.processes}",
        '--rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$endpoint"',
        "-m train",
        *map(shlex.quote, job.overrides),
    ]
    return "\n".join([*lines, " \\\n    ".join(srun) + " &", "step=$!", ""])


_SETTINGS = """\
run_dir={run_dir}
# First job of a chain, which its later jobs are told; a job of its own is its own first.
chain=${{1:-$SLURM_JOB_ID}}
(umask 077 && mkdir -p "$run_dir")
"""

_BEGIN = """\
answer=$("${{tell[@]}}" begin "$run_dir" --job "$SLURM_JOB_ID" --chain "$chain" --steps {steps} --bound {bound}) || exit
[ "$answer" = go ] || exit "${{answer#end }}"

# USR1 comes before the time limit, TERM from scancel and from SLURM. The ranks look for a file; one that is there already
# is the user's own request to stop, and is left alone.
asked=
ask_to_stop() {{
    (set -o noclobber && echo "slurm job $SLURM_JOB_ID: $1" > "$run_dir/stop") 2> /dev/null
}}
trap 'ask_to_stop USR1 && asked=USR1' USR1
trap 'ask_to_stop TERM; asked=TERM' TERM
"""

_WAIT = """\
# A trap ends `wait` early.
while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2> /dev/null || break
done
trap '' USR1 TERM
"""

_END = """\
# The exit code of torchrun says little after a signal: the run's own word counts.
preempted=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' PreemptTime=[0-9]')
answer=$("${{tell[@]}}" end "$run_dir" --chain "$chain" --code "$code" --asked "$asked" --bound {bound} \\
    ${{preempted:+--preempted}}) || exit
"""

_REQUEUE = """\
if [ "${answer%% *}" = again ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "launch: this job cannot be requeued here: submit it again, or use --chain" >&2
    exit 1
fi
exit "${answer#* }"
"""

_NEXT = """\
# The next job of the chain, if there is one, goes on.
exit "${answer#* }"
"""
