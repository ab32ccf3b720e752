"""Makes run directories like those of the trainer, of any length, with any number of stages, from a seed.

The order of events is the trainer's: the outcome of a switch is evaluated just before the event of the expansion.
Also a tool: make one and look at its report.

    python -c "from pathlib import Path; from tests.train.synthetic_run import make_run; \
make_run(Path('/tmp/run'), [(300, 8), (300, 16)], layers=4, greedy=True, full=True)" && python -m train.report /tmp/run
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.report.columns import NORM_GROUPS
from train.run_files import RunFiles
from upcycle.plan import ExpansionPlan, LayerPlan

TOKENS_PER_STEP = 8192
JUMP = 0.06
SECONDS = {"plan": 0.05, "save": 0.42, "transform": 0.11, "rebuild": 0.9, "load": 0.55, "verify": 0.2}


class _Maker:
    """State of a run being made up: its files, what is popular among experts, and when the present stage was born."""

    def __init__(
        self,
        run_dir: Path,
        stages: list[tuple[int, int]],
        layers: int,
        greedy: bool,
        seed: int,
        ep_ranks: int,
        full: bool,
        level: float,
    ) -> None:
        self.files = RunFiles(run_dir)
        self.full, self.level = full, level
        self.stages, self.layers, self.greedy, self.ep_ranks = stages, layers, greedy, ep_ranks
        self.rng = np.random.default_rng(seed)
        self.total = sum(steps for steps, _ in stages)
        self.stage, self.experts, self.step, self.born = 0, stages[0][1], 0, 0
        self.popularity = [self.rng.gamma(3.0, 1.0, max(1, self.experts)) for _ in range(layers)]
        self.metrics: list[dict[str, Any]] = []
        self.loads: list[dict[str, Any]] = []

    def event(self, name: str, **details: Any) -> None:
        self.files.append_event(name, self.step, **details)

    def loss(self) -> float:
        """A power law that jumps a little at each switch and then falls below where it was."""
        level = self.level - 0.08 * self.stage + 4.0 * (self.step + 30) ** -0.45
        age = self.step - self.born
        return level + ((0.08 + JUMP) * np.exp(-age / (0.05 * self.total)) if self.stage else 0.0)

    def start(self, corpus: str) -> None:
        self.files.prepare()
        self.files.config.write_text(f"model:\n  hidden_size: 64\nrun:\n  name: synthetic\ndata:\n  corpus: {corpus}\n")
        self.event(
            "start",
            num_experts=self.experts,
            **self._sizes(),
            world_size=2,
            layout={"tensor": 1, "pipeline": 1, "expert": 2, "data": 2},
            versions={"coppice": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1", "python": "3.11.2"},
        )

    def _sizes(self) -> dict[str, int]:
        return {
            "parameters_total": 1_200_000 + 98_304 * self.experts * self.layers,
            "parameters_active": 1_400_000 + 64 * self.experts,
        }

    def checkpoint(self, name: str) -> None:
        (self.files.checkpoints / name).mkdir()
        self.event("checkpoint", path=f"checkpoints/{name}", seconds=0.42, bytes=31_457_280)

    def evaluate(self, loss: float, divergence: float | None) -> None:
        spread = None if divergence is None else {"mean": divergence, "min": 0.6 * divergence, "max": 1.5 * divergence}
        more: dict[str, Any] = {}
        if self.full:
            # The general set is forgotten a little, the domain is learnt.
            forgotten = 0.1 * self.step / self.total
            losses = {"general": 2.4 + forgotten + 0.2 * (loss - 2.1), "domain": loss}
            more["sets"] = {
                name: {
                    "loss": value,
                    "perplexity": float(np.exp(value)),
                    "bits_per_byte": value / np.log(2) / 4.1,
                    "tokens": 16_384,
                }
                for name, value in losses.items()
            }
            if divergence is not None:
                pulled = min(1.0, 3 * divergence)
                more["sibling_moment_divergence"] = {"mean": pulled, "min": 0.7 * pulled, "max": min(1.2, 1.3 * pulled)}
                more["routing_agreement"] = {
                    "mean": 1 - 0.4 * divergence,
                    "min": 1 - 0.7 * divergence,
                    "max": 1 - 0.2 * divergence,
                }
        self.event("evaluation", valid_loss=loss, tokens=16_384, sibling_divergence=spread, **more)

    def expand(self, after: int) -> None:
        before, loss = self.experts, self.loss() + 0.02
        plan = make_plan(self.step, self.stage + 1, before, after, self.layers, self.greedy, self.rng, self.ep_ranks)
        path = f"plans/step-{self.step:08d}.json"
        (self.files.run_dir / path).write_text(json.dumps(plan))
        self.evaluate(loss, None)
        self.checkpoint(f"step-{self.step:08d}-stage{self.stage}")
        self.evaluate(loss + JUMP, 0.0)
        self.stage, self.experts, self.born = self.stage + 1, after, self.step
        self.event(
            "expansion" if after > before else "layout_change",
            stage=self.stage,
            from_experts=before,
            to_experts=after,
            selection=plan["selection"],
            plan=path,
            valid_loss_before=loss,
            valid_loss_after=loss + JUMP,
            pause_seconds=2.31,
            seconds=SECONDS,
            **self._sizes(),
        )
        parents = [layer["parents"] for layer in plan["layers"]]
        self.popularity = [
            old[family] * self.rng.gamma(8.0, 1.0, after) for old, family in zip(self.popularity, parents, strict=True)
        ]

    def train(self, every: int) -> None:
        """One step: a line of metrics, now and then one of expert load and an evaluation."""
        self.step += 1
        age, rng = self.step - self.born, self.rng
        seconds = (0.31 + 0.06 * self.stage) * rng.lognormal(0.0, 0.06)
        warmup = min(1.0, self.step / (0.05 * self.total + 1))
        record: dict[str, Any] = {
            "step": self.step,
            "stage": self.stage,
            "num_experts": self.experts,
            "tokens": self.step * TOKENS_PER_STEP,
            "lm_loss": self.loss() + 0.05 * rng.standard_normal(),
            "grad_norm": 0.7 * rng.lognormal(0.0, 0.2) + 0.5 * np.exp(-age / 10),
            "learning_rate": 3e-4 * warmup * (0.55 + 0.45 * np.cos(np.pi * self.step / self.total)),
            "step_seconds": seconds,
            "tokens_per_second": TOKENS_PER_STEP / seconds,
        }
        if self.experts:
            even = 1 - np.exp(-age / (0.15 * self.total + 1))
            record["expert_load_max"] = 1.15 + 1.2 * (1 - even) + 0.05 * rng.random()
            record["expert_load_min"] = 0.85 * even + 0.02 * rng.random()
            record["expert_load_entropy"] = 0.9 + 0.095 * even + 0.003 * rng.random()
            record["dead_experts"] = int(rng.poisson(3 * (1 - even) ** 4))
            if self.step % every == 0 or self.step == 1:
                self.loads.append(self._load(float(even)))
            if self.full:
                record |= {
                    "expert_load_p10": 0.5 + 0.4 * even,
                    "expert_load_p50": 0.97,
                    "expert_load_p90": 1.6 - 0.4 * even,
                }
                record |= {"router_entropy": 0.95 - 0.3 * even, "bias_min": -0.02 * even, "bias_max": 0.03 * even}
        if self.full:
            record |= self._costs(seconds, every)
        self.metrics.append(record)
        if self.step % (5 * every) == 0 or self.step == self.total:
            self.evaluate(self.loss() + 0.02, 0.3 * (1 - np.exp(-age / (0.3 * self.total))) if self.stage else None)

    def _costs(self, seconds: float, every: int) -> dict[str, Any]:
        """Times, memory and FLOPs of a step, and now and then norms."""
        shares = {"data": 0.03, "forward_backward": 0.82, "all_to_all": 0.2 + 0.05 * self.stage, "optimizer": 0.1}
        record: dict[str, Any] = {f"{part}_seconds": share * seconds for part, share in shares.items()}
        flops = 6.0 * (1_400_000 + 64 * self.experts) * TOKENS_PER_STEP
        record |= {"memory_bytes": int(1.1e9 + 3.2e8 * self.stage + 1e6 * self.rng.random()), "step_flops": flops}
        record |= {"tflops_per_device": flops / seconds / 2e12, "mfu": flops / seconds / 2e12 / 0.9}
        if self.step % every == 0 or self.step == 1:
            for i, group in enumerate(NORM_GROUPS):
                if group != "dense_mlp":
                    record[f"grad_norm_{group}"] = 0.1 * (i + 1) * self.rng.lognormal(0.0, 0.2)
                    record[f"param_norm_{group}"] = (
                        12.0 * (i + 1) + 1e-3 * self.step + 4 * self.stage * (group == "experts")
                    )
        return record

    def _load(self, even: float) -> dict[str, Any]:
        drawn: Callable[[Any], Any] = self.rng.dirichlet
        weights = [popularity ** (1 - 0.8 * even) for popularity in self.popularity]
        return {
            "step": self.step,
            "stage": self.stage,
            "num_experts": self.experts,
            "layers": list(range(1, self.layers + 1)),
            "share_LE": [drawn(80 * self.experts * weight / weight.sum()).tolist() for weight in weights],
        }


def make_run(
    run_dir: Path,
    stages: list[tuple[int, int]],
    *,
    layers: int = 2,
    greedy: bool = False,
    finished: bool = True,
    every: int = 10,
    seed: int = 0,
    ep_ranks: int = 1,
    full: bool = False,
    corpus: str = "runs/corpus/synthetic",
    level: float = 2.1,
) -> RunFiles:
    """A run directory like a real one.

    Args:
        run_dir: where to write it.
        stages: (steps, experts) of each stage; 0 experts is a dense model, the same number again a change of layout.
        layers: MoE layers.
        greedy: plans with unequal copies.
        finished: with a last checkpoint and a stop event.
        every: steps between records of expert load; evaluations are five times rarer.
        seed: of everything.
        ep_ranks: expert-parallel ranks over which plans spread the copies of a family; 1 for none.
        full: with every optional figure: times of the parts of a step, memory, FLOPs, norms, validation sets.
        corpus: what config.yaml says was trained on.
        level: loss that the first stage would end at after endless training.
    """
    maker = _Maker(run_dir, stages, layers, greedy, seed, ep_ranks, full, level)
    maker.start(corpus)
    for i, (steps, experts) in enumerate(stages):
        if i:
            maker.expand(experts)
        for _ in range(steps):
            maker.train(every)
    maker.files.metrics.write_text("".join(json.dumps(record) + "\n" for record in maker.metrics))
    if maker.loads:
        maker.files.expert_load.write_text("".join(json.dumps(record) + "\n" for record in maker.loads))
    if finished:
        maker.checkpoint(f"step-{maker.step:08d}")
        maker.event("stop", reason="finished")
    return maker.files


def make_plan(
    step: int, stage: int, before: int, after: int, layers: int, greedy: bool, rng: Any, ep_ranks: int = 1
) -> dict[str, Any]:
    """A plan as `upcycle` writes it: uniform copies, or greedy ones after a random utility.

    Expert-parallel ranks, if any, share the copies of a family out as evenly as they can (`placement: spread`).
    """
    entries = []
    for layer in range(1, layers + 1):
        scores = rng.gamma(2.0, 1e-3, before)
        copies = np.full(before, after // before)
        if greedy:
            copies = np.ones(before, dtype=int)
            for _ in range(after - before):
                copies[np.argmax(scores / copies * (copies < 5))] += 1
        parents = np.repeat(np.arange(before), copies).tolist()
        if ep_ranks > 1 and after > before:
            # Dealt out like cards, so that siblings are on different ranks.
            parents = [parent for rank in range(ep_ranks) for parent in parents[rank::ep_ranks]]
        entries.append(
            LayerPlan(layer, tuple(parents), tuple(copies.tolist()), tuple(scores.tolist()) if greedy else None)
        )
    return ExpansionPlan(
        step=step,
        stage=stage,
        experts_before=before,
        experts_after=after,
        layers=tuple(entries),
        selection={"rule": "greedy", "utility": "grad_norm"} if greedy else {"rule": "uniform"},
        placement={"rule": "spread" if ep_ranks > 1 else "near"},
        bias_noise=1e-3,
        seed=1234,
    ).to_dict()
