"""The command line of `python -m upcycle`: parses, calls, prints, and turns errors into one line and an exit code."""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.errors import ConfigError, CoppiceError, DataError, ExpansionError
from train.checkpoint.files import refuse_inside
from train.offline.dense_command import add_from_dense, from_dense
from train.settings import compose_settings, explain, stage_from_dict, to_settings
from upcycle.plan import ExpansionPlan
from upcycle.stage_config import StageConfig

_ABOUT = """\
Grow the experts of a Mixture-of-Experts model outside of a training job, or ask a running job to.

  python -m upcycle plan experiment=demo                          the plans of a configuration
  python -m upcycle plan runs/demo --factor 2 --selection greedy  the plan a run would make where it stands
  python -m upcycle expand runs/demo/checkpoints/step-00000070 --factor 2 --output grown
  python -m upcycle from-dense runs/dense --num-experts 8 --top-k 2 --output moe
  python -m upcycle request runs/demo --factor 2                  a live run expands after its next step
  python -m upcycle lineage runs/demo                             which expert came from which
"""
_RULES = "rules of the stage, as in an element of upcycle.stages (docs/configuration.md)"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(line: str) -> None:
    """Progress, apart from what a command prints as its result."""
    if _rank() == 0:
        print(line, file=sys.stderr, flush=True)


def _print(line: str) -> None:
    if _rank() == 0:
        print(line, flush=True)


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """One option per key of a stage, but for its trigger."""
    group = parser.add_argument_group(_RULES)
    for field in dataclasses.fields(StageConfig):
        if field.name in ("at_step", "at_tokens"):
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else "{}"
        shown = "null" if default is None else default
        group.add_argument(
            f"--{field.name.replace('_', '-')}", dest=f"rule_{field.name}", metavar="VALUE", help=f"default {shown}"
        )


