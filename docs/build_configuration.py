"""Writes docs/configuration.md from the typed schema, so that the page cannot say something else than the code.

Names, types and defaults come from the dataclasses, allowed values from their checks, meanings from the comment above
each field. What a comment cannot give (units, fields that share a comment or have none) is in two tables here;
tests/test_docs.py fails when the page is out of date, a key has no meaning, or a table names a key that is gone.

    python docs/build_configuration.py            # from the repository root
"""

import ast
import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.config import RunSettings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"

# Units by the end of a key, then by the whole key. "-" is a number without a unit.
_UNITS_BY_ENDING = {
    "_steps": "steps",
    "_step": "steps",
    "_seconds": "s",
    "_batches": "global batches",
    "_tokens": "tokens",
}
_UNITS = {
    "run.seed": "-",
    "run.steps": "steps",
    "run.stop_at_step": "step number",
    "model.layers": "layers",
    "model.hidden_size": "features",
    "model.ffn_hidden_size": "features",
    "model.attention_heads": "heads",
    "model.kv_heads": "heads",
    "model.head_dim": "features",
    "model.mla_query_rank": "features",
    "model.mla_kv_rank": "features",
    "model.mla_head_dim": "features",
    "model.mla_rope_head_dim": "features",
    "model.mla_value_head_dim": "features",
    "model.norm_epsilon": "-",
    "model.rope_base": "-",
    "model.rope_percent": "fraction",
    "model.vocab_multiple": "rows",
    "model.vocab_size": "rows",
    "model.rope_scaling_factor": "-",
    "model.rope_original_length": "tokens",
    "model.rope_mscale": "-",
    "model.rope_mscale_all_dim": "-",
    "model.init_std": "-",
    "model.dropout": "probability",
    "model.num_experts": "experts",
    "model.top_k": "experts",
    "model.expert_ffn_hidden_size": "features",
    "model.shared_expert_ffn_hidden_size": "features",
    "model.dense_first": "layers",
    "model.dense_last": "layers",
    "model.moe_period": "layers",
    "model.router_groups": "groups",
    "model.router_group_topk": "groups",
    "model.router_scale": "-",
    "model.aux_loss_coeff": "-",
    "model.z_loss_coeff": "-",
    "model.bias_update_rate": "score per step",
    "model.capacity_factor": "-",
    "model.recompute_layers": "layers",
    "parallel.tensor": "ranks",
    "parallel.pipeline": "ranks",
    "parallel.virtual_pipeline": "chunks",
    "parallel.context": "ranks",
    "parallel.expert": "ranks",
    "parallel.expert_tensor": "ranks",
    "data.blend[].weight": "-",
    "data.blend[].max_epochs": "epochs",
    "data.schedule[].at_step": "step number",
    "data.schedule[].at_stage": "stage number",
    "data.sequence_length": "tokens",
    "data.micro_batch_size": "samples",
    "data.global_batch_size": "samples",
    "optimizer.beta1": "-",
    "optimizer.beta2": "-",
    "optimizer.epsilon": "-",
    "optimizer.weight_decay": "-",
    "optimizer.clip_grad": "gradient norm",
    "schedule.learning_rate": "-",
    "schedule.min_learning_rate": "-",
    "checkpoint.keep_last": "checkpoints",
    "evaluation.batches": "global batches",
    "evaluation.sets[].batches": "global batches",
    "upcycle.stages[].at_step": "step number",
    "upcycle.stages[].factor": "-",
    "upcycle.stages[].num_experts": "experts",
    "upcycle.stages[].max_extra_copies": "copies",
    "upcycle.stages[].bias_noise": "score",
    "upcycle.stages[].temperature": "-",
    "upcycle.stages[].optimizer_scale": "-",
    "upcycle.stages[].bias_rate_multiplier": "-",
    "upcycle.stages[].bias_rate_steps": "steps",
    "upcycle.stages[].rewarm_steps": "steps",
    "upcycle.stages[].router_lr_multiplier": "-",
    "upcycle.stages[].replica_lr_multiplier": "-",
    "upcycle.stages[].lr_multiplier_steps": "steps",
    "upcycle.stages[].max_load_imbalance": "-",
    "upcycle.stages[].parallel.tensor": "ranks",
    "upcycle.stages[].parallel.pipeline": "ranks",
    "upcycle.stages[].parallel.virtual_pipeline": "chunks",
    "upcycle.stages[].parallel.context": "ranks",
    "upcycle.stages[].parallel.expert": "ranks",
    "upcycle.stages[].parallel.expert_tensor": "ranks",
    "upcycle.transfer_chunk_mib": "MiB",
    "upcycle.guard.max_increase": "nats per token",
    "upcycle.guard.evaluations": "evaluations",
    "checkpoint.keep_every_steps": "steps",
    "health.spike_factor": "-",
    "health.max_rollbacks": "times",
}

