"""Making many objects at once, without the cyclic garbage collector looking at each of them again and again."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_AHEAD = 32 * 1024 * 1024  # bytes

Row = TypeVar("Row")
Made = TypeVar("Made")

_pausing = threading.Lock()
_paused = 0
_resume = False


@contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection while many objects are made: it would look at all of them, and they all stay."""
    global _paused, _resume
    with _pausing:
        if not _paused:
            _resume = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _pausing:
            _paused -= 1
            if not _paused and _resume:
                gc.enable()


def made_ahead(rows: Iterator[Row], make: Callable[[Row], Made], weigh: Callable[[Row], int]) -> Iterator[Made]:
    """What is made of each row, ahead of whoever takes it: one row, then four times as many as before at a time.

    What lies ready was made of at most `_AHEAD` bytes and a row. An error is raised in its turn.
    """
    ready: deque[Made] = deque()
    most, is_over = 1, False
    while not is_over:
        error: Exception | None = None
        with gc_paused():
            weight = 0
            while not is_over and len(ready) < most and weight < _AHEAD:
                try:
                    row = next(rows)
                    weight += weigh(row)
                    ready.append(make(row))
                except StopIteration:
                    is_over = True
                except Exception as failure:
                    error, is_over = failure, True
        while ready:
            yield ready.popleft()
        if error is not None:
            raise error
        most *= 4