def _rules(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rules that were given, typed as YAML."""
    given = {k[len("rule_") :]: v for k, v in vars(arguments).items() if k.startswith("rule_") and v is not None}
    try:
        typed = OmegaConf.to_container(OmegaConf.from_dotlist([f"{k}={v}" for k, v in given.items()]))
    except OmegaConfBaseException as e:
        raise ConfigError(explain(e)) from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{given} is no YAML: {' '.join(str(e).split())}") from None
    assert isinstance(typed, dict)
    return {str(key): value for key, value in typed.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m upcycle", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        allow_abbrev=False,
        name="plan",
        help="print the plan of an expansion, for a configuration or a checkpoint",
        description="Print the plan of an expansion: for a configuration (KEY=VALUE settings as for `python -m train`), "
        "or where a checkpoint or the newest one of a run stands. Without rules, the stages that are configured. Rules "
        "that go by gradients or loads take the model over batches; under torchrun in parallel.",
    )
    plan.add_argument("source", nargs="*", metavar="CHECKPOINT | RUN_DIR | KEY=VALUE")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON alone")
    plan.add_argument("--output", type=Path, metavar="FILE", help="write the plan as JSON, for `expand --plan`")
    plan.add_argument(
        "--scores", type=Path, metavar="FILE", help='utilities to go by: JSON, {"LAYER": [one per expert]}'
    )
    _add_memory(plan)
    _add_rules(plan)
    expand = commands.add_parser(
        allow_abbrev=False,
        name="expand",
        help="expand a checkpoint into another one, in bounded memory",
        description="Write the checkpoint that a job would have saved right after the expansion, bit for bit; go on from "
        "it with run.resume=DIR.",
    )
    expand.add_argument("source", nargs="+", metavar="CHECKPOINT | RUN_DIR [KEY=VALUE ...]")
    expand.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new checkpoint")
    expand.add_argument("--plan", type=Path, metavar="FILE", help="carry out this plan instead of making one")
    expand.add_argument("--scores", type=Path, metavar="FILE", help="as for plan")
    _add_memory(expand)
    _add_rules(expand)
    _add_memory(add_from_dense(commands))
    request = commands.add_parser(
        allow_abbrev=False,
        name="request",
        help="ask a live run to begin a stage after its next step",
        description="Leave a request in RUN_DIR/requests. The run takes it between two steps, on all ranks or none, or "
        "refuses it and says why; a run that is not running finds it when it resumes.",
    )
    request.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    request.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="wait for the answer (default: do not)"
    )
    _add_rules(request)
    lineage = commands.add_parser(
        "lineage", help="print which expert came from which, at every stage", allow_abbrev=False
    )
    lineage.add_argument("source", type=Path, metavar="CHECKPOINT | RUN_DIR")
    lineage.add_argument("--layer", type=int, help="one MoE layer only, by its number from 1")
    lineage.add_argument("--json", action="store_true", help="the chains of ids of every expert, as JSON")
    return parser


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chunk-mib", type=int, default=16, metavar="MIB", help="memory for a piece of a tensor (default 16)"
    )


def _split(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A path, if the first word is one, and settings.

    Raises:
        ConfigError: for a second path.
    """
    path = Path(words[0]) if words and "=" not in words[0] else None
    settings = list(words[1:] if path else words)
    for word in settings:
        if "=" not in word:
            raise ConfigError(f"{word} is no KEY=VALUE: name one checkpoint or run, before the settings")
    return path, settings


def _scores(file: Path | None) -> dict[int, list[float]] | None:
    if file is None:
        return None
    try:
        found = {int(layer): [float(x) for x in row] for layer, row in json.loads(file.read_text()).items()}
        if not all(math.isfinite(x) and x >= 0 for row in found.values() for x in row):
            raise ValueError("a utility is negative or no number")
        return found
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise DataError(f'--scores {file} cannot be read as {{"LAYER": [one per expert]}}: {e}') from None


def _chunk_bytes(arguments: argparse.Namespace) -> int:
    if arguments.chunk_mib < 1:
        raise ConfigError(f"--chunk-mib={arguments.chunk_mib} must be 1 or more")
    return int(arguments.chunk_mib) << 20


def _plan(arguments: argparse.Namespace) -> None:
    path, overrides = _split(arguments.source)
    plans = _plans_of_settings(arguments, overrides) if path is None else [_plan_of(arguments, path, overrides)]
    if arguments.output:
        if len(plans) > 1:
            raise ConfigError(f"--output {arguments.output} takes one plan, and there are {len(plans)}: use --json")
        _write_plan(arguments.output, plans[0])
    if arguments.json:
        dicts = [plan.to_dict() for plan in plans]
        _print(json.dumps(dicts[0] if len(dicts) == 1 else dicts))
        return
    for plan in plans:
        for line in plan.table():
            _print(line)
        _print(f"digest {plan.digest}")


def _plans_of_settings(arguments: argparse.Namespace, overrides: list[str]) -> list[ExpansionPlan]:
    from train.offline.expand import plan_of_settings, smallest_world

    rules = _rules(arguments)
    if not any(word.startswith(("data.corpus=", "data.blend=")) for word in overrides):
        # A plan needs no text.
        overrides = [*overrides, "data.corpus=unused"]
    settings = to_settings(compose_settings(overrides))
    if rules:
        stage = stage_from_dict(rules, "the stage")
        stage = dataclasses.replace(stage, at_step=1)
        settings = dataclasses.replace(settings, upcycle=dataclasses.replace(settings.upcycle, stages=[stage]))
    settings.check(smallest_world(settings))
    return plan_of_settings(settings.resolved(), _scores(arguments.scores))


def _plan_of(arguments: argparse.Namespace, path: Path, overrides: list[str]) -> ExpansionPlan:
    from train.offline.expand import open_source, plan_of_checkpoint

    source, rules = open_source(path, overrides), _rules(arguments)
    stage = stage_from_dict(rules, "the stage") if rules else source.next_rules()
    plan, _ = plan_of_checkpoint(
        source, stage, scores=_scores(arguments.scores), chunk_bytes=_chunk_bytes(arguments), say=_say
    )
    return plan


def _write_plan(path: Path, plan: ExpansionPlan) -> None:
    if _rank() == 0:
        refuse_inside("--output", path)
        try:
            path.write_text(json.dumps(plan.to_dict()))
        except OSError as e:
            raise DataError(f"--output {path} cannot be written ({e.strerror}): choose another file") from None


def _read_plan(path: Path) -> ExpansionPlan:
    try:
        return ExpansionPlan.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as e:
        raise ExpansionError(
            f"--plan {path} cannot be read ({e}): make it with python -m upcycle plan --output"
        ) from None


def _expand(arguments: argparse.Namespace) -> None:
    from train.offline.expand import check_plan, expand_offline, open_source, plan_of_checkpoint

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "expand works in one process: make the plan under torchrun with `python -m upcycle plan ... --output FILE`, "
            "then expand with --plan FILE"
        )
    path, overrides = _split(arguments.source)
    if path is None:
        raise ConfigError(f"{arguments.source[0]} is no checkpoint: name one before the settings")
    source, rules, chunk_bytes = open_source(path, overrides), _rules(arguments), _chunk_bytes(arguments)
    if arguments.plan:
        plan = _read_plan(arguments.plan)
        check_plan(plan, source)
        _, entry = source.with_next(stage_from_dict({**_rules_behind(plan, source), **rules}, "the stage"))
    else:
        stage = stage_from_dict(rules, "the stage") if rules else source.next_rules()
        plan, entry = plan_of_checkpoint(
            source, stage, scores=_scores(arguments.scores), chunk_bytes=chunk_bytes, say=_say
        )
    for line in plan.table():
        _print(line)
    manifest = expand_offline(source, plan, entry, arguments.output, chunk_bytes=chunk_bytes, say=_say)
    _print(
        f"{arguments.output}: step {manifest.step}, stage {manifest.stage}, {manifest.num_experts} experts, verified; go on "
        f"with run.resume={arguments.output}"
    )