# Fields without a comment of their own, or whose comment speaks of several fields at once.
_MEANINGS = {
    "run.resume": (
        "`auto` continues from the newest complete checkpoint in run.dir, or starts where there is none; `never` starts, "
        "and refuses a folder that holds a run; or the path of a checkpoint or of a run (docs/checkpoints.md)."
    ),
    "model.mla_query_rank": "MLA only: rank of the compressed query; null leaves queries uncompressed.",
    "model.mla_kv_rank": "MLA only: rank of the compressed keys and values.",
    "model.mla_head_dim": "MLA only: width of the part of a query and key head without position.",
    "model.mla_rope_head_dim": "MLA only: width of the part of a query and key head with rotary position.",
    "model.mla_value_head_dim": "MLA only: width of a value head.",
    "model.normalization": "Norm before attention, before the feed-forward, and at the end.",
    "model.norm_epsilon": "Added to the mean square or variance in norms.",
    "model.activation": "Activation of dense layers and experts; swiglu and geglu are gated.",
    "model.linear_bias": "Bias terms in linear layers.",
    "model.qkv_bias": "Bias terms in the qkv projection alone.",
    "model.rope_base": "Base of the rotary position embedding.",
    "model.rope_percent": "Part of each head that is rotated.",
    "model.init_std": "Standard deviation of the initial weights.",
    "model.dropout": "Dropout of attention and of the residual stream.",
    "model.dense_first": "Leading layers that stay dense.",
    "model.dense_last": "Trailing layers that stay dense.",
    "model.moe_period": "1: every layer between those holds experts; 2: every second one; and so on.",
    "model.router_score": "How gates are scored.",
    "model.router_pre_softmax": "Take the softmax before top-K, over all experts, instead of after it.",
    "model.router_groups": "Group-limited routing: groups of neighbouring experts; null means none.",
    "model.router_group_topk": "Group-limited routing: groups a token may use; null means none.",
    "model.z_loss_coeff": "Weight of the router's z-loss; null means none.",
    "model.dispatcher": "How tokens travel to their experts; flex needs DeepEP or HybridEP (docs/parallelism.md).",
    "model.mcore": (
        "Further fields of mcore's TransformerConfig by their own names, with values of the types that the installed mcore "
        "declares, for what has no key here (others are refused); a new one is added with a plus: "
        "`+model.mcore.moe_input_jitter_eps=0.01`."
    ),
    "data.blend": "Several corpora with weights, instead of `data.corpus`.",
    "optimizer.beta1": "Decay of Adam's mean of gradients.",
    "optimizer.beta2": "Decay of Adam's mean of squared gradients.",
    "optimizer.epsilon": "Added to the root in Adam's denominator.",
    "optimizer.weight_decay": "Decoupled weight decay; not applied to biases and norms (mcore's rule).",
    "optimizer.overlap_grad_reduce": "Reduce gradients while the backward pass still runs.",
    "optimizer.overlap_param_gather": "Gather parameters while the forward pass runs; needs `overlap_grad_reduce`.",
    "schedule.learning_rate": "Peak learning rate.",
    "schedule.warmup_steps": "Steps of linear rise from zero.",
    "checkpoint.keep_last": (
        "Ordinary checkpoints kept. Those before and right after an expansion are kept for ever. null keeps all."
    ),
    "checkpoint.save_final": "Save at the normal end of the run. Stops and expansions are saved in any case.",
    "tracking.project": "Project the run appears under at W&B.",
    "upcycle.stages": "The stages after the first, in order; see below.",
    "upcycle.guard": "Watches the validation loss after an expansion (docs/upcycling.md).",
    "upcycle.stages[].factor": "New number of experts as a multiple of the one before. Give this or `num_experts`.",
    "upcycle.stages[].num_experts": "New number of experts. Give this or `factor`.",
}

_HEAD = """\
# Configuration

<!-- Written by docs/build_configuration.py from the typed schema: change the comments there, not this page. -->

A run is told everything through one tree of typed keys. Values come from, in rising order: the schema's defaults, the
presets chosen from `configs/`, the command line.

```
python -m train --cfg job experiment=demo              print what a command line composes to, and exit
python -m train --help                                 presets, examples, all keys with their values
torchrun --nproc-per-node 2 -m train experiment=demo model=tiny parallel.expert=2 run.dir=runs/look
```

- `GROUP=NAME` chooses a preset, `GROUP.KEY=VALUE` sets one key, `null` is "none", lists and mappings are written in
  YAML's short form and quoted for the shell: `'upcycle.stages=[{at_step: 100, factor: 2}]'`. The grammar is Hydra's.
- A run refuses unknown keys (naming the nearest known one), values of the wrong type, and combinations that cannot
  work, in one line and with exit code 2, before any process group or device is touched. `--cfg job` composes and types
  only; it does not check combinations.
- The resolved configuration is written to `run.dir/config.yaml`. A resume that changes it keeps the one before as
  `config.until-step-NNNNNNNN.yaml`.
- `python -m train` alone uses the presets marked * below, so what a run gets may differ from the default in the tables,
  which is the schema's: `model=demo` for instance sets `model.bias_update_rate`.

Exit codes: 0 finished or stopped on request, 1 the run itself failed (a loss that is not finite, or a defect, which
keeps its traceback), 2 configuration, 3 data, 4 checkpoint, 5 expansion, 6 launch.
"""


