"""Whether losses of several runs mean the same: tokenizers, corpora, context and validation batches, as runs recorded them.

The facts are in config.yaml and the events; the tokenizer is in the manifest of the corpus, where that still lies on disk.

Usage: `doubts_about({"a": record_a, "b": record_b})`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from parallel.errors import DataError
from train.data.manifest import CorpusManifest, load_manifest
from train.report.data import RunRecord
from train.report.loss import set_names


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


# Name of the fact that differs, and what that means.
_MEANING = {
    "tokenizer": ("Tokenizers differ", "a loss per token of one says nothing about the other"),
    "corpora": ("Corpora differ", "neither training nor validation is on the same text"),
    "context": ("Sequence lengths differ", "a longer context lowers the loss by itself"),
    "validation": ("Validation differs", "the validation losses are not of the same tokens"),
}


def doubts_about(records: Mapping[str, RunRecord]) -> list[str]:
    """What makes the losses of these runs, by label, hard to compare: a sentence each, none if nothing is known."""
    facts = {label: facts_of(record) for label, record in records.items()}
    doubts = []
    for name, (what, so) in _MEANING.items():
        told = _told(facts, name)
        if len(told) > 1:
            listed = "; ".join(f"{', '.join(labels)}: {value}" for value, labels in told.items())
            doubts.append(f"{what}, so {so} ({listed}).")
    silent = [label for label, fact in facts.items() if fact.corpora is None]
    if silent:
        doubts.append(f"What {', '.join(silent)} trained on is not recorded (no data.corpus in config.yaml).")
    for label, record in records.items():
        if record.steps_S[0] > 1:
            doubts.append(
                f"{label} begins at step {record.steps_S[0]:,.0f}, from a checkpoint of another run: what that had cost "
                "is taken from its token count and the cost of its first step here."
            )
    return doubts


def alike(records: Sequence[RunRecord]) -> bool:
    """Whether the losses of these runs are of the same tokens, as far as the runs tell."""
    facts = {str(i): facts_of(record) for i, record in enumerate(records)}
    return all(len(_told(facts, name)) < 2 for name in _MEANING)


def _told(facts: Mapping[str, Facts], name: str) -> dict[str, list[str]]:
    """The values that the runs tell of a fact, each with the runs that do."""
    told: dict[str, list[str]] = {}
    for label, fact in facts.items():
        value = getattr(fact, name)
        if value is not None:
            told.setdefault(value, []).append(label)
    return told


def facts_of(record: RunRecord) -> Facts:
    """What a run tells of its data.

    Raises:
        DataError: its config.yaml is not YAML.
    """
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
