"""A fault at every point of the seams, one after another: what failed is whole or absent, and all is well afterwards.

The points lie before and after every call of the storage and of the hook, or before every SQL statement.
"""

from __future__ import annotations

import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

from audit import audit, journal_ids, untrue_search, vector_ids
from census import GRAPHS, THREAD, Cell, Env, compare
from journal_hook import INDEX, JournalHook

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate import search as searching
from langgraph_memstate.testing.faults import FaultPoints, FaultyHook, FaultyStorage


class Crash(BaseException):
    """Ends what it strikes as no ordinary handler expects; a background thread too, without a word."""


def _thread_ended(args: threading.ExceptHookArgs) -> None:
    if not isinstance(args.exc_value, Crash):
        threading.__excepthook__(args)


threading.excepthook = _thread_ended


@dataclass(frozen=True)
class Kind:
    """`seam`: calls (of storage and hook) or statements."""

    name: str
    error: type[BaseException]
    for_ever: bool = False
    seam: str = "calls"


KINDS = (
    Kind("OSError once", OSError),
    Kind("OSError for ever", OSError, for_ever=True),
    Kind("BaseException once", Crash),
    Kind("BaseException for ever", Crash, for_ever=True),
)
STATEMENTS = (
    Kind("I/O error once", sqlite3.OperationalError, seam="statements"),
    Kind("I/O error for ever", sqlite3.OperationalError, for_ever=True, seam="statements"),
    Kind("constraint once", sqlite3.IntegrityError, seam="statements"),
)


@dataclass
class Run:
    """One memory whose seams fail, on a database that can be looked at from outside."""

    path: Path
    memory: MemoryStore

    @property
    def database(self) -> Path:
        return self.path / "memory.db"


Operation = Callable[[Run], object]


# -- the operations ---------------------------------------------------------------------------------


def note(id: str, n: int = 0) -> Fact:
    return Fact(type="note", id=id, payload={"n": n, "text": f"memory {id} {n}"})


def in_a_transaction(run: Run) -> None:
    with run.memory.transaction() as memory:
        memory.commit(note("t1"))
        memory.delete("note", "b2")
        memory.commit([note("t2"), note("a", 2)])


FACTS: tuple[Operation, ...] = (
    lambda run: run.memory.commit(note("a")),
    lambda run: run.memory.commit([note("b1"), note("b2"), note("b3")]),
    lambda run: run.memory.commit(note("a", 1)),
    lambda run: run.memory.delete("note", "b1"),
    in_a_transaction,
    lambda run: run.memory.flush(),
)
UPKEEP: tuple[Operation, ...] = (
    lambda run: run.memory.checkpointer.copy_thread("t", "copy"),
    lambda run: run.memory.checkpointer.prune(["t"]),
    lambda run: run.memory.checkpointer.delete_for_runs(["no such run"]),
    lambda run: run.memory.checkpointer.delete_thread("t"),
)


def contents(database: Path) -> Any:
    """What is visible, without ids that differ between runs."""
    with closing(sqlite3.connect(database)) as connection:

        def rows(query: str) -> list[tuple[object, ...]]:
            return connection.execute(query).fetchall()

        return (
            rows("SELECT ns, key, op, value FROM facts ORDER BY seq"),
            rows("SELECT ns, key, value FROM items ORDER BY ns, key"),
            rows("SELECT thread_id, count(*) FROM checkpoints GROUP BY 1 ORDER BY 1"),
            rows("SELECT thread_id, count(*) FROM channel_values GROUP BY 1 ORDER BY 1"),
            rows("SELECT thread_id, count(*) FROM writes GROUP BY 1 ORDER BY 1"),
        )


# -- opening with faults ----------------------------------------------------------------------------


def open_faulty(path: Path, points: FaultPoints, kind: Kind, vector_sync: Any) -> MemoryStore:
    hook = FaultyHook(JournalHook(path / "index.journal"))
    storage: Any = SQLiteStorage(path / "memory.db")
    if kind.seam == "calls":
        storage = FaultyStorage(storage, points.point)
        points.watch(hook)
    memory = MemoryStore(storage, index=INDEX, vector_sync=vector_sync)
    try:
        memory.add_hook(hook)
    except BaseException:
        memory.close()
        raise
    return memory


@contextmanager
def failing_statements(points: FaultPoints) -> Any:
    """Make every statement of connections opened meanwhile a point; SQLite can always roll back."""

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
            if not statement.startswith("ROLLBACK"):
                points.point()
            return super().execute(statement, *args)

        def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:  # type: ignore[override]
            rows = list(rows)
            if rows:
                points.point()
            return super().executemany(statement, rows)

    connect = sqlite3.connect

    def failing(*args: Any, **options: Any) -> sqlite3.Connection:
        return connect(*args, factory=Connection, **options)

    sqlite3.connect = failing  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.connect = connect


