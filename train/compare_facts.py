"""Whether losses of several runs mean the same: tokenizers, corpora, context and validation batches, as runs recorded them.

The facts are in config.yaml and the events; the tokenizer is in the manifest of the corpus, where that still lies on disk.

Usage: `sentences, alike = doubts_about({"a": record_a, "b": record_b})`
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from parallel.errors import DataError
from train.manifest import CorpusManifest, load_manifest
from train.report_data import RunRecord
from train.report_loss import set_names


@dataclass(frozen=True)
class Facts:
    """What decides whose losses may be held against each other; None where a run does not tell.

    Attributes:
        tokenizer: its spec and the start of its digest.
        corpora: names with their shares, or digests of the text where the manifests are at hand.
        context: tokens per sample.
        validation: tokens of an evaluation, and the named sets.
    """

    tokenizer: str | None
    corpora: str | None
    context: str | None
    validation: str | None


def doubts_about(records: Mapping[str, RunRecord]) -> tuple[list[str], bool]:
    """What makes the losses of these runs hard to compare.

    Args:
        records: of the runs, by label.

    Returns:
        Sentences, empty if nothing is known against it; and whether the runs have losses of the same tokens, as far as
        they tell.
    """
    facts = {label: _facts(record) for label, record in records.items()}
    checks: list[tuple[str, Callable[[Facts], str | None], str]] = [
        ("Tokenizers differ", lambda f: f.tokenizer, "a loss per token of one says nothing about the other"),
        ("Corpora differ", lambda f: f.corpora, "neither training nor validation is on the same text"),
        ("Sequence lengths differ", lambda f: f.context, "a longer context lowers the loss by itself"),
        ("Validation differs", lambda f: f.validation, "the validation losses are not of the same tokens"),
    ]
    doubts = []
    for what, read, so in checks:
        told = {label: value for label, fact in facts.items() if (value := read(fact)) is not None}
        if len(set(told.values())) > 1:
            listed = "; ".join(f"{label}: {value}" for label, value in told.items())
            doubts.append(f"{what}, so {so} ({listed}).")
    alike = not doubts
    if not any(doubt.startswith("Corpora") for doubt in doubts):
        silent = [label for label, fact in facts.items() if fact.corpora is None]
        if silent:
            doubts.append(f"What {', '.join(silent)} trained on is not recorded (no data.corpus in config.yaml).")
    for label, record in records.items():
        if record.steps_S[0] > 1:
            doubts.append(
                f"{label} begins at step {record.steps_S[0]:,.0f}, from a checkpoint of another run: what that had cost "
                "is taken from its token count and the cost of its first step here."
            )
    return doubts, alike


def _facts(record: RunRecord) -> Facts:
    data = _section(_config(record), "data")
    parts = data.get("blend") or ([{"prefix": data["corpus"]}] if data.get("corpus") else [])
    shares = [(str(part.get("prefix")), float(part.get("weight", 1.0))) for part in parts if isinstance(part, dict)]
    manifests = [_manifest(prefix) for prefix, _ in shares]
    tokenizers = {f"{m.tokenizer_spec}, digest {m.tokenizer_digest[:8]}" for m in manifests if m is not None}
    whole = sum(weight for _, weight in shares)
    corpora = ", ".join(
        f"{prefix.rsplit('/', 1)[-1]}{f' {100 * weight / whole:.3g} %' if len(shares) > 1 else ''}"
        + (f" (text {manifest.fingerprint[:8]})" if manifest else "")
        for (prefix, weight), manifest in zip(shares, manifests, strict=True)
    )
    tokens = sorted({e.tokens for e in record.evaluations if e.tokens is not None})
    validation = [" or ".join(f"{count:,.0f}" for count in tokens) + " tokens"] if tokens else []
    names = set_names(record)
    validation += [f"sets {', '.join(names)}"] if names else []
    length = data.get("sequence_length")
    return Facts(
        tokenizer=" and ".join(sorted(tokenizers)) or None,
        corpora=corpora or None,
        context=None if length is None else f"{length:,} tokens",
        validation=", ".join(validation) or None,
    )


def _manifest(prefix: str) -> CorpusManifest | None:
    """The manifest of a corpus, or None where it is no longer at hand: a comparison works on copies of runs too."""
    try:
        return load_manifest(prefix)
    except DataError:
        return None


def _config(record: RunRecord) -> dict[str, Any]:
    """config.yaml of a run; empty if it has none."""
    try:
        config = yaml.safe_load(record.config_text)
    except yaml.YAMLError as error:
        raise DataError(f"{record.files.config}: not YAML ({' '.join(str(error).split())}): restore it") from error
    return config if isinstance(config, dict) else {}


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}
