"""Plans that make experts out of the feed-forwards of a dense model. Pure: no tensors, no process groups.

A dense feed-forward is seen as G experts, its shards along the intermediate dimension (G = 1: all of it); each becomes
R = M / G experts. New expert number copy * G + shard is a copy of its shard, so that the shards of one copy are
neighbours. Methods:

    copy           G = 1, every expert a copy (sparse upcycling, arXiv 2212.05055)
    virtual_group  any G; R rows of the router, each given to all shards of a copy, so that top-K picks whole copies
                   (arXiv 2410.07524, section 3)
    drop           G = 1, and a share of the intermediate units of every expert is drawn anew, the same units in all of
                   its matrices (Drop-Upcycling, arXiv 2502.19261)

How to use: `plan_from_dense(...)`, then `upcycle/dense_stream.py` carries it out on a checkpoint.
"""

from dataclasses import dataclass

from model.config import ModelConfig, divides, one_of
from model.network import gated
from parallel.errors import ConfigError
from upcycle.plan import ExpansionPlan, LayerPlan
from upcycle.slices import DenseOrigin

METHODS = ("copy", "virtual_group", "drop")
SCALINGS = ("exact", "even")
RULES = ("reset", "copy")
# grouped_mm and Transformer Engine take rows of a multiple of this many bytes (`model/experts.py`).
_ROW_BYTES = 16


@dataclass(frozen=True)
class DenseRules:
    """What a user asks for.

    Attributes:
        method: one of `METHODS`.
        granularity: shards per feed-forward, G.
        redraw_share: of the intermediate units, under `drop`.
        scaling: one of `SCALINGS`, see `matrix_scales`.
        optimizer_rule: one of `RULES`: the experts' moments begin anew, or are those of the dense feed-forward.
    """

    method: str = "copy"
    granularity: int = 1
    redraw_share: float = 0.5
    scaling: str = "exact"
    optimizer_rule: str = "reset"

    def check(self, model: ModelConfig, itemsize: int) -> None:
        """Check the rules against the network that shall come out.

        Args:
            model: with `num_experts` and `top_k` of the MoE; its dense layers have the width of the source.
            itemsize: bytes per element of the weights.

        Raises:
            ConfigError: naming the option, the value and the remedy.
        """
        one_of("--method", self.method, METHODS)
        one_of("--scaling", self.scaling, SCALINGS)
        one_of("--optimizer-rule", self.optimizer_rule, RULES)
        experts, g = model.num_experts, self.granularity
        if g < 1:
            raise ConfigError(f"--granularity={g} must be 1 or more: the shards of one feed-forward")
        if g > 1 and self.method != "virtual_group":
            raise ConfigError(
                f"--granularity={g} needs --method=virtual_group, not {self.method}: elsewhere a token would meet some "
                "shards of the feed-forward and not others"
            )
        if self.method == "drop" and not 0 < self.redraw_share < 1:
            raise ConfigError(
                f"--redraw-share={self.redraw_share:g} must lie between 0 and 1; to draw nothing anew use --method copy"
            )
        if self.method == "drop" and self.optimizer_rule == "copy":
            raise ConfigError(
                "--optimizer-rule=copy has no meaning with --method=drop: weights drawn anew have no past; use reset"
            )
        divides("--num-experts", experts, "--granularity", g)
        if experts < 2 * g:
            raise ConfigError(
                f"--num-experts={experts} is one copy of {g} shards: use {2 * g} or more, so that there is something to "
                "choose from"
            )
        divides("model.ffn_hidden_size", model.ffn_hidden_size, "--granularity", g)
        multiple = _ROW_BYTES // itemsize
        if model.experts != "sequential" and model.ffn_hidden_size // g % multiple:
            raise ConfigError(
                f"--granularity={g} makes experts of {model.ffn_hidden_size // g} units, and a grouped matrix product takes "
                f"multiples of {multiple}: use a smaller granularity, or model.experts=sequential"
            )
        self._check_routing(model)

    def _check_routing(self, model: ModelConfig) -> None:
        g, top_k = self.granularity, model.top_k
        if model.shared_expert_ffn_hidden_size is not None:
            raise ConfigError(
                f"model.shared_expert_ffn_hidden_size={model.shared_expert_ffn_hidden_size} has no source in a dense model: "
                "leave it out"
            )
        if model.router_score == "softmax" and top_k == 1 and not model.router_pre_softmax:
            raise ConfigError(
                "--top-k=1 with softmax over the chosen experts makes every gate 1, and the router would never learn: add "
                "--pre-softmax, or use --router-score sigmoid"
            )
        if self.method != "virtual_group":
            return
        if top_k % g:
            raise ConfigError(
                f"--top-k={top_k} is not a multiple of --granularity={g}: virtual groups choose whole copies of {g} shards; "
                f"use --top-k {g}"
            )
        groups = model.router_groups or 1
        if model.num_experts // groups % g:
            raise ConfigError(
                f"model.router_groups={groups} cuts copies of {g} shards apart: use routing groups whose size is a multiple "
                f"of --granularity={g}"
            )


