"""Folders of published models that are not what they should be, and reading any box of any tensor."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.hf.read import PublishedReader
from model.hf.registry import family_of
from model.hf.source import INDEX, SINGLE, PublishedModel
from parallel.errors import CheckpointError, ConfigError, CoppiceError, DataError
from parallel.regions import Box
from tests.model.published import CASES

_OUTPUT = "lm_head.weight"


def _reader(folder: Path) -> PublishedReader:
    source = PublishedModel(folder)
    return PublishedReader(source, family_of(source.config).model_config(source.config))


@pytest.mark.parametrize("name", CASES)
def test_any_box_is_that_of_the_whole(name: str, published: Path, noise: dict[str, float]) -> None:
    reader, draw = _reader(published / name), random.Random(name)
    for key, tensor in reader.tensors.items():
        whole = torch.full(tensor.shape, torch.nan)
        reader.read_into(key, Box((0,) * len(tensor.shape), tensor.shape), whole)
        assert not whole.isnan().any(), key
        for _ in range(3):
            offset = tuple(draw.randrange(n) for n in tensor.shape)
            box = Box(offset, tuple(draw.randint(1, n - o) for n, o in zip(tensor.shape, offset, strict=True)))
            part = torch.full(box.shape, torch.nan)
            reader.read_into(key, box, part)
            assert torch.equal(part, whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]), (key, box)


def _changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, {"format": "pt"})

    return apply


def _pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _indexed(**where: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
        (folder / INDEX).write_text(
            json.dumps({"weight_map": names | {k.replace("__", "."): v for k, v in where.items()}})
        )

    return apply


def _cut(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1])


_BROKEN: dict[str, tuple[Callable[[Path], None], type[CoppiceError], str]] = {
    "missing": (_changed(lambda t: t.pop(_OUTPUT)), CheckpointError, f"lacks 1 tensors of this model, first {_OUTPUT}"),
    "extra": (
        _changed(lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(2)})),
        CheckpointError,
        "1 tensors that have no place in mixtral, first model.layers.0.extra.weight",
    ),
    "misshapen": (
        _changed(lambda t: t.update({_OUTPUT: torch.zeros(104, 32)})),
        CheckpointError,
        r"lm_head.weight of shape [104, 32], but its config.json asks for [103, 32]",
    ),
    "index of another form": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {_OUTPUT: None}})),
        CheckpointError,
        "has no weight_map",
    ),
    "quantised": (
        _changed(lambda t: t.update({_OUTPUT: torch.zeros(103, 32, dtype=torch.int8)})),
        ConfigError,
        "lm_head.weight in",
    ),
    "pickled": (_pickled, CheckpointError, "as pickles (pytorch_model.bin), which may run code"),
    "no weights": (lambda f: (f / SINGLE).unlink(), CheckpointError, "has neither"),
    "cut": (_cut, CheckpointError, "cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json cannot be read"),
    "no folder": (lambda f: shutil.rmtree(f), ConfigError, "is no folder: download the model first"),
    "file named, not there": (
        _indexed(lm_head__weight="other.safetensors"),
        CheckpointError,
        "other.safetensors is missing",
    ),
    "file elsewhere": (_indexed(lm_head__weight=f"../{SINGLE}"), CheckpointError, "is missing, which"),
    "named in the index only": (_indexed(ghost="model.safetensors"), CheckpointError, "lacks ghost, which"),
}


@pytest.mark.parametrize("fault", _BROKEN)
def test_a_folder_that_is_not_whole_is_refused(
    fault: str, published: Path, noise: dict[str, float], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(published / "mixtral", folder)
    breaks, error, told = _BROKEN[fault]
    breaks(folder)
    with pytest.raises(error) as refused:
        _reader(folder)
    assert told in str(refused.value)


def test_heads_of_multi_token_prediction_are_left_out(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(published / "deepseek_v3", folder)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.3.embed_tokens.weight": torch.zeros(2, 2),
    }
    _changed(lambda t: t.update(extra))(folder)
    assert _reader(folder).left_out == sorted(extra)
    _changed(lambda t: t.update({"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}))(folder)
    with pytest.raises(CheckpointError, match=r"first model\.layers\.4\.eh_proj"):
        _reader(folder)


def test_rotary_frequencies_are_left_out(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    """Llama 2 is published with them as tensors."""
    folder, name = tmp_path / "model", "model.layers.0.self_attn.rotary_emb.inv_freq"
    shutil.copytree(published / "llama", folder)
    _changed(lambda t: t.update({name: torch.ones(4)}))(folder)
    assert _reader(folder).left_out == [name]


def test_a_second_copy_of_a_tied_embedding_is_left_out(
    published: Path, noise: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(published / "qwen2", folder)
    monkeypatch.setattr("model.hf.read._COMPARED", 1000)
    _changed(lambda t: t.update({_OUTPUT: t["model.embed_tokens.weight"].clone()}))(folder)
    assert _reader(folder).left_out == [_OUTPUT]
    for change in (lambda t: t[_OUTPUT][-1, -1].add_(1), lambda t: t.update({_OUTPUT: t[_OUTPUT][1:].clone()})):
        _changed(change)(folder)
        with pytest.raises(CheckpointError, match=f"has {_OUTPUT} other than .* tie_word_embeddings=true"):
            _reader(folder)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(
    value: float, published: Path, noise: dict[str, float], tmp_path: Path
) -> None:
    from train.hf.importing import import_published

    folder = tmp_path / "model"
    shutil.copytree(published / "llama", folder)
    _changed(lambda t: t[_OUTPUT][5].fill_(value))(folder)
    with pytest.raises(CheckpointError, match=f"{_OUTPUT} in .*infinite or NaN"):
        import_published(folder, tmp_path / "made", precision=None, vocab_multiple=128, chunk_bytes=1 << 20, say=print)
    assert not list(tmp_path.glob("made*"))


def test_an_export_in_a_type_too_small_is_refused(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    from train.hf import command as hf_command

    folder, made, output = tmp_path / "model", tmp_path / "made", str(tmp_path / "out")
    shutil.copytree(published / "llama", folder)
    # More than fp16 has, and a sum that is more than fp32 has: neither makes a number infinite.
    _changed(lambda t: t[_OUTPUT].fill_(3e38))(folder)
    assert hf_command.main(["import", str(folder), "--output", str(made)]) == 0
    assert hf_command.main(["export", str(made), "--output", output, "--dtype", "float16"]) == ConfigError.exit_code
    assert not Path(output).exists()
    assert hf_command.main(["export", str(made), "--output", output]) == 0


def test_a_full_disk_is_told_before_anything_is_written(
    published: Path, noise: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By the size of what is written: an import of bf16 in fp32 takes twice what is read."""
    from train.hf import command as hf_command

    source = published / "qwen3_moe-sparse"
    usage = shutil.disk_usage(tmp_path)._replace(free=int((source / SINGLE).stat().st_size * 1.5))
    monkeypatch.setattr("train.checkpoint.folder.shutil.disk_usage", lambda folder: usage)
    words = ["import", str(source), "--output", str(tmp_path / "made"), "--precision"]
    assert hf_command.main([*words, "fp32"]) == CheckpointError.exit_code
    assert f"--output {tmp_path / 'made'}: the checkpoint needs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert hf_command.main([*words, "bf16", "--vocab-multiple", "1"]) == 0


