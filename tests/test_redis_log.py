"""A log that many follow: every copy holds the same rows, whatever it began with, and the log stays short."""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "crash"))
from audit import rows_of
from truth import python

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import CorruptRowError, DatabaseOpenError, LostCommitsError, StorageError, TransientError
from langgraph_memstate.facts import Origin
from langgraph_memstate.storage.operations import (
    Append,
    Commit,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    Forget,
    Op,
    OutboxDone,
    OutboxFailed,
    Prepare,
    PutEmbeddings,
    PutIndexMeta,
    PutVectors,
    QueueIndex,
    RebuildIndex,
    Settle,
    Stage,
    Touch,
    Unstage,
)
from langgraph_memstate.storage.values import Blob, EmbeddingRow, PreparedRow, VectorRow
from langgraph_memstate.testing.samples import (
    NOTES,
    NOW,
    append,
    checkpoint,
    delete,
    elements,
    listed,
    put,
    step,
    writes,
)

pytest.importorskip("redis", reason="the extra [redis] is not installed")

from line import When
from redis_proxy import CHUNK, IMAGE, line_to
from redis_server import Server

from langgraph_memstate import RedisStorage
from langgraph_memstate.storage import redis as module
from langgraph_memstate.storage.redis_log import load_entry
from langgraph_memstate.storage.redis_view import MARKS

INDEX = "vectors"


@pytest.fixture
def name(redis_server: Server) -> Iterator[str]:
    with redis_server.memory() as fresh:
        yield fresh


def note(key: str, **payload: Any) -> Fact:
    return Fact("note", payload or {"text": key}, id=key)


def rows(storage: RedisStorage) -> Any:
    """Every row of a copy that has followed the log to its end."""
    storage._refresh()
    return rows_of(storage._view._path)


def opened(server: Server, name: str, **options: Any) -> RedisStorage:
    storage = server.storage(name, **options)
    storage.open()
    return storage


def held(server: Server, name: str) -> dict[str, int]:
    """Entries in the list, and chunks of the image."""
    with server.connect() as client:
        head = client.hgetall(f"{{memstate:{name}}}:head")
        assert client.llen(f"{{memstate:{name}}}:log") == int(head[b"length"]) - int(head[b"trimmed"])
        return {key: int(head[key.encode()]) for key in ("length", "trimmed", "chunks")}


# -- copies -----------------------------------------------------------------------------------------


def random_commit(rng: random.Random, storage: RedisStorage) -> Commit:
    """A few operations of any kind on few names, so that they meet; some are refused."""

    def thread() -> str:
        return rng.choice(("t", "u", "v"))

    def number() -> int:
        return rng.randrange(1, 6)

    def drafts() -> tuple[Any, ...]:
        ns = rng.choice((NOTES, ("x", "y")))
        written = put(rng.choice("abc"), {"n": rng.random()}, ttl=rng.choice((None, 0.5)), ns=ns)
        made = [written, delete(rng.choice("abc"))]
        return tuple(rng.sample(made, rng.randrange(1, 3)))

    def one() -> list[Op]:
        fresh = rng.randbytes(3)
        held: Any = {"lists": {"l": (fresh.hex(), listed(fresh, b"1"))}, "elements": elements(fresh, b"1")}
        values = {"a": Blob("b", rng.randbytes(60))}
        draft = put(rng.choice("abc"), origin=Origin(thread_id=thread()))
        vectors = tuple(VectorRow(INDEX, f"{draft.version}{ord}", draft.version, ord, fresh) for ord in range(2))
        with storage._view.snapshot() as reader:
            waiting = tuple(reader.outbox(INDEX, due=None, limit=100))
        some = tuple(rng.sample(waiting, min(len(waiting), 3)))
        return rng.choice(
            [
                [Append(drafts(), ())],
                [Append(drafts(), (INDEX,))],
                [Append((draft,), (INDEX,)), PutEmbeddings((EmbeddingRow("m", fresh, b"\0" * 8),)),
                 PutVectors(vectors, frozenset([INDEX]) if rng.random() < 0.5 else frozenset())],
                [checkpoint(number(), values, thread_id=thread(), run_id=rng.choice("rs"), **held)],
                [writes(number(), rng.choice("xy"), (0, "a", fresh), (-1, "b", fresh), thread_id=thread())],
                [Stage(step(number(), thread()), rng.choice("xy"), "", drafts())],
                [Unstage(step(number(), thread()))],
                [Drain(step(number(), thread()), frozenset(["unknown", "others"]))],
                [Prepare(PreparedRow(fresh.hex(), INDEX, ("p", "q"), "me", NOW))],
                [Settle("nobody's")],
                [Append(drafts()), Settle("nobody's")],
                [OutboxDone(some)],
                [OutboxFailed(tuple(row.id for row in some), "why", rng.choice((None, NOW)))],
                [QueueIndex(INDEX, tuple(row.vector_id for row in some), ("gone",))],
                [RebuildIndex(INDEX)],
                [PutIndexMeta(rng.choice((INDEX, "other")), "m", 2, number())],
                [Touch(((NOTES, "a"),), NOW + number())],
                [Forget(NOTES, rng.choice("abc"))],
                [CopyThread(thread(), thread())],
                [DeleteThread(thread())],
                [DeleteRuns((rng.choice("rs"),))],
                [DeleteCheckpoints((step(number(), thread()), step(number(), thread())))],
            ]
        )  # fmt: skip

    return tuple(op for _ in range(rng.randrange(1, 4)) for op in one())


