"""Tokenizers of every kind: ids and text agree, no text turns into special tokens, faults name the file."""

import json
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError, DataError
from train.corpus.build import CorpusRequest, build_corpus
from train.data.tokenizers import Tokenizer, build_tokenizer, train_bpe

TEXT = "  naïve Straße\t数学 🌳 <|endoftext|></s>\n\n"
PLAIN = "the stem and the root and the tree"  # what every SentencePiece model can give back unchanged


def huggingface(folder: Path, **changes: Any) -> str:
    """A tokenizer.json trained on TEXT, with top-level keys changed."""
    train_bpe([(TEXT + PLAIN) * 3], 280, folder / "tokenizer.json")
    record = json.loads((folder / "tokenizer.json").read_bytes()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(record))
    return f"huggingface:{folder}"


def ranks(folder: Path) -> str:
    """A rank file: the bytes and four merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the"]
    lines = [b64encode(token).decode() + f" {rank}" for rank, token in enumerate(tokens)]
    (folder / "tiny.tiktoken").write_text("\n".join(lines) + "\n")
    return f"tiktoken:{folder / 'tiny.tiktoken'}"


def mcore_vocabulary(folder: Path) -> str:
    """mcore's JSON form of the same."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" t", b" the"]
    entries = [{"rank": i, "token_bytes": b64encode(t).decode(), "token_str": ""} for i, t in enumerate(tokens)]
    (folder / "vocabulary.json").write_text(json.dumps(entries))
    return f"tiktoken:{folder / 'vocabulary.json'}"


def sentencepiece(folder: Path, **options: Any) -> str:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "text.txt").write_text((PLAIN + "\n") * 20)
    trainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "sp"),
        vocab_size=30,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return f"sentencepiece:{folder / 'sp.model'}"


KINDS = {
    "byte": (lambda folder: "byte", 257, 256),
    "huggingface": (huggingface, 280, 0),
    "tiktoken": (ranks, 261, 260),
    "tiktoken of mcore": (mcore_vocabulary, 1260, 2),
    "sentencepiece": (sentencepiece, 30, 2),
}


def make(kind: str, folder: Path) -> Tokenizer:
    if kind.startswith("tiktoken"):
        pytest.importorskip("tiktoken")
    return build_tokenizer(KINDS[kind][0](folder))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_agree(tmp_path: Path, kind: str) -> None:
    tokenizer = make(kind, tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod) == KINDS[kind][1:]
    for text in (PLAIN, TEXT, "x"):
        ids = tokenizer.tokenize(text)
        assert tokenizer.eod not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        if kind != "sentencepiece" or text == PLAIN:
            assert tokenizer.detokenize(ids) == text
        assert tokenizer.detokenize([*ids, tokenizer.eod]) == tokenizer.detokenize(ids)
        for threads in (1, 2):
            first, second = tokenizer.encode_batch([text, PLAIN], threads)
            assert first.tolist() == ids and second.tolist() == tokenizer.tokenize(PLAIN)
    assert len(tokenizer.tokenize(PLAIN)) < len(PLAIN) or kind == "byte"


@pytest.mark.parametrize("kind", KINDS)
def test_corpus_carries_its_tokenizer_along(tmp_path: Path, kind: str) -> None:
    (tmp_path / "made").mkdir()
    original = make(kind, tmp_path / "made")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{PLAIN} {i}"}) for i in range(9)))
    request = CorpusRequest((str(tmp_path / "text.jsonl"),), str(tmp_path / "c"), tokenizer=original.spec)
    manifest = build_corpus(request).manifest
    if original.file is not None:
        original.file.unlink()  # the copy beside the corpus is enough
    carried = manifest.tokenizer()
    assert carried.tokenize(TEXT) == original.tokenize(TEXT) and carried.digest == original.digest
    assert (carried.vocab_size, carried.eod) == (manifest.vocab_size, manifest.eod) == KINDS[kind][1:]
    assert json.loads(json.dumps(carried.unique_identifiers))["corpus"] == manifest.fingerprint


