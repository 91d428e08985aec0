"""How far a long command is, for whoever watches it."""

from __future__ import annotations

import threading
from typing import TextIO


class ProgressBar:
    """A bar that redraws itself on a terminal; a line for every tenth elsewhere. Threads may share it."""

    def __init__(self, total: int, out: TextIO) -> None:
        self._total = total
        self._out = out
        self._done = 0
        self._live = out.isatty()
        self._lock = threading.Lock()

    def advance(self, what: str) -> None:
        """One more is done: `what` it is."""
        with self._lock:
            self._draw(what, self._done + 1)

    def show(self, what: str, done: int, total: int) -> None:
        """So many are done, of so many."""
        with self._lock:
            self._total = max(1, total)
            self._draw(what, done)

    def _draw(self, what: str, done: int) -> None:
        before, self._done = self._done, done
        if self._live:
            filled = 30 * self._done // self._total
            bar = "#" * filled + "-" * (30 - filled)
            self._out.write(f"\r[{bar}] {self._percent:3}%  {what}\x1b[K")
        elif self._done * 10 // self._total > before * 10 // self._total:
            self._out.write(f"{self._percent}%\n")
        self._out.flush()

    @property
    def _percent(self) -> int:
        return 100 * self._done // self._total

    def close(self) -> None:
        """Leave an empty line where the bar was."""
        if self._live:
            self._out.write("\r\x1b[K")
            self._out.flush()
