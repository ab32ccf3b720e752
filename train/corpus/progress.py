"""Lines of progress of a corpus build: plain, one every few seconds."""

import time
from collections.abc import Callable

REPORT_SECONDS = 5.0
Say = Callable[[str], None]


class Progress:
    """Counts what is done and says how fast it goes and when it will be over."""

    def __init__(self, say: Say, verb: str, total_bytes: int) -> None:
        """Starts the clock.

        Args:
            say: takes the lines.
            verb: what is being done, such as `tokenized`.
            total_bytes: the work that is left.
        """
        self._say, self._verb, self._total_bytes = say, verb, total_bytes
        self._start = self._last = time.monotonic()
        self._bytes = self._tokens = 0

    def add(self, size_bytes: int, tokens: int = 0) -> None:
        """Counts finished work."""
        self._bytes += size_bytes
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last >= REPORT_SECONDS:
            self._last = now
            self._say(self.line(now - self._start))

    def line(self, seconds: float) -> str:
        """What is said after that many seconds."""
        rate = self._bytes / seconds
        tokens = f"{self._tokens / seconds:,.0f} tokens/s, " if self._tokens else ""
        left = (self._total_bytes - self._bytes) / rate if rate else 0.0
        return (
            f"{self._verb} {self._bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB "
            f"({tokens}{rate / 1e6:.1f} MB/s, {duration(left)} left)"
        )


def duration(seconds: float) -> str:
    """Seconds for people: `40 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
