"""Verifies and measures on the GPUs that are here everything that still lacks a GPU figure: `make gpu-check`.

    python benchmarks/gpu_check.py [--sections machine,train] [--small] [--processes N] [--output FILE]
    python benchmarks/gpu_check.py --show benchmarks/results/gpu_check.json     the file as a table for the guide

Every section runs in a process of its own with a time limit, so that one that fails or hangs costs only itself, and the
whole ends within eight minutes. A section has its own time and what those before it left over (one alone has all of it),
leaves out what would take longer and says so; what it has started ends with it. Rows are printed as they come, and the
result file is written again after each one: what is stopped keeps what it had. The file
(benchmarks/results/gpu_check.json) has the card and the versions, each section the date, the git commit and the command;
each row has a name, a value with its unit, the goal where there is one, and whether it is met. With `--sections` the others
stay in the file as they were. Sections that need several GPUs run with
one process on each, and are left out where there is one. Without a GPU only `--small` runs: the same sections on CPU with
tiny shapes, which say that the code works and nothing about speed (tests/benchmarks/test_gpu_check.py). What has to be
installed: benchmarks/gpu_setup.sh says what is missing.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import DEADLINE, SECTIONS, WHOLE
from launch.environment import DEFAULTS

_ROOT = Path(__file__).resolve().parents[1]
_RESULT = _ROOT / "benchmarks" / "results" / "gpu_check.json"
# Variable by which everything that a section starts is told from everything else on the machine.
_MARK = "COPPICE_GPU_CHECK"


def _end_all(mark: str) -> None:
    """Kill what a section has started and left, in whatever session: torchrun gives each of its ranks one of its own.

    A rank that lives on would hold its card's memory, and the pipe that its section is heard through.
    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == mark:
                    process.kill()
                    found += 1
        if not found:
            return
        # Looked at again: it may have been about to start something, and memory is free when it is gone.
        time.sleep(0.1)


def run_section(
    name: str, small: bool, seconds: float, processes: int, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One section in its own process, or processes.

    Args:
        name: of the section.
        small: tiny shapes.
        seconds: after which it is killed, with all it has started.
        processes: it runs with; more than 1 are started by torchrun.
        say: called with the section's state so far after each row.

    Returns:
        Its rows; `error`, one line, if it did not end well; and the seconds that it took.
    """
    python = [sys.executable]
    if SECTIONS[name].many:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*python, str(Path(__file__).resolve()), "--section", name, *(["--small"] if small else [])]
    began, rows, said, mark = time.monotonic(), [], [], uuid.uuid4().hex
    found: dict[str, Any] = {"rows": rows, "seconds": 0.0}
    with subprocess.Popen(
        command,
        cwd=_ROOT,
        env={
            **DEFAULTS,
            **SECTIONS[name].variables,
            **_compiled_once(os.environ),
            _MARK: mark,
            DEADLINE: str(began + seconds),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:

        def see_it_end() -> None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                said.append(f"stopped after {seconds:.0f} s")
                process.kill()
            _end_all(mark)

        end = threading.Thread(target=see_it_end)
        end.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("ROW "):
                    rows.append(json.loads(line.removeprefix("ROW ")))
                    found["seconds"] = round(time.monotonic() - began, 1)
                    say(found)
                elif line.strip():
                    said.append(line.rstrip())
        except BaseException:
            # Ctrl-C does not reach a session of its own.
            process.kill()
            raise
        finally:
            end.join()
    found["seconds"] = round(time.monotonic() - began, 1)
    if process.returncode or not rows:
        stopped = [line for line in said if line.startswith("stopped after")]
        # torchrun says a screen of its own after what the ranks said.
        ranks = [line for line in said if "Error: " in line and "ChildFailedError" not in line]
        found["error"] = (stopped or ranks[-1:] or said[-1:] or [f"exit code {process.returncode}"])[0]
        found["output"] = said[-100:]
    return found


def _compiled_once(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python keeps what it compiles of modules, whose folder may be one that it may not write to.

    On a lent machine every section took several seconds to compile torch's sources anew.
    """
    kept = {name: value for name, value in environment.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "coppice-gpu-check-pycache"), **kept}


def seconds_for(name: str, names: list[str], processes: int, left: float) -> float:
    """What a section may take.

    Args:
        name: of the section.
        names: of all that run, in order.
        processes: those on several GPUs run with.
        left: of the whole, in seconds.

    Returns:
        Its own seconds and what those before it left over; less only where less is left.
    """
    later = [SECTIONS[n] for n in names[names.index(name) + 1 :]]
    kept = sum(section.seconds for section in later if processes > 1 or not section.many)
    return min(left, max(float(SECTIONS[name].seconds), left - kept))


def show(row: dict[str, Any]) -> str:
    """A row on the screen."""
    goal = f"   goal {row['goal']}: {'met' if row['met'] else 'NOT MET'}" if row.get("goal") else ""
    return f"  {row['name']:<64} {_value(row)}{goal}"


def _value(row: dict[str, Any]) -> str:
    value = row["value"]
    return f"{f'{value:,.4g}' if isinstance(value, float) else value} {row['unit']}".strip()


