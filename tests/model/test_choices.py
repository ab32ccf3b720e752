"""What `auto` becomes on machines that are not here, and what is refused on them."""

from dataclasses import replace
from typing import Any

import pytest

from model.choices import Situation, choose, mcore_fields, resolved
from model.config import ModelConfig
from model.performance import PerformanceConfig
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from parallel.machine import LIBRARIES, Machine, named_machine

_CPU = Machine(None, (0, 0), frozenset(LIBRARIES), 8)


def _at(machine: Machine, *, expert: int = 8, world: int = 8, **changes: Any) -> Situation:
    values: dict[str, Any] = dict(
        model=ModelConfig(num_experts=64, shared_expert_ffn_hidden_size=512),
        performance=PerformanceConfig(),
        overlap_grad_reduce="auto",
        overlap_param_gather="auto",
        sharded=True,
        parallel=ParallelConfig(expert=expert),
        world_size=world,
        bf16=True,
        families=False,
        documents=False,
        machine=machine,
    )
    values |= changes
    return Situation(**({"num_experts": values["model"].num_experts} | values))


def _values(at: Situation) -> dict[str, bool | str]:
    return {choice.key.split(".")[1]: choice.value for choice in choose(at)}


def _h100(installed: str = "transformer-engine", ranks_per_node: int = 8) -> Machine:
    return named_machine("h100", installed, ranks_per_node)


def test_on_cpu_all_of_it_is_off() -> None:
    values = _values(_at(_CPU))
    words = {name: values.pop(name) for name in ("transformer_impl", "experts", "dispatcher")}
    assert words == {"transformer_impl": "local", "experts": "grouped", "dispatcher": "alltoall"}
    assert set(values.values()) == {False}


def test_hopper_with_transformer_engine() -> None:
    values = _values(_at(_h100()))
    assert values == {
        "transformer_impl": "transformer_engine", "experts": "grouped",
        "dispatcher": "alltoall", "permute_fusion": True, "router_fusion": True, "rope_fusion": True,
        "cross_entropy_fusion": True, "gradient_accumulation_fusion": True, "shared_expert_overlap": True,
        "overlap_grad_reduce": True, "overlap_param_gather": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "changes", "layers", "experts"),
    [
        (_h100(), {}, "transformer_engine", "grouped"),
        (named_machine("B200", "transformer-engine", 8), {}, "transformer_engine", "grouped"),
        (named_machine("A100", "transformer-engine", 8), {}, "transformer_engine", "te"),  # torch has no kernel for it
        (_h100(), {"bf16": False}, "transformer_engine", "te"),
        (_h100(), {"model": ModelConfig(fp8="hybrid")}, "transformer_engine", "te"),
        (_h100(), {"model": ModelConfig(mcore={"use_te_activation_func": True})}, "transformer_engine", "te"),
        (_h100(), {"model": ModelConfig(experts="te")}, "transformer_engine", "te"),
        (_h100(), {"model": ModelConfig(experts="sequential")}, "transformer_engine", "sequential"),
        (_h100(), {"model": ModelConfig(transformer_impl="local")}, "local", "grouped"),
        (_h100(""), {}, "local", "grouped"),
        (named_machine("A100", "", 8), {}, "local", "grouped"),
        (_h100(), {"model": ModelConfig(num_experts=0), "parallel": ParallelConfig()}, "transformer_engine", None),
        (_CPU, {"model": ModelConfig(transformer_impl="local", experts="sequential")}, "local", "sequential"),
    ],
)  # fmt: skip
def test_whose_layers_and_whose_experts(
    machine: Machine, changes: dict[str, Any], layers: str, experts: str | None
) -> None:
    at = _at(machine, **changes)
    values = _values(at)
    assert (values["transformer_impl"], values.get("experts")) == (layers, experts)
    model, _ = resolved(at, choose(at))
    assert (model.transformer_impl, model.experts) == (layers, experts or at.model.experts)


@pytest.mark.parametrize(
    ("machine", "expert", "dispatcher", "backend"),
    [
        (_h100("deepep"), 8, "alltoall", None),  # within the node
        (_h100("deepep"), 16, "flex", "deepep"),
        (_h100("deepep", 4), 16, "alltoall", None),  # DeepEP counts on eight per node
        (_h100("deepep"), 48, "alltoall", None),  # older ones have no settings for so many
        (_h100("deepep,hybridep"), 16, "flex", "deepep"),
        (named_machine("GB200", "deepep,hybridep", 4), 32, "flex", "hybridep"),
        (named_machine("A100", "deepep", 8), 16, "alltoall", None),  # not worth it
        (_h100("deepep", 12), 8, "alltoall", None),  # straddles nodes, which DeepEP does not know
        (named_machine("B200", "transformer-engine", 8), 32, "alltoall", None),
    ],
)
def test_the_dispatcher(machine: Machine, expert: int, dispatcher: str, backend: str | None) -> None:
    values = _values(_at(machine, expert=expert, world=expert))
    assert (values["dispatcher"], values.get("flex_backend")) == (dispatcher, backend)
    assert values["shared_expert_overlap"] == (dispatcher == "alltoall")


