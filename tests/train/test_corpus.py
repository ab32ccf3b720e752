"""The corpus command and the tokenizers: what goes in comes out of mcore's datasets, or nothing is written at all."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parallel.errors import ConfigError, DataError
from train.corpus import documents, token_files
from train.corpus.__main__ import main
from train.corpus.build import CorpusRequest, build_corpus
from train.corpus.sources import find_sources
from train.corpus.splits import LEFT_OUT, VALID, assign_splits, scan
from train.data.index_files import RECORD, built, drop_broken
from train.data.manifest import CorpusManifest, load_manifest
from train.data.tokenizers import train_bpe

ROOT = Path(__file__).resolve().parents[2]
# Trailing white space, several alphabets, an emoji, a line separator, and the BPE's own special token as plain text.
HARD_TEXT = "  naïve Straße\t数学 🌳\u2028end <|endoftext|> of it \n\n"


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Forty documents of different kinds in tmp_path/in; their names (as find_sources gives them) and texts."""
    root = tmp_path / "in"
    (root / "deep" / "er").mkdir(parents=True)
    contents = {f"deep/{i:02}.txt": f"document {i}: " + "the stem and the root " * (i + 1) + "\n" for i in range(30)}
    contents |= {"deep/er/a.md": HARD_TEXT, "b.rst": "Title\n=====\n", "c.py": "print('grow')\n"}
    for name, text in contents.items():
        (root / name).write_bytes(text.encode())
    lines = [f"line {i}\u2028not a new line" for i in range(7)]
    (root / "d.jsonl").write_text("\n\n".join(json.dumps({"id": 1, "text": t}, ensure_ascii=False) for t in lines))
    for name in (".hidden.txt", "ignored.bin"):
        (root / name).write_bytes(b"\xff must not be read")
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("must not be read")
    return {f"in/{name}": text for name, text in contents.items()} | {
        f"in/d.jsonl:{2 * i + 1}": text for i, text in enumerate(lines)
    }


def build(tmp_path: Path, *inputs: str, output: str = "out/c", **options: Any) -> CorpusManifest:
    request = CorpusRequest(inputs=inputs or (str(tmp_path / "in"),), output=str(tmp_path / output), **options)
    return build_corpus(request).manifest