def as_table(result: dict[str, Any]) -> str:
    """A result file as the table of the guide, with command, machine, versions and date below it."""
    lines = ["| what | value | goal | met |", "|---|---|---|---|"]
    for name, section in result["sections"].items():
        for row in section["rows"]:
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            lines.append(f"| {name}: {row['name']} | {_value(row)} | {row['goal']} | {met} |")
        if "error" in section:
            lines.append(f"| {name} | failed: {section['error'].replace('|', '/')} | | **no** |")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += ["", f"{result['cards']} x {result['card']}, {versions}."]
    calls: dict[tuple[str, ...], list[str]] = {}
    for name, section in result["sections"].items():
        calls.setdefault(tuple(section[key] for key in ("command", "commit", "date")), []).append(name)
    for (command, commit, date), names in calls.items():
        lines += ["", f"{', '.join(names)}: `{command}`, commit {commit}, {date}."]
    return "\n".join(lines)


def earlier(output: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Sections of an earlier result, to stand beside those that run now.

    Args:
        output: where the result goes; there may be none yet.
        result: of now, without sections.

    Raises:
        ValueError: the file is of another machine or other versions, so that its figures cannot stand beside those of now.
    """
    if not output.exists():
        return {}
    old = json.loads(output.read_text())
    for key in ("card", "cards", "versions", "small"):
        if old.get(key) != result[key]:
            raise ValueError(
                f"--sections: {output} is of {key} {old.get(key)}, and this is {result[key]}: name another --output"
            )
    return {name: section for name, section in old["sections"].items() if name in SECTIONS}


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in ("torch", "megatron-core", "transformer-engine", "torchtitan"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit that is measured; a copy without git's folder says so, unless it is told (`--commit`)."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown (no git here)"


def _card() -> str:
    """Name of the first GPU, from its driver if that can be asked: torch would hold a part of its memory from then on."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        told = ""
    import torch

    return told.splitlines()[0] if told else torch.cuda.get_device_name()


def _section_main(name: str, small: bool) -> int:
    from benchmarks.gpu.rows import print_row

    for row in SECTIONS[name].load()(small):
        if os.environ.get("RANK", "0") == "0":
            print_row(row)
    return 0


def _options() -> argparse.Namespace:
    about = "\n".join(
        f"  {name:<8} {section.about} (at most {section.seconds} s)" for name, section in SECTIONS.items()
    )
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nSections, in this order:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sections", "--only", metavar="A,B", help="only these, separated by commas")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on CPU too")
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="of sections on several GPUs; by default all, or the next lower power of two",
    )
    parser.add_argument("--output", type=Path, default=_RESULT, metavar="FILE", help="where the result goes")
    parser.add_argument("--commit", help="what is measured, where the code was copied without git's folder")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result file as a table, and measure nothing")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the sections and write the result. Returns the exit status: 0 if every section ran and every check held."""
    options = _options()
    if options.show:
        print(as_table(json.loads(options.show.read_text())))
        return 0
    if options.section:
        return _section_main(options.section, options.small)
    names = options.sections.split(",") if options.sections else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"error: --sections {unknown[0]} is unknown: use {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    import torch

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not cards and not options.small:
        print("error: no CUDA device is visible: run this where there is one, or use --small", file=sys.stderr)
        return 2
    # A power of two, which divides the numbers of experts.
    processes = options.processes or 1 << (max(cards, 1).bit_length() - 1)
    if cards and processes > cards:
        print(f"error: --processes {processes} on {cards} visible GPUs: use at most {cards}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "card": _card() if cards else "none: CPU, tiny shapes", "cards": processes, "versions": _versions(),
        "small": options.small,
    }  # fmt: skip
    call = {
        "command": "python " + " ".join(sys.argv), "commit": options.commit or _commit(), "date": time.strftime("%Y-%m-%d")
    }  # fmt: skip
    try:
        kept = earlier(options.output, result) if options.sections else {}
    except (ValueError, KeyError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    sections: dict[str, Any] = {}
    began = time.monotonic()
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        found = kept | {name: call | section for name, section in sections.items()}
        result["sections"] = {name: found[name] for name in SECTIONS if name in found}
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in names:
        section = SECTIONS[name]
        if section.many and processes < 2:
            print(f"{name}: left out, it needs at least 2 GPUs", flush=True)
            continue
        print(f"{name}: {section.about}", flush=True)

        def say(found: dict[str, Any], name: str = name) -> None:
            sections[name] = found
            print(show(found["rows"][-1]), flush=True)
            write()

        left = WHOLE - (time.monotonic() - began)
        # Tiny shapes on a CPU that others use too may take longer, and nobody waits for a lent card.
        limit = 600.0 if options.small else seconds_for(name, names, processes, left)
        if limit < 5:
            sections[name] = {"rows": [], "seconds": 0.0, "error": f"not begun: the {WHOLE} s are over"}
        else:
            sections[name] = run_section(name, options.small, limit, processes, say)
        if "error" in sections[name]:
            print(f"  FAILED after {sections[name]['seconds']} s: {sections[name]['error']}", flush=True)
            # The end of what it said; the file has more of it, if that can be had from the machine.
            for line in sections[name].get("output", [])[-12:]:
                print(f"    | {line}", flush=True)
        write()
    write()
    rows = [row for section in sections.values() for row in section["rows"]]
    failed = [name for name, section in sections.items() if "error" in section]
    checks = [row["name"] for row in rows if row.get("check") and not row["met"]]
    summary = f"{len(failed)} sections failed, {len(checks)} checks did not hold"
    print(f"{len(rows)} figures in {time.monotonic() - began:.0f} s, {summary}; written to {options.output}")
    return 1 if failed or checks else 0


if __name__ == "__main__":
    sys.exit(main())
