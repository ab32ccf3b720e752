"""What is wrong with `model.mcore` is told before any process group: a field, a value, a combination that mcore refuses."""

import dataclasses
import importlib
import itertools
import logging
import os
import random
import types
import typing
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

from model.attention_backend import refuse_other_attention
from model.config import ModelConfig
from parallel.compat import quiet_megatron
from parallel.errors import ConfigError
from parallel.layout import dist
from train.buildable import refuse_anywhere, refuse_unbuildable
from train.settings import _check_passed_on, load_settings, refuse_passed_on, settings_from_dict, settings_to_dict

_PLAIN = ["model=tiny", "data.corpus=x"]
_GROWS = "upcycle.stages=[{at_step: 9, factor: 2}, {at_step: 12, parallel: {pipeline: 2}}]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moe_input_jiter_eps=0.01", r"=0\.01: TransformerConfig of megatron-core \S+ has no such field; did you mean moe_input_jitter_eps\?"),
        ("zzz=1", r"=1: .* has no such field: leave it out"),
        ("moe_input_jitter_eps=abc", r"=abc must be a finite number or null"),
        ("moe_input_jitter_eps='0.01'", r"=0\.01 must be a finite number or null"),
        ("moe_input_jitter_eps=nan", r"=nan must be a finite number or null"),
        ("attention_dropout=true", r"=true must be a finite number"),
        ("window_size=[4,0,1]", r"=\[4, 0, 1\] must be a list of 2 whole numbers or null"),
        ("window_size=[4,a]", r"\[1\]=a must be a whole number"),
        ("softmax_type=off", r"=off must be vanilla, off-by-one or learnable"),
        ("attention_backend=flush", r"=flush must be flash, fused, unfused, local or auto"),
        ("init_model_with_meta_device=1", r"=1 must be true or false"),
        ("timers=print", r"=print stands for an object of mcore's that no setting can name: leave it out"),
        ("autocast_dtype=bf16", r"=bf16 stands for an object .*: leave it out"),
    ],
)  # fmt: skip
def test_a_field_and_its_value_are_held_against_what_mcore_declares(override: str, message: str) -> None:
    name = override.split("=")[0]
    with pytest.raises(ConfigError, match=rf"^model\.mcore\.{name}{message}$"):
        load_settings([*_PLAIN, f"+model.mcore.{override}"], 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.mcore.no_rope_freq=3"],
         r"^model\.mcore\.no_rope_freq=3: megatron-core refuses this model: .*num_layers=2 \(num_layers is model\.layers\): change it or leave it out$"),
        # Of two fields only the one to blame is named.
        (["+model.mcore.softmax_scale=0.1", "+model.mcore.moe_pad_expert_input_to_capacity=true"],
         r"^model\.mcore\.moe_pad_expert_input_to_capacity=true: megatron-core refuses .* \(moe_expert_capacity_factor is model\.capacity_factor\): change"),
        # A later layout.
        (["+model.mcore.defer_embedding_wgrad_compute=true", _GROWS], r"^model\.mcore\.defer_embedding_wgrad_compute=true: megatron-core refuses"),
        (["+model.mcore.num_layers_in_first_pipeline_stage=1", "parallel.pipeline=2", "upcycle.stages=[{at_step: 9, parallel: {pipeline: 1}}]"],
         r"^upcycle\.stages\[0\]: model\.mcore\.num_layers_in_first_pipeline_stage=1: megatron-core refuses this model: Mismatch"),
    ],
)  # fmt: skip
def test_what_mcore_refuses_is_told_with_the_settings(overrides: list[str], message: str) -> None:
    settings = load_settings([*_PLAIN, *overrides], 2)
    for refuse in (refuse_passed_on, lambda given: refuse_unbuildable(given, 2)):
        with pytest.raises(ConfigError, match=message) as refused:
            refuse(settings)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+model.mcore.attention_dropout=1"], r"^model\.mcore\.attention_dropout=1 must be a probability below 1$"),
        (["+model.mcore.embedding_init_method_std=-1"], r"embedding_init_method_std=-1 must be zero or more$"),
        (["+model.mcore.moe_input_jitter_eps=0"], r"moe_input_jitter_eps=0 must be above zero and below 1$"),
        (["+model.mcore.moe_router_load_balancing_type=auxloss"], r"=auxloss is unknown: use one of aux_loss, seq_aux_loss"),
        (["+model.mcore.moe_router_load_balancing_type=sinkhorn", "model.aux_loss_coeff=0.1"], r"=sinkhorn goes without a loss: use model\.aux_loss_coeff=0, not 0\.1$"),
        (["+model.mcore.microbatch_group_size_per_vp_stage=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4"],
         r"vp_stage=1 must lie between parallel\.pipeline=2 and the 2 micro-batches of a step"),
        (["+model.mcore.moe_apply_probs_on_input=true"], r"moe_apply_probs_on_input=true needs model\.top_k=1, not 2: leave it out$"),
        (["+model.mcore.fused_single_qkv_rope=true"], r"^model\.mcore\.fused_single_qkv_rope=true needs layers of Transformer Engine"),
        (["+model.mcore.fp32_residual_connection=true", "run.precision=bf16"], r"fp32_residual_connection=true needs layers of Transformer Engine"),
        (["+model.mcore.masked_softmax_fusion=true", "run.precision=bf16"], r"masked_softmax_fusion=true needs scaled_masked_softmax_cuda"),
    ],
)  # fmt: skip
def test_what_a_layer_or_a_step_would_stumble_over_is_told_with_the_settings(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_unbuildable(load_settings([*_PLAIN, "run.precision=fp32", *overrides], 2), 2)


def test_a_combination_of_our_own_keys_is_told_with_the_keys() -> None:
    # What the settings' own checks refuse as well, given to mcore alone.
    from model.build import config_anywhere
    from parallel.config import ParallelConfig

    with pytest.raises(ConfigError, match=r"^megatron-core refuses this model: .*\(num_attention_heads is model\.attention_heads, tensor_m.* is parallel\.tensor\): change one of these keys$"):  # fmt: skip
        config_anywhere(ModelConfig(attention_heads=4), 8, ParallelConfig(tensor=3), "bf16", "grouped")
    settings = load_settings([*_PLAIN, "performance.rope_fusion=true"], 2)
    with pytest.raises(
        ConfigError, match=r"^performance\.rope_fusion=true cannot be here: it needs Transformer Engine"
    ):
        refuse_unbuildable(settings, 2)


def test_a_plan_leaves_open_what_only_the_machine_of_the_run_can_say() -> None:
    from launch.plan_inputs import settings_without_corpus

    words = ["model=tiny", "run.precision=bf16", "+model.mcore.moe_input_jitter_eps=0.1"]
    for more in (
        ["model.fp8=hybrid"],
        ["+model.mcore.symmetric_ar_type=one_shot"],
        ["performance.permute_fusion=true"],
    ):
        assert settings_without_corpus([*words, *more], 2).model.mcore
    with pytest.raises(ConfigError, match=r"^model\.mcore\.no_rope_freq=3: megatron-core refuses"):
        settings_without_corpus([*words, "+model.mcore.no_rope_freq=3"], 2)


def test_a_plan_asks_mcore_of_the_engine_where_that_is() -> None:
    from megatron.core.transformer import transformer_config

    words = ["run.precision=bf16", "model.fp8=hybrid", "+model.mcore.symmetric_ar_type=one_shot"]
    settings = load_settings([*_PLAIN, *words, "data.global_batch_size=32"], 2)
    with mock.patch("train.buildable.have_transformer_engine", return_value=True):
        with mock.patch.object(transformer_config, "is_te_min_version", return_value=True):
            refuse_passed_on(settings)
        with (
            mock.patch.object(transformer_config, "is_te_min_version", return_value=False),
            pytest.raises(ConfigError, match="megatron-core refuses this model: Only transformer-engine"),
        ):
            refuse_passed_on(settings)


def test_a_machine_that_cannot_load_mcore_leaves_its_fields_to_the_job() -> None:
    """As Transformer Engine makes it where it is installed without the libraries of a GPU."""
    real = importlib.import_module

    def without_libraries(name: str, *more: Any) -> Any:
        if name == "model.mcore_config":
            raise RuntimeError("cudnn shared object not found.")
        return real(name, *more)

    with mock.patch.object(importlib, "import_module", side_effect=without_libraries):
        settings = load_settings([*_PLAIN, "+model.mcore.no_rope_freq=none"], 2)
        refuse_passed_on(settings)
    with pytest.raises(ConfigError, match=r"no_rope_freq=none must be a whole number"):
        load_settings([*_PLAIN, "+model.mcore.no_rope_freq=none"], 2)


def test_a_run_is_refused_before_ranks_meet() -> None:
    from train import job

    settings = load_settings([*_PLAIN, "+model.mcore.no_rope_freq=3"], 1)
    with (
        mock.patch.object(job, "join_job") as joined,
        pytest.raises(ConfigError, match=r"^model\.mcore\.no_rope_freq=3: megatron-core refuses"),
    ):
        job.run_settings(settings)
    assert not joined.called


def test_an_evaluation_is_refused_before_ranks_meet() -> None:
    from train.offline import evaluation

    settings = load_settings([*_PLAIN, "+model.mcore.no_rope_freq=3"], 1)
    source = mock.Mock(settings=settings, manifest=mock.Mock(num_experts=8))
    with pytest.raises(ConfigError, match=r"^model\.mcore\.no_rope_freq=3: megatron-core refuses"):
        evaluation._settings(source, [])


def test_values_reach_mcore_in_the_form_that_it_declares() -> None:
    from megatron.core.transformer.enums import AttnBackend

    from model.mcore_config import passed_values

    passed = {"attention_backend": "flash", "window_size": [4, 0], "cp_comm_type": ["p2p", "a2a"], "softmax_scale": 1}
    model = ModelConfig(mcore=passed)
    values = passed_values(model)
    assert values == {**passed, "attention_backend": AttnBackend.flash, "window_size": (4, 0)}
    # mcore writes into lists of its config.
    assert values["cp_comm_type"] is not passed["cp_comm_type"]


def test_an_environment_that_contradicts_the_attention_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly where mcore would assert while it builds the network."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    for name in names:
        # Networks that other tests have built in this process.
        monkeypatch.delenv(name, raising=False)
    refused = 0
    for backend, *values in itertools.product(AttnBackend, *3 * [(None, "0", "1")]):
        told = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        config = types.SimpleNamespace(attention_backend=backend, flash_attention_version=None)
        mine = theirs = False
        with mock.patch.dict(os.environ, told):
            try:
                refuse_other_attention(ModelConfig(mcore={"attention_backend": backend.name}))
            except ConfigError:
                mine = True
            try:
                LanguageModule._set_attention_backend(types.SimpleNamespace(config=config))
            except AssertionError:
                theirs = True
        assert mine == theirs, (backend, told)
        refused += mine
    # Of 27 environments eight suit each backend: every variable as it wants it, or unset.
    assert refused == len(AttnBackend) * (27 - 8)
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    settings = load_settings(_PLAIN, 2)
    told = r"^NVTE_FLASH_ATTN=0 in the environment contradicts model\.mcore\.attention_backend=auto, for which .* sets it to 1: "
    with pytest.raises(ConfigError, match=told + "unset NVTE_FLASH_ATTN, or use .*=fused or unfused or local$"):
        refuse_unbuildable(settings, 2)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "yes")
    with pytest.raises(ConfigError, match=r"unset NVTE_FLASH_ATTN, NVTE_FUSED_ATTN$"):
        refuse_unbuildable(settings, 2)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "1")
    refuse_unbuildable(load_settings([*_PLAIN, "+model.mcore.attention_backend=fused"], 2), 2)