def _from_dense(arguments: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("from-dense works in one process: start it without torchrun")
    path, overrides = _split(arguments.source)
    from_dense(arguments, path, overrides, chunk_bytes=_chunk_bytes(arguments), show=_print, say=_say)


def _rules_behind(plan: ExpansionPlan, source: Any) -> dict[str, Any]:
    """The rules that a plan was made by: the run's next stage where it is that one, else what the plan itself says.

    A plan does not hold what a stage does later, such as its release and its learning rates.
    """
    coming = source.course.stages[source.course.begun :]
    said = rules_of(plan)
    if coming and coming[0].at_step == plan.step:
        stage = coming[0]
        same = stage.target(plan.experts_before) == plan.experts_after and all(
            getattr(stage, key) == said[key] for key in ("selection", "mode", "optimizer_rule", "placement")
        )
        if same:
            configured = dataclasses.asdict(stage)
            return {k: v for k, v in configured.items() if k not in ("at_step", "at_tokens", "factor")} | {
                "num_experts": plan.experts_after
            }
    return said


def rules_of(plan: ExpansionPlan) -> dict[str, Any]:
    """What a plan says of the rules it was made by."""
    return {
        "num_experts": plan.experts_after,
        "selection": plan.selection["rule"],
        **{k: plan.selection[k] for k in ("utility", "max_extra_copies", "scoring_batches", "temperature")
           if k in plan.selection},
        "optimizer_rule": plan.optimizer_rule,
        "optimizer_scope": plan.optimizer_scope,
        "optimizer_scale": plan.optimizer_scale,
        "mode": plan.mode,
        "bias_noise": plan.bias_noise if plan.mode == "plain" else None,
        "placement": plan.placement["rule"],
    }  # fmt: skip


def _request(arguments: argparse.Namespace) -> None:
    from train.requests import leave_request

    rules = _rules(arguments)
    if not rules:
        raise ConfigError("a request says what to do: give --factor, --num-experts or --parallel")
    folder, path = leave_request(arguments.run_dir, rules)
    _print(f"left {path}: the run takes it after its next step")
    deadline = time.monotonic() + arguments.wait
    while arguments.wait:
        answer = folder.answer(path)
        if answer is not None:
            mark, body = answer
            if mark == "refused":
                raise ExpansionError(f"{path.name} was refused: {body['reason']}")
            _print(f"{mark} after step {body['step']}")
            return
        if time.monotonic() > deadline:
            raise ExpansionError(f"{path} was not answered within {arguments.wait:g} s: the run may not be running")
        time.sleep(0.2)


def _lineage(arguments: argparse.Namespace) -> None:
    from train.offline.expand import plans_of
    from upcycle.provenance import lineage_lines, lineage_table

    plans = [ExpansionPlan.from_dict(plan) for plan in plans_of(arguments.source)]
    if not plans:
        _print(f"{arguments.source} has gone through no expansion")
        return
    if arguments.layer is not None:
        plans[-1].layer(arguments.layer)
    if arguments.json:
        table: Mapping[Any, Any] = lineage_table(plans)
        _print(json.dumps(table))
        return
    for line in lineage_lines(plans, arguments.layer):
        _print(line)


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line and act; errors are one line and an exit code.

    Args:
        words: instead of the command line.
    """
    arguments = _parser().parse_args(words)
    commands = {
        "plan": _plan,
        "expand": _expand,
        "from-dense": _from_dense,
        "request": _request,
        "lineage": _lineage,
    }
    try:
        if arguments.command != "request":
            # Before anything else of mcore is imported: it warns at import of what is not installed.
            from parallel.compat import prepare_megatron

            prepare_megatron()
        commands[arguments.command](arguments)
    except CoppiceError as e:
        return e.tell()
    return 0
