"""Faults, sprung at the same points of both sides.

A point lies before or after a call that both sides make: of the language model, of the store's `put`, of Chroma's
`upsert` or `add`, of the saver's `put_writes` and `put`. The calls are wrapped on their classes, so neither side knows.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from chromadb import Collection
from langchain_core.language_models import ParrotFakeChatModel

from langgraph_memstate.demo.sides import Side

Kind = Literal["outage", "rate limit", "kill -9"]


class Outage(ConnectionError):
    """A service is down; nobody tries again by themselves."""


class RateLimited(Exception):
    """A service asks to be called again, which the agent's `RetryPolicy` does."""


@dataclass(frozen=True, slots=True)
class Trap:
    """A fault at the last point of a route, once the points before it were passed in this order."""

    kind: Kind
    route: tuple[str, ...]


class Faults:
    """Sets one trap at a time. Points are passed in several threads."""

    def __init__(self, side: Side) -> None:
        self._lock = threading.Lock()
        self._kind: Kind | None = None
        self._left: list[str] = []
        for owner, name, point in (
            (ParrotFakeChatModel, "_generate", "model"),
            (type(side.store), "put", "store.put"),
            (Collection, "upsert", "upsert"),
            (Collection, "add", "upsert"),
            (type(side.checkpointer), "put_writes", "put_writes"),
            (type(side.checkpointer), "put", "put"),
        ):
            setattr(owner, name, self._watched(getattr(owner, name), point))

    def set(self, trap: Trap | None) -> None:
        """Set a trap in place of the last one, or none."""
        with self._lock:
            self._kind = trap.kind if trap else None
            self._left = list(trap.route) if trap else []

    @property
    def sprung(self) -> bool:
        """Whether the trap that was set has sprung; True without one."""
        return not self._left

    def _watched(self, call: Callable[..., Any], point: str) -> Callable[..., Any]:
        @wraps(call)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._passed(f"before {point}")
            result = call(*args, **kwargs)
            self._passed(f"after {point}")
            return result

        return watched

    def _passed(self, point: str) -> None:
        with self._lock:
            if not self._left or self._left[0] != point:
                return
            del self._left[0]
            if self._left:
                return
        if self._kind == "kill -9":
            kill_this_process()
        raise RateLimited(point) if self._kind == "rate limit" else Outage(point)


def kill_this_process() -> None:
    """End at once: no `finally`, no `atexit`, nothing is flushed."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # SIGTERM does the same on Windows
    threading.Event().wait()  # the signal is on its way
