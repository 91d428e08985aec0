"""`from_conn_string` and `setup`, which users of the upstream savers and stores expect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

from langgraph_memstate.awaited import opened
from langgraph_memstate.memory import MemoryStore

Face = TypeVar("Face")


class Opening(Generic[Face]):
    """A context manager, sync and async, that opens a memory and hands out one face of it."""

    def __init__(self, open_memory: Callable[[], MemoryStore], face: Callable[[MemoryStore], Face]) -> None:
        self._open_memory = open_memory
        self._face = face
        self._memory: MemoryStore | None = None

    def __enter__(self) -> Face:
        self._memory = self._open_memory()
        try:
            return self._face(self._memory)
        except BaseException:
            self._memory.close()
            raise

    def __exit__(self, *exc: object) -> None:
        if self._memory is not None:
            self._memory.close()

    async def __aenter__(self) -> Face:
        return await opened(self.__enter__, lambda _: self.__exit__())

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.__exit__, *exc)


class ready:
    """The result of a `setup` with nothing left to do, whether it is called or awaited."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield
