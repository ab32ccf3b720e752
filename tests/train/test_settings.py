"""Settings: what a user types is understood, or refused in one line with the key, the value and the remedy."""

from pathlib import Path

import pytest

from parallel.errors import ConfigError
from train.settings import config_groups, explain, load_settings, settings_from_dict, settings_to_dict, stage_from_dict

_DEMO = ["experiment=demo", "model=tiny", "parallel.expert=2"]


def test_demo_settings_derive_what_the_command_line_says() -> None:
    settings = load_settings(
        [*_DEMO, "run.steps=30", "upcycle.stages=[{at_step: 10, factor: 3}]", "schedule.decay_steps=5"], 2
    )
    assert settings.model.hidden_size == 64
    assert settings.upcycle.expert_counts(settings.model.num_experts) == [8, 24]
    assert settings.parallel.describe(2)["data"] == 2
    assert settings_from_dict(settings_to_dict(settings)) == settings


def test_a_number_of_tokens_is_judged_when_the_checkpoint_is_known(tmp_path: Path) -> None:
    """With half the batch from here on, the stage that is over would lie past the end of the run."""
    words = [*_DEMO, f"run.dir={tmp_path}", "run.steps=60", "schedule.decay_steps=5", "data.global_batch_size=4"]
    words += ["upcycle.stages=[{at_tokens: 81920, factor: 2}]", "data.micro_batch_size=2"]
    with pytest.raises(ConfigError, match=r"at_tokens=81920 \(step 80\) is past the end of the run"):
        load_settings(words, 2)
    (tmp_path / "checkpoints").mkdir()
    assert load_settings(words, 2).upcycle.stages[0].at_tokens == 81920