def test_a_corpus_of_other_tokens_is_refused(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    from train.corpus.build import CorpusRequest, build_corpus
    from train.data.manifest import load_manifest
    from train.hf.start import check_tokenizer

    text, folder = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("some words of some text, " * 50)
    made = {}
    for name, tokenizer in (("bytes", "byte"), ("pairs", "bpe:260")):
        request = CorpusRequest(
            inputs=(str(text),), output=str(tmp_path / name), tokenizer=tokenizer, validation_fraction=0
        )
        build_corpus(request, say=lambda line: None)
        made[name] = load_manifest(tmp_path / name)
    shutil.copytree(published / "mixtral-300", folder)
    for corpus in made.values():
        check_tokenizer(folder, corpus)
    shutil.copyfile(tmp_path / "pairs.tokenizer.json", folder / "tokenizer.json")
    check_tokenizer(folder, made["pairs"])
    with pytest.raises(DataError, match="holds tokens of byte, not of the tokenizer in"):
        check_tokenizer(folder, made["bytes"])


def test_the_architecture_replaces_that_of_the_preset(published: Path, noise: dict[str, float], tmp_path: Path) -> None:
    from train.settings import load_settings

    begin = [
        "data.corpus=unused",
        f"run.dir={tmp_path}",
        f"model.init_from=hf:{published / 'mixtral'}",
        "model=deepseek_v3",
    ]
    model = load_settings([*begin, "model.aux_loss_coeff=0.5", "model.recompute=full"], world_size=1).model
    assert (model.attention, model.router_groups, model.dense_first, model.vocab_size) == ("gqa", None, 0, 103)
    # The family's, since the command line says nothing; the command line's; and what is not about the model.
    assert (model.balancing, model.aux_loss_coeff, model.recompute) == ("aux_loss", 0.5, "full")
    assert load_settings([*begin, "model.layers=2"], world_size=1).model.layers == 2
    with pytest.raises(ConfigError, match=r"model\.top_k=3, but .* makes it 2: leave the key out"):
        load_settings([*begin, "model.top_k=3"], world_size=1)
    with pytest.raises(ConfigError, match=r"model\.init_from=mixtral is unknown: use hf:DIR"):
        load_settings(["data.corpus=unused", "model.init_from=mixtral"], world_size=1)