# -- one run ----------------------------------------------------------------------------------------


def try_operations(
    path: Path, start: Path | None, operations: Sequence[Operation], states: Sequence[Any], kind: Kind, at: int,
    vector_sync: Any,
) -> tuple[bool, list[str]]:  # fmt: skip
    """Run operations with a fault at one point; each is tried again if it failed and did not land.

    Returns whether the fault struck. `states` are the contents before the first operation, and after each.
    """
    if start is None:
        path.mkdir(parents=True)
    else:
        shutil.copytree(start, path)
    points = FaultPoints(at, kind.error("a fault"), for_ever=kind.for_ever)
    violations: list[str] = []
    landed = 0
    with suppress(Exception, Crash) if kind.for_ever else nullcontext():
        memory = _opened(path, points, kind, vector_sync)
        try:
            run = Run(path, memory)
            for landed, operation in enumerate(operations):
                violations += _try(run, operation, states[landed], states[landed + 1], landed, kind.for_ever)
            landed = len(operations)
        finally:
            with suppress(Exception, Crash):
                memory.close()
    points.heal()
    violations += [f"{name} outlived close()" for name in threads()]
    possible = states[landed : landed + 2] if kind.for_ever else states[-1:]
    violations += examine(path, possible, vector_sync, pruned=start is not None)
    return points.struck, [f"{kind.name} at {at}: {what}" for what in violations]


