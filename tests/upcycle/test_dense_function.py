"""What an upcycled model computes: real dense and MoE models from mcore, the executor between them, logits compared.

The tolerance is a bound on rounding: two layers, in each a few sums over H, F and K terms, each exact to 2^-24 relative to
the largest partial sum.
"""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.model.grown_model import SEQUENCE, VOCABULARY, forward, layout_of, model_config, relative_error

_TOLERANCE = 2 * (32 + 48 + 8) * 2.0**-24
_POST: dict[str, Any] = {"router_score": "softmax"}
_PRE: dict[str, Any] = {"router_score": "softmax", "router_pre_softmax": True}
_SIGMOID: dict[str, Any] = {"router_score": "sigmoid", "balancing": "loss_free"}
# name -> method, G, scaling, changes of the model; M and K among them.
_EXACT: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "copy, softmax": ("copy", 1, "exact", {"num_experts": 4, **_POST}),
    "copy, sigmoid, every second layer": ("copy", 1, "exact", {"num_experts": 4, "moe_period": 2, **_SIGMOID}),
    "copy, router_scale, biases": (
        "copy", 1, "exact", {"num_experts": 4, "router_scale": 2.5, "linear_bias": True, "qk_norm": True, **_SIGMOID},
    ),
    "groups, softmax": ("virtual_group", 4, "exact", {"num_experts": 8, "top_k": 4, **_POST}),
    "groups, sigmoid, two copies a token": ("virtual_group", 2, "exact", {"num_experts": 8, "top_k": 4, **_SIGMOID}),
    "groups, geglu, biases": (
        "virtual_group", 3, "exact",
        {"num_experts": 12, "top_k": 3, "activation": "geglu", "linear_bias": True, "normalization": "LayerNorm", **_POST},
    ),
    "groups, gelu, biases": (
        "virtual_group", 4, "exact", {"num_experts": 8, "top_k": 4, "activation": "gelu", "linear_bias": True, **_POST},
    ),
    "groups, squared ReLU, even": (
        "virtual_group", 4, "even", {"num_experts": 8, "top_k": 4, "activation": "squared_relu", **_POST},
    ),
    "groups, routing groups": (
        "virtual_group", 4, "exact", {"num_experts": 16, "top_k": 4, "router_groups": 2, "router_group_topk": 1, **_POST},
    ),
    "groups, softmax over all, all copies": ("virtual_group", 2, "exact", {"num_experts": 4, "top_k": 4, **_PRE}),
}  # fmt: skip
_NOT_EXACT: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "even scaling of a gate": ("virtual_group", 4, "even", {"num_experts": 8, "top_k": 4, **_POST}),
}
# The neutral factor leaves what the router says of a token: K gates out of all, or one gate that is not normalised.
_BY_ROUTER: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "copy, softmax over all": ("copy", 1, "exact", {"num_experts": 4, **_PRE}),
    "groups, softmax over all": ("virtual_group", 4, "exact", {"num_experts": 16, "top_k": 8, **_PRE}),
    "copy, one of sigmoid": ("copy", 1, "exact", {"num_experts": 4, "top_k": 1, **_SIGMOID}),
}


def _config(changes: dict[str, Any], granularity: int = 1) -> Any:
    width = 48 // granularity
    return model_config(**{"num_experts": 0, "expert_ffn_hidden_size": width, "experts": "auto"} | changes)


def _built(config: Any, layout: Any) -> Any:
    from model.build import build_chunks
    from parallel.compat import forget_models

    forget_models()
    (chunk,) = build_chunks(
        config, config.num_experts, layout, vocab_size=VOCABULARY, sequence_length=SEQUENCE, precision="fp32"
    )
    return chunk


def _dense(changes: dict[str, Any], layout: Any, folder: Path) -> Any:
    """A dense model with random weights, norms and biases included, and its weights on disk."""
    from model.sharded_state import model_state
    from parallel.sharded_save import save_sharded

    config = _config({k: v for k, v in changes.items() if k not in ("num_experts", "top_k")})
    chunk = _built(config, layout)
    for name, p in chunk.named_parameters():
        noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.data.copy_(torch.randn(p.shape, generator=noise) * 0.15 + (1.0 if "norm" in name else 0.0))
    save_sharded(model_state([chunk], layout), str(folder))
    return chunk


def _upcycled(source: Path, target: Path, case: tuple[str, int, str, dict[str, Any]], layout: Any) -> Any:
    """The MoE model of a case, its tensors made by the executor, verified, and loaded; no key too many or too few."""
    from model.sharded_state import expert_keys, model_state
    from parallel.sharded_load import load_sharded
    from upcycle.dense import DenseRules, plan_from_dense
    from upcycle.dense_stream import opened_dense
    from upcycle.dense_verify import verify_from_dense
    from upcycle.stream import NewTensor, write_tensors

    method, granularity, scaling, changes = case
    config = _config(changes, granularity)
    rules = DenseRules(method=method, granularity=granularity, scaling=scaling)
    plan = plan_from_dense(rules, config, step=0, seed=5, itemsize=4)
    with opened_dense(source, plan, config) as dense:
        stored = dense.stored
        before = write_tensors(
            target.with_name(f"{target.name}-same"),
            {key: NewTensor(tensor, 1) for key, tensor in stored.tensors.items()},
            stored.read,
            chunk_bytes=1 << 20,
        )
        # Pieces that cut matrices; in one case rows too.
        chunk = 110 if granularity == 3 else 3000
        found = dense.write(target, chunk_bytes=chunk)
        assert verify_from_dense(before, found, dense, chunk_bytes=chunk + 90) > 0
        experts = dense.experts
    chunk = _built(config, layout)
    assert experts == expert_keys([chunk], layout)
    loaded, missing, unexpected = load_sharded(model_state([chunk], layout), str(target), strict=False)
    assert not missing and not unexpected
    chunk.load_state_dict(loaded["model0"], strict=False)
    return chunk


