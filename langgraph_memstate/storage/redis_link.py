"""Connections to Redis: one call at a time, and what an error means."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from langgraph_memstate.errors import (
    DatabaseOpenError,
    DiskFullError,
    ReadOnlyError,
    StorageError,
    TransientError,
)

logger = logging.getLogger("langgraph_memstate")

T = TypeVar("T")
Argument = str | bytes | int | float

_KEPT = 32  # connections; each is taken for one round trip
_CODES: dict[str, tuple[type[StorageError], str]] = {
    "OOM": (DiskFullError, "the server's memory is full (maxmemory); allow it more, or free some"),
    "MISCONF": (DiskFullError, "the server cannot write to its disk; free space there"),
    "READONLY": (ReadOnlyError, "the server is a replica and takes no writes; connect to the primary"),
    "NOPERM": (ReadOnlyError, "this user may not do that; allow it the memory's keys, and scripts"),
    "NOAUTH": (DatabaseOpenError, "the server asks for a password; put it into the URL"),
    "WRONGPASS": (DatabaseOpenError, "the server refuses this user; check name and password"),
    "WRONGTYPE": (DatabaseOpenError, "the keys of this name are another program's; choose another name"),
    "ASK": (TransientError, "the cluster moves keys; try again"),
    "CROSSSLOT": (DatabaseOpenError, "the keys of one memory are not on one slot"),
    "NOREPLICAS": (TransientError, "too few replicas are connected; try again"),
    "BUSY": (TransientError, "a script keeps the server busy; try again"),
    "TRYAGAIN": (TransientError, "the cluster moves keys; try again"),
    "CLUSTERDOWN": (TransientError, "the cluster is down; try again"),
    "MASTERDOWN": (TransientError, "the primary is down; try again"),
}
_CLASSES: dict[type[Exception], str] = {  # redis-py takes these codes off the text
    redis.exceptions.OutOfMemoryError: "OOM",
    redis.exceptions.ReadOnlyError: "READONLY",
    redis.exceptions.NoPermissionError: "NOPERM",
    redis.exceptions.AuthenticationError: "WRONGPASS",
    redis.exceptions.AuthenticationWrongNumberOfArgsError: "NOAUTH",
    redis.exceptions.AskError: "ASK",
    redis.exceptions.ClusterCrossSlotError: "CROSSSLOT",
    redis.exceptions.TryAgainError: "TRYAGAIN",
    redis.exceptions.ClusterDownError: "CLUSTERDOWN",
    redis.exceptions.MasterDownError: "MASTERDOWN",
}
_CODE = re.compile(rf"(?:^|[ -])({'|'.join(_CODES)})\b")  # a script wraps the error of a command it calls


class Away(Exception):
    """The server cannot be reached. `sent`: the call may have arrived all the same."""

    def __init__(self, cause: Exception, *, sent: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.sent = sent


class Script:
    """A Lua script that comes with this package."""

    def __init__(self, name: str) -> None:
        self.text = resources.files("langgraph_memstate.storage.lua").joinpath(name).read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


def storage_error(error: Exception, doing: str) -> StorageError:
    """The error of our tree that an answer of the server means."""
    text = str(error).strip().partition("\n")[0]
    found = _CODE.search(text)
    code = _CLASSES.get(type(error)) or (found[1] if found else None)
    if "user executing the script" in text:
        code = "NOPERM"
    if code is None:
        return StorageError(f"{doing}: {text}")
    kind, advice = _CODES[code]
    return kind(f"{doing}: {advice} ({text})")


class _Pool:
    """Connections to one server: as many as are in use at once, of which some are kept.

    redis-py's own pool has a lock that Python code takes and gives back: who is interrupted (Ctrl-C) between the two
    leaves all others waiting for ever. Here an interrupted caller loses its connection, and nothing else.
    """

    def __init__(self, url: str, timeout: float, place: Mapping[str, Any]) -> None:
        options: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        options["protocol"] = 2  # answers have the shape that every server gives them
        read = redis.ConnectionPool.from_url(url, **options)
        self.options = {**read.connection_kwargs, "decode_responses": False, "retry": Retry(NoBackoff(), 0), **place}
        self._make = functools.partial(read.connection_class, **self.options)
        self._idle: list[Any] = [self._make()]  # an option that there is not shows here
        self._kept = _KEPT

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """A connection, perhaps to be made yet. It is used again where the body gets an answer, or a refusal."""
        is_whole = False
        conn = self._take()
        try:
            yield conn
            is_whole = True
        except redis.ResponseError:
            is_whole = True
            raise
        finally:
            if is_whole and len(self._idle) < self._kept:
                self._idle.append(conn)
            else:
                conn.disconnect()

    def _take(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def disconnect(self) -> None:
        while self._idle:
            self._take().disconnect()

    def open(self) -> None:
        self._kept = _KEPT

    def close(self) -> None:
        """Disconnect; a connection that is in use now is not kept."""
        self._kept = 0
        self.disconnect()


def _connect(conn: Any) -> None:
    """Make a connection ready for a command: anew, where it was cut since, or holds what nobody has read."""
    conn.connect()
    try:
        is_stale = conn.can_read()
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        logger.debug("connecting again: %s", error)
        is_stale = True
    if is_stale:
        conn.disconnect()
        conn.connect()


class Link:
    """One Redis server, or the node of a Cluster that has the keys which are asked for.

    Args:
        url: as redis-py reads it: ``redis://``, ``rediss://`` or ``unix://``.
        timeout: seconds to wait for an answer, and for a server that is away to come back.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout
        self._seed = self._pool = self._connected()

    def _connected(self, **place: Any) -> _Pool:
        """A pool for the server that the URL names, or for another place."""
        try:
            return _Pool(self._url, self._timeout, place)
        except (ValueError, TypeError, redis.RedisError) as error:
            raise DatabaseOpenError(f"{self._url.partition('@')[2] or self._url}: {error}") from error

    def locate(self, key: str) -> None:
        """On a Cluster: connect to the node that has a key. Raises what `command` does."""
        try:
            self.command("EXISTS", key)
        except redis.exceptions.MovedError as moved:
            self._move(moved)

    def _move(self, moved: redis.exceptions.MovedError) -> None:
        """Connect to the node that a Cluster names; where it goes away, the URL's knows better."""
        place = {"host": moved.host, "port": moved.port}
        is_seed = place.items() <= self._seed.options.items()
        self._use(self._seed if is_seed else self._connected(**place))

    def _use(self, pool: _Pool) -> None:
        before, self._pool = self._pool, pool
        if before not in (pool, self._seed):
            before.close()

    def run(
        self, script: Script, keys: Sequence[str], *arguments: Argument, wait: tuple[int, int] | None = None
    ) -> Any:
        """One round trip: what a script answers, and with `wait` what ``WAIT`` says on the same connection.

        Raises:
            Away: there was no answer.
            redis.ResponseError: the server refuses.
        """

        def call(conn: Any) -> Any:
            rest = (len(keys), *keys, *arguments)
            try:
                conn.send_command("EVALSHA", script.digest, *rest)
                answer = conn.read_response()
            except redis.exceptions.NoScriptError:
                conn.send_command("EVAL", script.text, *rest)
                answer = conn.read_response()
            if wait is None:
                return answer
            conn.send_command("WAIT", *wait)
            return answer, conn.read_response()

        return self._with_connection(call)

    def command(self, *parts: Argument) -> Any:
        """A command and its answer; raises as `run` does."""

        def call(conn: Any) -> Any:
            conn.send_command(*parts)
            return conn.read_response()

        return self._with_connection(call)

    def _with_connection(self, call: Callable[[Any], T]) -> T:
        with self._pool.connection() as conn:
            try:
                _connect(conn)
            except redis.AuthenticationError:
                raise
            except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
                raise Away(error, sent=False) from error
            try:
                return call(conn)
            except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
                raise Away(error, sent=True) from error

    def persist(self, call: Callable[[], T], doing: str, *, writes: bool = False) -> T:
        """Call until the server answers. A call that may have arrived is made again: it must bear that.

        Raises:
            TransientError: it stays away.
            StorageError: it refuses.
        """
        deadline = time.monotonic() + self._timeout
        pause, sent, is_demoted = 0.01, False, False
        while True:
            try:
                return call()
            except redis.exceptions.MovedError as moved:
                self._move(moved)
                cause: Exception = moved
                failure: StorageError = TransientError(f"{doing}: the cluster moves the memory; try again ({moved})")
            except Away as away:
                self._use(self._seed)
                sent = sent or away.sent
                outcome = "it landed whole or not at all" if sent else "nothing landed"
                cause = away.cause
                failure = TransientError(
                    f"{doing}: the server cannot be reached{f', and {outcome}' if writes else ''} ({cause})"
                )
            except redis.RedisError as error:
                cause, failure = error, storage_error(error, doing)
                if isinstance(failure, ReadOnlyError) and not is_demoted:
                    is_demoted = True  # after a failover, the address may be another server's
                    self._pool.disconnect()
                elif not isinstance(failure, TransientError):
                    raise failure from error
            if time.monotonic() + pause > deadline:
                raise failure from cause
            time.sleep(pause)
            pause = min(pause * 2, 0.5)

    def open(self) -> None:
        """Keep connections, again where it was closed."""
        self._seed.open()
        self._pool.open()

    def close(self) -> None:
        self._pool.close()
        self._seed.close()
