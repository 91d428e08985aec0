"""Vectors in the database of the facts: one transaction writes both, so that at no moment anybody sees them differ."""

from __future__ import annotations

import logging
import operator
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
import pytest
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))
from truth import DIMS, Words, check_search, commit, eventually, note, notes, python, vector_of

from langgraph_memstate import Constraint, Fact, MemoryStore, SQLiteStorage
from langgraph_memstate.errors import ConstraintError, IndexConfigError
from langgraph_memstate.hooks.pgvector import PgvectorSyncHook
from langgraph_memstate.index import to_bytes
from langgraph_memstate.migration import migrate
from langgraph_memstate.storage.operations import RebuildIndex
from langgraph_memstate.storage.values import Nearest
from langgraph_memstate.testing.hook_making import needs_fork
from langgraph_memstate.testing.kills import Children, say

psycopg = pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")

from line import When  # noqa: E402
from postgres_proxy import line_to  # noqa: E402
from postgres_server import Server  # noqa: E402

from langgraph_memstate import PostgresStorage  # noqa: E402
from langgraph_memstate.storage import postgres_vectors  # noqa: E402

INDEX = {"dims": DIMS, "embed": Words(), "fields": ["text"]}


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    with postgres.database() as fresh:
        yield fresh


@pytest.fixture
def memory(url: str) -> Iterator[MemoryStore]:
    with MemoryStore.open(url, index=INDEX) as opened:
        yield opened