def test_a_gpu_of_unknown_kind_is_given_the_benefit_of_the_doubt() -> None:
    """Blackwell takes HybridEP where an older GPU takes DeepEP, which knows no group of 6 ranks."""
    settings = load_settings(
        [*_PLAIN, "run.precision=bf16", "model.dispatcher=flex", "model.num_experts=12", "parallel.expert=6",
         "data.global_batch_size=12", "data.micro_batch_size=2"], 6,
    )  # fmt: skip
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", side_effect=AssertionError),
        mock.patch("parallel.machine._found", side_effect=lambda: iter(found)),
    ):
        found = ["deepep", "hybridep"]
        refuse_unbuildable(settings, 6)
        found = ["deepep"]
        with pytest.raises(ConfigError, match=r"DeepEP has no settings for 6 ranks"):
            refuse_unbuildable(settings, 6)


# ---- any value ---------------------------------------------------------------------------------------------------------

_ODD: list[Any] = [
    0, 1, -1, 7, 2**70, 0.0, -0.5, 1e300, float("nan"), float("inf"), True, False, None, "", "a", "none", "3", "true", "a\nb",
    "${run.dir}", "???", "Et*2L", "E|t|tL", "[", [], [1], [1, 0], ["a", None], [[1]], {}, {"a": 1},
]  # fmt: skip


