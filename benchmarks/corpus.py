"""Speed of the corpus command beside Megatron-LM's own preprocessing, on the same text with the same tokenizer.

    python benchmarks/corpus.py [--megabytes 64] [--workers 2] [--repeats 2] [--megatron CHECKOUT]

The text is the standard library's, cut into documents of uneven length (a new cut each time round, so no two are the
same), shuffled, as JSONL. The tokenizer is byte-level BPE with 32,000 tokens trained on it. The programs run in turn, each
as a command from start to finish: ours reads the text twice and writes train files only (no held-out documents).
Megatron-LM is a checkout (`git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM`); its
tools/preprocess_data.py wants more packages than Coppice, which --megatron-packages may hold. Without one there is the
reference loop: mcore's IndexedDatasetBuilder fed by multiprocessing.Pool.imap, which encodes each line with `tokenizers`.

Told are megabytes of text per second and per second of processor time (all processes; this holds on a busy machine), for
the whole command and without the start-up (the difference to a run on a twentieth of the text). The token files must be
the same. Writes benchmarks/results/corpus.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = Path(__file__).parent / "results"
_SMALL_SHARE = 20
_VOCABULARY = 32_000


def write_text(path: Path, size_bytes: int) -> int:
    """Writes JSONL of about that much text; gives the bytes of text in it."""
    from train.corpus.sources import find_sources

    texts = [source.path.read_text(encoding="utf-8") for source in find_sources(["stdlib"], [])[0]]
    draw = random.Random(0)
    documents: list[str] = []
    written = 0
    while written < size_bytes:
        for text in texts:
            place = 0
            while place < len(text) and written < size_bytes:
                length = int(draw.lognormvariate(8, 1))  # median 3,000 characters
                if piece := text[place : place + length].strip():
                    documents.append(piece)
                    written += len(piece.encode())
                place += length
    draw.shuffle(documents)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return written


def make_tokenizer(folder: Path, text: Path) -> None:
    """A folder as Hugging Face's libraries know it."""
    from train.data.tokenizers import BPE_END_OF_DOCUMENT, train_bpe

    folder.mkdir()
    with text.open() as stream:
        train_bpe((json.loads(line)["text"] for line in stream), _VOCABULARY, folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": BPE_END_OF_DOCUMENT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class _Encoder:
    """One line to token ids; the tokenizer is built in each process of the pool."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def start(self) -> None:
        from tokenizers import Tokenizer

        _Encoder.library = Tokenizer.from_file(self.tokenizer)
        _Encoder.eod = _Encoder.library.token_to_id("<|endoftext|>")

    def encode(self, line: str) -> list[int]:
        return [*_Encoder.library.encode(json.loads(line)["text"], add_special_tokens=False).ids, _Encoder.eod]


def reference_loop(text: str, output: str, tokenizer: str, workers: int) -> None:
    """The plain way to write the format with mcore."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    encoder = _Encoder(tokenizer)
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(_VOCABULARY))
    with open(text, encoding="utf-8") as stream, multiprocessing.Pool(workers, encoder.start) as pool:
        for ids in pool.imap(encoder.encode, stream, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{output}.idx")


def run(command: list[str], search: list[str]) -> dict[str, float]:
    """Runs a command to its end; wall seconds, and processor seconds of all its processes."""
    path = os.pathsep.join([*search, str(_ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")
    return {"wall_seconds": time.perf_counter() - start, "processor_seconds": usage.ru_utime + usage.ru_stime}


def commands(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[str], dict[str, float]]]:
    """The programs by name: each takes `text` or `small` and writes NAME-text.bin."""
    python, workers, tokenizer = sys.executable, str(options.workers), str(folder / "tokenizer")

    def coppice(text: str) -> dict[str, float]:
        source, output = str(folder / f"{text}.jsonl"), str(folder / f"coppice-{text}")
        command = [python, "-m", "train.corpus", source, "--output", output, "--workers", workers, "--overwrite"]
        return run([*command, "--tokenizer", f"huggingface:{tokenizer}", "--validation-fraction", "0"], [])

    def reference(text: str) -> dict[str, float]:
        source, output = str(folder / f"{text}.jsonl"), str(folder / f"reference-{text}")
        return run([python, __file__, "--reference", source, output, f"{tokenizer}/tokenizer.json", workers], [])

    def megatron(text: str) -> dict[str, float]:
        tool = [python, f"{options.megatron}/tools/preprocess_data.py", "--append-eod", "--workers", workers]
        tool += ["--input", str(folder / f"{text}.jsonl"), "--output-prefix", str(folder / f"megatron-{text}")]
        tool += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer]
        return run(tool, [options.megatron, *options.megatron_packages])

    programs = {"coppice": coppice, "reference": reference}
    return programs | ({"megatron": megatron} if options.megatron else {})


def same_tokens(folder: Path, programs: list[str]) -> bool:
    """Whether all programs wrote the same token file."""
    names = {"coppice": "coppice-text.train.bin", "megatron": "megatron-text_text_document.bin"}
    contents = {(folder / names.get(name, f"{name}-text.bin")).read_bytes() for name in programs}
    return len(contents) == 1


def rates(large: dict[str, float], small: dict[str, float], megabytes: float) -> dict[str, float]:
    """Megabytes per second of the whole command, and without what it takes to start."""
    row = dict(large)
    for clock in ("wall", "processor"):
        seconds, start = large[f"{clock}_seconds"], small[f"{clock}_seconds"]
        row[f"mb_per_{clock}_second"] = megabytes / seconds
        row[f"steady_mb_per_{clock}_second"] = megabytes * (1 - 1 / _SMALL_SHARE) / (seconds - start)
    return row


def _machine() -> str:
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="text to tokenize (default 64)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each program (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each program, the best counts (default 2)")
    parser.add_argument("--megatron", metavar="CHECKOUT", help="checkout of Megatron-LM")
    parser.add_argument("--megatron-packages", nargs="+", default=[], metavar="FOLDER", help="packages only it needs")
    parser.add_argument("--reference", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference:
        text, output, tokenizer, workers = options.reference
        reference_loop(text, output, tokenizer, int(workers))
        return
    from parallel.compat import versions

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size_bytes = write_text(folder / "text.jsonl", options.megabytes * 10**6)
        write_text(folder / "small.jsonl", options.megabytes * 10**6 // _SMALL_SHARE)
        make_tokenizer(folder / "tokenizer", folder / "text.jsonl")
        programs = commands(options, folder)
        runs: dict[str, dict[str, list[dict[str, float]]]] = {each: {"text": [], "small": []} for each in programs}
        for _ in range(options.repeats):
            for each, program in programs.items():
                for text in ("small", "text"):
                    runs[each][text].append(program(text))
                    print(each, text, runs[each][text][-1], flush=True)
        same = same_tokens(folder, list(programs))

    def best(each: str, text: str) -> dict[str, float]:
        return {key: min(entry[key] for entry in runs[each][text]) for key in runs[each][text][0]}

    rows: dict[str, Any] = {each: rates(best(each, "text"), best(each, "small"), size_bytes / 1e6) for each in programs}
    for each in programs:
        keys = [key for key in rows[each] if "mb_per" in key]
        rows[each]["coppice_over_it"] = {key: rows["coppice"][key] / rows[each][key] for key in keys}
        print(f"{each}: " + ", ".join(f"{key} {rows[each][key]:.2f}" for key in keys))
    result = {"machine": _machine(), "versions": versions(), "date": time.strftime("%Y-%m-%d"),
              "command": "python " + " ".join(sys.argv),
              "load_average": os.getloadavg()[0], "system": platform.platform(), "text_megabytes": size_bytes / 1e6,
              "vocabulary": _VOCABULARY, "workers": options.workers, "repeats": options.repeats,
              "same_token_files": same, "programs": rows, "runs": runs}  # fmt: skip
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / "corpus.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"token files the same: {same}; written to {_RESULTS / 'corpus.json'}")


if __name__ == "__main__":
    main()
