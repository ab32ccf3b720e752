"""Fields of mcore that have a key of their own are refused when the settings are read, and none is forgotten."""

from typing import Any
from unittest import mock

import pytest

from model.mcore_fields import KEYS, REFUSED, refuse_fields
from parallel.errors import ConfigError
from tests.model.grown_model import model_config
from train.settings import known_keys, load_settings

# What the model is told beside them: decided here, or with values that no key gives.
_FREE = {
    "attention_dropout",
    "batch_p2p_comm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "embedding_init_method",
    "hidden_dropout",
    "init_method",
    "moe_router_dtype",
    "moe_router_load_balancing_type",
    "moe_router_padding_for_quantization",
    "output_layer_init_method",
    "overlap_p2p_comm",
    "persist_layer_norm",
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_layers=9", r"^model\.mcore\.num_layers=9 has a key of its own: use model\.layers$"),
        ("moe_permute_fusion=true", r"moe_permute_fusion=true .* use performance\.permute_fusion$"),
        ("expert_model_parallel_size=2", r"expert_model_parallel_size=2 .* use parallel\.expert$"),
    ],
)
def test_a_field_with_a_key_is_refused_with_the_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(["model=tiny", "data.corpus=x", f"+model.mcore.{override}"], 2)
    load_settings(["model=tiny", "data.corpus=x", "+model.mcore.moe_input_jitter_eps=0.01"], 2)


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_of_unknown_form_are_refused_with_the_settings(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.mcore\.{name}=\d* .*; leave it out$"):
        load_settings(["model=tiny", "data.corpus=x", f"+model.mcore.{name}=8"], 2)
    refuse_fields({name: None})
    with pytest.raises(ConfigError):
        refuse_fields({name: 0})


def test_every_field_that_a_key_sets_is_listed() -> None:
    import torch

    from model import build, mcore_config
    from model.performance import PerformanceConfig
    from parallel.config import ParallelConfig

    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    told: set[str] = set()

    def record(cls: Any, **values: Any) -> Any:
        told.update(values)
        return mock.DEFAULT

    flex = PerformanceConfig(flex_backend="deepep")
    with (
        mock.patch.object(mcore_config, "make_transformer_config", side_effect=record),
        mock.patch.multiple(build, experts_kind=lambda model: "te", uses_engine=lambda model: True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="NVIDIA H200"),
    ):
        for changes in (
            {"dispatcher": "flex", "fp8": "hybrid"},
            {"recompute": "full"},
            {"recompute": "selective"},
            {"attention": "mla", "rope_scaling": "yarn"},
        ):
            build.transformer_config(model_config(**changes), 8, parallel, "bf16", initialise=False, performance=flex)
    assert told - KEYS.keys() == _FREE
    # The remedies name keys that there are.
    named = {word.split("=")[0] for key in KEYS.values() for word in key.split() if "." in word}
    assert {word.strip(",") for word in named} <= set(known_keys())
