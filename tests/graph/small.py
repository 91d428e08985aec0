"""The names that small graphs of several test modules share."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

NOTES = ("notes",)
THREAD: dict[str, Any] = {"configurable": {"thread_id": "t"}}
DURABILITIES = ("sync", "async", "exit")


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


class Trouble(RuntimeError):
    """What a node fails with."""