def activation_scale(model: ModelConfig, granularity: int) -> float:
    """Factor on the output of every expert that makes an MoE layer equal the dense feed-forward under a neutral router.

    A router whose scores are all equal gives every chosen expert the same gate, and whole copies are chosen. Output is
    then S / G times the dense one, S being the sum of the K gates, so the factor is c = G / S:

        softmax over the chosen     S = 1          c = G             for any scores, not only equal ones
        sigmoid, K > 1, normalised  S = 1          c = G             the same
        softmax over all M          S = K / M      c = G M / K       exact for equal scores, or if all copies are chosen
        sigmoid, K = 1              S = 1 / 2      c = 2 G           exact for equal scores

    and `router_scale` multiplies S. With M = R G the third is the R G^2 / K of arXiv 2410.07524, the first its G.

    Args:
        model: with `num_experts` and `top_k` of the MoE.
        granularity: shards per feed-forward, G.
    """
    total = 1.0
    if model.router_score == "softmax" and model.router_pre_softmax:
        total = model.top_k / model.num_experts
    elif model.router_score == "sigmoid" and model.top_k == 1:
        total = 0.5
    return granularity / (total * (model.router_scale or 1.0))


def matrix_scales(
    activation: str, scale: float, granularity: int, scaling: str, *, bias: bool = False
) -> dict[str, float]:
    """How the matrices of an expert share the factor on its output.

    `even` is that of arXiv 2410.07524: the cube root for every matrix of a gated or squared-ReLU feed-forward, else the
    square root. It keeps the function only for squared ReLU: f(a x) is a f(x) or a^2 f(x) for no other activation.
    `exact` leaves alone what goes through such an activation: for a gated one the square root on up and down, which the
    output is linear in; for GELU all of it on down; for squared ReLU it is the same as `even`.

    Args:
        activation: `model.activation`.
        scale: the factor on the output, c.
        granularity: shards per feed-forward, G.
        scaling: one of `SCALINGS`.
        bias: whether linear layers have biases.

    Returns:
        Matrix -> factor. The bias of the first projection goes with its matrix; that of the second, `down_bias`, is added
        once per chosen expert with its gate, so its factor is 1 / S = c / G.
    """
    has_gate = activation in ("swiglu", "geglu")
    if activation == "squared_relu":
        found = {"up": scale ** (1 / 3), "down": scale ** (1 / 3)}
    elif scaling == "even":
        root = scale ** (1 / 3 if has_gate else 1 / 2)
        found = {"gate": root} if has_gate else {}
        found |= {"up": root, "down": root}
    elif has_gate:
        found = {"gate": 1.0, "up": scale**0.5, "down": scale**0.5}
    else:
        found = {"up": 1.0, "down": scale}
    return found | ({"down_bias": scale / granularity} if bias else {})


def plan_from_dense(rules: DenseRules, model: ModelConfig, *, step: int, seed: int, itemsize: int) -> ExpansionPlan:
    """Decide how the experts of a model come out of a dense one.

    Args:
        rules: what is asked for.
        model: the network that shall come out.
        step: optimizer steps that the dense model has made.
        seed: root seed of the run; what is drawn is named by (seed, layer).
        itemsize: bytes per element of the weights.

    Raises:
        ConfigError: naming the option, the value and the remedy.
    """
    rules.check(model, itemsize)
    g, experts = rules.granularity, model.num_experts
    scale = activation_scale(model, g)
    origin = DenseOrigin(
        method=rules.method,
        granularity=g,
        ffn_hidden_size=model.ffn_hidden_size,
        activation_scale=scale,
        scaling=rules.scaling,
        scales=matrix_scales(model.activation, scale, g, rules.scaling, bias=model.linear_bias),
        redraw_share=rules.redraw_share if rules.method == "drop" else 0.0,
        router_std=model.init_std,
    )
    assert ("gate" in origin.scales) == gated(model)
    parents = tuple(new % g for new in range(experts))
    return ExpansionPlan(
        step=step,
        stage=1,
        experts_before=g,
        experts_after=experts,
        layers=tuple(LayerPlan(number, parents, (experts // g,) * g) for number in model.moe_layer_numbers()),
        selection={"rule": "uniform"},
        placement={"rule": "copies"},
        optimizer_rule=rules.optimizer_rule,
        # All rows of all families: there is no original among experts and routers that were not there before.
        optimizer_scope="family",
        seed=seed,
        dense=origin,
    )