def difference(url: str, schema: str = "memstate") -> list[tuple[Any, ...]]:
    """Vectors that are in the index's table and not among what is current, or the other way round, at one moment."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"SET search_path TO {schema}, public")
        return compare(conn)


def compare(conn: Any) -> list[tuple[Any, ...]]:
    ((number,),) = conn.execute("SELECT number FROM vector_tables").fetchall()
    wanted = "SELECT vector_id, ns, version FROM vectors JOIN items USING (version)"
    held = f"SELECT vector_id, ns, version FROM vectors_{number}"
    query = f"(({held}) EXCEPT ({wanted})) UNION ALL (({wanted}) EXCEPT ({held}))"
    return conn.execute(query).fetchall()


def counted(url: str, what: str) -> int:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("SET search_path TO memstate, public")
        return conn.execute(f"SELECT count(*) FROM {what}").fetchone()[0]


def table_of(memory: MemoryStore) -> str:
    return memory.storage._tables.places["pgvector:memory"].table


# -- what a memory does -----------------------------------------------------------------------------


def test_everything_that_changes_what_is_current_takes_the_vectors_along(url: str, memory: MemoryStore) -> None:
    assert memory._outbox.indexes[0].name == "pgvector:memory"
    texts = notes(40)
    commit(memory, texts)
    assert difference(url) == []
    changed = {key: text + " changed" for key, text in list(texts.items())[:10]}
    with memory.transaction():
        commit(memory, changed)
        memory.delete("note", "n39")
        commit(memory, {"n38": "trains", "n37": "a cat"})
        commit(memory, {"n38": "green tea"})
    texts = {
        key: text for key, text in (texts | changed | {"n38": "green tea", "n37": "a cat"}).items() if key != "n39"
    }
    assert difference(url) == []
    check_search(memory, texts)
    report = memory.rollback(1)
    assert difference(url) == []
    check_search(memory, notes(40))
    memory.rollback(to=report.undone)
    assert difference(url) == []
    check_search(memory, texts)
    past = memory.as_of(40).search(("note",), query="green tea", limit=50)
    assert {item.key for item in past} == notes(40).keys()
    memory.forget("note", "n1")
    del texts["n1"]
    assert difference(url) == []
    check_search(memory, texts)
    assert memory.reindex().ok
    assert difference(url) == []
    check_search(memory, texts)
    assert counted(url, "outbox") == counted(url, "prepared") == 0


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done(url: str, memory: MemoryStore, seed: int) -> None:
    dice = random.Random(seed)
    texts: dict[str, str] = {}
    moments: dict[int, dict[str, str]] = {}

    def some() -> dict[str, str]:
        return {
            f"n{dice.randrange(9)}": f"{dice.choice(('green tea', 'a cat', 'trains'))} {dice.random()}" for _ in "123"
        }

    for _ in range(50):
        match dice.choice(("put", "put", "delete", "transaction", "back", "forget", "rebuild", "repair")):
            case "put":
                texts |= (change := some())
                commit(memory, change)
            case "delete":
                texts.pop(key := f"n{dice.randrange(9)}", None)
                memory.delete("note", key)
            case "transaction":
                first, second = some(), some()
                with memory.transaction():
                    commit(memory, first)
                    memory.delete("note", "n0")
                    commit(memory, second)
                texts = {key: text for key, text in (texts | first).items() if key != "n0"} | second
            case "back" if moments:
                seq = dice.choice(list(moments))
                memory.rollback(to=seq)
                texts = dict(moments[seq])
            case "forget":
                memory.forget("note", key := f"n{dice.randrange(9)}")
                texts.pop(key, None)
                moments.clear()
            case "rebuild":
                assert memory.reindex().ok
            case _:
                assert memory.repair().ok
        assert difference(url) == []
        moments[max((entry.seq for entry in memory.log(limit=1)), default=0)] = dict(texts)
    check_search(memory, texts)


def test_items_that_expired_are_not_found(memory: MemoryStore) -> None:
    for number in range(30):
        memory.store.put(("note",), f"short{number}", {"text": "green tea"}, ttl=0.00001)
    commit(memory, {"a": "green tea", "b": "green roof"})
    assert [fact.id for fact in memory.search("green tea", limit=3)] == ["a", "b"]
    assert memory.sweep() == 30
    assert memory.verify().ok


def test_what_was_lost_is_repaired(url: str, memory: MemoryStore) -> None:
    commit(memory, notes(20))
    table = f"memstate.{table_of(memory)}"
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"DELETE FROM {table} WHERE version IN (SELECT version FROM memstate.items LIMIT 5)")
        conn.execute(f"UPDATE {table} SET vector_id = 'ghost' WHERE version IN (SELECT version FROM {table} LIMIT 1)")
    report = memory.verify().indexes[0]
    assert (len(report.missing), report.orphaned) == (6, ("ghost",))
    assert memory.repair().ok
    assert difference(url) == []
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"DROP TABLE {table}")
    check_search(memory, notes(20))
    assert memory.repair().ok
    assert difference(url) == []
    check_search(memory, notes(20))


def test_facts_of_a_process_without_an_index(url: str, memory: MemoryStore) -> None:
    commit(memory, {"a": "green tea"})
    with MemoryStore.open(url) as other:
        commit(other, {"a": "trains to berlin", "b": "a cat"})
    assert ("n",) not in difference(url)
    check_search(memory, {"a": "trains to berlin", "b": "a cat"})
    memory.flush()
    assert difference(url) == []
    with MemoryStore.open(url) as other:
        other.delete("note", "a")
    assert difference(url) == []


def test_a_memory_that_had_no_index_table_gets_one(url: str) -> None:
    with MemoryStore(PostgresStorage(url), index=INDEX) as memory:
        commit(memory, notes(60))
        memory.search("green tea")
    model = Words()
    with MemoryStore.open(url, index=INDEX | {"embed": model}) as memory:
        check_search(memory, notes(60))
        memory.flush()
        assert difference(url) == []
        assert not any(text.startswith("n") for text in model.texts), "SQL holds the embeddings"


def test_an_index_that_is_built_anew_while_others_ask(url: str, memory: MemoryStore) -> None:
    """The new table has what a snapshot from before it cannot see; nobody goes back to comparing in memory."""
    commit(memory, notes(5))
    question = Nearest("pgvector:memory", "words", to_bytes(unit("a cat")), (), (), 0.0, 3)
    with MemoryStore.open(url, index=INDEX) as other:
        with memory.storage.snapshot() as reader:
            assert reader.last_seq() == 5
            assert memory.reindex().ok
            assert reader.nearest(question) is None
        check_search(other, notes(5))
        assert other._outbox.indexes[0].matrix._rows is None
        for storage in (memory.storage, other.storage):
            with storage.snapshot() as reader:
                answer = reader.nearest(question)
                assert answer is not None
                assert len(answer.ids) == len(answer.rows) == 3
        commit(other, {"more": "a cat"})
        assert difference(url) == []
        eventually(lambda: other.verify().ok)


def unit(text: str) -> Any:
    vector = np.array(vector_of(text), np.float32)
    return vector / np.linalg.norm(vector)


# -- a commit that fails ----------------------------------------------------------------------------


class Contact(BaseModel):
    text: str
    email: str


def test_who_waits_for_a_server_holds_up_no_other_memory(postgres: Server, url: str, memory: MemoryStore) -> None:
    """Else two memories of one process may wait for each other, one of them in the server, which cannot know."""
    with (
        postgres.database() as elsewhere,
        MemoryStore.open(elsewhere, index=INDEX) as other,
        ThreadPoolExecutor(2) as pool,
        psycopg.connect(url) as conn,
    ):
        conn.execute("LOCK TABLE memstate.vector_tables IN ACCESS EXCLUSIVE MODE")
        waiting = pool.submit(memory.storage.apply, ((RebuildIndex("pgvector:memory"),),))
        eventually(lambda: counted(url, "pg_locks WHERE NOT granted") == 1)
        pool.submit(commit, other, notes(1)).result(timeout=10)
        assert not waiting.done()
        conn.rollback()
        assert waiting.result(timeout=10) == [None]


def test_an_index_that_is_built_anew_while_space_is_freed(url: str, memory: MemoryStore) -> None:
    commit(memory, notes(3))
    with (
        MemoryStore.open(url, index=INDEX) as other,
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(url) as conn,
    ):
        conn.execute("LOCK TABLE memstate.writes IN ACCESS EXCLUSIVE MODE")
        waiting = pool.submit(memory.storage.vacuum)
        eventually(lambda: counted(url, "pg_locks WHERE NOT granted") == 1)
        other.reindex()
        conn.rollback()
        waiting.result(timeout=10)
    assert difference(url) == []


def test_a_commit_that_is_refused_leaves_neither(url: str, memory: MemoryStore) -> None:
    memory.register_schema("contact", Contact, Constraint(unique="email"))

    def contact(key: str, email: str) -> Fact:
        return Fact("contact", {"text": f"green tea {key}", "email": email}, id=key)

    memory.commit(contact("a", "x"))
    with pytest.raises(ConstraintError):
        memory.commit([note("lost", "green tea"), contact("b", "x")])
    with ThreadPoolExecutor(8) as pool:  # some share a transaction, in which one of two is refused
        runs = [pool.submit(memory.commit, contact(f"c{n}", "x" if n % 2 else f"{n}")) for n in range(24)]
    assert sum(run.exception() is not None for run in runs) == 12
    assert difference(url) == []
    assert counted(url, table_of(memory)) == counted(url, "items") == 13


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_that_breaks_at_the_commit(postgres: Server, when: When) -> None:
    with (
        postgres.schema() as schema,
        line_to(postgres.uri) as line,
        MemoryStore(PostgresStorage(line.uri, schema=schema), index=INDEX) as memory,
    ):
        memory.add_hook(PgvectorSyncHook())
        texts = notes(6)
        for key, text in texts.items():
            line.breaks = when
            commit(memory, {key: text})
            assert difference(postgres.uri, schema) == []
        assert line.broken == len(texts)
        check_search(memory, texts)


# -- a client that dies -----------------------------------------------------------------------------


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


STEPS = ("one", "two", "three")


def agent(memory: MemoryStore, run: str) -> Any:
    """Each step writes a fact of its own and one that all of them share; the last deletes what the first wrote."""

    def node(name: str) -> Any:
        def work(state: State, *, store: BaseStore) -> dict[str, Any]:
            store.put(("runs", run), name, {"text": f"green tea {name} {run}"})
            store.put(("runs", run), "latest", {"text": f"a cat {name} {run}"})
            if name == STEPS[-1]:
                store.delete(("runs", run), STEPS[0])
            return {"log": [name]}

        return work

    graph = StateGraph(State)
    for name in STEPS:
        graph.add_node(name, node(name))
    for left, right in zip((START, *STEPS), (*STEPS, END), strict=True):
        graph.add_edge(left, right)
    return graph.compile(checkpointer=memory.checkpointer, store=memory.store)


def after(log: list[str], run: str) -> dict[str, str]:
    """What the facts of a run are after these steps."""
    texts = {name: f"green tea {name} {run}" for name in log}
    if log:
        texts["latest"] = f"a cat {log[-1]} {run}"
    if STEPS[-1] in log:
        del texts[STEPS[0]]
    return texts


@needs_fork
class TestKilled:
    """A client is killed at every statement that it sends while a graph runs."""

    def run_until(self, url: str, number: str) -> None:
        """In a child: die as statement `number` of the run is about to be sent."""
        left = int(number)
        memory = MemoryStore.open(url, index=INDEX)
        graph = agent(memory, number)
        execute = psycopg.Connection.execute

        def counting(conn: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return execute(conn, *args, **kwargs)

        psycopg.Connection.execute = counting  # type: ignore[method-assign]
        graph.invoke({"log": []}, _config(number), durability="sync")
        psycopg.Connection.execute = execute  # type: ignore[method-assign]
        say("through")
        memory.close()

    @pytest.mark.slow
    def test_facts_are_vectors_wherever_the_client_dies(self, url: str) -> None:
        children = Children(type(self), ("psycopg", "numpy"))
        seen: set[int] = set()
        MemoryStore.open(url, index=INDEX).close()
        try:
            with MemoryStore(PostgresStorage(url)) as watching:
                for number in range(1, 1_000):
                    said, status = children.call("run_until", url, number)
                    assert difference(url) == [], number
                    assert counted(url, "outbox") == counted(url, "prepared") == 0
                    config = _config(str(number))
                    log = agent(watching, str(number)).get_state(config).values.get("log", [])
                    held = {fact.id: fact.payload["text"] for fact in watching.query(("runs", str(number)))}
                    assert held in [after(list(STEPS[:count]), str(number)) for count in range(len(STEPS) + 1)]
                    assert held.keys() >= after(log[:-1], str(number)).keys() - {STEPS[0]}
                    seen.add(len(held))
                    if "through" in said:
                        assert status == 0
                        break
                else:
                    pytest.fail("the run never came to an end")
        finally:
            children.close()
        assert number > 60
        assert seen >= {0, 2, 3}, "it died before the first step, and after some"
        with MemoryStore.open(url, index=INDEX) as memory:
            for resumed in range(1, number, 7):
                run, config = str(resumed), _config(str(resumed))
                graph = agent(memory, run)
                graph.invoke({"log": []} if not graph.get_state(config).values else None, config)
                assert {fact.id: fact.payload["text"] for fact in memory.query(("runs", run))} == after([*STEPS], run)
            assert difference(url) == []
            for steps in (1, 2):
                memory.rollback(steps, thread_id=f"t{resumed}")
                left = {fact.id: fact.payload["text"] for fact in memory.query(("runs", run))}
                assert left in [after(list(STEPS[:count]), run) for count in range(len(STEPS))]
                assert difference(url) == []


def _config(run: str) -> Any:
    return {"configurable": {"thread_id": f"t{run}"}}


# -- many at once -----------------------------------------------------------------------------------

WRITE = """
from langgraph_memstate import PostgresStorage
from langgraph_memstate.hooks.pgvector import PgvectorSyncHook
url, who = sys.argv[1], sys.argv[2]
with MemoryStore.open(url, index={"dims": DIMS, "embed": Words(), "fields": ["text"]}) as memory:
    for number in range(40):
        memory.commit([note(f"shared{number % 5}", f"green tea {who} {number}"), note(f"{who}{number}", "a cat")])
        if number % 4 == 0:
            memory.delete("note", f"{who}{number}")
        if number % 10 == 9:
            found = memory.search("green tea", limit=10)
            assert len(found) >= 5, found
            memory.commit(note(f"{who}-extra", f"trains {number}"))
        if who == "a" and number == 20:
            assert memory.reindex().ok
