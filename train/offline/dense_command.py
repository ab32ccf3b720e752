"""The command `python -m upcycle from-dense`: its options, and what it prints."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from parallel.errors import ConfigError
from upcycle.dense import METHODS, RULES, SCALINGS, DenseRules

# Option -> key of the model that it stands for.
_KEYS = {
    "dense_first": "model.dense_first",
    "dense_last": "model.dense_last",
    "moe_period": "model.moe_period",
    "router_score": "model.router_score",
    "balancing": "model.balancing",
}


def add_from_dense(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Declare the command and its options."""
    parser = commands.add_parser(
        allow_abbrev=False,
        name="from-dense",
        help="make experts out of the feed-forwards of a dense checkpoint, in bounded memory",
        description="Write a checkpoint of a Mixture-of-Experts model whose experts are copies or shards of a dense "
        "model's feed-forwards; go on from it with run.resume=DIR (docs/dense-to-moe.md).",
    )
    parser.add_argument("source", nargs="+", metavar="CHECKPOINT | RUN_DIR [KEY=VALUE ...]")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument("--num-experts", type=int, required=True, metavar="M", help="experts per MoE layer")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="experts per token")
    parser.add_argument("--method", default="copy", metavar="|".join(METHODS), help="default copy")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="shards per feed-forward, with virtual_group (default 1)",
    )
    parser.add_argument(
        "--redraw-share", type=float, default=0.5, metavar="R", help="of the units, with drop (default 0.5)"
    )
    parser.add_argument(
        "--scaling", default="exact", metavar="|".join(SCALINGS), help="how matrices share the factor (default exact)"
    )
    parser.add_argument(
        "--optimizer-rule", default="reset", metavar="|".join(RULES), help="for the experts' moments (default reset)"
    )
    layers = parser.add_argument_group("layers and routing, as the keys of the model group (default: the dense run's)")
    for name in ("dense_first", "dense_last", "moe_period"):
        layers.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"model.{name}")
    layers.add_argument("--router-score", metavar="softmax|sigmoid", help="model.router_score")
    layers.add_argument("--pre-softmax", action="store_true", help="model.router_pre_softmax=true")
    layers.add_argument("--balancing", metavar="NAME", help="model.balancing")
    return parser


def from_dense(
    arguments: argparse.Namespace,
    path: Path | None,
    overrides: list[str],
    *,
    chunk_bytes: int,
    show: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Make the checkpoint, and tell how to go on from it.

    Args:
        arguments: parsed.
        path: of the checkpoint or run.
        overrides: `KEY=VALUE`.
        chunk_bytes: memory for a piece of a tensor.
        show: prints a line of the result.
        say: told of progress.

    Raises:
        CoppiceError: naming what cannot be.
    """
    from train.offline.from_dense import make_from_dense, open_dense, plan_of_dense

    if path is None:
        raise ConfigError(f"{arguments.source[0]} is no checkpoint: name one before the settings")
    given = {key: getattr(arguments, name) for name, key in _KEYS.items() if getattr(arguments, name) is not None}
    if arguments.pre_softmax:
        given["model.router_pre_softmax"] = "true"
    source = open_dense(
        path,
        experts=arguments.num_experts,
        top_k=arguments.top_k,
        granularity=arguments.granularity,
        overrides=[*overrides, *(f"{key}={value}" for key, value in given.items())],
    )
    rules = DenseRules(
        method=arguments.method,
        granularity=arguments.granularity,
        redraw_share=arguments.redraw_share,
        scaling=arguments.scaling,
        optimizer_rule=arguments.optimizer_rule,
    )
    plan = plan_of_dense(source, rules)
    for line in plan.table():
        show(line)
    manifest = make_from_dense(source, plan, arguments.output, chunk_bytes=chunk_bytes, say=say)
    moments = manifest.imported is not None or any(name.startswith("exp_avg/") for name in manifest.fingerprints)
    words = [
        f"run.resume={arguments.output}",
        *source.continuing(),
        *([] if moments else ["checkpoint.load=model_only"]),
    ]
    show(f"{arguments.output}: step {manifest.step}, {manifest.num_experts} experts, verified")
    show(f"go on with the settings of the dense run and {shlex.join(words)}")
