"""The report: numbers from synthetic runs of every shape, a self-contained page, typed errors, bounded time."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import DataError
from train.report import main, summary_lines, write_report
from train.report_data import load_run
from train.report_load import family_bands
from train.report_plot import envelope, moving_mean
from train.run_files import RunFiles

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS_PER_STEP = 8192


def _plan(step: int, stage: int, before: int, after: int, layers: int, greedy: bool, rng: Any) -> dict[str, Any]:
    """A plan as upcycle writes it: uniform copies, or greedy ones after a random utility."""
    entries = []
    for layer in range(1, layers + 1):
        scores = rng.gamma(2.0, 1e-3, before)
        copies = np.full(before, after // before)
        if greedy:
            copies = np.ones(before, dtype=int)
            for _ in range(after - before):
                copies[np.argmax(scores / copies * (copies < 5))] += 1
        parents = np.repeat(np.arange(before), copies)
        entries.append(
            {
                "layer": layer,
                "parents": parents.tolist(),
                "copies": copies.tolist(),
                "scores": scores.tolist() if greedy else None,
            }
        )
    return {
        "format": 1,
        "step": step,
        "stage": stage,
        "experts_before": before,
        "experts_after": after,
        "selection": {"rule": "greedy", "utility": "grad_norm"} if greedy else {"rule": "uniform"},
        "placement": {"rule": "near"},
        "optimizer_rule": "copy",
        "bias_noise": 1e-3,
        "seed": 1234,
        "layers": entries,
        "digest": "9f1c2e6a7b304d58",
    }


def _share(rng: Any, popularity: Any, concentration: float) -> Any:
    """Expert shares of one layer, near a slowly changing popularity."""
    return rng.dirichlet(popularity / popularity.sum() * concentration)


def make_run(
    run_dir: Path,
    stages: list[tuple[int, int]],
    *,
    layers: int = 2,
    greedy: bool = False,
    finished: bool = True,
    every: int = 10,
    seed: int = 0,
) -> RunFiles:
    """A run directory like a real one.

    Args:
        run_dir: where to write it.
        stages: (steps, experts) of each stage; 0 experts is a dense model.
        layers: MoE layers.
        greedy: plans with unequal copies.
        finished: with a stop event.
        every: steps between records of expert load; evaluations are five times rarer.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    files = RunFiles(run_dir)
    files.prepare()
    files.config.write_text("model:\n  hidden_size: 64\nrun:\n  name: synthetic\n")
    total = sum(steps for steps, _ in stages)
    experts = stages[0][1]
    files.append_event(
        "start",
        step=0,
        num_experts=experts,
        parameters_total=1_200_000 + 98_304 * experts * layers,
        parameters_active=1_400_000,
        world_size=2,
        layout={"tensor": 1, "pipeline": 1, "expert": 2, "data": 2},
        versions={"coppice": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1", "python": "3.11.2"},
    )
    popularity = [rng.gamma(3.0, 1.0, max(1, experts)) for _ in range(layers)]
    step, metrics, loads, jump = 0, [], [], 0.0
    floor, born = 2.1, 0
    for stage, (steps, experts) in enumerate(stages):
        if stage:
            before = stages[stage - 1][1]
            loss = floor + 4.0 * (step + 30) ** -0.45
            jump, born = 0.06, step
            plan = _plan(step, stage, before, experts, layers, greedy, rng)
            path = f"plans/step-{step:08d}.json"
            (run_dir / path).write_text(json.dumps(plan))
            checkpoint = f"checkpoints/step-{step:08d}-stage{stage - 1}"
            (run_dir / checkpoint).mkdir()
            # In the trainer's order: the outcome is evaluated before the event of the expansion is written.
            files.append_event("evaluation", step=step, valid_loss=loss + 0.02, tokens=16_384, sibling_divergence=None)
            files.append_event("checkpoint", step=step, path=checkpoint, seconds=0.42, bytes=31_457_280)
            none = {"mean": 0.0, "min": 0.0, "max": 0.0}
            files.append_event(
                "evaluation", step=step, valid_loss=loss + 0.02 + jump, tokens=16_384, sibling_divergence=none
            )
            files.append_event(
                "expansion",
                step=step,
                stage=stage,
                from_experts=before,
                to_experts=experts,
                selection=plan["selection"],
                plan=path,
                valid_loss_before=loss + 0.02,
                valid_loss_after=loss + 0.02 + jump,
                pause_seconds=2.31,
                seconds={"plan": 0.05, "save": 0.42, "transform": 0.11, "rebuild": 0.9, "load": 0.55, "verify": 0.2},
            )
            popularity = [
                popularity[i][plan["layers"][i]["parents"]] * rng.gamma(8.0, 1.0, experts) for i in range(layers)
            ]
            floor -= 0.08
        for _ in range(steps):
            step += 1
            base = (
                floor
                + 4.0 * (step + 30) ** -0.45
                + (0.08 + jump) * np.exp(-(step - born) / (0.05 * total)) * (stage > 0)
            )
            seconds = (0.31 + 0.06 * stage) * rng.lognormal(0.0, 0.06)
            record: dict[str, Any] = {
                "step": step,
                "stage": stage,
                "num_experts": experts,
                "tokens": step * TOKENS_PER_STEP,
                "lm_loss": base + 0.05 * rng.standard_normal(),
                "grad_norm": 0.7 * rng.lognormal(0.0, 0.2) + 0.5 * np.exp(-(step - born) / 10),
                "learning_rate": 3e-4
                * min(1.0, step / (0.05 * total + 1))
                * (0.55 + 0.45 * np.cos(3.14 * step / total)),
                "step_seconds": seconds,
                "tokens_per_second": TOKENS_PER_STEP / seconds,
            }
            if experts:
                even = 1 - np.exp(-(step - born) / (0.15 * total + 1))
                record["expert_load_max"] = 1.15 + 1.2 * (1 - even) + 0.05 * rng.random()
                record["expert_load_min"] = 0.85 * even + 0.02 * rng.random()
                record["expert_load_entropy"] = 0.9 + 0.095 * even + 0.003 * rng.random()
                record["dead_experts"] = int(rng.poisson(3 * (1 - even) ** 4))
                if step % every == 0:
                    shares = [_share(rng, p ** (1 - 0.8 * even), 80 * experts) for p in popularity]
                    loads.append(
                        {
                            "step": step,
                            "stage": stage,
                            "num_experts": experts,
                            "layers": list(range(1, layers + 1)),
                            "share_LE": [share.tolist() for share in shares],
                        }
                    )
            metrics.append(record)
            if step % (5 * every) == 0 or step == total:
                apart = 0.3 * (1 - np.exp(-(step - born) / (0.3 * total))) if stage else None
                files.append_event(
                    "evaluation",
                    step=step,
                    valid_loss=base + 0.02,
                    tokens=16_384,
                    sibling_divergence={"mean": apart, "min": 0.6 * apart, "max": 1.5 * apart} if apart else None,
                )
    files.metrics.write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if loads:
        files.expert_load.write_text("".join(json.dumps(record) + "\n" for record in loads))
    if finished:
        (run_dir / f"checkpoints/step-{step:08d}").mkdir()
        files.append_event("checkpoint", step=step, path=f"checkpoints/step-{step:08d}", seconds=0.5, bytes=62_914_560)
        files.append_event("stop", step=step, reason="finished")
    return files
