"""What a Redis server promises to keep, as far as it says so."""

from __future__ import annotations

import logging
import time

import redis

from langgraph_memstate.errors import DatabaseOpenError, ReadOnlyError, StorageError
from langgraph_memstate.storage.redis_link import Away, Link, storage_error

logger = logging.getLogger("langgraph_memstate")

_PROMISES = {
    "always": None,
    "everysec": "appendfsync everysec: if its machine fails, up to a second of confirmed commits is lost",
    "no": "appendfsync no: if its machine fails, what the system had not yet written is lost, often half a minute",
}
_NOTHING = (
    "appendonly no: if it stops, confirmed commits since its last snapshot are lost; set appendonly yes and "
    "appendfsync always"
)
_UNKNOWN = "it does not say how often it syncs its append-only file, so nobody knows what survives its failure"


def check_server(link: Link, key: str) -> None:
    """Connect to the server that has a key, and warn where confirmed commits may be lost.

    Raises:
        DatabaseOpenError: the server would throw keys away to make room, or it cannot be reached.
    """
    _reach(link, key)
    said = _info(link)
    policy = said.get("maxmemory_policy", "")
    if policy.startswith("allkeys") and said.get("maxmemory", "0") != "0":
        raise DatabaseOpenError(
            f"the server throws away keys of its choice when its memory is full (maxmemory-policy {policy}), and with "
            "them the memory; set it to noeviction, or to a volatile policy"
        )
    if (promise := _promise(link, said)) is not None:
        logger.warning("Redis: %s", promise)


def _promise(link: Link, said: dict[str, str]) -> str | None:
    if said.get("aof_enabled") == "0":
        return _NOTHING
    try:
        answer = link.command("CONFIG", "GET", "appendfsync")
    except redis.ResponseError:
        return _UNKNOWN
    setting = answer[1].decode() if len(answer) == 2 else ""
    return _PROMISES.get(setting, _UNKNOWN)


def _reach(link: Link, key: str) -> None:
    try:
        link.locate(key)
    except Away as away:
        if not isinstance(away.cause, redis.BusyLoadingError):  # which is waited for later
            raise DatabaseOpenError(f"Redis cannot be reached: {away.cause}") from away.cause
    except redis.RedisError as error:
        raise storage_error(error, "opening") from error


def _info(link: Link) -> dict[str, str]:
    """What INFO says; nothing where it may not be asked."""
    try:
        text = link.persist(lambda: link.command("INFO"), "asking for the server's settings")
    except ReadOnlyError:
        return {}
    lines = text.decode(errors="replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def rewrite_append_only_file(link: Link, timeout: float) -> None:
    """Have the server write its append-only file anew, from what it holds now, and wait so many seconds for that."""
    deadline = time.monotonic() + timeout
    is_asked = False
    try:
        while (said := _info(link)).get("aof_enabled", "0") == "1":
            if said.get("aof_rewrite_in_progress") == said.get("aof_rewrite_scheduled") == "0":
                if is_asked:
                    return
                link.command("BGREWRITEAOF")
                is_asked = True
            if time.monotonic() > deadline:
                logger.warning("Redis is still rewriting its append-only file; until then that holds what was erased")
                return
            time.sleep(0.01)
    except (redis.ResponseError, StorageError, Away) as error:
        logger.warning("Redis does not rewrite its append-only file, which holds what was erased: %s", error)
