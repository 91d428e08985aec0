"""A LangGraph step and everything it remembers commit together, or not at all."""

from typing import TYPE_CHECKING, Any

from langgraph_memstate.errors import MemStateError
from langgraph_memstate.facts import Fact, LogEntry
from langgraph_memstate.graph.checkpointer import MemStateCheckpointer
from langgraph_memstate.graph.reducer import TypedReducer
from langgraph_memstate.graph.rollback_node import RollbackNode
from langgraph_memstate.graph.store import MemStateStore
from langgraph_memstate.graph.typed_node import enforce, typed_node
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.schemas import Constraint
from langgraph_memstate.storage.memory import InMemoryStorage
from langgraph_memstate.storage.sqlite import SQLiteStorage

if TYPE_CHECKING:
    from langgraph_memstate.storage.postgres import PostgresStorage
    from langgraph_memstate.storage.redis import RedisStorage

__all__ = [
    "Constraint",
    "Fact",
    "InMemoryStorage",
    "LogEntry",
    "MemStateCheckpointer",
    "MemStateError",
    "MemStateStore",
    "MemoryStore",
    "PostgresStorage",
    "RedisStorage",
    "RollbackNode",
    "SQLiteStorage",
    "TypedReducer",
    "enforce",
    "typed_node",
]


def __getattr__(name: str) -> Any:
    if name == "PostgresStorage":  # its driver is an extra, and takes a while to import
        from langgraph_memstate.storage.postgres import PostgresStorage

        return PostgresStorage
    if name == "RedisStorage":  # likewise
        from langgraph_memstate.storage.redis import RedisStorage

        return RedisStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
