"""Ctrl-C in the middle of a call: what it interrupts is whole or absent, and nobody else notices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from types import FrameType
from typing import Any

import pytest

from langgraph_memstate.facts import Draft, new_version
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Append
from langgraph_memstate.urls import storage_at

TRIES = 150


def interrupted(call: Callable[[], Any], at: int) -> int:
    """Interrupt a call when it has called, or returned from, so many functions; returns how many it came to."""
    seen = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal seen
        seen += event in ("call", "return")  # of Python's: there a signal is looked for
        if seen == at:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sys.setprofile(count)
        try:
            call()
        finally:
            sys.setprofile(None)
    return seen


def write(storage: Storage, key: str = "a") -> list[BaseException | None]:
    draft = Draft(new_version(), ("n",), key, "put", "{}")
    return storage.apply(((Append((draft,)),),))


def keys(storage: Storage) -> set[str]:
    with storage.snapshot() as reader:
        return {entry.key for entry in reader.log()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a connection that nobody can close
@pytest.mark.parametrize("url", ["file", "postgres", "redis"], indirect=True)
@pytest.mark.parametrize("call", [write, keys])
def test_an_interrupted_call_leaves_nothing_behind(url: str, call: Callable[[Storage], object]) -> None:
    one, other = storage_at(url), storage_at(url)
    with closing(one), closing(other):
        one.open()
        other.open()
        events = interrupted(lambda: call(one), 0)
        assert events > 10
        for number in range(TRIES):
            interrupted(lambda: call(one), 1 + number * events // TRIES)
            assert write(other, f"other {number}") == [None]  # nothing is locked
            assert write(one, f"one {number}") == [None]  # and the next call of the same storage is as good as any
            assert {f"other {number}", f"one {number}"} <= keys(one)
        assert keys(one) == keys(other)
