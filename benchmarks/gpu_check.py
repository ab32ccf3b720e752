"""Verifies and measures on the GPU that is here everything that still lacks a GPU figure: `make gpu-check`.

    python benchmarks/gpu_check.py [--only machine,train] [--small] [--output FILE]

Every section runs in a process of its own with a time limit, so that one that fails or hangs costs only itself, and the
whole ends within eight minutes. Prints a table as it goes and writes benchmarks/results/gpu_check.json: each row has a
name, a value with its unit, the goal where there is one, and whether it is met; the file has the card, the versions, the
date and the command. Without a GPU only `--small` runs: the same sections on CPU with tiny shapes, which say that the code
works and nothing about speed (tests/benchmarks/test_gpu_check.py).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import SECTIONS

_ROOT = Path(__file__).resolve().parents[1]
_RESULT = _ROOT / "benchmarks" / "results" / "gpu_check.json"


def run_section(name: str, small: bool, seconds: int) -> dict[str, Any]:
    """One section in its own process.

    Args:
        name: of the section.
        small: tiny shapes.
        seconds: after which it is killed, with all it has started.

    Returns:
        Its rows; `error`, one line, if it did not end well; and the seconds that it took.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name, *(["--small"] if small else [])]
    began = time.monotonic()
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nstopped after {seconds} s"
    lines = output.splitlines()
    rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
    found: dict[str, Any] = {"rows": rows, "seconds": round(time.monotonic() - began, 1)}
    if process.returncode or not rows:
        said = [line for line in lines if line.strip() and not line.startswith("ROW ")]
        found["error"] = said[-1] if said else f"exit code {process.returncode}"
        found["output"] = said[-40:]
    return found


def show(row: dict[str, Any]) -> str:
    """A row of the table."""
    value = row["value"]
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    goal = f"   goal {row['goal']}: {'met' if row['met'] else 'NOT MET'}" if row.get("goal") else ""
    return f"  {row['name']:<64} {text} {row['unit']}{goal}"


def main() -> int:
    """Run the sections and write the result. Returns the exit status: 0 if every section ran and every check held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"sections, separated by commas, of: {', '.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on CPU too")
    parser.add_argument("--output", type=Path, default=_RESULT, metavar="FILE")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        from benchmarks.gpu.rows import print_row

        for row in SECTIONS[options.section].load()(options.small):
            print_row(row)
        return 0
    import torch

    if not torch.cuda.is_available() and not options.small:
        print("error: no CUDA device is visible: run this where there is one, or use --small", file=sys.stderr)
        return 2
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        print(f"error: --only {unknown[0]} is unknown: use {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    began, sections = time.monotonic(), {}
    for name in names:
        print(f"{name}: {SECTIONS[name].about}", flush=True)
        sections[name] = run_section(name, options.small, SECTIONS[name].seconds)
        for row in sections[name]["rows"]:
            print(show(row), flush=True)
        if "error" in sections[name]:
            print(f"  FAILED after {sections[name]['seconds']} s: {sections[name]['error']}", flush=True)
    result = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU, tiny shapes",
        "date": time.strftime("%Y-%m-%d"), "command": "python " + " ".join(sys.argv), "small": options.small,
        "seconds": round(time.monotonic() - began, 1), "sections": sections,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    rows = [row for section in sections.values() for row in section["rows"]]
    failed = [name for name, section in sections.items() if "error" in section]
    checks = [row["name"] for row in rows if row.get("check") and not row["met"]]
    summary = f"{len(failed)} sections failed, {len(checks)} checks did not hold"
    print(f"{len(rows)} figures in {result['seconds']:.0f} s, {summary}; written to {options.output}")
    return 1 if failed or checks else 0


if __name__ == "__main__":
    sys.exit(main())