@pytest.mark.parametrize("name", config_groups()["model"])
def test_every_model_preset_is_valid(name: str) -> None:
    settings = load_settings([f"model={name}", "data.corpus=x"], 1)
    assert settings.model.moe_layer_numbers()


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["run.stps=3"], 2, r"unknown key run\.stps; did you mean run\.steps\?"),
        (["model.layer=3"], 2, r"unknown key model\.layer; did you mean model\.layers\?"),
        (["upcycle.stages=[{at_step: 3, fctor: 2}]"], 2, r"unknown key .*fctor; did you mean factor\?"),
        (["upcycle.stages=[{at_step: 3, factor: 2, optimizer: reset}]"], 2, r"unknown key .*optimizer; did you mean optimizer_rule\?"),
        (["run.steps=abc"], 2, r"run\.steps=abc must be a whole number$"),
        (["model=tyni"], 2, r"model=tyni is unknown: use one of .*; did you mean tiny\?"),
        (["optimizer=lion"], 2, r"optimizer=lion is unknown: use one of adamw"),
        (["model.layers=-1"], 2, r"model\.layers=-1 must be above zero"),
        (["parallel.expert=-2"], 2, r"parallel\.expert=-2 must be 1 or more"),
        (["parallel.expert=4"], 2, r"parallel\.expert=4 .* does not divide the 2 processes"),
        (["parallel.tensor=3"], 2, r"parallel\.tensor=3 .* does not divide the 2 processes"),
        (["parallel.expert=3"], 3, r"model\.num_experts=8 is not divisible by parallel\.expert=3: use model\.num_experts=6 or 9"),
        (["model.attention_heads=5"], 2, r"model\.hidden_size=64 is not divisible by model\.attention_heads=5"),
        (["model.top_k=9"], 2, r"model\.top_k=9 is above model\.num_experts=8"),
        (["data.global_batch_size=7"], 2, r"data\.global_batch_size=7 is not divisible by .*: use data\.global_batch_size=4 or 8"),
        (["upcycle.stages=[{at_step: 300, factor: 2}]"], 2, r"upcycle\.stages\[0\]\.at_step=300 is past the end of the run"),
        (["model.linear_bias=true", "model.shared_expert_ffn_hidden_size=64"], 2, r"linear_bias=true cannot .*hidden_size=64: mcore's shared"),
        (["model.linear_bias=true", "model.experts=sequential", "parallel.expert=1"], 2, r"not parallel\.expert=1: .* use model\.experts=grouped"),
        (["model.linear_bias=true", "model.experts=sequential", "upcycle.stages=[{at_step: 9, parallel: {expert: 1}}]"], 2, r"not upcycle\.stages\[0\]\.parallel\.expert=1"),
        (["model.linear_bias=true", "parallel.expert_tensor=2", "parallel.expert=1"], 2, r"parallel\.expert_tensor=2: experts that are split"),
        (["upcycle.stages=[{at_step: 0, factor: 2}]"], 2, r"upcycle\.stages\[0\]\.at_step=0 must be 1 or more"),
        (["upcycle.stages=[{at_step: 9, factor: 1}]"], 2, r"factor=1 must be 2 or more"),
        (["upcycle.stages=[{at_step: 9, factor: 2, num_experts: 16}]"], 2, r"give either factor or num_experts"),
        (["upcycle.stages=[{at_step: 9, num_experts: 9, selection: greedy}]"], 2, r"num_experts=9 is not divisible by parallel\.expert=2"),
        (["run.precision=bf16", "model.expert_ffn_hidden_size=132"], 2,
         r"expert_ffn_hidden_size=132 is not a multiple of 8, which a grouped product in bf16 needs: use .*=136, or .*=sequential"),
        # A later stage gives every rank one of the experts.
        (["run.precision=bf16", "model.num_experts=2", "model.top_k=1", "model.dispatcher=alltoall", "parallel.expert=1", "performance.expert_parallel_overlap=true", "data.global_batch_size=8",
          "upcycle.stages=[{at_step: 9, factor: 2, parallel: {expert: 4}}]"], 4, r"expert_parallel_overlap=true cannot be here: with 4 experts on .*=4 ranks each has one"),
        # A later stage splits experts further.
        (["run.precision=bf16", "model.expert_ffn_hidden_size=136", "parallel.expert=1", "upcycle.stages=[{at_step: 9, parallel: {expert_tensor: 2}}]"],
         2, r"expert_ffn_hidden_size=136 / upcycle\.stages\[0\]\.parallel\.expert_tensor=2 is not a multiple of 8"),
        (["model.num_experts=512", "parallel.expert=1", "upcycle.stages=[{at_step: 9, factor: 2}]"], 1, "stage 1 has 1024 experts / parallel.expert=1 "),
        (["upcycle.stages=[{at_step: 9, num_experts: 12}]"], 2, r"num_experts=12 is not a multiple of the 8 experts .*selection=greedy"),
        (["upcycle.stages=[{at_step: 9, num_experts: 4}]"], 2, r"num_experts=4 must be above the 8 experts"),
        (["upcycle.stages=[{at_step: 9, factor: 4, selection: greedy, max_extra_copies: 2}]"], 2, r"max_extra_copies=2 is too small for 8 -> 32 experts: use .*=3"),
        (["upcycle.stages=[{at_step: 9, factor: 2, optimizer_rule: forget}]"], 2, r"optimizer_rule=forget is unknown: use one of copy"),
        (["upcycle.stages=[{at_step: 9}]"], 2, r"upcycle\.stages\[0\] changes nothing: give factor or num_experts"),
        (["upcycle.stages=[{at_step: 9, num_experts: 8}]"], 2, r"num_experts=8 must be above the 8 experts"),
        (["upcycle.stages=[{at_step: 9, factor: 1, parallel: {expert: 1}}]"], 2, r"factor=1 must be 2 or more"),
        (["upcycle.stages=[{at_step: 9, parallel: {expert: 0}}]"], 2, r"upcycle\.stages\[0\]\.parallel\.expert=0 must be 1 or more"),
        (["upcycle.stages=[{at_step: 9, parallel: {exprt: 4}}]"], 2, r"unknown key .*exprt; did you mean (parallel\.)?expert\?"),
        (["upcycle.stages=[{at_step: 9, parallel: {expert: many}}]"], 2, r"upcycle\.stages\[0\]\.parallel\.expert=many must be a whole number or null"),
        (["data.global_batch_size=12", "upcycle.stages=[{at_step: 9, parallel: {expert: 3}}]"], 6, r"upcycle\.stages\[0\]\.parallel\.expert=3 does not divide the 8 experts"),
        (["data.global_batch_size=64", "upcycle.stages=[{at_step: 9, factor: 2, parallel: {expert: 32}}]"], 32, r"factor x experts=16 is not divisible by upcycle\.stages\[0\]\.parallel\.expert=32"),
        (["upcycle.stages=[{at_step: 9, parallel: {virtual_pipeline: 2}}]"], 2, r"upcycle\.stages\[0\]\.parallel: parallel\.virtual_pipeline=2 needs parallel\.pipeline"),
        (["upcycle.stages=[{at_step: 9, factor: 2, placement: far}]"], 2, r"stages\[0\]\.placement=far is unknown: use one of near, spread, auto"),
        (["upcycle.stages=[{at_step: 9, factor: 2, max_load_imbalance: 0.9}]"], 2, r"max_load_imbalance=0\.9 must be 1 or more"),
        (["upcycle.stages=[{at_step: 9, parallel: {expert: 1}, placement: auto}]"], 2, r"placement=auto needs more experts: add factor or num_experts"),
        (["upcycle.stages=[{at_step: 9, parallel: {expert: 1}, selection: greedy}]"], 2, r"selection=greedy needs more experts"),
        (["data.schedule=[{at_step: 9, at_stage: 1, blend: [{prefix: a}]}]"], 2, r"data\.schedule\[0\]: give one of at_step, at_tokens, at_stage \(got at_step, at_stage\)"),
        (["data.schedule=[{at_step: 140, blend: [{prefix: a}]}]"], 2, r"data\.schedule\[0\]\.at_step=140 is past the end of the run: use a step below run\.steps=140"),
        (["data.schedule=[{at_stage: 1}]"], 2, r"data\.schedule\[0\]\.blend is empty"),
        (["data.schedule=[{at_stage: 1, blend: [{prefix: a, max_epochs: 0}]}]"], 2, r"data\.schedule\[0\]\.blend\[0\]\.max_epochs=0\.0 must be above zero"),
        (["data.schedule=[{at_stge: 1}]"], 2, r"unknown key .*at_stge; did you mean at_stage\?"),
        (["data.document_attention=true", "+model.mcore.window_size=[4,0]"], 2, r"data\.document_attention=true cannot be combined with model\.mcore\.window_size"),
        (["data.document_attention=true", "parallel.context=2"], 2, r"data\.document_attention=true cannot be combined with context parallelism \(2 ranks in stage 0\)"),
        (["data.document_attention=true", "+model.mcore.softmax_type=learnable"], 2, r"document_attention=true .* model\.mcore\.softmax_type=learnable"),
        (["parallel.context=2", "model.transformer_impl=local"], 2, r"^parallel\.context=2 needs .* model\.transformer_impl=local keeps out: use model\.transformer_impl=auto"),
        (["model.transformer_impl=local", "model.experts=te"], 1, r"^model\.experts=te are .* model\.transformer_impl=local keeps out: use model\.transformer_impl=auto"),
        (["upcycle.stages=[{at_step: 9, parallel: {context: 2}}]", "run.precision=fp32"], 2, r"^upcycle\.stages\[0\]\.parallel\.context=2 needs run\.precision=bf16"),
        (["parallel.context=2", "+model.mcore.cp_comm_type=a2a+p2p"], 2, r"cp_comm_type has a2a\+p2p, .*parallel\.context=2 .*one of p2p, all_gather, a2a$"),
        (["parallel.context=2", "+model.mcore.cp_comm_type=a2a", "model.kv_heads=1"], 2, r"^model\.kv_heads=1 is not divisible by parallel\.tensor x parallel\.context, as .* has a2a"),
        (["parallel.context=2", "+model.mcore.window_size=[4,0]"], 2, r"window_size=.* parallel\.context=2 .*cp_comm_type=all_gather or a2a$"),
        (["parallel.context=2", "+model.mcore.cp_comm_type=all_gather", "model.attention=mla", "model.kv_heads=null"], 2, r"has all_gather, but latent attention travels by p2p"),
        (["+model.mcore.fp8_param=true"], 2, r"^model\.mcore\.fp8_param=true would keep weights in a form .* leave it out$"),
        (["upcycle.stages=[{at_step: 9, factor: 2, selection: best}]"], 2, r"selection=best is unknown: use one of uniform, greedy, sampling"),
        (["upcycle.stages=[{at_step: 9, factor: 2, selection: sampling, temperature: 0}]"], 2, r"temperature=0\.0 must be above zero"),
        (["upcycle.stages=[{at_step: 9, factor: 4, selection: sampling, max_extra_copies: 2}]"], 2, r"max_extra_copies=2 is too small for 8 -> 32"),
        (["upcycle.stages=[{at_step: 9, factor: 2, utility: luck}]"], 2, r"utility=luck is unknown: use one of grad_norm, weight_norm, saliency"),
        (["+model.mcore.moe_router_load_balancing_type=sinkhorn", "model.aux_loss_coeff=0", "upcycle.stages=[{at_step: 9, factor: 2, mode: exact}]"],
         2, r"mode=exact has no families under .*=sinkhorn: leave the field out"),
        (["upcycle.path=sideways"], 2, r"upcycle\.path=sideways is unknown: use one of live, checkpoint"),
        (["upcycle.offload=true", "upcycle.path=checkpoint"], 2, r"upcycle\.offload=true needs upcycle\.path=live, not checkpoint"),
        (["upcycle.transfer_chunk_mib=0"], 2, r"upcycle\.transfer_chunk_mib=0 must be above zero"),
        (["upcycle.stages=[{at_step: 9, factor: 2}, {at_step: 9, factor: 2}]"], 2, r"stages\[1\]\.at_step=9 must come after"),
        (["model.balancing=aux_loss"], 2, r"needs model\.balancing=loss_free, not aux_loss"),
        (["model.router_score=softmax"], 2, r"model\.balancing=loss_free needs model\.router_score=sigmoid"),
        (["data.corpus=null"], 2, r"data\.corpus is not set: build one with `python -m train\.corpus"),
        (["run.dir=''"], 2, r"run\.dir is empty"),
        (["schedule.warmup_steps=500"], 2, r"schedule\.warmup_steps=500 must be below run\.steps=140"),
        (["run.steps"], 2, r"run\.steps"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(overrides: list[str], processes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_settings([*_DEMO, *overrides], processes)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


# A kind of key each: what is no value of it.
_KINDS = {
    "run.seed": (
        "a whole number",
        ["abc", "''", "1.5", "nan", "[1]", "{a: 1}", "null", "true", "99999999999999999999"],
    ),
    "run.stop_at_step": ("a whole number or null", ["abc", "[1]", "???"]),
    "optimizer.beta1": ("a finite number", ["abc", "nan", "inf", "[1]", "null", "true"]),
    "checkpoint.save_final": ("true or false", ["-1", "abc", "null", "[true]"]),
    "performance.rope_fusion": ("true, false or text", ["[true]", "1", "null"]),
    "run.dir": ("text", ["[a]", "{a: 1}", "null", "true"]),
    "tracking.name": ("text or null", ["false"]),
    "run": ("a mapping of dir, seed, steps, resume, precision, stop_at_step, ...", ["abc", "3", "[1]", "null"]),
    "model.mcore": ("a mapping", ["abc", "[1]", "null"]),
    "profile.steps": ("a list of whole numbers or null", ["3", "{a: 1}"]),
    "evaluation.sets": ("a list of mappings of name, prefix, split, batches", ["abc", "{name: a}", "null"]),
    "data.schedule": ("a list of mappings of at_step, at_tokens, at_stage, blend", ["3"]),
}


@pytest.mark.parametrize(("key", "words", "value"), [(k, w, v) for k, (w, values) in _KINDS.items() for v in values])
def test_a_value_of_another_kind_is_refused_by_the_full_key(key: str, words: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings([f"{key}={value}"], 2)
    text = str(refused.value)
    assert text.startswith(f"{key}=") and text.endswith(f" must be {words}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.blend=[{prefix: a}, {prefix: b, weight: much}]", r"data\.blend\[1\]\.weight=much must be a finite number"),
        ("data.schedule=[{at_step: 9, blend: [a]}]", r"data\.schedule\[0\]\.blend\[0\]=a must be a mapping of prefix, weight"),
        ("evaluation.sets=[{nme: a}]", r"unknown key evaluation\.sets\[0\]\.nme; did you mean name\?"),
        ("run={stps: 3}", r"unknown key run\.stps; did you mean steps\?"),
        ("learning_rat=3", r"unknown key learning_rat; did you mean schedule\.learning_rate\?"),
        ("upcycle.on_load.fctor=3", r"unknown key .*fctor; did you mean upcycle\.on_load\.factor\?"),
        ("upcycle.on_load.temperature=-1", r"upcycle\.on_load\.temperature=-1\.0 must be above zero"),
        ("upcycle.on_load.parallel.expert=2", r"upcycle\.on_load\.parallel\.expert=2 has no meaning"),
        ("run.steps=${run.dir}", r"run\.steps must be a whole number: .*\$\{run\.dir\}"),
        ("run.dir=${oc.env:COPPICE_HAS_NONE}", r"run\.dir must be text: .*COPPICE_HAS_NONE"),
        ("schedule=null", r"schedule=null names no preset: use one of constant, cosine, wsd"),
        ("data=''", r"data= is unknown: use one of default, long"),
        ("model=tiny,demo", r"model=tiny,demo gives several values: .* -m for a sweep"),
        ("~run.steps", r"~run\.steps: a run needs every key: give it a value, run\.steps=VALUE"),
        ("+run.steps=3", r"\+run\.steps=3: run\.steps is there already: leave out the plus"),
        ("hydra.run.dir=x", r"hydra\.run\.dir=x sets no key of a run"),
        ("=3", "=3 sets no key of a run"),
        ("run.steps=[", r"run\.steps=\[ is not KEY=VALUE as Hydra reads it"),
        ("model.layers=1000000000", r"model\.layers=1000000000 is more than any network has"),
        ("model.dropout=1.5", r"model\.dropout=1\.5 must be below 1"),
        ("model.rope_percent=2", r"model\.rope_percent=2\.0 must be 1 at most"),
        ("run.resume=''", r"run\.resume is empty"),
        ("model.recompute=true", r"^model\.recompute=true is unknown: use one of none, selective, full$"),
        ("tracking.name=''", r"tracking\.name is empty"),
    ],
)  # fmt: skip
def test_words_that_hydra_has_no_plain_answer_to(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_settings([*_DEMO, override], 2)
    assert "\n" not in str(refused.value)


def test_a_kept_configuration_and_a_request_are_held_against_the_same_types() -> None:
    kept = settings_to_dict(load_settings(_DEMO, 2))
    assert settings_from_dict(kept).run.steps == kept["run"]["steps"]
    kept["optimizer"]["beta1"] = float("nan")
    with pytest.raises(ConfigError, match=r"^optimizer\.beta1=nan must be a finite number"):
        settings_from_dict(kept)
    with pytest.raises(ConfigError, match=r"^the request: unknown key fctor; did you mean factor\?"):
        stage_from_dict({"fctor": 2}, "the request")
    with pytest.raises(ConfigError, match=r"^the request: num_experts=\[4\] must be a whole number or null"):
        stage_from_dict({"num_experts": [4]}, "the request")


def test_explain_survives_an_error_without_a_key() -> None:
    assert explain(ValueError("two\nlines")) == "two lines"
