"""Kill -9 at every SQL statement of a graph run with memory writes; then resume, and count what is wrong.

A node writes each memory under a new key and returns the keys in the state. So the state says exactly which memories
there must be, at any moment, and what is held beside that is a ghost or a duplicate.
"""

from __future__ import annotations

import asyncio
import operator
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from audit import audit, facts_of_checkpoints, journal_ids, rows_of, untrue_search, vector_ids
from forks import KILLED, KillSwitch, in_child
from journal_hook import INDEX, JournalHook
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.store.sqlite import SqliteStore
from langgraph.store.sqlite.aio import AsyncSqliteStore

from langgraph_memstate import MemoryStore, RedisStorage, SQLiteStorage
from langgraph_memstate import search as searching
from langgraph_memstate.storage.base import Storage

DURABILITIES = ("sync", "async", "exit")
NAMESPACE = ("memories",)
THREAD = {"configurable": {"thread_id": "t"}}
PAUSE = 0.02  # seconds


class Boom(Exception):
    """What a node fails with."""


class State(TypedDict, total=False):
    log: Annotated[list[dict[str, list[str]]], operator.add]


@dataclass(frozen=True)
class Cell:
    """One way to run a graph.

    `side`: memstate (with a `JournalHook`), chroma (memstate with Chroma), upstream, or redis (memstate on `server`,
    killed around its round trips; "redis sql": at every statement as well).
    """

    side: str
    graph: str
    sync: bool
    durability: str
    vector_sync: Any = "atomic"
    server: str = ""

    @property
    def is_on_redis(self) -> bool:
        return self.side.startswith("redis")

    def __str__(self) -> str:
        face = "sync" if self.sync else "async"
        mode = "" if self.side == "upstream" else f" {self.vector_sync}"
        return f"{self.side:8} {self.graph:7} {face:5} durability={self.durability:5}{mode}"


@dataclass
class Count:
    """What is wrong, in numbers and in words. A death is a point at which the process was killed."""

    deaths: int = 0
    ghosts: int = 0
    losses: int = 0
    duplicates: int = 0
    bad_deaths: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: Count) -> None:
        self.ghosts += other.ghosts
        self.losses += other.losses
        self.duplicates += other.duplicates
        self.violations += other.violations

    @property
    def clean(self) -> bool:
        return not (self.ghosts or self.losses or self.duplicates or self.violations)


# -- the sides --------------------------------------------------------------------------------------


@dataclass
class Env:
    cell: Cell
    path: Path
    saver: Any
    store: Any
    phase: int
    memory: MemoryStore | None = None

    async def invoke(self, graph: Any, input: Any) -> None:
        with suppress(Boom):
            if self.cell.sync:
                graph.invoke(input, THREAD, durability=self.cell.durability)
            else:
                await graph.ainvoke(input, THREAD, durability=self.cell.durability)

    async def state(self) -> dict[str, Any] | None:
        """The values of the latest checkpoint, or None."""
        found = self.saver.get_tuple(THREAD) if self.cell.sync else await self.saver.aget_tuple(THREAD)
        return None if found is None else found.checkpoint["channel_values"]

    async def keys(self) -> list[str]:
        """Keys of all memories, as the store lists them."""
        if self.cell.sync:
            return [item.key for item in self.store.search(NAMESPACE, limit=1000)]
        return [item.key for item in await self.store.asearch(NAMESPACE, limit=1000)]


def storage_of(cell: Cell, path: Path) -> Storage:
    if cell.is_on_redis:
        return RedisStorage(cell.server, name=path.name, replica=path / "memory.db")
    return SQLiteStorage(path / "memory.db")


@asynccontextmanager
async def opened(cell: Cell, path: Path, phase: int, point: Callable[[], None] = lambda: None) -> AsyncIterator[Env]:
    async with AsyncExitStack() as stack:
        if cell.side != "upstream":
            searching.EXACT_BELOW = -1  # ask the index, however few candidates there are
            searching._FLOOR = 1
            memory = MemoryStore(storage_of(cell, path), index=INDEX, vector_sync=cell.vector_sync)
            stack.callback(memory.close)
            if cell.side == "chroma":
                from langgraph_memstate.hooks.chroma import ChromaSyncHook

                memory.add_hook(ChromaSyncHook(path=path / "chroma"))
            else:
                memory.add_hook(JournalHook(path / "index.journal", point))
            yield Env(cell, path, memory.checkpointer, memory.store, phase, memory)
        elif cell.sync:
            saver = stack.enter_context(SqliteSaver.from_conn_string(str(path / "saver.db")))
            store = stack.enter_context(SqliteStore.from_conn_string(str(path / "store.db")))
            saver.setup()
            store.setup()
            yield Env(cell, path, saver, store, phase)
        else:
            asaver = await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(str(path / "saver.db")))
            astore = await stack.enter_async_context(AsyncSqliteStore.from_conn_string(str(path / "store.db")))
            await asaver.setup()
            await astore.setup()
            yield Env(cell, path, asaver, astore, phase)


