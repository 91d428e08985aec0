"""The async face: every blocking method has a twin that can be awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar


class Runs(Protocol):
    """What has threads for its blocking calls."""

    async def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any: ...


M = TypeVar("M", bound=Runs)
P = ParamSpec("P")
T = TypeVar("T")


def awaited(method: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], Coroutine[Any, Any, T]]:
    """The same method as a coroutine; a subclass that overrides the method changes its twin as well."""
    name = method.__name__

    async def twin(self: M, /, *args: P.args, **kwargs: P.kwargs) -> T:
        found: T = await self.run(getattr(self, name), *args, **kwargs)
        return found

    functools.update_wrapper(twin, method)
    twin.__name__ = f"a{name}"
    twin.__qualname__ = f"{method.__qualname__.removesuffix(name)}a{name}"
    return twin


async def opened(open_it: Callable[[], T], close: Callable[[T], object]) -> T:
    """What `open_it` opens, in a thread. If the await is cancelled, nobody has it, and it is closed once it is open."""

    def close_opened(opening: Future[T]) -> None:
        if opening.exception() is None:
            close(opening.result())

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memstate-open")
    opening = executor.submit(open_it)
    executor.shutdown(wait=False)
    try:
        return await asyncio.shield(asyncio.wrap_future(opening))
    except asyncio.CancelledError:
        opening.add_done_callback(close_opened)
        raise


def is_own(method: object, original: object) -> bool:
    """Whether calling a bound method calls `original`, which nothing overrides or wraps."""
    return getattr(method, "__func__", None) is original


def on_event_loop() -> bool:
    """Whether this thread runs an event loop, which blocking calls would hold up."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