def threads() -> list[str]:
    """Threads of a memory that are running."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("memstate")]


def _opened(path: Path, points: FaultPoints, kind: Kind, vector_sync: Any) -> MemoryStore:
    with failing_statements(points) if kind.seam == "statements" else nullcontext():
        try:
            return open_faulty(path, points, kind, vector_sync)
        except (Exception, Crash):
            return open_faulty(path, points, kind, vector_sync)


def _try(run: Run, operation: Operation, before: Any, after: Any, number: int, for_ever: bool) -> list[str]:
    """A failed operation left the database as it was before, or as it is afterwards."""
    try:
        operation(run)
    except (Exception, Crash) as error:
        found = contents(run.database)
        if found not in (before, after):
            return [f"operation {number} failed with {error!r} and is neither absent nor whole: {found}"]
        if for_ever:
            raise
        if found == before:
            run.memory.repair()  # an index that could not be opened would be tried again in a moment
            operation(run)
    if contents(run.database) != after:
        return [f"operation {number} was acknowledged, and is not there"]
    return []


def examine(path: Path, states: Sequence[Any], vector_sync: Any, *, pruned: bool = False) -> list[str]:
    """Open the database without faults: it holds one of these states, and the index follows."""
    violations: list[str] = []
    searching.EXACT_BELOW = -1
    searching._FLOOR = 1
    with MemoryStore(SQLiteStorage(path / "memory.db"), index=INDEX, vector_sync=vector_sync) as memory:
        if contents(path / "memory.db") not in states:
            violations.append("the database holds another state than it should")
        memory.add_hook(JournalHook(path / "index.journal"))
        violations += untrue_search(memory)
        memory.flush()
        report = memory.verify()
        if not report.ok:
            violations.append(f"verify: {report}")
    violations += audit(path / "memory.db", settled=True, pruned=pruned)
    held, current = journal_ids(path / "index.journal"), vector_ids(path / "memory.db")
    if held != current:
        violations.append(f"index: {len(held - current)} too many, {len(current - held)} missing")
    return violations


# -- the checks -------------------------------------------------------------------------------------


def fail_everywhere(
    root: str, script: str, kind: Kind, vector_sync: Any = "atomic", stride: int = 1
) -> tuple[int, list[str]]:
    """How many faults struck, and the violations after each. `script`: facts, upkeep or one of the graphs."""
    if script in GRAPHS:
        return _fail_graphs(root, script, kind, vector_sync, stride)
    operations = FACTS if script == "facts" else UPKEEP
    start = None if script == "facts" else _thread_to_keep_up(Path(root) / uuid4().hex)
    states = _states(Path(root) / uuid4().hex, start, operations, vector_sync)
    violations: list[str] = []
    for struck, at in enumerate(count(1, stride)):
        path = Path(root) / uuid4().hex
        hit, wrong = try_operations(path, start, operations, states, kind, at, vector_sync)
        violations += wrong
        shutil.rmtree(path)
        if not hit:
            return struck, violations
    raise AssertionError


def _states(path: Path, start: Path | None, operations: Sequence[Operation], vector_sync: Any) -> list[Any]:
    if start is None:
        path.mkdir(parents=True)
    else:
        shutil.copytree(start, path)
    with open_faulty(path, FaultPoints(), KINDS[0], vector_sync) as memory:
        run = Run(path, memory)
        states = [contents(run.database)]
        for operation in operations:
            operation(run)
            states.append(contents(run.database))
    return states


def _graph(path: Path, memory: MemoryStore, script: str, durability: str, phase: int) -> Any:
    cell = Cell("memstate", script, True, durability)
    return GRAPHS[script][0](Env(cell, path, memory.checkpointer, memory.store, phase, memory))


def _thread_to_keep_up(path: Path) -> Path:
    path.mkdir(parents=True)
    with open_faulty(path, FaultPoints(), KINDS[0], "atomic") as memory:
        _graph(path, memory, "line", "sync", 1).invoke({"log": []}, THREAD)
    return path


def _fail_graphs(root: str, script: str, kind: Kind, vector_sync: Any, stride: int) -> tuple[int, list[str]]:
    """A run that fails is resumed until it ends; state and memory agree whenever they are looked at."""
    violations: list[str] = []
    for struck, at in enumerate(count(1, stride)):
        path = Path(root) / uuid4().hex
        path.mkdir(parents=True)
        durability = ("sync", "async", "exit")[at % 3]
        points = FaultPoints(at, kind.error("a fault"), for_ever=kind.for_ever)

        def invoke(run: Run, durability: Any = durability) -> None:
            _graph(run.path, run.memory, script, durability, 1).invoke({"log": []}, THREAD, durability=durability)

        _run_once(path, points, kind, vector_sync, [invoke])
        wrong = _finish_graph(path, script, durability, vector_sync)
        wrong += examine(path, [contents(path / "memory.db")], vector_sync)
        violations += [f"{script}, {durability}, {kind.name} at {at}: {what}" for what in wrong]
        shutil.rmtree(path)
        if not points.struck:
            return struck, violations
    raise AssertionError


def _finish_graph(path: Path, script: str, durability: str, vector_sync: Any) -> list[str]:
    wrong: list[str] = []
    with open_faulty(path, FaultPoints(), KINDS[0], vector_sync) as memory:
        for when in ("after the fault", "at the end"):
            found = memory.checkpointer.get_tuple(THREAD)
            log = found.checkpoint["channel_values"].get("log", []) if found else []
            difference = compare(log, [fact.id for fact in memory.query(("memories",), limit=1000)])
            if not difference.clean:
                wrong.append(f"{when}: {difference}")
            if when == "after the fault":
                graph = _graph(path, memory, script, durability, 1)
                graph.invoke(None if found else {"log": []}, THREAD, durability=durability)
        if {key.partition("/")[0] for entry in log for key in entry["put"]} != GRAPHS[script][1]:
            wrong.append(f"the run ended with {log}")
    return wrong


def fail_while_recovering(root: str, kind: Kind, vector_sync: Any, left_at: Sequence[int]) -> tuple[int, list[str]]:
    """A second fault, at every point of opening, replaying and closing what a first one left behind."""
    violations: list[str] = []
    struck = 0
    for first in left_at:
        start = Path(root) / uuid4().hex
        start.mkdir(parents=True)
        _run_once(start, FaultPoints(first, Crash(), for_ever=True), KINDS[3], vector_sync, FACTS)
        left = contents(start / "memory.db")
        for second in count(1):
            path = Path(root) / uuid4().hex
            shutil.copytree(start, path)
            points = FaultPoints(second, kind.error("a fault"), for_ever=kind.for_ever)
            _run_once(path, points, kind, vector_sync, [lambda run: run.memory.flush()])
            wrong = examine(path, [left], vector_sync)
            violations += [f"left at {first}, {kind.name} at {second}: {what}" for what in wrong]
            shutil.rmtree(path)
            if not points.struck:
                break
            struck += 1
    return struck, violations


def _run_once(path: Path, points: FaultPoints, kind: Kind, vector_sync: Any, operations: Sequence[Operation]) -> None:
    """Open, operate and close, whatever fails on the way."""
    with suppress(Exception, Crash):
        memory = _opened(path, points, kind, vector_sync)
        for operation in operations:
            with suppress(Exception, Crash):
                operation(Run(path, memory))
        with suppress(Exception, Crash):
            memory.close()
    points.heal()