def stored(manifest: CorpusManifest, split: str) -> list[list[int]]:
    """The documents of a split as mcore's IndexedDataset reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(manifest.path(split)))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def gpt_datasets(manifest: CorpusManifest, cache: Path, length: int) -> tuple[Any, Any]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend_per_split=[([str(manifest.path("train"))], None), ([str(manifest.path("valid"))], None), None],
        path_to_cache=str(cache),
        tokenizer=manifest.tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    return train, valid


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_every_document_comes_back_from_the_token_files_once(tmp_path: Path, texts: dict[str, str], spec: str) -> None:
    manifest = build(tmp_path, tokenizer=spec, validation_fraction=0.3)
    tokenizer = manifest.tokenizer()
    decoded: dict[str, list[str]] = {}
    for split, counts in manifest.splits.items():
        ids = stored(manifest, split)
        assert all(document[-1] == manifest.eod and manifest.eod not in document[:-1] for document in ids)
        assert (counts.documents, counts.tokens) == (len(ids), sum(map(len, ids)))
        assert max(map(max, ids)) < manifest.vocab_size
        decoded[split] = [tokenizer.detokenize(document) for document in ids]
        assert counts.bytes == sum(len(text.encode()) for text in decoded[split])
    assert sorted(decoded["train"] + decoded["valid"]) == sorted(texts.values())
    assert not set(decoded["train"]) & set(decoded["valid"])
    assert HARD_TEXT in decoded["train"] + decoded["valid"]


def test_mcore_gpt_dataset_serves_the_documents(tmp_path: Path, texts: dict[str, str]) -> None:
    manifest = build(tmp_path, validation_fraction=0.3)
    for split, dataset in zip(("train", "valid"), gpt_datasets(manifest, tmp_path / "cache", 32), strict=True):
        ids = stored(manifest, split)
        stream = [token for number in dataset.document_index for token in ids[number]]
        assert len(dataset) == (manifest.tokens(split) - 1) // 32 > 5
        for i in range(len(dataset)):
            start = int(dataset.shuffle_index[i]) * 32
            assert dataset[i]["tokens"].tolist() == stream[start : start + 32]
            assert dataset[i]["labels"].tolist() == stream[start + 1 : start + 33]


def test_an_index_that_is_not_what_was_written_is_made_again(tmp_path: Path, texts: dict[str, str]) -> None:
    """Cut by a kill, or with other contents, which would be another order of the data and nothing else."""
    manifest, cache = build(tmp_path), tmp_path / "cache"

    def samples() -> list[list[int]]:
        train, _ = gpt_datasets(manifest, cache, 32)
        return [sample["tokens"].tolist() for sample in train]

    def made_again() -> list[str]:
        dropped = drop_broken(cache)
        with built(cache, records=True):
            assert samples() == wanted
        return dropped

    with built(cache, records=True):
        wanted = samples()
    assert drop_broken(cache) == [] == drop_broken(tmp_path / "nowhere")
    cut, empty = (next(cache.glob(f"*-train-{name}_index.npy")) for name in ("shuffle", "sample"))
    os.truncate(cut, cut.stat().st_size - 1)
    os.truncate(empty, 0)
    with pytest.raises((ValueError, EOFError)):
        gpt_datasets(manifest, cache, 32)
    assert made_again() == sorted([cut.name, empty.name])
    assert made_again() == []
    header, contents = cut.read_bytes()[:128], cut.read_bytes()[128:]
    for damaged in (bytes(len(contents)), bytes([contents[0] ^ 1]) + contents[1:]):
        cut.write_bytes(header + damaged)
        assert samples() != wanted, "mcore has noticed"
        assert made_again() == [cut.name]
    # Without a record, as after a kill before it was written, nothing is known of any.
    every = sorted(path.name for path in cache.glob("*.npy"))
    for text in ("", "[]", '{"other.npy": [1, "2"]}'):
        (cache / RECORD).write_text(text)
        assert made_again() == every
    assert sorted(json.loads((cache / RECORD).read_text())) == every


def test_a_disk_that_refuses_an_index_is_named(tmp_path: Path, texts: dict[str, str]) -> None:
    manifest = build(tmp_path)
    (tmp_path / "cache").write_text("in the way")
    with (
        pytest.raises(DataError, match="cache: the index of the samples cannot be written or read"),
        built(tmp_path / "cache", records=True),
    ):
        gpt_datasets(manifest, tmp_path / "cache", 32)
    with pytest.raises(DataError, match="No space left on device"), built(tmp_path, records=True):
        # As mcore does it on rank 0 of a job.
        raise Exception("Failed to write dataset materials") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(ValueError, match="else"), built(tmp_path, records=True):
        raise ValueError("else")


def test_rebuilt_corpus_does_not_meet_the_cached_indices_of_the_old_one(tmp_path: Path, texts: dict[str, str]) -> None:
    old, _ = gpt_datasets(build(tmp_path), tmp_path / "cache", 32)
    for file in (tmp_path / "in/deep").glob("*.txt"):
        file.write_text("short")
    new, _ = gpt_datasets(build(tmp_path, overwrite=True, validation_fraction=0.2), tmp_path / "cache", 32)
    assert len(new) < len(old)
    assert all(len(new[i]["tokens"]) == 32 for i in range(len(new)))


@pytest.mark.parametrize("spec", ["byte", "bpe:300"])
def test_second_build_is_the_same_byte_for_byte(tmp_path: Path, texts: dict[str, str], spec: str) -> None:
    first = build(tmp_path, tokenizer=spec, output="one/c")
    again = build(tmp_path, tokenizer=spec, output="two/c", workers=2)
    other = build(tmp_path, tokenizer=spec, output="three/c", seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert everything_below(tmp_path / "one") == everything_below(tmp_path / "two")


def test_bpe_learns_from_the_training_documents_only(tmp_path: Path, texts: dict[str, str]) -> None:
    manifest = build(tmp_path, tokenizer="bpe:300", validation_fraction=0.5)
    tokenizer = manifest.tokenizer()
    train_bpe([tokenizer.detokenize(ids) for ids in stored(manifest, "train")], 300, tmp_path / "train.json")
    assert manifest.tokenizer_file is not None
    assert manifest.tokenizer_file.read_bytes() == (tmp_path / "train.json").read_bytes()
    train_bpe(texts.values(), 300, tmp_path / "all.json")
    assert manifest.tokenizer_file.read_bytes() != (tmp_path / "all.json").read_bytes()


def test_bpe_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    text = "for word in words:\n    counts[word] += len(word) # 数学\n" * 3 + HARD_TEXT * 2
    train_bpe([text, text[7:]], 400, tmp_path / "here.json")
    code = "import sys; from pathlib import Path; from train.data.tokenizers import train_bpe\n"
    code += "t = sys.argv[1]; train_bpe([t, t[7:]], 400, Path(sys.argv[2]))"
    environment = {**os.environ, "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, text, str(tmp_path / "there.json")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def draws(number: int, seed: int = 0) -> tuple[Any, Any]:
    found = scan((documents.Document(f"d{i}", "text", 4) for i in range(number)), seed)
    return found.sizes, found.draws


def test_held_out_share_is_near_the_fraction_and_stable_when_documents_are_added() -> None:
    sizes, numbers = draws(5000)
    codes = assign_splits(sizes, numbers, 0.1, None)
    # Binomial(5000, 0.1): mean 500, standard deviation 21; six of them.
    assert abs(int((codes == VALID).sum()) - 500) < 127
    assert (assign_splits(sizes[:3000], numbers[:3000], 0.1, None) == codes[:3000]).all()
    assert (assign_splits(*draws(5000, seed=1), 0.1, None) != codes).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_two_documents_give_one_on_each_side(fraction: float) -> None:
    for seed in range(20):
        assert sorted(assign_splits(*draws(2, seed), fraction, None)) == [1, 2]


def test_limit_takes_a_sample_that_fits_and_a_larger_one_for_a_larger_limit() -> None:
    sizes = np.array([0, 70, 30, 500, 30, 30, 10])
    _, numbers = draws(7)
    for limit in (10, 65, 100, 10_000):
        codes = assign_splits(sizes, numbers, 0.0, limit)
        taken, left = sizes[codes != LEFT_OUT].sum(), sizes[(codes == LEFT_OUT) & (sizes > 0)]
        assert 0 < taken <= limit
        assert all(taken + size > limit for size in left)  # nothing that would still fit is left out


def test_single_document_and_fraction_zero_leave_no_validation_files(
    tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    one, none = str(tmp_path / "one"), str(tmp_path / "none")
    assert main([str(tmp_path / "in/c.py"), "--output", one]) == 0
    assert "only one document" in capsys.readouterr().out
    assert main([str(tmp_path / "in"), "--output", none, "--validation-fraction", "0"]) == 0
    assert "--validation-fraction 0" in capsys.readouterr().out
    for prefix in (one, none):
        assert not Path(f"{prefix}.valid.bin").exists() and not Path(f"{prefix}.valid.idx").exists()
        assert load_manifest(prefix).tokens("valid") == 0
    assert load_manifest(none).splits["train"].documents == len(texts)


def test_stdlib_is_sampled_from_python_sources_without_tests(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    sources, _ = find_sources(["stdlib"], ["*.txt"])
    assert {source.path for source in sources} >= {library / "abc.py", library / "json/decoder.py"}
    for source in sources:
        assert source.path == library / source.name.removeprefix("stdlib/") and source.path.suffix == ".py"
        assert not {"site-packages", "test", "tests", "__pycache__"} & set(Path(source.name).parts)
    manifest = build(tmp_path, "stdlib", limit_bytes=300_000)
    assert 200_000 < sum(split.bytes for split in manifest.splits.values()) <= 300_000
    originals = {source.path.read_text(encoding="utf-8") for source in sources}
    assert {manifest.tokenizer().detokenize(ids) for ids in stored(manifest, "train")} <= originals


def test_inputs_that_overlap_are_read_once_and_same_names_are_kept_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.txt").write_text(folder)
    (tmp_path / "b/link.txt").symlink_to(tmp_path / "a/part.txt")
    files = [str(tmp_path / folder / "part.txt") for folder in ("a", "b")]
    sources, repeated = find_sources([*files, str(tmp_path / "b")], ["*.txt"])
    assert [source.name for source in sources] == ["part.txt", "part.txt~2"] and repeated == 2
    assert find_sources([str(tmp_path)], ["b/*.txt"])[0][0].name.endswith("/b/link.txt")


def test_empty_documents_are_skipped_and_counted_and_marks_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.txt").write_text(" \n\t")
    (tmp_path / "c.jsonl").write_text('{"body": ""}\n\n{"body": "x"}\n')
    out = str(tmp_path / "o")
    assert main([str(tmp_path), "--output", out, "--text-key", "body"]) == 0
    assert "2 empty documents" in capsys.readouterr().out
    manifest = load_manifest(out)
    assert sorted(bytes(ids[:-1]) for split in ("train", "valid") for ids in stored(manifest, split)) == [b"text", b"x"]


def test_names_in_capitals_or_of_no_alphabet_and_json_that_is_text(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "line"}\n')
    (tmp_path / "b.ndjson").write_text('{"text": "other"}\n')
    (tmp_path / "c.json").write_text('{"text":\n"value"}\n')
    latin = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")
    Path(latin).write_text("drink")
    manifest = build(tmp_path, *(str(path) for path in sorted(tmp_path.iterdir())))
    found = sorted(bytes(ids[:-1]) for split in ("train", "valid") for ids in stored(manifest, split))
    assert found == [b"drink", b"line", b"other", b'{"text":\n"value"}\n']


def bad_text(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        (folder / "good.txt").write_text("good")
        return [str(folder / "good.txt"), str(folder / name)]

    return write


def named_pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


BAD = {
    "missing": (lambda p: [str(p / "nowhere")], 3, ["nowhere", "no such file"]),
    "one empty file": (lambda p: [(p / "e.txt").write_text("") or str(p / "e.txt")], 3, ["e.txt", "no text"]),
    "blank lines": (lambda p: [(p / "e.jsonl").write_text("\n\n") and str(p / "e.jsonl")], 3, ["e.jsonl", "no line"]),
    "nothing matches": (lambda p: [str(p), "--include", "*.f90", "*.c"], 3, ["--include *.f90 *.c"]),
    "no regular file": (lambda p: [named_pipe(p / "f.txt")], 3, ["f.txt", "neither"]),
    "latin-1": (bad_text("l.txt", b"caf\xe9"), 3, ["l.txt", "byte offset 3 (0xe9)"]),
    "latin-1 after mark": (bad_text("l.txt", b"\xef\xbb\xbfa\xe9"), 3, ["byte offset 4"]),
    "latin-1 line": (bad_text("l.jsonl", b'{"text": "a"}\n{"text": "\xe9"}'), 3, ["l.jsonl", "byte offset 24"]),
    "bad json": (bad_text("j.jsonl", b'{"text": "a"}\n{"text": }\n'), 3, ["j.jsonl:2", "not a JSON object"]),
    "json list": (bad_text("j.jsonl", b"[1]\n"), 3, ["j.jsonl:1", "list"]),
    "no key": (bad_text("j.jsonl", b'\n{"body": "a", "id": 1}'), 3, ["j.jsonl:2", "'text'", "body, id", "--text-key"]),
    "no string": (bad_text("j.jsonl", b'{"text": null}'), 3, ["j.jsonl:1", "NoneType"]),
    "json lines": (bad_text("j.json", b'{"text": "a"}\n{"text": "b"}\n'), 3, ["j.json:", "end in .jsonl"]),
    "surrogate": (bad_text("j.jsonl", b'{"text": "ab\\ud800"}'), 3, ["j.jsonl:1", "character 2"]),
    "unknown spec": (lambda p: ["stdlib", "--tokenizer", "words"], 2, ["--tokenizer=words", "sentencepiece:PATH"]),
    "byte with size": (lambda p: ["stdlib", "--tokenizer", "byte:3"], 2, ["byte:3"]),
    "bpe too small": (lambda p: ["stdlib", "--tokenizer", "bpe:256"], 2, ["bpe:256", "257"]),
    "bpe too large": (lambda p: ["stdlib", "--tokenizer", "bpe:1048577"], 2, ["bpe:1048577", "at most 1048576"]),
    "no such tokenizer": (lambda p: ["stdlib", "--tokenizer", f"huggingface:{p}/t"], 3, ["there is no file"]),
    "fraction": (lambda p: ["stdlib", "--validation-fraction", "1"], 2, ["--validation-fraction=1.0"]),
    "workers": (lambda p: ["stdlib", "--workers", "0"], 2, ["--workers=0"]),
    "limit": (lambda p: ["stdlib", "--limit-bytes", "1"], 2, ["--limit-bytes=1", "no document fits"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    prepare, code, words = BAD[case]
    (tmp_path / "in").mkdir()
    arguments = prepare(tmp_path / "in")
    assert main([*arguments, "--output", str(tmp_path / "new/folder/c")]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert all(word in errors[0] for word in words), errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_longer_file_than_the_format_takes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "long.txt").open("wb") as stream:
        stream.truncate(documents.LONGEST_DOCUMENT_BYTES + 1)
    with pytest.raises(DataError, match=r"long.txt: a document of 2147483647 bytes.*split it"):
        build(tmp_path, str(tmp_path / "long.txt"))


@pytest.mark.parametrize("output", ["file/c", "file/deeper/c", "/proc/none/c", "in/"])
def test_output_that_cannot_be_written_is_refused(tmp_path: Path, texts: dict[str, str], output: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises((DataError, ConfigError), match=f"--output={tmp_path / output}|names a folder"):
        build_corpus(CorpusRequest((str(tmp_path / "in"),), os.path.join(tmp_path, output)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]


def test_existing_corpus_is_kept_unless_told_to_overwrite(tmp_path: Path, texts: dict[str, str]) -> None:
    build(tmp_path, tokenizer="bpe:300")
    before = everything_below(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"c.json exists already.*--overwrite"):
        build(tmp_path)
    assert everything_below(tmp_path / "out") == before
    build(tmp_path, validation_fraction=0.0, overwrite=True)
    assert sorted(everything_below(tmp_path / "out")) == ["c.json", "c.train.bin", "c.train.idx"]
    (tmp_path / "out/c.json").unlink()  # what a job killed between the last two renames leaves
    with pytest.raises(ConfigError, match=r"c.train.bin exists already"):
        build(tmp_path)


@contextlib.contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """Makes writes past a size fail in this process with EFBIG, as a full disk fails them with ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [300, 4096])
def test_full_disk_leaves_nothing_and_spares_the_old_corpus(
    tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    out = tmp_path / "out/c"
    with files_limited_to(limit):
        code = main([str(tmp_path / "in"), "--output", str(out)])
    assert code == 3 and "cannot write the corpus: File too large" in capsys.readouterr().err
    assert not out.parent.exists()
    old = build(tmp_path)
    before = everything_below(out.parent)
    with files_limited_to(limit), pytest.raises(DataError, match="make room"):
        build(tmp_path, overwrite=True, seed=1)
    assert everything_below(out.parent) == before and load_manifest(out) == old


def published(folder: Path) -> list[str]:
    """Files that somebody could take for a corpus."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_failure_or_interruption_at_any_rename_leaves_no_corpus_and_the_same_command_goes_on(
    tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path, tokenizer="bpe:300", output="whole/c")
    real = os.replace
    for allowed in range(6):  # four token files, the tokenizer, the manifest
        left = [allowed]

        def replace(source: Any, target: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            left[0] -= 1
            real(source, target)

        monkeypatch.setattr(token_files.os, "replace", replace)
        with pytest.raises(DataError, match=r"No space left on device \(run the same command again to go on\)"):
            build(tmp_path, tokenizer="bpe:300")
        assert published(tmp_path / "out") == []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    command = [str(tmp_path / "in"), "--output", str(tmp_path / "out/c"), "--tokenizer", "bpe:300"]
    monkeypatch.setattr(token_files.os, "replace", interrupt)
    assert main(command) == 130 and published(tmp_path / "out") == []

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(token_files.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        main(command)
    assert published(tmp_path / "out") == [] and signal.getsignal(signal.SIGTERM) is handler

    monkeypatch.setattr(token_files.os, "replace", real)
    capsys.readouterr()
    assert main(command) == 0
    assert "going on with the build that was stopped: 1 parts are finished" in capsys.readouterr().err
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "whole")


def test_file_that_changes_during_the_build_stops_it(tmp_path: Path, texts: dict[str, str]) -> None:
    for change in ("more text than before\n", ""):

        def say(line: str, change: str = change) -> None:
            if line.startswith("tokenizing"):
                (tmp_path / "in/c.py").write_text(change)

        with pytest.raises(DataError, match=r"in/c.py: changed while"):
            build_corpus(CorpusRequest((str(tmp_path / "in"),), str(tmp_path / "out/c")), say)
        assert not (tmp_path / "out").exists()

    def shorten(line: str) -> None:
        if line.startswith("tokenizing"):
            (tmp_path / "in/d.jsonl").write_text('{"text": "line 0\u2028not a new line"}')

    with pytest.raises(DataError, match=r"d.jsonl: changed while"):
        build_corpus(CorpusRequest((str(tmp_path / "in/d.jsonl"),), str(tmp_path / "out/c")), shorten)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "c.json").unlink(), r"data\.corpus=.*/c: there is no corpus.*python -m train\.corpus"),
        (lambda p: (p / "c.json").write_text("{"), "not the manifest"),
        (lambda p: (p / "c.json").write_text('{"format": 2}'), "no object with format 1"),
        (lambda p: (p / "c.json").write_text('{"format": 1}'), "KeyError: 'tokenizer'"),
        (lambda p: (p / "c.train.bin").unlink(), "c.train.bin is missing"),
        (lambda p: cut(p / "c.train.bin"), r"c.train.bin has \d+ bytes instead of \d+"),
        (lambda p: cut(p / "c.valid.idx"), r"c.valid.idx has \d+ bytes instead of \d+"),
        (lambda p: (p / "c.valid.idx").write_bytes(b"MMI"), "c.valid.idx is cut off"),
        (lambda p: (p / "c.valid.idx").write_bytes(bytes(99)), "not an index file"),
        (lambda p: (p / "c.valid.idx").write_bytes((p / "c.train.idx").read_bytes()), "lists .* documents"),
        (lambda p: (p / "c.tokenizer.json").unlink(), "c.tokenizer.json is missing"),
    ],
)
def test_broken_corpus_is_refused(tmp_path: Path, texts: dict[str, str], damage: Any, words: str) -> None:
    build(tmp_path, tokenizer="bpe:300")
    damage(tmp_path / "out")
    with pytest.raises(DataError, match=words):
        load_manifest(tmp_path / "out/c")


def test_exchanged_tokenizer_is_refused(tmp_path: Path, texts: dict[str, str]) -> None:
    manifest = build(tmp_path, tokenizer="bpe:300")
    train_bpe(["something else entirely " * 9] * 3, 300, tmp_path / "out/c.tokenizer.json")
    with pytest.raises(DataError, match="is not the tokenizer the corpus was written with"):
        manifest.tokenizer()


def test_manifest_and_tokenizer_load_without_torch_from_another_folder(tmp_path: Path, texts: dict[str, str]) -> None:
    build(tmp_path, tokenizer="bpe:300")
    (tmp_path / "out").rename(tmp_path / "moved")
    code = "import sys; from train.data.manifest import load_manifest; t = load_manifest('moved/c').tokenizer()\n"
    code += "assert t.detokenize(t.tokenize('grow')) == 'grow'; assert not {'torch', 'megatron'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)


def test_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.corpus", str(tmp_path / "none"), "--output", str(tmp_path / "c")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, "") and result.stderr.startswith("error: INPUT ")
    assert result.stderr.count("\n") == 1
    assert "stdlib" in subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