# -- the graphs -------------------------------------------------------------------------------------


Forget = Callable[[State], str]
"""Which key a node deletes, by its state."""


def node(env: Env, name: str, *slots: str, forget: Forget | None = None, fails: bool = False) -> Callable[..., Any]:
    """A node that writes a memory per slot, may delete one, and returns what it did. Its runs are noted in a file.

    One that `fails` lets the others of its step finish first.
    """

    def plan(state: State) -> tuple[list[str], list[str]]:
        with (env.path / "runs").open("a") as file:
            file.write(f"{env.phase} {name}\n")
        return [f"{slot}/{uuid4().hex}" for slot in slots], [] if forget is None else [forget(state)]

    def value(key: str) -> dict[str, str]:
        return {"text": f"memory {key.partition('/')[0]}"}

    def run(state: State, *, store: BaseStore) -> dict[str, Any]:
        put, delete = plan(state)
        for key in put:
            store.put(NAMESPACE, key, value(key))
        for key in delete:
            store.delete(NAMESPACE, key)
        if fails:
            time.sleep(PAUSE)
            raise Boom
        return {"log": [{"put": put, "delete": delete}]}

    async def arun(state: State, *, store: BaseStore) -> dict[str, Any]:
        put, delete = plan(state)
        for key in put:
            await store.aput(NAMESPACE, key, value(key))
        for key in delete:
            await store.adelete(NAMESPACE, key)
        if fails:
            await asyncio.sleep(PAUSE)
            raise Boom
        return {"log": [{"put": put, "delete": delete}]}

    return run if env.cell.sync else arun


def three_nodes(env: Env) -> Any:
    """One memory, then two, then one that replaces the first."""
    graph = StateGraph(State)
    graph.add_node("a", node(env, "a", "a"))
    graph.add_node("b", node(env, "b", "b1", "b2"))
    graph.add_node("c", node(env, "c", "c", forget=lambda state: state["log"][0]["put"][0]))
    for before, after in ((START, "a"), ("a", "b"), ("b", "c"), ("c", END)):
        graph.add_edge(before, after)
    return graph.compile(checkpointer=env.saver, store=env.store)


def fan_out(env: Env) -> Any:
    """Two that finish beside one that writes and fails in the first phase; a last node follows all."""
    graph = StateGraph(State)
    graph.add_node("good", node(env, "good", "g1", "g2"))
    graph.add_node("fine", node(env, "fine", "f"))
    graph.add_node("bad", node(env, "bad", "x", fails=env.phase == 0))
    graph.add_node("last", node(env, "last", "l"))
    for name in ("good", "fine", "bad"):
        graph.add_edge(START, name)
    graph.add_edge(["good", "fine", "bad"], "last")
    graph.add_edge("last", END)
    return graph.compile(checkpointer=env.saver, store=env.store)


GRAPHS: dict[str, tuple[Callable[[Env], Any], frozenset[str]]] = {
    "line": (three_nodes, frozenset(("a", "b1", "b2", "c"))),
    "fan out": (fan_out, frozenset(("g1", "g2", "f", "x", "l"))),
}


async def go_on(env: Env) -> None:
    """Start the graph, or resume it where it was left; a graph that has ended stays as it is."""
    graph = GRAPHS[env.cell.graph][0](env)
    await env.invoke(graph, {"log": []} if await env.state() is None else None)


# -- counting ---------------------------------------------------------------------------------------


def compare(log: Sequence[dict[str, list[str]]], held: Sequence[str]) -> Count:
    """What memory holds, against what the state says of it. Keys are ``slot/attempt``."""
    written = {key for entry in log for key in entry["put"]}
    wanted = written - {key for entry in log for key in entry["delete"]}
    copies = Counter(held)
    extra = [key for key in copies if key not in wanted]
    twins = [key for key in extra if any(key.split("/")[0] == other.split("/")[0] for other in wanted)]
    return Count(
        ghosts=len(extra) - len(twins),
        losses=len(wanted - copies.keys()),
        duplicates=len(twins) + sum(copies.values()) - len(copies),
    )


async def look(env: Env, when: str) -> Count:
    """Compare state and memory as they are."""
    state = await env.state()
    held = await env.keys()
    found = compare((state or {}).get("log", []), held)
    if env.memory is not None:
        wrong = audit(env.path / "memory.db") + untrue_search(env.memory)
        found.violations += [f"{when}: {what}" for what in wrong]
    return found


# -- one death --------------------------------------------------------------------------------------


def create(cell: Cell, path: Path) -> None:
    """Make the databases."""

    async def run() -> None:
        async with opened(cell, path, 0):
            return

    asyncio.run(run())


