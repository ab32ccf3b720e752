"""Inputs of every form, parts and processes: the same documents and the same bytes, whatever was cut, shared or killed."""

import bz2
import gzip
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from parallel.errors import ConfigError, DataError
from train.corpus import build as corpus_build
from train.corpus import parts
from train.corpus.__main__ import main
from train.corpus.build import CorpusRequest, build_corpus
from train.corpus.documents import BAD_BYTES, Document, read_part
from train.corpus.parts import Piece, cut_lines, plan_parts
from train.corpus.sources import PACKED, Source, find_sources
from train.corpus.staging import staging_folder
from train.corpus.workers import Workers
from train.data.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"text {i}: naïve 数学 🌳\u2028\n" + "the stem and the root " * (i % 7) for i in range(60)]


def pack(ending: str, data: bytes) -> bytes:
    if ending == ".zst":
        return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(data))
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[ending](data)


def lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(path: Path, column: Any, rows: int = 7, key: str = "text") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"place": pyarrow.array([{"id": i} for i in range(len(column))]), key: column})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=rows)
    return path


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(*inputs: Path | str, key: str = "text") -> list[Document]:
    """The documents of the inputs, by way of the parts."""
    sources, _ = find_sources([str(entry) for entry in inputs], ["*"])
    return [document for part in plan_parts(sources, key, map) for document in read_part(part, key)]


def stored(prefix: Path, split: str) -> list[list[int]]:
    """The documents of a split as mcore's IndexedDataset reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(f"{prefix}.{split}")
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some hundred bytes, so that little text has many."""
    monkeypatch.setattr(parts, "SMALLEST_BYTES", 300)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with documents in every form, one of them bad."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for i in range(6):
        (root / f"deep/{i}.txt").write_text(f"text file {i} " * 9)
    (root / "plain.jsonl").write_bytes(lines(TEXTS) + b'{"text": "\xff"}\n' + lines(TEXTS[::-1]))
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        (root / f"p{ending[1:]}.jsonl{ending}").write_bytes(pack(ending, lines([f"{ending} {t}" for t in TEXTS])))
    parquet(root / "rows.parquet", [f"row {text}" for text in TEXTS])
    return root


# --- cutting and reading


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from([b"\n", b"a", b"bcd", b"\r\n"]), max_size=60), st.integers(1, 30), st.integers(1, 9))
@example([b"a", b"\n"], 2, 2)
def test_cuts_are_line_starts_with_their_numbers(pieces: list[bytes], wanted: int, block: int) -> None:
    import io

    data = b"".join(pieces)
    with mock.patch.object(parts, "_BLOCK_BYTES", block):
        cuts, size = cut_lines(io.BytesIO(data), wanted)
    assert size == len(data) and cuts[0] == (0, 1)
    for (offset, line), (after, _) in zip(cuts, [*cuts[1:], (size, 0)], strict=True):
        assert offset == 0 or data[offset - 1 : offset] == b"\n"
        assert line == data.count(b"\n", 0, offset) + 1
        # A piece is as short as line ends let it be: without its last line it is shorter than wanted.
        last = data.rfind(b"\n", offset, after - 1) + 1
        assert after == size or after - offset >= wanted > last - offset


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_pieces_of_a_file_hold_its_documents_once_and_in_order(tmp_path: Path, data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=20))
    ending = data.draw(st.sampled_from(["", ".gz", ".xz", ".zst"]))
    blank = data.draw(st.sampled_from([b"", b"\n", b" \n\n", b"\xef\xbb\xbf"]))
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(pack(ending, blank + lines(texts)))
    whole = [document for document in read_part((Piece(find_sources([str(path)], [])[0][0], 0),), "text")]
    assert [document.text for document in whole] == ["" if not t or t.isspace() else t for t in texts]
    with mock.patch.object(parts, "SMALLEST_BYTES", data.draw(st.integers(1, 60))):
        assert read(path) == whole


@pytest.mark.parametrize("ending", ["", *PACKED])
def test_packed_files_hold_the_same_documents(tmp_path: Path, small_parts: None, ending: str) -> None:
    half = len(lines(TEXTS)) // 2
    data = pack(ending, lines(TEXTS)[:half]) + pack(ending, lines(TEXTS)[half:])  # as from `cat a.gz b.gz`
    (tmp_path / f"x.jsonl{ending}").write_bytes(data)
    (tmp_path / f"y.txt{ending}").write_bytes(pack(ending, b"\xef\xbb\xbf" + TEXTS[1].encode()))
    documents = read(tmp_path)
    assert [document.text for document in documents] == [*TEXTS, TEXTS[1]]
    name = tmp_path.name
    assert [document.name for document in documents[::60]] == [f"{name}/x.jsonl{ending}:1", f"{name}/y.txt{ending}"]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_rows_are_documents(tmp_path: Path, small_parts: None, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    array = pyarrow.array(TEXTS)
    column = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pyarrow, kind)())
    documents = read(parquet(tmp_path / "x.parquet", column))
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"x.parquet:{i}" for i in range(1, 61)]
    sources, _ = find_sources([str(tmp_path / "x.parquet")], [])
    assert len(plan_parts(sources, "text", map)) > 5  # several row groups, several parts
    assert read(parquet(tmp_path / "none.parquet", pyarrow.array([], kind if kind != "dictionary" else "string"))) == []