@pytest.mark.parametrize(
    ("changes", "off"),
    [
        ({"families": True}, {"router_fusion"}),
        ({"model": ModelConfig(transformer_impl="local", shared_expert_ffn_hidden_size=8)},
         {"permute_fusion", "router_fusion", "rope_fusion"}),
        ({"documents": True}, {"rope_fusion"}),
        ({"sharded": False}, {"overlap_param_gather"}),
        ({"overlap_grad_reduce": False}, {"overlap_grad_reduce", "overlap_param_gather"}),
        ({"model": ModelConfig(attention="mla", shared_expert_ffn_hidden_size=8)}, {"rope_fusion"}),
        ({"model": ModelConfig()}, {"shared_expert_overlap"}),
        ({"model": ModelConfig(shared_expert_ffn_hidden_size=8, recompute="selective", recompute_modules=["shared_experts"])},
         {"shared_expert_overlap"}),
        ({"model": ModelConfig(num_experts=0), "parallel": ParallelConfig()},
         {"permute_fusion", "router_fusion", "shared_expert_overlap"}),
        ({"parallel": ParallelConfig(), "world_size": 1},
         {"shared_expert_overlap", "overlap_grad_reduce", "overlap_param_gather"}),
        ({"parallel": ParallelConfig(expert=1, tensor=8)}, {"shared_expert_overlap"}),  # experts still have replicas
    ],
)  # fmt: skip
def test_what_stands_in_the_way_of_one_leaves_the_others(changes: dict[str, Any], off: set[str]) -> None:
    values = _values(_at(_h100("transformer-engine,apex"), **changes))
    assert {key for key, value in values.items() if value is False} == off


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        (_CPU, {"performance": PerformanceConfig(permute_fusion=True)},
         r"performance\.permute_fusion=true cannot be here: it needs Transformer Engine and a GPU: use .*=auto or false"),
        (replace(_h100(), compile_obstacle="there is no C compiler"), {"performance": PerformanceConfig(permute_fusion=True)},
         r"permute_fusion=true cannot be here: .*with Triton, which cannot here: there is no C compiler: use .*=auto or false"),
        (_h100(""), {"performance": PerformanceConfig(router_fusion=True)}, r"router_fusion=true .*Transformer Engine"),
        (_h100(), {"performance": PerformanceConfig(router_fusion=True), "families": True}, "exact mode"),
        (_h100(""), {"performance": PerformanceConfig(gradient_accumulation_fusion=True)}, "NVIDIA Apex"),
        (_h100("deepep"), {"model": ModelConfig(dispatcher="flex"), "bf16": False}, r"flex cannot be here: .*fp32"),
        (_h100(), {"model": ModelConfig(dispatcher="flex")}, r"neither DeepEP nor HybridEP is installed: use .*alltoall"),
        (_h100("hybridep"), {"model": ModelConfig(dispatcher="flex"),
                             "performance": PerformanceConfig(flex_backend="deepep")}, "flex_backend=deepep is not inst"),
        (_h100("deepep"), {"model": ModelConfig(dispatcher="flex"), "parallel": ParallelConfig(expert=3),
                           "world_size": 3}, "no settings for 3 ranks"),
        (_h100("deepep"), {"model": ModelConfig(dispatcher="flex", shared_expert_ffn_hidden_size=8),
                           "performance": PerformanceConfig(shared_expert_overlap=True)}, "needs alltoall"),
        (_h100("deepep"), {"performance": PerformanceConfig(flex_backend="deepep")},
         r"flex_backend=deepep is of the flex dispatcher, and this is alltoall"),
        (_h100(), {"performance": PerformanceConfig(shared_expert_overlap=True), "model": ModelConfig()},
         "no shared experts"),
        (_CPU, {"model": ModelConfig(experts="te")}, r"model\.experts=te needs .*: install both .* or use model\.experts=auto"),
        (_h100(""), {"model": ModelConfig(transformer_impl="transformer_engine")},
         r"model\.transformer_impl=transformer_engine needs .*: install both .* or use model\.transformer_impl=auto"),
        (_h100(), {"model": ModelConfig(experts="grouped", fp8="hybrid")}, r"model\.fp8=hybrid needs .* not model\.experts=grouped: use"),
    ],
)  # fmt: skip
def test_what_was_asked_for_and_cannot_be_is_refused(machine: Machine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(_at(machine, **changes))


_WOVEN = PerformanceConfig(expert_parallel_overlap=True)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({}, True),
        ({"parallel": ParallelConfig(expert=8, pipeline=2, virtual_pipeline=2), "world_size": 16}, True),
        ({"model": ModelConfig(num_experts=8), "num_experts": 16}, True),  # grown since
        ({"model": ModelConfig(num_experts=8), "parallel": ParallelConfig(expert=8, expert_tensor=2, tensor=2),
          "world_size": 16}, True),
        ({"model": ModelConfig(num_experts=64, recompute="selective", recompute_modules=["moe_act"])}, True),
        ({"parallel": ParallelConfig(), "world_size": 1}, False),
        ({"model": ModelConfig(num_experts=0), "parallel": ParallelConfig()}, False),
    ],
)  # fmt: skip
def test_micro_batches_are_woven_where_tokens_travel(changes: dict[str, Any], value: bool) -> None:
    at = _at(_h100(), **({"performance": _WOVEN} | changes))
    values = _values(at)
    assert values["expert_parallel_overlap"] is value
    if at.num_experts:
        assert not (values["shared_expert_overlap"] and value)
    model, performance = resolved(at, choose(at))
    assert mcore_fields(model, performance)["overlap_moe_expert_parallel_comm"] is value
    assert "expert_parallel_overlap" not in _values(_at(_h100(), **changes))


