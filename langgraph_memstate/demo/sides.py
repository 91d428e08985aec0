"""What the agent runs on: the same four things, put together in two ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.store.base import BaseStore

SideName = Literal["without", "with"]
SIDES: tuple[SideName, ...] = ("without", "with")

NAMESPACE = ("memories", "ada")
ALL = 10_000  # more memories than any story has


@dataclass(frozen=True, slots=True)
class Side:
    """`save` writes one memory (key, text) from inside a node; `vectors` lists the text behind every vector."""

    checkpointer: BaseCheckpointSaver[str]
    store: BaseStore
    save: Callable[[str, str], None]
    vectors: Callable[[], list[str]]

    def facts(self) -> list[str]:
        """The text of every memory in SQL."""
        return [str(item.value["text"]) for item in self.store.search(NAMESPACE, limit=ALL)]


def open_side(name: SideName, directory: Path) -> AbstractContextManager[Side]:
    """Open one side's databases in a directory of its own."""
    if name == "without":
        from langgraph_memstate.demo.without import open_without

        return open_without(directory)
    from langgraph_memstate.demo.beside import open_with

    return open_with(directory)