"""


def test_two_processes_write_while_a_third_looks(url: str) -> None:
    """One of them builds the index anew in the middle."""
    MemoryStore.open(url, index=INDEX).close()
    over = threading.Event()

    def watch() -> int:
        looks = 0
        with psycopg.connect(url) as conn:
            while not over.is_set():
                conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                conn.execute("SET LOCAL search_path TO memstate, public")
                try:
                    found = compare(conn)
                except psycopg.errors.UndefinedTable:  # built anew since the transaction began
                    found = []
                conn.rollback()
                assert found == []
                looks += 1
        return looks

    with ThreadPoolExecutor(3) as pool:
        watching = pool.submit(watch)
        try:
            done = list(pool.map(lambda who: python(WRITE, url, who), ("a", "b")))
        finally:
            over.set()
        assert all(one.returncode == 0 for one in done), [one.stderr for one in done]
        assert watching.result() > 20
    with MemoryStore.open(url, index=INDEX) as memory:
        assert memory.verify().ok
        texts = {fact.id: fact.payload["text"] for fact in memory.query("note", limit=1_000)}
        assert len(texts) == 5 + 2 * (30 + 1)
        check_search(memory, texts)
    assert difference(url) == []


# -- asking -----------------------------------------------------------------------------------------


class Points:
    """Texts are numbers of points."""

    model = "points"

    def __init__(self, dims: int, count: int) -> None:
        points = np.random.default_rng(3).normal(size=(count, dims)).astype(np.float32)
        self.points = points / np.linalg.norm(points, axis=1, keepdims=True)

    def __call__(self, texts: list[str]) -> list[list[float]]:
        return [self.points[int(text)].tolist() for text in texts]

    def best(self, query: int, among: list[int], count: int) -> list[float]:
        return sorted((self.points[among] @ self.points[query]).tolist(), reverse=True)[:count]


def filled(url: str, model: Points, dims: int, count: int) -> MemoryStore:
    memory = MemoryStore.open(url, index={"dims": dims, "embed": model, "fields": ["text"]})
    memory.commit(
        [
            Fact("note", {"text": f"{n}", "kind": n % 50, "half": n % 2}, id=f"{n}", namespace=("u", f"{n % 10}"))
            for n in range(count)
        ]
    )
    return memory


def test_a_filter_leaves_as_many_as_there_are(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is walked on until enough match; where it does not find enough, every vector is compared."""
    dims, count = 16, 3_000
    model = Points(dims, count + 5)
    for few in ("_FEW", "_FEW_THAT_MATCH"):
        monkeypatch.setattr(postgres_vectors, few, -1)
    with postgres.database() as url:
        with psycopg.connect(url, autocommit=True) as conn:
            for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "sort"):  # what is left is the graph
                conn.execute(f"ALTER DATABASE {conn.info.dbname} SET enable_{way} TO off")
        with filled(url, model, dims, count) as memory:
            asked: list[bool] = []
            neighbours = postgres_vectors.neighbours

            def noting(conn: Any, tables: Any, question: Any) -> Any:
                asked.append(question.exact)
                return neighbours(conn, tables, question)

            monkeypatch.setattr("langgraph_memstate.storage.postgres_read.neighbours", noting)
            for query in range(count, count + 5):
                for condition, among in {
                    "all": range(count), "half": range(0, count, 2), "fiftieth": range(7, count, 50), "one": [77],
                    "none": [],
                }.items():  # fmt: skip
                    filters = {"all": None, "half": {"half": 0}, "fiftieth": {"kind": 7}, "one": {"text": "77"}}
                    chosen = filters.get(condition, {"text": "nowhere"})
                    asked.clear()
                    found = memory.search(f"{query}", filter=chosen, limit=10)
                    assert len(found) == min(10, len(among)), condition
                    assert asked[0] is False
                    assert (True in asked) is (len(among) < 20), condition
                    scores = [fact.score for fact in found]
                    expected = [float(model.points[int(fact.id)] @ model.points[query]) for fact in found]
                    assert scores == pytest.approx(expected, abs=1e-6), "cosine, not what the graph computed"
                    best = model.best(query, list(among), 10) if among else []
                    near = sum(score >= best[-1] - 1e-6 for score in scores) if best else 0
                    assert near >= 0.8 * len(best), condition
                under = memory.search(f"{query}", namespace=("u", "3"), limit=400)
                assert {int(fact.id) % 10 for fact in under} == {3}
                assert len(under) == count / 10