@pytest.mark.parametrize("seed", range(3))
def test_all_copies_hold_the_same_rows(redis_server: Server, name: str, seed: int, tmp_path: Path) -> None:
    """Byte for byte, ids included: three write at once, one reads along, and others come when all is over."""
    landed: list[int] = []
    with ExitStack() as stack:

        def another(**options: Any) -> RedisStorage:
            storage = opened(redis_server, name, **options)
            stack.callback(storage.close)
            return storage

        writers = [another(), another(), another(replica=tmp_path / "replica.db")]
        reading = another()

        def write(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            for _ in range(60):
                group = [random_commit(rng, writers[number]) for _ in range(rng.randrange(1, 4))]
                outcomes = writers[number].apply(group)
                assert all(outcome is None or isinstance(outcome, StorageError) for outcome in outcomes)
                landed.append(outcomes.count(None))
                if rng.random() < 0.2:
                    rows(reading)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(write, range(3)))
        last = put("z")
        (outcome,) = writers[0].apply(((
            Append((last,), (INDEX,)), PutVectors((VectorRow(INDEX, "z", last.version, 0, b"z"),), frozenset([INDEX])),
            checkpoint(9, {"a": Blob("b", b"1")}, lists={"l": ("z", listed(b"z"))}, elements=elements(b"z")),
            Stage(step(9), "z", "", (put("later"),)), writes(9, "z", (0, "a", b"")),
            PutEmbeddings((EmbeddingRow("m", b"z", b""),)), Prepare(PreparedRow("z", INDEX, ("z",), "me", NOW)),
        ),))  # fmt: skip
        assert outcome is None
        first = rows(writers[0])
        assert sum(landed) > 100
        assert all(found for table, found in first.items() if table != "indexes")
        for storage in (*writers[1:], reading, another()):
            assert rows(storage) == first
        writers[0]._store_image()
        assert held(redis_server, name)["length"] == held(redis_server, name)["trimmed"]
        later = another()
        assert rows(later) == first
        write(0)
        assert rows(later) == rows(writers[2]) == rows(writers[0]) != first
        writers[1].close()
        writers[2].close()


def test_a_copy_that_differs_is_noticed(redis_server: Server, name: str) -> None:
    """As it might if another release ran the same operation in another way."""
    one, other = opened(redis_server, name), opened(redis_server, name)
    append(one, put("a"))
    rows(other)
    other._view._writer.execute("INSERT INTO vectors VALUES (7, 'v', 'i', 0, 'x', X'00')")  # type: ignore[union-attr]
    append(one, put("b"))
    with pytest.raises(CorruptRowError, match="same release"), other.snapshot():
        pytest.fail("it was read")
    with pytest.raises(CorruptRowError):
        append(other, put("c"))
    one.close()
    other.close()


def test_a_refusal_is_one_by_the_latest(redis_server: Server, name: str) -> None:
    """What a copy that is behind would refuse, and what it would take for done, is asked of the log first."""
    one, other = opened(redis_server, name), opened(redis_server, name)
    append(one, put("a"))
    append(other, put("b"))
    (outcome,) = one.apply(((Prepare(PreparedRow("p", INDEX, (), "me", NOW)),),))
    assert outcome is None
    (outcome,) = other.apply(((Settle("p"),),))
    assert outcome is None
    append(one, put("c"))
    (outcome,) = other.apply(((Forget(NOTES, "c"),),))
    assert outcome is None
    with one.snapshot() as reader:
        assert [entry.forgotten for entry in reader.log()] == [False, False, True]
    one.close()
    other.close()