def _classes(cls: type) -> Iterator[type]:
    """The dataclasses of the schema, element types of lists included."""
    yield cls
    for field in dataclasses.fields(cls):
        for kind in (field.type, *typing.get_args(field.type)):
            if dataclasses.is_dataclass(kind):
                yield from _classes(typing.cast(type, kind))


def _elements(cls: type) -> list[type]:
    """Dataclasses that are elements of a class's lists: their keys have a table of their own."""
    return [kind for field in dataclasses.fields(cls) for kind in typing.get_args(field.type)]


def _comments(cls: type) -> dict[str, str]:
    """Field name -> the comment right above it."""
    lines, _ = inspect.getsourcelines(cls)
    tree = ast.parse("".join(lines))
    found = {}
    for node in typing.cast(ast.ClassDef, tree.body[0]).body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, number = [], node.lineno - 2
        while lines[number].strip().startswith("# "):
            above.insert(0, lines[number].strip()[2:])
            number -= 1
        found[node.target.id] = " ".join(above)
    return found


def _choices(cls: type) -> dict[str, tuple[str, ...]]:
    """Field name -> allowed values, from the `one_of` calls of a class's checks."""
    module = importlib.import_module(cls.__module__)
    found = {}
    for node in ast.walk(ast.parse(inspect.getsource(cls))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "one_of"):
            continue
        key, _, allowed = node.args
        last = key.values[-1] if isinstance(key, ast.JoinedStr) else key
        name = str(typing.cast(ast.Constant, last).value).rsplit(".", 1)[-1]
        found[name] = getattr(module, allowed.id) if isinstance(allowed, ast.Name) else ast.literal_eval(allowed)
    return found


def _type_name(kind: Any) -> str:
    """A type as a user would say it."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return "list"
    return {dict: "mapping"}.get(typing.get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _default(field: dataclasses.Field[Any]) -> str:
    """A default in YAML's words."""
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else str(value)


def _unit(key: str, kind: str) -> str:
    """The unit of a number; empty for what is no number."""
    if "int" not in kind and "float" not in kind:
        return ""
    by_ending = next((unit for ending, unit in _UNITS_BY_ENDING.items() if key.endswith(ending)), "")
    unit = _UNITS.get(key, by_ending)
    if not unit:
        raise KeyError(f"{key} has no unit: add it to _UNITS in {Path(__file__).name}")
    return "" if unit == "-" else unit


def _rows(cls: type, prefix: str) -> list[str]:
    """Table rows of one class; a group inside it is a mapping, followed by its own keys."""
    comments, choices, rows = _comments(cls), _choices(cls), []
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(field.type)
        elsewhere = field.type in _elements(cls)
        key, kind = f"{prefix}{field.name}", "mapping" if nested else _type_name(field.type)
        meaning = _MEANINGS.get(key) or comments[field.name]
        if not meaning:
            raise KeyError(f"{key} has no meaning: write a comment above the field in {cls.__module__}")
        if field.name in choices:
            meaning += " One of " + ", ".join(f"`{value}`" for value in choices[field.name]) + "."
        default = "`{}`" if nested else f"`{_default(field)}`"
        rows.append(f"| `{key}` | {kind} | {default} | {_unit(key, kind)} | {meaning.replace('|', chr(92) + '|')} |")
        if nested and not elsewhere:
            rows += _rows(typing.cast(type, field.type), f"{key}.")
    return rows


def _table(cls: type, prefix: str) -> list[str]:
    return ["| Key | Type | Default | Unit | Meaning |", "|---|---|---|---|---|", *_rows(cls, prefix), ""]


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _presets() -> list[str]:
    """The files of configs/ with the first comment of each; * marks those that configs/config.yaml starts from."""
    chosen = (ROOT / "configs" / "config.yaml").read_text()
    lines = ["## Presets", "", "| Preset | What it is |", "|---|---|"]
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        comments = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ")]
        about = next(comment for comment in comments if not comment.startswith("@"))
        star = " *" if f"- {group}: {name}\n" in chosen else ""
        lines.append(f"| [`{group}={name}`](../configs/{group}/{name}.yaml){star} | {about} |")
    return [*lines, ""]


def render() -> str:
    """The whole page."""
    lines = [_HEAD, *_presets()]
    for group in dataclasses.fields(RunSettings):
        cls = typing.cast(type, group.type)
        lines += [f"## {group.name}", "", _summary(cls), "", *_table(cls, f"{group.name}.")]
        for field in dataclasses.fields(cls):
            for element in typing.get_args(field.type):
                if dataclasses.is_dataclass(element):
                    element = typing.cast(type, element)
                    lines += [f"### Elements of {group.name}.{field.name}", "", _summary(element), ""]
                    lines += _table(element, f"{group.name}.{field.name}[].")
    return "\n".join(lines).rstrip("\n") + "\n"


def unknown_keys() -> list[str]:
    """Keys in this file's tables that the schema does not have."""
    page = render()
    return sorted(key for key in {*_UNITS, *_MEANINGS} if f"| `{key}` |" not in page)


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"written: {PAGE}")
