"""Forgetting: content that was erased is in no answer and in no file, and nothing brings it back."""

from __future__ import annotations

import operator
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Command, interrupt

sys.path.insert(0, str(Path(__file__).parent))
from truth import Words, check_search, check_settled, directory, hook_of, open_memory, rows

from langgraph_memstate import Fact, MemoryStore
from langgraph_memstate.errors import ForgetError, KeyTypeError, NamespaceError, VectorSyncError
from langgraph_memstate.hooks.chroma import ChromaSyncHook

SECRET = "zebrasecret"
T: Any = {"configurable": {"thread_id": "t"}}


def secret(key: str, namespace: tuple[str, ...] = ("users", "ann"), extra: str = "") -> Fact:
    return Fact("note", {"text": f"{SECRET} {key} {extra}".strip()}, id=key, namespace=namespace)


def public(key: str, namespace: tuple[str, ...] = ("users", "bob")) -> Fact:
    return Fact("note", {"text": f"green tea {key}"}, id=key, namespace=namespace)


def texts(memory: MemoryStore) -> dict[str, str]:
    return {fact.id: fact.payload["text"] for fact in memory.query(limit=10_000)}


def traces(folder: Path, *needles: bytes) -> list[str]:
    """Files that hold one of these bytes."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a journal of Chroma's that comes and goes
            if path.is_file() and any(needle in path.read_bytes() for needle in needles):
                found.append(str(path.relative_to(folder)))
    return found


def left_over(database: Path, *needles: bytes) -> list[str]:
    """The same, but for what Chroma does not write on purpose.

    It makes room for a hundred vectors and writes that to its files as malloc hands it out, with whatever this process
    had there before.
    """
    as_malloc_left_it = ("data_level0.bin", "length.bin")
    return [name for name in traces(database.parent, *needles) if not name.endswith(as_malloc_left_it)]


def vectors_of(database: Path, word: str = SECRET) -> list[bytes]:
    """The bytes of every embedding of a text with that word."""
    found = rows(
        database,
        "SELECT DISTINCT embeddings.vector FROM embeddings JOIN vectors USING (text_hash) JOIN facts USING (version) "
        "WHERE value LIKE ?",
        f"%{word}%",
    )
    return [vector for (vector,) in found]


# -- what goes, and what stays ----------------------------------------------------------------------


def lives(memory: MemoryStore) -> None:
    memory.commit([secret("a"), secret("b"), secret("deep", ("users", "ann", "notes")), public("x")])
    memory.commit([secret("a", extra="again"), public("like", ("users", "anna"))])
    memory.delete(("users", "ann"), "b")


@pytest.mark.parametrize("vectors", [False, True], ids=["plain", "vectors"])
def test_a_subject_is_forgotten_in_sessions_too(database: Path, vectors: bool) -> None:
    with open_memory(database) if vectors else MemoryStore.open(database) as memory:
        memory.commit([secret("a"), public("b")])
        memory.commit([secret("a", extra="said today"), secret("c")], session_id="today")
        memory.commit(secret("d"), session_id="before")
        memory.commit(public("e"), session_id="today")
        memory.promote_session("before")
        report = memory.forget(("users", "ann"))
        assert (report.items, report.versions) == (4, 5)
        assert [fact.id for fact in memory.query(session_id="today")] == ["e"]
        assert memory.history(("users", "ann"), "c", session_id="today")[0].value is None
        assert memory.forget(("users", "bob"), "e").items == 1
        assert texts(memory).keys() == {"b"}
    assert left_over(database, SECRET.encode()) == []


def test_a_subject_goes_and_the_log_keeps_that_it_was(memory: MemoryStore) -> None:
    lives(memory)
    report = memory.forget(("users", "ann"), actor="dpo", reason="request 7")
    assert texts(memory) == {"x": "green tea x", "like": "green tea like"}
    assert (report.items, report.versions, report.vectors, report.threads) == (2, 4, 0, ())
    log = memory.log()
    assert [entry.seq for entry in log] == list(range(1, 10))
    gone = [entry for entry in log if entry.namespace[:2] == ("users", "ann")]
    assert all(entry.value is None for entry in gone)
    assert [entry.forgotten for entry in gone] == [True, True, True, True, False, False, False]
    assert [(entry.op, entry.actor, entry.reason) for entry in log[-2:]] == [("delete", "dpo", "request 7")] * 2
    assert not any(entry.forgotten for entry in log if entry not in gone)


def test_a_key_alone(memory: MemoryStore) -> None:
    lives(memory)
    report = memory.forget(("users", "ann"), "a")
    assert (report.items, report.versions) == (1, 2)
    assert set(texts(memory)) == {"deep", "x", "like"}
    assert memory.forget(("users", "ann"), "a").versions == 0


def test_a_thread_alone(memory: MemoryStore) -> None:
    memory.commit(secret("a"), thread_id="t")
    memory.commit(public("x"), thread_id="u")
    memory.commit(secret("x", ("users", "bob")), thread_id="t")
    memory.commit(public("y"), thread_id="t")
    memory.commit(public("y"), thread_id="u")
    report = memory.forget(thread_id="t")
    assert report.versions == 3
    assert texts(memory) == {"y": "green tea y"}  # theirs by now
    assert [entry.forgotten for entry in memory.log(until=5)] == [True, False, True, True, False]


@pytest.mark.parametrize("arguments", [{}, {"key": "a"}, {"namespace": ()}])
def test_nobody_named_is_nobody_forgotten(memory: MemoryStore, arguments: dict[str, Any]) -> None:
    lives(memory)
    with pytest.raises(ForgetError):
        memory.forget(**arguments)
    assert not any(entry.forgotten for entry in memory.log())


@pytest.mark.parametrize("namespace", [("",), (1,), ("a", "")])
def test_a_namespace_is_checked(memory: MemoryStore, namespace: Any) -> None:
    with pytest.raises((NamespaceError, KeyTypeError)):
        memory.forget(namespace)


def test_what_looks_alike_stays(memory: MemoryStore) -> None:
    for namespace in (("a",), ("a%",), ("ab",), ("a", "b"), ("A",)):
        memory.store.put(namespace, "k", {"text": "/".join(namespace)})
    memory.forget(("a%",))
    assert sorted(texts_of(memory)) == ["A", "a", "a/b", "ab"]
    memory.forget(("a",))
    assert sorted(texts_of(memory)) == ["A", "ab"]


def texts_of(memory: MemoryStore) -> list[str]:
    return [fact.payload["text"] for fact in memory.query(limit=100)]


# -- nothing brings it back -------------------------------------------------------------------------


def test_neither_the_past_nor_an_undo_brings_it_back(memory: MemoryStore) -> None:
    lives(memory)
    memory.forget(("users", "ann"))
    for seq in range(len(memory.log()) + 1):
        assert not any(SECRET in item.value["text"] for item in memory.as_of(seq).search((), limit=100))
    assert not any(SECRET in str(change) for change in memory.diff(0))
    last = len(memory.log())
    for to in range(last):
        memory.rollback(to=to)
        assert not any(SECRET in text for text in texts(memory).values())
    memory.rollback(to=last)
    assert texts(memory) == {"x": "green tea x", "like": "green tea like"}


def test_a_thread_cannot_go_back_to_it(memory: MemoryStore) -> None:
    graph = agent(memory)
    for n in range(3):
        graph.invoke({"log": [f"in{n}"]}, T)
    memory.forget(("users", "ann"), "k1")
    history = list(graph.get_state_history(T))
    for snapshot in history[1:]:
        memory.rollback(to=snapshot.config, on_conflict="overwrite")
        assert "k1" not in texts(memory)


def test_what_an_undo_had_brought_back_is_the_same_content(memory: MemoryStore) -> None:
    """Another thread's rollback has written the subject's words once more."""
    memory.commit(secret("a"), thread_id="t")
    memory.commit(public("a", ("users", "ann")), thread_id="u")
    memory.rollback(1, thread_id="u")
    assert SECRET in texts(memory)["a"]
    report = memory.forget(thread_id="t")
    assert report.versions == 2
    assert texts(memory) == {}
    assert not any(SECRET in str(entry.value) for entry in memory.log())


def test_what_was_promoted_is_the_same_content(file_memory: MemoryStore, database: Path) -> None:
    """It belongs to no thread, as the commit that promoted it."""
    memory = file_memory
    memory.commit([secret("a"), secret("b")], thread_id="t", session_id="s")
    memory.commit(public("b", ("users", "ann")), thread_id="u")
    memory.promote_session("s")
    report = memory.rollback(1)
    memory.rollback(to=report.undone)
    memory.commit([public("b", ("users", "ann")), secret("c")], thread_id="u")
    report = memory.forget(thread_id="t")
    assert report.versions == 8  # in the session, promoted, and both once more by undoing and undoing that
    assert texts(memory) == {"b": "green tea b", "c": f"{SECRET} c"}
    assert [entry.key for entry in memory.log() if SECRET in str(entry.value)] == ["c"]
    memory.forget(thread_id="u")
    assert traces(database.parent, SECRET.encode()) == []


def test_who_names_a_session_does_not_mean_what_was_promoted(memory: MemoryStore) -> None:
    memory.commit([secret("a"), secret("b")], session_id="s")
    memory.promote_session("s", selector=lambda fact: fact.id == "a")
    assert memory.forget(("@session", "s")).versions == 2
    assert texts(memory) == {"a": f"{SECRET} a"}
    assert memory.query(session_id="s") == []


# -- staged work and checkpoints --------------------------------------------------------------------


def agent(memory: MemoryStore, fails: bool = False) -> Any:
    class State(TypedDict, total=False):
        log: Annotated[list[str], operator.add]

    def write(state: State, *, store: BaseStore) -> State:
        n = len(state["log"])
        store.put(("users", "ann"), f"k{n}", {"text": f"{SECRET} k{n}"})
        return {"log": [f"{SECRET} in state"]}

    def beside(state: State) -> State:
        if fails:
            raise RuntimeError("beside")
        return {}

    builder = StateGraph(State)
    builder.add_node("write", write)
    builder.add_node("beside", beside)
    builder.add_edge(START, "write")
    builder.add_edge(START, "beside")
    builder.add_edge("write", END)
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


def test_work_that_waits_for_its_step_is_forgotten_too(file_memory: MemoryStore, database: Path) -> None:
    with pytest.raises(RuntimeError, match="beside"):
        agent(file_memory, fails=True).invoke({"log": ["in"]}, T)
    assert file_memory.stats()["staged"] == 1
    file_memory.forget(("users", "ann"))
    assert file_memory.stats()["staged"] == 0


def interrupted(memory: MemoryStore, session_id: str | None) -> Any:
    """A thread that waits for an answer beside a node that has written about ann, and has said so in the state."""

    class State(TypedDict, total=False):
        log: Annotated[list[str], operator.add]

    def write(state: State) -> State:
        memory.commit([secret("a"), public("x")], session_id=session_id)
        return {"log": [f"{SECRET} in state"]}

    def ask(state: State) -> State:
        return {"log": [interrupt("?")]}

    builder = StateGraph(State).add_node("write", write).add_node("ask", ask)
    builder.add_edge(START, "write").add_edge(START, "ask")
    graph = builder.compile(checkpointer=memory.checkpointer, store=memory.store)
    graph.invoke({"log": ["in"]}, T)
    assert memory.stats()["staged"] == 2
    return graph


@pytest.mark.parametrize("session_id", [None, "s"])
@pytest.mark.parametrize(
    ("namespace", "key"), [(("users", "ann"), None), (("users",), "a"), (("@session", "s", "users", "ann"), "a")]
)
def test_work_that_waits_in_a_session_is_forgotten_too(
    memory: MemoryStore, session_id: str | None, namespace: tuple[str, ...], key: str | None
) -> None:
    graph = interrupted(memory, session_id)
    memory.forget(namespace, key)
    is_named = session_id is not None or namespace[0] == "users"
    graph.invoke(Command(resume="an answer"), T)
    left = {fact.id for fact in memory.query("users", session_id=session_id)}
    assert left == ({"x"} if is_named else {"a", "x"})
    assert graph.get_state(T).values["log"] == ["in", "an answer", f"{SECRET} in state"]


@pytest.mark.parametrize("session_id", [None, "s"])
def test_checkpoints_go_whose_work_waits(file_memory: MemoryStore, database: Path, session_id: str | None) -> None:
    graph = interrupted(file_memory, session_id)
    assert file_memory.forget(("users", "ben"), checkpoints=True).threads == ()
    assert file_memory.forget(("users", "ann"), "b", checkpoints=True).threads == ()
    assert file_memory.forget(("users", "ann"), thread_id="other", checkpoints=True).threads == ("other",)
    assert traces(database.parent, SECRET.encode())
    assert file_memory.forget(("users", "ann"), checkpoints=True).threads == ("t",)
    assert graph.get_state(T).values == {}
    assert traces(database.parent, SECRET.encode()) == []
    assert file_memory.stats()["staged"] == 0


def test_checkpoints_go_on_request(file_memory: MemoryStore, database: Path) -> None:
    graph = agent(file_memory)
    graph.invoke({"log": ["in"]}, T)
    other: Any = {"configurable": {"thread_id": "other"}}
    agent(file_memory).update_state(other, {"log": ["kept"]}, as_node="write")
    file_memory.forget(("users", "ann"))
    assert graph.get_state(T).values["log"]
    assert traces(database.parent, SECRET.encode())
    report = file_memory.forget(thread_id="t", checkpoints=True)
    assert report.threads == ("t",)
    assert graph.get_state(T).values == {}
    assert graph.get_state(other).values["log"] == ["kept"]
    assert traces(database.parent, SECRET.encode()) == []
    graph.invoke({"log": ["again"]}, T)
    assert len(graph.get_state(T).values["log"]) == 2


def test_threads_that_wrote_about_a_subject_go_with_it(memory: MemoryStore) -> None:
    for thread_id in ("one", "two"):
        agent(memory).invoke({"log": ["in"]}, {"configurable": {"thread_id": thread_id}})
    memory.commit(public("x"), thread_id="three")
    report = memory.forget(("users", "ann"), checkpoints=True)
    assert report.threads == ("one", "two")
    assert memory.stats()["checkpoints"] == 0


# -- vectors and files ------------------------------------------------------------------------------


@pytest.fixture
def verbose(database: Path) -> Iterator[MemoryStore]:
    """A memory whose Chroma keeps the texts as well, as documents and as metadata."""
    hook = ChromaSyncHook(path=directory(database), store_documents=True, metadata_fields=["text"])
    with MemoryStore.open(database, index={"dims": 64, "embed": Words(), "fields": ["text"]}, vectors=hook) as memory:
        yield memory


@pytest.mark.parametrize("count", [3, 700])
def test_not_a_byte_is_left(verbose: MemoryStore, database: Path, count: int) -> None:
    memory = verbose
    memory.commit([public(f"x{n}") for n in range(20)])
    for start in range(0, count, 100):
        memory.commit([secret(f"k{n}", extra="pad " * (n % 40)) for n in range(start, min(count, start + 100))])
    memory.commit([secret(f"k{n}", extra="changed") for n in range(0, count, 2)])
    memory.rollback(1)
    memory.delete(("users", "ann"), "k1")
    needles = [SECRET.encode(), *vectors_of(database)]
    assert traces(database.parent, *needles)
    report = memory.forget(("users", "ann"))
    assert report.items == count - 1
    assert report.vectors == report.versions == count + 2 * len(range(0, count, 2))
    assert left_over(database, *needles) == []
    left = {f"x{n}": f"green tea x{n}" for n in range(20)}
    assert texts(memory) == left
    check_search(memory, left)
    memory.close()
    assert left_over(database, *needles) == []


def test_what_was_superseded_long_ago_has_left_no_bytes_either(file_memory: MemoryStore, database: Path) -> None:
    """Rows that were replaced, drained or deleted before anybody asked to forget."""
    file_memory.commit([secret(f"k{n}", extra=f"{n} " * 50) for n in range(300)])
    file_memory.commit([public(f"k{n}", ("users", "ann")) for n in range(300)])
    for n in range(0, 300, 3):
        file_memory.delete(("users", "ann"), f"k{n}")
    with pytest.raises(RuntimeError, match="beside"):
        agent(file_memory, fails=True).invoke({"log": ["in"]}, T)
    agent(file_memory).invoke(None, T)
    file_memory.forget(("users", "ann"))
    file_memory.forget(thread_id="t", checkpoints=True)
    assert traces(database.parent, SECRET.encode()) == []
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_an_embedding_that_others_share_stays(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        memory.commit([secret("a"), Fact("note", {"text": f"{SECRET} a"}, id="same", namespace=("users", "bob"))])
        memory.forget(("users", "ann"))
        assert memory.stats()["embeddings"] == 1
        check_search(memory, {"same": f"{SECRET} a"})
        memory.forget(("users", "bob"))
        assert memory.stats()["embeddings"] == 0
        memory.flush()
        check_settled(memory, database)


def test_the_index_is_settled_and_asks_the_model_nothing(database: Path) -> None:
    model = Words()
    with open_memory(database, model=model) as memory:
        memory.commit([secret(f"k{n}") for n in range(30)])
        memory.commit([public(f"x{n}") for n in range(30)])
        asked = len(model.texts)
        memory.forget(("users", "ann"))
        assert len(model.texts) == asked
        check_settled(memory, database)
        check_search(memory, {f"x{n}": f"green tea x{n}" for n in range(30)})
        assert set(hook_of(memory).inner.ids()) == {
            vector for (vector,) in rows(database, "SELECT vector_id FROM vectors JOIN items USING (version)")
        }


def test_a_vector_database_that_is_away_forgets_later(database: Path) -> None:
    with open_memory(database) as memory:
        memory.commit([secret("a"), public("x")])
        hook_of(memory).go_away()
        with pytest.raises(VectorSyncError):
            memory.forget(("users", "ann"))
        assert texts(memory) == {"x": "green tea x"}
        assert [fact.id for fact in memory.search(SECRET, limit=5)] == ["x"]
        hook_of(memory).heal()
        memory.flush()
        check_settled(memory, database)


def test_writers_go_on_while_somebody_is_forgotten(database: Path) -> None:
    with open_memory(database) as memory:
        memory.commit([secret(f"k{n}") for n in range(50)])
        done, failures = threading.Event(), []

        def write() -> None:
            n = 0
            while not done.is_set():
                try:
                    memory.commit(public(f"x{n % 20}"))
                except BaseException as error:
                    failures.append(error)
                n += 1

        writer = threading.Thread(target=write)
        writer.start()
        for n in range(5):
            memory.commit(secret(f"k{n}"))
            memory.forget(("users", "ann"))
        done.set()
        writer.join()
        assert failures == []
        memory.flush()
        assert not any(SECRET in text for text in texts(memory).values())
        check_settled(memory, database)


async def test_the_async_face(memory: MemoryStore) -> None:
    await memory.acommit(secret("a"))
    report = await memory.aforget(("users", "ann"))
    assert report.versions == 1
    assert texts(memory) == {}
