"""Which storage a URL names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from langgraph_memstate.errors import DatabaseOpenError
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.memory import InMemoryStorage
from langgraph_memstate.storage.sqlite import SQLiteStorage


def storage_at(url: str | Path) -> Storage:
    """The storage, not opened yet, of a path, ``sqlite:///path``, ``:memory:``, ``postgresql://…`` or ``redis://…``.

    A Redis server holds several memories; ``?name=`` says which.
    """
    if not isinstance(url, str | Path) or "\0" in str(url):
        raise DatabaseOpenError(f"{url!r} names no file; give a path, sqlite:///path or :memory:")
    text = str(url)
    if text == ":memory:":
        return InMemoryStorage()
    scheme, colon, rest = text.partition("://")
    if not colon:
        if not text:
            raise DatabaseOpenError("the URL is empty; give a path, sqlite:///path or :memory:")
        return SQLiteStorage(text)
    if scheme == "sqlite":
        path = rest[1:] if rest.startswith("/") else rest
        if path in ("", ":memory:"):
            return InMemoryStorage()
        return SQLiteStorage(path)
    if scheme in ("postgresql", "postgres"):
        return _postgres(text)
    if scheme in ("redis", "rediss"):
        return _redis(text)
    raise DatabaseOpenError(
        f"{scheme}:// is no scheme this release opens; there are a path, sqlite:///, :memory:, postgresql://, redis:// "
        "and rediss://"
    )


def _postgres(url: str) -> Storage:
    try:
        from langgraph_memstate.storage.postgres import PostgresStorage
    except ImportError as error:
        raise DatabaseOpenError(f"{url.partition(':')[0]}://: {error}") from error
    return PostgresStorage(url)


def _redis(url: str) -> Storage:
    try:
        from langgraph_memstate.storage.redis import RedisStorage
    except ImportError as error:
        raise DatabaseOpenError(f"{url.partition(':')[0]}://: {error}") from error
    address, _, query = url.partition("?")
    options = parse_qsl(query, keep_blank_values=True)
    names = [value for option, value in options if option == "name"]
    rest = urlencode([(option, value) for option, value in options if option != "name"])
    address = f"{address}?{rest}" if rest else address
    return RedisStorage(address, name=names[-1]) if names else RedisStorage(address)