@pytest.mark.parametrize(
    ("machine", "changes", "message"),
    [
        (_CPU, {}, r"expert_parallel_overlap=true cannot be here: it needs the streams of a GPU: use .*=false \(docs/gpu\.md\)"),
        (_h100(), {"bf16": False}, "the run is fp32"),
        (_h100(), {"parallel": ParallelConfig(expert=8, pipeline=2), "world_size": 16}, r"parallel\.virtual_pipeline of 2"),
        (_h100(), {"model": ModelConfig(num_experts=64, dispatcher="allgather")}, "allgather sends all tokens"),
        (_h100(), {"model": ModelConfig(num_experts=8)}, "with 8 experts on parallel.expert=8 ranks each has one"),
        (_h100(), {"model": ModelConfig(num_experts=64, recompute="full")}, "recompute=full"),
        (_h100(), {"model": ModelConfig(num_experts=64, recompute="selective", recompute_modules=["moe"])}, "has moe"),
        (_h100(), {"model": ModelConfig(num_experts=64, shared_expert_ffn_hidden_size=8), "performance": PerformanceConfig(
            expert_parallel_overlap=True, shared_expert_overlap=True)}, "shared_expert_overlap=true hides the same"),
        (_h100(), {"performance": PerformanceConfig(expert_parallel_overlap=True, cuda_graphs="attention")},
         "cuda_graphs=attention has not been tried"),
    ],
)  # fmt: skip
def test_micro_batches_that_cannot_be_woven(machine: Machine, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(_at(machine, **({"performance": _WOVEN} | changes)))


def test_without_a_compiler_tokens_are_permuted_by_torch() -> None:
    at = _at(replace(_h100(), compile_obstacle="Triton is not installed"))
    off = {choice.key: choice.why for choice in choose(at) if choice.value is False}
    assert "Triton is not installed" in off["performance.permute_fusion"]
    assert off.keys() == {choice.key for choice in choose(_at(_h100())) if choice.value is False} | {
        "performance.permute_fusion"
    }


def test_sizes_of_newer_deepep_are_left_to_who_asks_for_them() -> None:
    at = _at(_h100("deepep"), model=ModelConfig(dispatcher="flex"), expert=48, world=48)
    assert _values(at)["flex_backend"] == "deepep"


def test_every_choice_says_why_and_mcore_is_told() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    at = _at(_h100("transformer-engine,deepep,apex"), expert=16, world=16)
    choices = choose(at)
    assert all(choice.why for choice in choices)
    fields = mcore_fields(*resolved(at, choices))
    assert fields["moe_token_dispatcher_type"] == "flex" and fields["moe_flex_dispatcher_backend"] == "deepep"
    assert fields["moe_permute_fusion"] and fields["gradient_accumulation_fusion"]
    assert fields.keys() <= set(TransformerConfig.__dataclass_fields__)


def test_unknown_machines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu=V100 is unknown: use one of A100, H100"):
        named_machine("V100", "", 8)
    with pytest.raises(ConfigError, match=r"--installed=apx is unknown: use some of transformer-engine"):
        named_machine("H100", "apx", 8)