def _errors(folder: str, cases: dict[str, tuple[str, int, str, dict[str, Any]]]) -> dict[str, float]:
    layout, found = layout_of(), {}
    for number, (name, case) in enumerate(cases.items()):
        source = Path(folder) / f"dense-{number}"
        source.mkdir()
        with torch.no_grad():
            expected = forward([_dense(case[3], layout, source)])
            ours = forward([_upcycled(source, Path(folder) / f"moe-{number}", case, layout)])
        found[name] = relative_error(ours, expected)
    return found


def test_the_function_is_kept(tmp_path: Path) -> None:
    (errors,) = run_distributed(_errors, 1, str(tmp_path), _EXACT)
    assert max(errors.values()) < _TOLERANCE, errors


def test_the_even_scaling_is_not_exact_for_gated_activations(tmp_path: Path) -> None:
    (errors,) = run_distributed(_errors, 1, str(tmp_path), _NOT_EXACT)
    assert all(error > 1e-3 for error in errors.values()), errors


def _outputs(chunk: Any) -> list[torch.Tensor]:
    """Input and output of the first layer's feed-forward."""
    seen: list[torch.Tensor] = []
    hook = chunk.decoder.layers[0].mlp.register_forward_hook(lambda m, i, output: seen.extend((i[0], output[0])))
    with torch.no_grad():
        forward([chunk])
    hook.remove()
    return seen


def _by_router(folder: str, cases: dict[str, tuple[str, int, str, dict[str, Any]]]) -> dict[str, tuple[float, float]]:
    """Error of output = dense output x what the router's gates come to, and how far that is from 1."""
    layout, found = layout_of(), {}
    for number, (name, case) in enumerate(cases.items()):
        source = Path(folder) / f"dense-{number}"
        source.mkdir()
        dense = _outputs(_dense(case[3], layout, source))
        moe = _upcycled(source, Path(folder) / f"moe-{number}", case, layout)
        entered, output = _outputs(moe)
        assert torch.equal(entered, dense[0])
        changes, granularity = case[3], case[1]
        logits = entered.reshape(-1, 32) @ moe.decoder.layers[0].mlp.router.weight.detach().T
        copies = logits[:, ::granularity]
        if changes["router_score"] == "softmax":
            chosen = changes["top_k"] // granularity if "top_k" in changes else 2
            gates = copies.softmax(1).topk(chosen, 1).values.sum(1) * copies.shape[1] / chosen
        else:
            gates = 2 * copies.max(1).values.sigmoid()
        expected = dense[1].reshape(-1, 32) * gates[:, None]
        found[name] = relative_error(output.reshape(-1, 32), expected), float((gates - 1).abs().max())
    return found


def test_without_normalised_gates_it_is_kept_up_to_what_the_router_says(tmp_path: Path) -> None:
    """Exactly so: each token's output is the dense one times its gates over those of a neutral router."""
    (found,) = run_distributed(_by_router, 1, str(tmp_path), _BY_ROUTER)
    for name, (error, away) in found.items():
        assert error < _TOLERANCE, (name, error)
        # Router rows of N(0, 0.02) are nearly neutral.
        assert 1e-4 < away < 0.2, (name, away)


@pytest.mark.parametrize(
    ("changes", "granularity", "scale"),
    [
        ({"num_experts": 8, "top_k": 2, **_POST}, 1, 1.0),
        ({"num_experts": 64, "top_k": 8, **_POST}, 8, 8.0),
        # R G^2 / T and G of arXiv 2410.07524.
        ({"num_experts": 64, "top_k": 8, **_PRE}, 8, 8 * 64 / 8),
        ({"num_experts": 8, "top_k": 2, **_PRE}, 1, 4.0),
        ({"num_experts": 64, "top_k": 8, "router_scale": 2.5, **_SIGMOID}, 8, 3.2),
        ({"num_experts": 8, "top_k": 1, **_SIGMOID}, 1, 2.0),
    ],
)
def test_the_factor(changes: dict[str, Any], granularity: int, scale: float) -> None:
    from upcycle.dense import activation_scale, matrix_scales

    assert activation_scale(_config(changes), granularity) == pytest.approx(scale)
    for activation, root in (("swiglu", 3), ("geglu", 3), ("squared_relu", 3), ("gelu", 2)):
        even = matrix_scales(activation, scale, granularity, "even")
        assert set(even.values()) == {scale ** (1 / root)} and len(even) == (3 if "glu" in activation else 2)