def test_a_copy_that_cannot_be_written_follows_later(
    redis_server: Server, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The commit is in the log by then, so it has landed."""
    with MemoryStore(redis_server.storage(name)) as memory:
        memory.commit(note("a"))

        def full(*_: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(memory.storage._view, "commit", full)  # type: ignore[attr-defined]
        memory.commit(note("b"))
        assert "disk is full" in caplog.text
        with pytest.raises(StorageError, match="disk is full"):
            memory.get("note", "b")
        monkeypatch.undo()
        assert [entry.key for entry in memory.log()] == ["a", "b"]


# -- images -----------------------------------------------------------------------------------------


def test_the_log_stays_short(redis_server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGE_AFTER", 20_000)
    with MemoryStore(redis_server.storage(name)) as sleeping, MemoryStore(redis_server.storage(name)) as memory:
        memory.commit(note("first"))
        assert sleeping.get("note", "first")
        with ExitStack() as stack:
            reader = stack.enter_context(sleeping.storage.snapshot())
            for number in range(200):
                memory.commit(note(f"{number}", text=os.urandom(100).hex()))
            assert reader.last_seq() == 1
        memory.storage.close()
        log = held(redis_server, name)
        assert log["length"] > log["trimmed"] > 0
        assert log["length"] - log["trimmed"] < 150
        assert reader is not None
        with MemoryStore(redis_server.storage(name)) as fresh:
            assert len(list(fresh.log())) == 201
            assert list(fresh.log()) == list(sleeping.log())  # which had fallen behind the image
            fresh.commit(note("last"))
            assert [entry.key for entry in sleeping.log()][-1] == "last"
        with redis_server.connect() as client:
            found = {key.decode() for key in client.scan_iter(f"{{memstate:{name}}}:*")}
            assert len(found) == 3, found  # head, log and one image


def test_a_large_image_comes_in_chunks(redis_server: Server, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.storage.redis_view._CHUNK", 30_000)
    with MemoryStore(redis_server.storage(name)) as memory:
        memory.commit([note(f"{number}", text=os.urandom(1_000).hex()) for number in range(2_000)])
        memory.storage._store_image()  # type: ignore[attr-defined]
        assert held(redis_server, name)["chunks"] > 3
        with MemoryStore(redis_server.storage(name)) as fresh:
            assert list(fresh.log()) == list(memory.log())


def test_an_image_that_is_replaced_while_it_is_read(redis_server: Server, name: str) -> None:
    with MemoryStore(redis_server.storage(name)) as memory:
        memory.commit(note("a"))
        memory.storage._store_image()  # type: ignore[attr-defined]
        late = redis_server.storage(name)
        inner = late._log.image
        replaced: list[int] = []

        def image(head: Any) -> Iterator[bytes]:
            if not replaced:
                replaced.append(1)
                memory.commit(note("b"))
                memory.storage._store_image()  # type: ignore[attr-defined]
            return inner(head)

        late._log.image = image  # type: ignore[method-assign]
        with MemoryStore(late) as fresh:
            assert [entry.key for entry in fresh.log()] == ["a", "b"]
        assert replaced


def test_an_outdated_image_is_not_stored(redis_server: Server, name: str) -> None:
    one, other = opened(redis_server, name), opened(redis_server, name)
    append(one, put("a"))
    rows(other)
    with other._view.snapshot() as reader:
        before = reader.meta("log")
    append(one, put("b"))
    one._store_image()
    image = held(redis_server, name)
    other._store_image()  # of the position it has followed to
    assert held(redis_server, name) == image
    with other._view.snapshot() as reader:
        assert reader.meta("log") == before
    assert rows(other) == rows(one)
    one.close()
    other.close()


@pytest.mark.parametrize("starts", [CHUNK, IMAGE], ids=["chunk", "image"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_image_whose_answer_was_lost_is_there(
    redis_server: Server, name: str, monkeypatch: pytest.MonkeyPatch, starts: bytes, when: When
) -> None:
    monkeypatch.setattr("langgraph_memstate.storage.redis_view._CHUNK", 1_000)
    with line_to(redis_server.port) as line, MemoryStore(RedisStorage(line.url, name=name)) as memory:
        line.starts = starts
        for number in range(3):  # an image takes the place of none, then of the one before
            memory.commit(note(f"{number}", text=os.urandom(3_000).hex()))
            line.breaks = None if number == 0 else when
            memory.storage._store_image()  # type: ignore[attr-defined]
        assert line.broken == 2
        assert held(redis_server, name)["trimmed"] == 3
        with MemoryStore(redis_server.storage(name)) as fresh:
            assert list(fresh.log()) == list(memory.log())


def test_a_chunk_that_arrived_twice_is_noticed(redis_server: Server, name: str) -> None:
    with MemoryStore(redis_server.storage(name)) as memory, redis_server.connect() as client:
        log = memory.storage._log  # type: ignore[attr-defined]
        key = f"{{memstate:{name}}}:image:x"
        log._upload(key, 0, b"a")
        client.rpush(key, b"a")  # sent before a connection broke, and held up on its way
        with pytest.raises(TransientError, match="2 of 1 chunks"):
            log._upload(key, 1, b"b")
        assert client.lrange(key, 0, -1) == [b"a", b"a"]


def test_an_image_that_is_gone_is_lost(redis_server: Server, name: str) -> None:
    with MemoryStore(redis_server.storage(name)) as memory, redis_server.connect() as client:
        memory.commit(note("a"))
        memory.storage._store_image()  # type: ignore[attr-defined]
        (key,) = client.scan_iter(f"{{memstate:{name}}}:image:*")
        client.delete(key)
        with pytest.raises(LostCommitsError, match="image"):
            MemoryStore(redis_server.storage(name))
        assert [entry.key for entry in memory.log()] == ["a"]  # who has followed so far has all of it


def test_a_damaged_image_is_named(redis_server: Server, name: str) -> None:
    with MemoryStore(redis_server.storage(name)) as memory, redis_server.connect() as client:
        memory.commit(note("a"))
        memory.storage._store_image()  # type: ignore[attr-defined]
        (key,) = client.scan_iter(f"{{memstate:{name}}}:image:*")
        whole = client.lindex(key, 0)
        for bad in (b"", whole[:-9], b"x" + whole, zlib.compress(b"SQLite format 3\0")):
            client.lset(key, 0, bad)
            with pytest.raises(StorageError):
                MemoryStore(redis_server.storage(name))
        client.lset(key, 0, whole)
        MemoryStore(redis_server.storage(name)).close()


# -- erasing ----------------------------------------------------------------------------------------


def test_what_is_forgotten_is_nowhere_in_redis(redis_server: Server, name: str, tmp_path: Path) -> None:
    secret = "the secret of " + os.urandom(8).hex()
    with (
        MemoryStore(redis_server.storage(name)) as memory,
        MemoryStore(redis_server.storage(name, replica=tmp_path / "replica.db")) as other,
        redis_server.connect() as client,
    ):
        memory.commit(note("kept", text="harmless"))
        memory.commit(note("a", text=secret))
        memory.commit(note("a", text=secret + " again"))
        memory.storage._store_image()  # type: ignore[attr-defined]
        memory.commit(note("b", text=secret))
        assert other.get("note", "a")
        stored = [client.lindex(f"{{memstate:{name}}}:log", -1)]
        (image,) = client.scan_iter(f"{{memstate:{name}}}:image:*")
        stored.append(client.lindex(image, 0))
        assert secret.encode() in contents(client, name)
        append_only = redis_server.folder / "appendonly.aof"
        assert all(part in append_only.read_bytes() for part in stored)

        memory.forget("note", "a")
        memory.forget("note", "b")
        assert secret.encode() not in contents(client, name)
        assert not any(part in append_only.read_bytes() for part in stored)
        assert [entry.key for entry in other.log() if entry.forgotten] == ["a", "a", "b"]
        assert memory.get("note", "kept").payload == {"text": "harmless"}
        for file in (*tmp_path.iterdir(), *memory.storage._folder.iterdir(), *other.storage._folder.iterdir()):  # type: ignore[attr-defined]
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_who_erases_and_dies_is_helped(redis_server: Server, name: str) -> None:
    """The erasure has landed, and what it erased is still in the log: whoever opens the memory next tidies up."""
    with MemoryStore(redis_server.storage(name)) as memory, redis_server.connect() as client:
        memory.commit(note("a", text="the secret"))
        (outcome,) = memory.storage.apply(((Append((delete("a", ns=("note",)),)), Forget(("note",))),))
        assert outcome is None
        assert b"the secret" in contents(client, name)
        MemoryStore(redis_server.storage(name)).close()
        assert b"the secret" not in contents(client, name)
        assert [entry.forgotten for entry in memory.log()] == [True, False]


def contents(client: Any, name: str) -> bytes:
    """All that Redis holds of a memory, unpacked."""
    found = []
    for entry in client.lrange(f"{{memstate:{name}}}:log", 0, -1):
        found.append(repr(load_entry(entry, MARKS)).encode())
    for key in client.scan_iter(f"{{memstate:{name}}}:image:*"):
        found.append(zlib.decompress(b"".join(client.lrange(key, 0, -1))))
    return b"".join(found)


# -- files ------------------------------------------------------------------------------------------


def test_a_file_is_taken_up_where_it_ended(redis_server: Server, name: str, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "replica.db"
    with MemoryStore(redis_server.storage(name)) as memory:
        with MemoryStore(redis_server.storage(name, replica=file)) as kept:
            memory.commit(note("a"))
            assert kept.get("note", "a")
        memory.commit(note("b"))
        storage = redis_server.storage(name, replica=file)
        replayed: list[int] = []
        inner = storage._replay
        storage._replay = lambda view, at, answer: (replayed.append(len(answer.entries)), inner(view, at, answer))[1]  # type: ignore[method-assign]
        with MemoryStore(storage) as kept:
            assert [entry.key for entry in kept.log()] == ["a", "b"]
            assert replayed == [1]
        memory.storage._store_image()  # type: ignore[attr-defined]
        memory.commit(note("c"))
    with MemoryStore(redis_server.storage(name, replica=file)) as kept:  # it fell behind the image
        assert [entry.key for entry in kept.log()] == ["a", "b", "c"]


def test_a_file_that_is_no_copy_is_left_alone(redis_server: Server, name: str, tmp_path: Path) -> None:
    with MemoryStore(SQLiteStorage(tmp_path / "own.db")) as own:
        own.commit(note("mine"))
    (tmp_path / "text").write_text("no database" * 100)
    with redis_server.memory() as another:
        with MemoryStore(redis_server.storage(another, replica=tmp_path / "another.db")) as memory:
            memory.commit(note("other"))
        for file in ("own.db", "another.db", "text"):
            before = (tmp_path / file).read_bytes()
            with pytest.raises(DatabaseOpenError):
                MemoryStore(redis_server.storage(name, replica=tmp_path / file))
            assert (tmp_path / file).read_bytes() == before


# -- many at once -----------------------------------------------------------------------------------

WRITE = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from langgraph_memstate import Fact, MemoryStore, RedisStorage
from langgraph_memstate.storage import redis
redis.IMAGE_AFTER = 20_000
replica = sys.argv[4] or None
with MemoryStore(RedisStorage(sys.argv[1], name=sys.argv[2], replica=replica)) as memory, ThreadPoolExecutor(4) as pool:
    def write(number):
        memory.commit(Fact("note", {"text": "x" * 100}, id=f"{sys.argv[3]}-{number}"))
        memory.update("counter", "all", {"n": number})
    list(pool.map(write, range(40)))
    print(sorted(entry.seq for entry in memory.log())[:1])
"""


@pytest.mark.parametrize("replica", ["", "replica.db"], ids=["a copy each", "one copy"])
def test_four_processes_with_four_threads_each(redis_server: Server, name: str, replica: str, tmp_path: Path) -> None:
    file = tmp_path / replica if replica else ""
    with MemoryStore(redis_server.storage(name)) as memory:
        memory.commit(Fact("counter", {"n": -1}, id="all"))
        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(lambda number: python(WRITE, redis_server.url, name, number, file), range(4)))
        assert [one.stdout.strip() for one in done] == ["[1]"] * 4, [one.stderr for one in done]
        log = list(memory.log())
        assert [entry.seq for entry in log] == list(range(1, 322))
        assert sorted(entry.key for entry in log if entry.key != "all") == sorted(
            f"{child}-{number}" for child in range(4) for number in range(40)
        )
        chain = [entry for entry in log if entry.key == "all"]
        assert [entry.supersedes for entry in chain] == [None, *(entry.version for entry in chain[:-1])]
        with MemoryStore(redis_server.storage(name)) as fresh:
            assert rows(fresh.storage) == rows(memory.storage)  # type: ignore[arg-type]


def test_a_read_sees_what_was_confirmed_before_it(redis_server: Server, name: str) -> None:
    """Whoever is told of a commit finds it, wherever: each process writes what it was told, plus one."""
    with MemoryStore(redis_server.storage(name)) as one, MemoryStore(redis_server.storage(name)) as other:
        one.commit(Fact("n", {"n": 0}, id="n"))
        turn = threading.Barrier(2)
        for number in range(1, 60):
            writer, reader = (one, other) if number % 2 else (other, one)
            assert turn.parties == 2
            writer.commit(Fact("n", {"n": number}, id="n"))
            assert reader.get("n", "n").payload == {"n": number}