def test_globs_take_files_with_the_names_they_have_in_the_folder(tmp_path: Path, mixed: Path) -> None:
    sources, _ = find_sources([f"{mixed}/**/*.txt", f"{mixed}/p*.jsonl.gz"], [])
    assert [source.name for source in sources] == [f"in/deep/{i}.txt" for i in range(6)] + ["in~2/pgz.jsonl.gz"]
    in_folder = {source.path: source.name for source in find_sources([str(mixed)], ["*"])[0]}
    assert {source.path: source.name for source in find_sources([f"{mixed}/**/*"], [])[0]} == in_folder
    with pytest.raises(DataError, match=r"INPUT .*/\*\.csv: no file matches"):
        find_sources([f"{mixed}/*.csv"], ["*"])


def test_file_both_packed_and_unpacked_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]))
    (tmp_path / "a.jsonl.gz").write_bytes(pack(".gz", lines(["one"])))
    with pytest.raises(DataError, match=r"a\.jsonl and a\.jsonl\.gz.*--include '\*\.jsonl'"):
        find_sources([str(tmp_path)], ["*.jsonl", "*.jsonl.gz"])
    assert len(find_sources([str(tmp_path)], ["*.jsonl"])[0]) == 1


# --- bad input

BAD_DOCUMENTS: dict[str, tuple[str, bytes, list[str]]] = {
    "latin-1 text": ("x.txt", b"one\ntwo caf\xe9", ["x.txt:2", "byte offset 11 (0xe9)"]),
    "latin-1 packed text": ("x.txt.gz", pack(".gz", b"one\n\n\xe9"), ["x.txt.gz:3", "byte offset 5 (0xe9)"]),
    "latin-1 line": ("x.jsonl", lines(["a"]) + b'{"text": "\xe9"}', ["x.jsonl:2", "byte offset 24 (0xe9)"]),
    "no JSON": ("x.jsonl", lines(["a"]) + b'{"text": }\n', ["x.jsonl:2", "not a JSON object"]),
    "no JSON in a packed file": ("x.jsonl.xz", pack(".xz", lines(["a"]) + b"{\n"), ["x.jsonl.xz:2"]),
    "no object": ("x.jsonl", b'"text"\n', ["x.jsonl:1", "a JSON str instead"]),
    "no key": (
        "x.jsonl",
        lines(["a"]) + lines(["b"], "body"),
        ["x.jsonl:2", "no key 'text' (keys: body)", "--text-key"],
    ),
    "no string": ("x.jsonl", b'{"text": 7}\n', ["x.jsonl:1", "a JSON int instead of a string"]),
    "lone surrogate": ("x.jsonl", b'{"text": "ab\\ud800"}\n', ["x.jsonl:1", "character 2"]),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_bad_document_stops_the_build_or_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    name, content, words = BAD_DOCUMENTS[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(lines(TEXTS[:9]))
    (tmp_path / "in" / name).write_bytes(content)
    command = [str(tmp_path / "in"), "--output", str(tmp_path / "out/c"), "--workers", "1"]
    assert main(command) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in [*words, "--on-bad skip"]), error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--on-bad", "skip"]) == 0
    told = capsys.readouterr().out
    assert "1 bad documents" in told and all(word in told for word in words)
    record = json.loads((tmp_path / "out/c.json").read_bytes())
    assert record["left_out"]["bad"] == 1 and words[0] in record["bad_examples"][0]
    ids = [bytes(i[:-1]).decode() for split in ("train", "valid") for i in stored(tmp_path / "out/c", split)]
    assert sorted(set(ids) & set(TEXTS)) == sorted(TEXTS[:9])


def test_null_and_bytes_that_are_no_text_in_parquet_have_their_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    broken = pyarrow.array([b"a", None, b"\xe9", b"d"]).view(pyarrow.string())
    documents = read(parquet(tmp_path / "x.parquet", broken, rows=3))
    assert [(document.text, document.bytes) for document in documents] == [
        ("a", 1),
        ("", BAD_BYTES),
        ("", BAD_BYTES),
        ("d", 1),
    ]
    assert "x.parquet:2: no text in column 'text'" in str(documents[1].fault)
    assert "x.parquet:3: not UTF-8 text at byte offset 0 (0xe9)" in str(documents[2].fault)


def cut_off(ending: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"x.jsonl{ending}"
        path.write_bytes(pack(ending, random.Random(0).randbytes(3000).hex().encode())[:-9])
        return path

    return write


def not_packed(ending: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"x.jsonl{ending}"
        path.write_bytes(lines(TEXTS))
        return path

    return write


def cut_parquet(folder: Path) -> Path:
    path = parquet(folder / "x.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:-9])
    return path


def damaged_page(folder: Path) -> Path:
    path = parquet(folder / "x.parquet", TEXTS, rows=60)
    data = bytearray(path.read_bytes())
    data[4:900] = bytes(896)
    path.write_bytes(data)
    return path


DAMAGED: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    **{f"cut off {ending}": (cut_off(ending), ["damaged or cut off"]) for ending in PACKED},
    **{f"not {ending}": (not_packed(ending), ["damaged or cut off"]) for ending in PACKED},
    "cut off Parquet": (cut_parquet, ["x.parquet", "damaged or cut off"]),
    "damaged page": (damaged_page, ["x.parquet", "damaged or cut off"]),
    "no such column": (
        lambda p: parquet(p / "x.parquet", TEXTS, key="body"),
        ["no column 'text' (columns: place, body)", "--text-key"],
    ),
    "column of numbers": (lambda p: parquet(p / "x.parquet", [1, 2]), ["column 'text' holds int64", "--text-key"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_refused_even_if_bad_documents_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    write, words = DAMAGED[case]
    out = str(tmp_path / "out/c")
    assert main([str(write(tmp_path)), "--output", out, "--on-bad", "skip", "--workers", "1"]) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("x.jsonl.zst", "zstandard", "zstandard"), ("x.parquet", "pyarrow.parquet", "parquet")],
)
def test_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{name}: needs the {package[:7]}.* pip install 'coppice\[{extra}\]'"):
        find_sources([str(tmp_path / name)], [])


# --- options and statistics


@pytest.mark.parametrize("append", [True, False])
def test_end_of_document_and_statistics(tmp_path: Path, append: bool, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([*TEXTS, "", " "]))
    prefix = tmp_path / "c"
    flag = "--eod" if append else "--no-eod"
    assert main([str(tmp_path / "x.jsonl"), "--output", str(prefix), flag, "--validation-fraction", "0.3"]) == 0
    told = capsys.readouterr().out
    assert ("not appended" in told) != append
    manifest, record = load_manifest(prefix), json.loads(prefix.with_suffix(".json").read_bytes())
    assert manifest.append_eod == append and record["left_out"]["empty"] == 2
    decoded = []
    for split, counts in manifest.splits.items():
        ids = stored(prefix, split)
        assert all((document[-1] == 256) == append and 256 not in document[:-1] for document in ids)
        texts = [bytes(document[:-1] if append else document) for document in ids]
        decoded += [text.decode() for text in texts]
        assert counts.bytes == record["text_bytes"][split] == sum(map(len, texts))
        lengths = sorted(map(len, ids))
        told_lengths = record["statistics"][split]["tokens_per_document"]
        assert (told_lengths["min"], told_lengths["max"]) == (lengths[0], lengths[-1])
        assert told_lengths["p50"] == lengths[(len(lengths) - 1) // 2]
        assert told_lengths["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)
        assert record["statistics"][split]["bytes_per_token"] == 1.0
        assert f"p50 {told_lengths['p50']:,}" in told
    assert sorted(decoded) == sorted(TEXTS)


# --- processes, and builds that were stopped


def request(mixed: Path, output: Path, **options: Any) -> CorpusRequest:
    return CorpusRequest((str(mixed),), str(output), **{"tokenizer": "bpe:300", "on_bad": "skip", **options})


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, mixed: Path, small_parts: None) -> None:
    results = []
    for workers in (1, 2, 3):
        result = build_corpus(request(mixed, tmp_path / f"{workers}/c", workers=workers, limit_bytes=30_000))
        results.append((result.statistics, result.left_out, result.faults, everything_below(tmp_path / f"{workers}")))
    assert results[0] == results[1] == results[2]
    assert results[0][1].bad == 1 and results[0][1].over_limit > 0
    errors = []
    for workers in (1, 2):  # also what is said of bad input: the first fault in the order of the documents
        with pytest.raises(DataError) as caught:
            build_corpus(request(mixed, tmp_path / "none/c", workers=workers, on_bad="refuse"))
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "plain.jsonl:61: not UTF-8" in errors[0] and not (tmp_path / "none").exists()
    with mock.patch.object(parts, "SMALLEST_BYTES", 1 << 20):  # nor does the size of the parts change a byte
        build_corpus(request(mixed, tmp_path / "one/c", limit_bytes=30_000))
    assert everything_below(tmp_path / "one") == results[0][3]


KILLED = """
import multiprocessing, os, signal, sys
from pathlib import Path
from train.corpus import build as corpus_build
from train.corpus import parts
from train.corpus.build import CorpusRequest, build_corpus

class Progress:
    def __init__(self, say, verb, total_bytes):
        self.left = 5 if verb == "tokenized" else -1
    def add(self, size_bytes, tokens=0):
        self.left -= 1
        if self.left == 0:
            Path("pids").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    parts.SMALLEST_BYTES = 300
    corpus_build.Progress = Progress
    build_corpus(CorpusRequest((sys.argv[1],), "out/c", tokenizer="bpe:300", on_bad="skip", workers=2))
"""


def test_killed_build_goes_on_with_its_finished_parts(
    tmp_path: Path, mixed: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "killed.py"), str(mixed)]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == -signal.SIGKILL
    workers = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    assert len(workers) == 2
    finished = len(list((tmp_path / "out/.c.partial").glob("*.npy")))
    assert finished >= 5 and not (tmp_path / "out/c.json").exists()

    encoded = []
    real = corpus_build.encode_part
    monkeypatch.setattr(corpus_build, "encode_part", lambda task: encoded.append(task.number) or real(task))
    said: list[str] = []
    monkeypatch.chdir(tmp_path)
    build_corpus(request(mixed, Path("out/c")), said.append)
    assert f"going on with the build that was stopped: {finished} parts are finished" in said
    again = len(encoded)
    build_corpus(request(mixed, Path("whole/c")))
    assert len(encoded) - again == finished + again and again > 0
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "option", "nothing"])
def test_finished_parts_of_another_build_are_dropped(
    tmp_path: Path, mixed: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    calls = []
    real = corpus_build.encode_part

    def stop_after_three(task: Any) -> Any:
        calls.append(task)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(task)

    said: list[str] = []
    monkeypatch.setattr(corpus_build, "encode_part", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(request(mixed, tmp_path / "out/c", tokenizer="byte"), said.append)
    assert f"kept 3 finished parts in {tmp_path}/out/.c.partial: the same command goes on with them" in said
    # A folder that is missing for the moment costs nothing.
    with pytest.raises(DataError, match="no such file"):
        build_corpus(request(tmp_path / "nowhere", tmp_path / "out/c"), said.append)
    options: dict[str, Any] = {"tokenizer": "byte"}
    if change == "input":
        path = mixed / "plain.jsonl"
        path.write_bytes(path.read_bytes().replace(b"text 7", b"text 8"))  # of the same length
    elif change == "option":
        options["append_eod"] = False
    said.clear()
    build_corpus(request(mixed, tmp_path / "out/c", **options), said.append)
    assert any("its 3 finished parts are dropped" in line for line in said) == (change != "nothing")
    assert any(line.startswith("going on") for line in said) == (change == "nothing")
    build_corpus(request(mixed, tmp_path / "new/c", **options))
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "new")


def test_damaged_finished_part_is_refused(
    tmp_path: Path, mixed: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_build, "_join", interrupt)
        build_corpus(request(mixed, tmp_path / "out/c"))
    part = tmp_path / "out/.c.partial/0000001.bin"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"0000001.bin: damaged: delete the folder .*\.c\.partial"):
        build_corpus(request(mixed, tmp_path / "out/c"))


def test_one_command_at_a_time_builds_a_prefix(tmp_path: Path, mixed: Path) -> None:
    with (
        staging_folder(str(tmp_path / "out/c"), print),
        pytest.raises(ConfigError, match="another command is building it"),
    ):
        build_corpus(request(mixed, tmp_path / "out/c"))


def test_killed_worker_is_an_error_and_one_that_raises_stops_the_others(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"worker process was killed.*fewer --workers"), Workers(2) as workers:
        list(workers.map(signal.raise_signal, [signal.SIGKILL] * 2))
    start = time.monotonic()
    with pytest.raises(ValueError), Workers(2) as workers:
        list(workers.map(time.sleep, [60.0, -1.0], ordered=False))
    assert time.monotonic() - start < 30


def test_source_kinds_follow_the_name() -> None:
    kinds = {
        name: (source.kind, source.packed)
        for name in ("a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet", "a.gz")
        for source in [Source(Path(name), name, 1, 1)]
    }
    assert list(kinds.values()) == [
        ("jsonl", ""),
        ("jsonl", ".gz"),
        ("text", ".zst"),
        ("parquet", ""),
        ("text", ".gz"),
    ]