def play(cell: Cell, path: Path, phase: int = 0, at: int = 0) -> None:
    """Run or resume the graph, killed at point number `at` (0: never)."""

    async def run() -> None:
        switch = KillSwitch(at)
        if cell.is_on_redis:
            switch.watch_redis()
        if cell.side != "redis":
            switch.watch_sqlite()
        async with opened(cell, path, phase, switch.point) as env:
            switch.armed = True
            await go_on(env)

    asyncio.run(run())


def survey(cell: Cell, path: Path, died: bool) -> Count:
    """Compare state and memory as a death left them; then resume until the end, and compare again, the index too."""

    async def run() -> Count:
        result = Count()
        if died:
            with frozen_outbox():
                async with opened(cell, path, 1) as env:
                    result.add(await look(env, "after the death"))
        async with opened(cell, path, 1) as env:
            await go_on(env)
            result.add(await look(env, "at the end"))
            log = (await env.state() or {}).get("log", [])
            slots = {key.partition("/")[0] for entry in log for key in entry["put"]}
            if slots != GRAPHS[cell.graph][1]:
                result.violations.append(f"the run ended after {sorted(slots)}")
            if env.memory is not None:
                env.memory.flush()
                report = env.memory.verify()
                if not report.ok:
                    result.violations.append(f"verify: {report}")
                result.violations += _disagreements(env.memory, path / "memory.db")
        if env.memory is not None:
            result.violations += audit(path / "memory.db", settled=True)
        if cell.is_on_redis:
            result.violations += _differences(cell, path)
        if cell.side not in ("upstream", "chroma"):
            held, wanted = journal_ids(path / "index.journal"), vector_ids(path / "memory.db")
            if held != wanted:
                result.violations.append(f"index: {len(held - wanted)} too many, {len(wanted - held)} missing")
        return result

    return asyncio.run(run())


def _disagreements(memory: MemoryStore, database: Path) -> list[str]:
    """Every checkpoint of the thread says what was remembered as it committed, not the latest alone."""
    facts = facts_of_checkpoints(database, "t")
    found: list[str] = []
    for stored in memory.checkpointer.list(THREAD):
        log = stored.checkpoint["channel_values"].get("log", [])
        if not compare(log, sorted(facts[stored.checkpoint["id"]])).clean:
            found.append(f"checkpoint {stored.metadata} does not agree with the facts of its time")
    return found


def _differences(cell: Cell, path: Path) -> list[str]:
    """Whether a process that starts with nothing comes to the same rows as the file that outlived the deaths."""
    with closing(RedisStorage(cell.server, name=path.name)) as storage:
        storage.open()
        return [] if rows_of(storage._view._path) == rows_of(path / "memory.db") else ["the copies differ"]


class frozen_outbox:
    """Keeps a memory from applying or settling any index work, so that a death can be looked at as it was left."""

    def __enter__(self) -> None:
        from langgraph_memstate.outbox import Outbox

        self._kept = {name: getattr(Outbox, name) for name in ("settle_abandoned", "replay", "flush")}
        Outbox.settle_abandoned = lambda self: None  # type: ignore[method-assign]
        Outbox.replay = lambda self, force=False: False  # type: ignore[method-assign]
        Outbox.flush = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *exc: object) -> None:
        from langgraph_memstate.outbox import Outbox

        for name, method in self._kept.items():
            setattr(Outbox, name, method)


# -- the census -------------------------------------------------------------------------------------


def take_census(cell: Cell, root: str, phase: int = 0, first: int = 1, stride: int = 1) -> Count:
    """Kill the process at every `stride`-th point of a phase, until one run is not killed any more.

    Phase 1 resumes a graph whose first phase left finished tasks beside a failed one.
    """
    total = Count()
    start = Path(root) / uuid4().hex
    start.mkdir(parents=True)
    in_child(play if phase == 1 else create, cell, start)
    saved = _saved(start / "memory.db") if cell.side != "upstream" else []
    for at in count(first, stride):
        path = Path(root) / uuid4().hex
        if cell.is_on_redis:
            path.mkdir()
        else:
            shutil.copytree(start, path)
        killed = in_child(play, cell, path, phase, at) is KILLED
        death = in_child(survey, cell, path, killed)
        death.violations += _run_again(path, saved)
        death.violations = [f"{cell}, phase {phase}, killed at {at}: {what}" for what in death.violations]
        total.deaths += killed
        total.bad_deaths += not death.clean
        total.add(death)
        shutil.rmtree(path)
        if not killed:
            return total
    raise AssertionError


def _saved(database: Path) -> list[str]:
    """Names of the tasks whose output is saved with a step that has not landed."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT DISTINCT task_path FROM staged JOIN writes USING (task_path) WHERE idx >= 0")
        return [path.rpartition(", ")[2] for (path,) in rows]


def _run_again(path: Path, saved: Sequence[str]) -> list[str]:
    """Finished tasks that ran once more although their output was saved before the resume."""
    runs = Counter((path / "runs").read_text().splitlines())
    return [f"{name} ran again" for name in saved if runs[f"1 {name}"]]