def test_bytes_that_are_no_text_decode_to_a_mark() -> None:
    assert build_tokenizer("byte").detokenize([0xE6, 0x95, 256, 65]) == "\ufffdA"


def test_truncation_and_padding_of_a_tokenizer_file_are_not_applied(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    padding["pad_to_multiple_of"] = None
    tokenizer = build_tokenizer(huggingface(tmp_path, truncation=truncation, padding=padding))
    for ids in (tokenizer.tokenize(TEXT), tokenizer.encode_batch([TEXT])[0].tolist()):
        assert tokenizer.detokenize(ids) == TEXT and len(ids) not in (4, 64)


def test_end_of_document_token_is_found_or_asked_for(tmp_path: Path) -> None:
    def added(*contents: str) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return [{"id": 280 + i, "content": content, **flags} for i, content in enumerate(contents)]

    spec = huggingface(tmp_path, added_tokens=added("</s>"))
    assert build_tokenizer(spec).eod == 280
    assert build_tokenizer(f"{spec}/tokenizer.json").vocab_size == 281
    for tokens, words in ((added("<stop>"), "no special token"), (added("</s>", "<eos>"), "</s> or <eos>")):
        with pytest.raises(DataError, match=f"{words}.*eos_token.*tokenizer_config.json"):
            build_tokenizer(huggingface(tmp_path, added_tokens=tokens))
    config = tmp_path / "tokenizer_config.json"
    for declared in ("<eos>", {"content": "<eos>"}):
        config.write_text(json.dumps({"eos_token": declared}))
        assert build_tokenizer(spec).eod == 281
    config.write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(DataError, match="'<none>'"):
        build_tokenizer(spec)


def test_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    """The manifest reads the width from the .idx; here it meets both widths as mcore's own helper chooses them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w69999 w1 w65535")
    for spec, dtype in ((f"huggingface:{tmp_path}", np.int32), ("byte", np.uint16)):
        request = CorpusRequest((str(tmp_path / "text.txt"),), str(tmp_path / "c"), tokenizer=spec, overwrite=True)
        manifest = build_corpus(request).manifest
        dataset = IndexedDataset(str(manifest.path("train")))  # owns the memory map that its arrays point into
        assert dataset[0].dtype == dtype
        if spec != "byte":
            assert dataset[0].tolist() == [69_999, 1, 65_535, 70_000] and manifest.vocab_size == 70_001


@pytest.mark.parametrize("package", ["sentencepiece", "tiktoken"])
def test_missing_optional_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / "model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'coppice\[{package}\]'"):
        build_tokenizer(f"{package}:{tmp_path / 'model'}")


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("huggingface", "tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("huggingface", "tokenizer.json", b"\xff", "is not a tokenizer.json"),
        ("sentencepiece", "sp.model", b"no model", "is not a SentencePiece model"),
        ("tiktoken", "t.tiktoken", b"AA== 0\nno rank\n", r"t.tiktoken:2 is not `base64 rank`"),
        ("tiktoken", "t.tiktoken", b"AA== 0\n", "256 bytes"),
        ("tiktoken", "t.json", b'{"a": 1}', "is not an mcore tiktoken vocabulary"),
    ],
)
def test_broken_tokenizer_file_is_named(tmp_path: Path, kind: str, name: str, content: bytes, words: str) -> None:
    if kind != "huggingface":
        pytest.importorskip(kind)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        build_tokenizer(f"{kind}:{tmp_path / name}")


def test_sentencepiece_model_without_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="eos_id"):
        build_tokenizer(sentencepiece(tmp_path, eos_id=-1))


def test_relative_paths_start_from_base_and_bpe_must_be_trained(tmp_path: Path) -> None:
    huggingface(tmp_path)
    assert build_tokenizer("huggingface:tokenizer.json", tmp_path).file == tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"python -m train\.corpus --tokenizer bpe:300"):
        build_tokenizer("bpe:300")
