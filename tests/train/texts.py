"""Text of the tests' corpora: written by a seeded generator, so that no change of this repository changes a number.

Like real text it has structure on several scales to learn from: frequent and rare words (Zipf), words that follow one
another, punctuation, lines, indentation, documents of very unequal length. Only `Random.random` is drawn from: Python
promises the same numbers from it in every version.
"""

from bisect import bisect
from itertools import accumulate
from pathlib import Path
from random import Random

_CONSONANTS, _VOWELS = "bcdfglmnprstvw", "aeiou"
_WORDS, _FOLLOWERS = 800, 6
KINDS = ("code", "prose")


def write_texts(folder: Path, kind: str = "code", *, documents: int = 160) -> Path:
    """A folder of text files, the same bytes on every machine; half a megabyte unless told otherwise.

    Args:
        folder: made, with its parents.
        kind: `code` (short indented lines) or `prose` (paragraphs of sentences), of different words.
        documents: number of files, most of 1 to 4 kB, the longest about ten times that.
    """
    random = Random(KINDS.index(kind))
    words = [_word(random) for _ in range(_WORDS)]
    likely = list(accumulate(1 / rank for rank in range(1, _WORDS + 1)))
    followers = [[_drawn(random, likely) for _ in range(_FOLLOWERS)] for _ in words]
    folder.mkdir(parents=True)
    for index in range(documents):
        length = int(1000 / (0.1 + random.random()) ** 1.5)
        parts, size, at = [], 0, 0
        while size < length:
            # Two words in three follow from the one before.
            at = followers[at][int(random.random() * _FOLLOWERS)] if random.random() < 0.67 else _drawn(random, likely)
            parts.append(words[at] + _separator(random, kind))
            size += len(parts[-1])
        (folder / f"{index:03}.txt").write_text("".join(parts) + "\n")
    return folder


def _word(random: Random) -> str:
    syllables = 1 + int(random.random() * 3)
    return "".join(_pick(random, _CONSONANTS) + _pick(random, _VOWELS) for _ in range(syllables))


def _pick(random: Random, letters: str) -> str:
    return letters[int(random.random() * len(letters))]


def _drawn(random: Random, likely: list[float]) -> int:
    """The index of a word by its frequency."""
    return bisect(likely, random.random() * likely[-1], hi=len(likely) - 1)


def _separator(random: Random, kind: str) -> str:
    """What stands after a word."""
    choice = random.random()
    if kind == "code":
        if choice < 0.2:
            return "\n" + "    " * int(random.random() * 3)
        return "(" if choice < 0.3 else ") = " if choice < 0.4 else "." if choice < 0.5 else " "
    return ".\n\n" if choice < 0.02 else ". " if choice < 0.1 else ", " if choice < 0.17 else " "