def _likely(draw: random.Random, kind: Any) -> Any:
    """A value of a declared type, as far as YAML has one."""
    union = typing.get_origin(kind) is typing.Union
    member = draw.choice(typing.get_args(kind)) if union else kind
    origin, inner = typing.get_origin(member) or member, typing.get_args(member)
    if origin is typing.Literal:
        return draw.choice(inner)
    if origin in (list, tuple):
        return [_likely(draw, inner[0] if inner else int) for _ in range(draw.choice([1, 2, 2]))]
    if hasattr(member, "__members__"):
        return draw.choice(list(member.__members__))
    values: dict[Any, list[Any]] = {
        bool: [True, False], int: [0, 1, 2, 4, -1, 1000], float: [0.0, 0.5, -1.0, 100, 1e-6],
        str: ["", "a", "p2p", "aux_loss", "sinkhorn", "Et*2L"],
    }  # fmt: skip
    return draw.choice(values.get(origin, [None]))


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.slow)])
def test_no_value_of_any_field_gives_anything_but_an_error_of_the_user(count: int) -> None:
    from model.mcore_config import declared_fields

    latent = ["model.attention=mla", "model.kv_heads=null"]
    more = [
        ["run.precision=bf16"],
        ["parallel.pipeline=2"],
        ["parallel.tensor=2"],
        [_GROWS],
        latent,
        ["model.recompute=full"],
    ]
    bases = [load_settings([*_PLAIN, *overrides], 2) for overrides in more]
    draw, names_missing, refused = random.Random(count), [], 0
    quiet_megatron()
    with (
        warnings.catch_warnings(record=True) as warned,
        mock.patch.object(torch.cuda, "_lazy_init") as touched,
        mock.patch.object(dist, "init_process_group") as joined,
        mock.patch.object(logging.Logger, "handle") as logged,
    ):
        for number in range(count):
            base = bases[number % len(bases)]
            kinds = declared_fields(base.model)
            chosen = draw.sample(list(kinds), draw.choice([1, 1, 2, 3]))
            passed = {name: draw.choice(_ODD) if draw.random() < 0.4 else _likely(draw, kinds[name]) for name in chosen}
            try:
                # OmegaConf takes ten times as long as all the rest: a few go by way of it.
                settings = dataclasses.replace(base, model=dataclasses.replace(base.model, mcore=passed))
                if number % 20 == 0:
                    settings = settings_from_dict(settings_to_dict(settings))
                _check_passed_on(settings.model)
                settings.check(2)
                refuse_anywhere(settings)
                refuse_unbuildable(settings, 2)
            except ConfigError as e:
                refused += 1
                assert "\n" not in str(e)
                if not any(f"model.mcore.{name}" in str(e) for name in passed):
                    names_missing.append((passed, str(e)))
    assert not names_missing and not warned
    assert not touched.called and not joined.called and not logged.called
    assert count / 2 < refused < count