def test_the_graph_is_used(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a connection has searched: a plan that would do for any namespace scans all vectors of this.

    Where few are in question it is not: they are compared, and none is missed.
    """
    monkeypatch.setattr(postgres_vectors, "_FEW", 1_000)
    model, searches = Points(32, 3_001), 20
    with filled(url, model, 32, 3_000) as memory, psycopg.connect(url, autocommit=True) as conn:
        memory.reindex()
        conn.execute("VACUUM (ANALYZE)")
        for _ in range(searches):
            assert memory.search("3000", limit=10)
            for among, few in (
                (range(3, 3_000, 10), {"namespace": ("u", "3")}),
                (range(7, 3_000, 50), {"filter": {"kind": 7}}),
            ):
                best = model.best(3_000, list(among), 10)
                assert [fact.score for fact in memory.search("3000", limit=10, **few)] == pytest.approx(best, abs=1e-6)
        table = table_of(memory)
    with psycopg.connect(url, autocommit=True) as conn:
        query = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s"

        def scans() -> int:  # counted when the connections of the memory have ended
            row = conn.execute(query, [f"{table}_graph"]).fetchone()
            assert row is not None
            return row[0]

        eventually(lambda: scans() >= searches)
        assert scans() < 2 * searches


@pytest.mark.parametrize(
    ("dims", "element", "has_graph"), [(2_000, "vector", True), (2_001, "halfvec", True), (4_001, "vector", False)]
)
def test_many_dimensions(url: str, dims: int, element: str, has_graph: bool) -> None:
    model = Points(dims, 41)
    with filled(url, model, dims, 40) as memory:
        for query in (0, 40):
            found = memory.search(f"{query}", limit=5)
            assert [fact.score for fact in found] == pytest.approx(model.best(query, list(range(40)), 5), abs=1e-6)
        assert memory.reindex().ok
        assert memory.storage._tables.places["pgvector:memory"].element == element
        graphs = counted(url, f"pg_indexes WHERE indexname = '{table_of(memory)}_graph'")
        assert graphs == has_graph


def test_more_dimensions_than_a_vector_has(url: str) -> None:
    with pytest.raises(IndexConfigError, match="16,000"):
        MemoryStore.open(url, index={"dims": 16_001, "embed": Words()})


# -- where it can be --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["file", ":memory:"])
def test_another_storage_refuses_it(tmp_path: Path, name: str) -> None:
    where = tmp_path / "memory.db" if name == "file" else name
    with MemoryStore.open(where) as memory, pytest.raises(IndexConfigError, match="PostgresStorage"):
        memory.add_hook(PgvectorSyncHook(embedding=Words()))


@pytest.fixture
def poor(postgres: Server) -> Iterator[Callable[[str], str]]:
    """Makes a role that owns its database and may make no extension; the address under which it comes."""
    with postgres.connect() as conn:
        conn.execute("CREATE ROLE poor LOGIN")

    def address(url: str) -> str:
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(f"ALTER DATABASE {conn.info.dbname} OWNER TO poor")
        return url.replace("postgres:@", "poor:@").replace("postgres@", "poor@")

    yield address
    with postgres.connect() as conn:
        conn.execute("DROP ROLE poor")


def test_without_the_extension(postgres: Server, poor: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    with postgres.database() as url:
        theirs = poor(url)
        with (
            MemoryStore(PostgresStorage(theirs), index=INDEX) as memory,
            pytest.raises(IndexConfigError, match="CREATE EXTENSION vector"),
        ):
            memory.add_hook(PgvectorSyncHook())
        with caplog.at_level(logging.WARNING), MemoryStore.open(theirs, index=INDEX) as memory:
            assert "CREATE EXTENSION vector" in caplog.text
            commit(memory, notes(10))
            check_search(memory, notes(10))
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("""CREATE SCHEMA "else%where's {0} %(x)s" """)
            conn.execute("""CREATE EXTENSION vector SCHEMA "else%where's {0} %(x)s" """)
            conn.execute("""GRANT USAGE ON SCHEMA "else%where's {0} %(x)s" TO poor""")
        with MemoryStore.open(theirs, index=INDEX) as memory:
            assert memory._outbox.indexes[0].name == "pgvector:memory"
            check_search(memory, notes(10))


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256, 7])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(IndexConfigError, match="collection_name"):
        PgvectorSyncHook(name)


def test_names_are_no_sql(url: str) -> None:
    with MemoryStore(PostgresStorage(url), index=INDEX) as memory:
        for name in ("'; DROP TABLE facts; --", '"%s" {rows} %(x)s', "é"):
            memory.add_hook(PgvectorSyncHook(name))
        commit(memory, notes(5))
        memory.delete("note", "n0")
        assert memory.verify().ok
        assert memory.verify().indexes[0].index == "pgvector:'; DROP TABLE facts; --"
        for index in memory._outbox.indexes:
            assert len(index.held_ids()) == 4
        memory.reindex()
        assert memory.verify().ok


def test_a_memory_that_moves_here_gets_its_vectors(url: str, tmp_path: Path) -> None:
    with MemoryStore(SQLiteStorage(tmp_path / "memory.db"), index=INDEX) as memory:
        memory.view()
        commit(memory, notes(30))
        memory.delete("note", "n0")
    migrate(tmp_path / "memory.db", url)
    model = Words()
    with MemoryStore.open(url, index=INDEX | {"embed": model}) as memory:
        memory.flush()
        assert difference(url) == []
        assert counted(url, table_of(memory)) == 29
        assert model.texts == []
