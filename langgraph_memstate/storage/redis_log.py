"""The log of commits that Redis holds, and the image that stands for its beginning.

A memory has three keys on one slot: a list of entries, a hash that says where the list begins and ends, and a list of
the chunks of the image. An entry is its format (one byte), the id of the entry before it, its own id (16 bytes each),
and the packed commits. So a reader sees whether what follows is the continuation of what it holds, and a writer whose
connection broke sees whether its entry is there.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from langgraph_memstate.errors import (
    CorruptRowError,
    DatabaseOpenError,
    LostCommitsError,
    NewerSchemaError,
    TransientError,
)
from langgraph_memstate.storage.op_codec import pack, unpack
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.packing import packed, unpacked
from langgraph_memstate.storage.redis_link import Link, Script

FORMAT = 1
LARGEST = 500_000_000  # bytes; Redis takes no longer value than 512 MiB
_MOST = 128  # entries in one answer
_UPLOAD = 60  # seconds that the chunks of an image may stay without being claimed
_CLAIM = 300  # seconds that one process has for making an image
_NAME = re.compile(r"[^\0-\x1f\x7f{}]{1,200}")
_OPEN, _STEP, _IMAGE = Script("open.lua"), Script("step.lua"), Script("image.lua")

Mark = tuple[int, ...]


class Position(NamedTuple):
    """A place in the log: how many entries lie before it, the id of the last of them, and the bytes of all of them."""

    number: int
    last: bytes
    size: int


START = Position(0, bytes(16), 0)


def position_in(text: str | None) -> Position:
    """The position that a copy of the memory notes; None: it has followed nothing."""
    if text is None:
        return START
    try:
        number, last, size = text.split()
        return Position(int(number), bytes.fromhex(last), int(size))
    except ValueError as error:
        raise CorruptRowError(f"the copy does not say how far it has followed the log: {error}") from error


class ImageReplaced(Exception):
    """Another image has taken the place of the one that is read."""


class Entry(NamedTuple):
    """Commits that landed together.

    `now` is when (seconds since 1970), `mark` what the next ids were afterwards: whoever runs them again must find the
    same.
    """

    before: bytes
    id: bytes
    now: float
    mark: Mark
    commits: Sequence[Commit]


class Head(NamedTuple):
    """What the hash says. `trimmed` entries are in the image alone."""

    length: int
    last: bytes
    size: int
    trimmed: int
    trimmed_size: int
    image: str
    chunks: int
    image_size: int


class Answer(NamedTuple):
    """What the log says to one who is at a position; `entries` follow it. `acknowledged`: by how many replicas."""

    status: str
    head: Head
    entries: tuple[bytes, ...] = ()
    acknowledged: int | None = None


def dump_entry(before: bytes, id: bytes, now: float, mark: Mark, dumped: Sequence[bytes]) -> bytes:
    """`dumped`: what `op_codec.dump_commit` made of each commit."""
    return bytes([FORMAT]) + before + id + packed(pack((now, *mark), dumped))


def load_entry(stored: bytes, marks: int) -> Entry:
    """The inverse of `dump_entry`.

    Raises:
        NewerSchemaError: a newer release wrote it.
        CorruptRowError: it is none of ours.
    """
    if len(stored) < 33:
        raise CorruptRowError("an entry of the log is cut off")
    if stored[0] != FORMAT:
        raise NewerSchemaError(
            f"an entry of the log has format {stored[0]}; this release knows {FORMAT}. Upgrade langgraph-memstate"
        )
    (now, *mark), commits = unpack(unpacked(stored[33:]), 1 + marks)
    return Entry(stored[1:17], stored[17:33], now, tuple(map(int, mark)), commits)


def entry_ids(stored: bytes) -> tuple[bytes, bytes]:
    """The id of the entry before, and its own."""
    return stored[1:17], stored[17:33]


class RedisLog:
    """One memory's log. Every call is one round trip, and made again while the server is away.

    Args:
        name: of the memory; its keys are ``{memstate:name}:…``, so that a Cluster keeps them on one slot.
        wait: how many replicas have to confirm an entry, and for how many milliseconds to wait for them.
    """

    def __init__(self, link: Link, name: str, wait: tuple[int, int] | None = None) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DatabaseOpenError(f"{name!r} is no name of a memory: 1 to 200 characters, without braces")
        self._link = link
        self._name = name
        self._wait = wait
        self._tag = f"{{memstate:{name}}}:"
        self.key = self._tag + "head"
        self._keys = (self.key, self._tag + "log")
        self.store_id = ""

    def exists(self) -> bool:
        return bool(self._link.persist(lambda: self._link.command("EXISTS", self.key), "looking for the log"))

    def open(self, store_id: str) -> Answer:
        """Find the log, or begin one with this id.

        Raises:
            DatabaseOpenError: the keys are another program's.
            NewerSchemaError: a newer release wrote them.
        """
        answer = self._link.persist(lambda: self._link.run(_OPEN, self._keys, FORMAT, store_id), "opening the log")
        if answer[0] != b"open":
            raise DatabaseOpenError(
                f"{self._keys[0]} is not the head of a memory: the keys of {self._name!r} are another program's, or "
                "the server has lost one of them; choose another name, or restore the server from a backup"
            )
        format_, store, *rest = answer[1]
        if format_ != b"%d" % FORMAT:
            raise NewerSchemaError(
                f"the memory {self._name!r} has format {format_.decode()}; this release knows {FORMAT}. "
                "Upgrade langgraph-memstate to open it"
            )
        self.store_id = store.decode()
        return Answer("open", _head(rest))

    def look(self, at: Position) -> Answer:
        """What follows a position."""

        def step() -> Any:
            return self._link.run(_STEP, self._keys, self.store_id, at.number, at.last, _MOST)

        return self._answer(at, self._link.persist(step, "reading the log"))

    def append(self, at: Position, id: bytes, entry: bytes) -> Answer:
        """Append an entry if the log ends there; `appended`, or what follows instead.

        A lost answer is asked for again, with the same entry, which lands once.
        """

        tries = 0

        def step() -> Any:
            nonlocal tries
            tries += 1
            return self._link.run(
                _STEP, self._keys, self.store_id, at.number, at.last, _MOST, entry, id, wait=self._wait
            )

        reply = self._link.persist(step, "committing", writes=True)
        acknowledged = None
        if self._wait is not None:
            reply, acknowledged = reply
        answer = self._answer(at, reply)
        if answer.status == "trimmed" and tries > 1:
            raise TransientError(
                "committing: the connection was lost, and others have trimmed the log since; the commit landed whole "
                "or not at all"
            )
        return answer._replace(acknowledged=acknowledged)

    def _answer(self, at: Position, reply: Any) -> Answer:
        """Raises: LostCommitsError: the log is not the one that the caller knows."""
        status, (_, store, *rest), entries = reply
        if status == b"torn":
            raise self._torn()
        if status == b"lost" or (entries and entry_ids(entries[0])[0] != at.last):
            there = "nothing" if store is None else f"{int(rest[0])} entries"
            raise LostCommitsError(
                f"the server has lost commits of the memory {self._name!r} that it had confirmed: this process has "
                f"seen {at.number} entries of its log, and the server holds {there}, or others. It was restarted "
                "without its append-only file, failed over to a replica that was behind, or was flushed. Restore it "
                "from a backup, or open the memory again to go on with what it holds"
            )
        return Answer(status.decode(), _head(rest), tuple(entries))

    def _torn(self) -> LostCommitsError:
        return LostCommitsError(
            f"the server has lost entries of the log of the memory {self._name!r}, or the image of its beginning: a "
            "key of it was evicted, deleted or cut. Restore the server from a backup"
        )

    # -- images -------------------------------------------------------------------------------------

    def claims_image(self) -> bool:
        """Whether this process is to make the next image."""
        return self._link.persist(
            lambda: self._link.command("SET", self._tag + "imaging", "1", "NX", "EX", _CLAIM), "claiming an image"
        ) is not None  # fmt: skip

    def put_image(self, at: Position, head: Head, chunks: Iterable[bytes]) -> bool:
        """Store an image of a position and drop what lies before it; False where there is a later one."""
        name = os.urandom(8).hex()
        key = self._image_key(name)
        count = size = 0
        for chunk in chunks:
            self._upload(key, count, chunk)
            count, size = count + 1, size + len(chunk)
        keys = (*self._keys, key, self._image_key(head.image), self._tag + "imaging")
        given = (self.store_id, at.number, at.last, at.size, name, count, size, head.image)
        return bool(self._link.persist(lambda: self._link.run(_IMAGE, keys, *given), "storing an image") == b"landed")

    def _upload(self, key: str, count: int, chunk: bytes) -> None:
        """Append a chunk once, though it may be sent twice.

        Raises:
            TransientError: the chunks before it are not there, or one of them twice, which arrived late.
        """
        is_sent = False

        def send() -> None:
            nonlocal is_sent
            held = self._link.command("LLEN", key)
            if held == count:
                is_sent = True
                self._link.command("RPUSH", key, chunk)
            elif not is_sent:
                raise TransientError(f"storing an image: {held} of {count} chunks are there; it is made anew later")
            self._link.command("EXPIRE", key, _UPLOAD)

        self._link.persist(send, "storing an image")

    def image(self, head: Head) -> Iterator[bytes]:
        """The chunks of the image.

        Raises:
            ImageReplaced: there is another one by now.
        """
        key = self._image_key(head.image)
        for number in range(head.chunks):
            found = self._link.persist(functools.partial(self._link.command, "LINDEX", key, number), "reading an image")
            if found is None:
                raise ImageReplaced
            yield found

    def check_replaced(self, head: Head) -> None:
        """Raises: LostCommitsError: the image that this head names is still the one, and it is gone."""
        fields = self._link.persist(lambda: self._link.command("HMGET", self.key, "store", "image"), "reading the log")
        if fields == [self.store_id.encode(), head.image.encode()]:
            raise self._torn()

    def _image_key(self, name: str) -> str:
        return f"{self._tag}image:{name}"


def _head(fields: Sequence[bytes]) -> Head:
    try:
        length, last, size, trimmed, trimmed_size, image, chunks, image_size = fields
        return Head(
            int(length), last, int(size), int(trimmed), int(trimmed_size), image.decode(), int(chunks), int(image_size)
        )
    except (TypeError, ValueError) as error:
        raise CorruptRowError(f"the head of the log is damaged: {error}") from error
