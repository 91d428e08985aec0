"""Several writers on one memory, killed at random or at a chosen point; what they had acknowledged must be there.

A writer's operations are numbered and known in advance, so the number it has reached says what must be there. Before
and after each one it tells the parent through a pipe, which no kill can take back: what was told as done must be
there, the one that was begun may be, and nothing else.
"""

from __future__ import annotations

import operator
import os
import random
import select
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from audit import audit, journal_ids, untrue_search, vector_ids
from census import compare, frozen_outbox
from forks import KILLED, KillSwitch, fork, in_child, wait_for
from journal_hook import INDEX, JournalHook
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore

from langgraph_memstate import Fact, MemoryStore, SQLiteStorage
from langgraph_memstate import search as searching

KINDS = 5
Held = dict[tuple[str, str], int]
"""(fact type, id) -> the number of the operation that wrote it"""


@dataclass(frozen=True)
class Setup:
    """Who writes, and how the index follows. A writer whose name begins with ``graph`` runs graphs."""

    writers: tuple[str, ...] = ("one", "two", "three", "graph")
    vector_sync: Any = "atomic"
    chroma: bool = False


@dataclass
class Reached:
    """How many operations a writer has begun, and how many were acknowledged."""

    begun: int = 0
    done: int = 0


# -- what the writers do ----------------------------------------------------------------------------


def facts_of(writer: str, number: int) -> Held:
    """What a writer's first `number` operations leave behind."""
    held: Held = {}
    for n in range(number):
        kind = n % KINDS
        if kind == 0:
            held.update({(f"batch.{writer}", f"{n}.{i}"): n for i in range(3)})
        elif kind in (1, 2):
            held[f"counter.{writer}", "value"] = n
        elif kind == 3:
            held[f"single.{writer}", str(n)] = n
        else:
            del held[f"single.{writer}", str(n - 1)]
    return held


def operate(memory: MemoryStore, writer: str, n: int) -> None:
    """Operation number `n`: a batch, a new value of a counter (twice in five), a single fact, its deletion."""

    def fact(type: str, id: str) -> Fact:
        return Fact(type=f"{type}.{writer}", id=id, payload={"n": n, "text": f"{type} {id} of {writer}"})

    kind = n % KINDS
    if kind == 0:
        memory.commit([fact("batch", f"{n}.{i}") for i in range(3)])
    elif kind in (1, 2):
        memory.commit(fact("counter", "value"))
    elif kind == 3:
        memory.commit(fact("single", str(n)))
    else:
        memory.delete(f"single.{writer}", str(n - 1))


class Turns(TypedDict, total=False):
    log: Annotated[list[dict[str, list[str]]], operator.add]
    turns: Annotated[list[int], operator.add]


def conversation(memory: MemoryStore, writer: str) -> Any:
    """Each turn is two steps with a memory each."""

    def node(name: str) -> Callable[..., Any]:
        def run(state: Turns, *, store: BaseStore) -> dict[str, Any]:
            key = f"{name}{state['turns'][-1]}/{uuid4().hex}"
            store.put((writer,), key, {"text": f"memory {name}"})
            return {"log": [{"put": [key], "delete": []}]}

        return run

    graph = StateGraph(Turns)
    graph.add_node("hear", node("hear"))
    graph.add_node("say", node("say"))
    for before, after in ((START, "hear"), ("hear", "say"), ("say", END)):
        graph.add_edge(before, after)
    return graph.compile(checkpointer=memory.checkpointer, store=memory.store)


def converse(memory: MemoryStore, writer: str, n: int) -> None:
    graph = conversation(memory, writer)
    durability: Any = ("sync", "async", "exit")[n % 3]
    config = {"configurable": {"thread_id": writer}}
    if turns_of(memory, writer)[-1:] == [n]:
        graph.invoke(None, config, durability=durability)  # the turn that was killed
    else:
        graph.invoke({"turns": [n]}, config, durability=durability)


def turns_of(memory: MemoryStore, writer: str) -> list[int]:
    """The turns whose input has reached the state, even if it was killed before the first step."""
    found = memory.checkpointer.get_tuple({"configurable": {"thread_id": writer}})
    if found is None:
        return []
    values = found.checkpoint["channel_values"]
    return [*values.get("turns", []), *values.get("__start__", {}).get("turns", [])]


# -- the process that is killed ---------------------------------------------------------------------


@contextmanager
def opened(setup: Setup, path: Path, point: Callable[[], None] = lambda: None) -> Iterator[MemoryStore]:
    searching.EXACT_BELOW = -1  # ask the index, however few candidates there are
    searching._FLOOR = 1
    memory = MemoryStore(SQLiteStorage(path / "memory.db"), index=INDEX, vector_sync=setup.vector_sync)
    with memory:
        if setup.chroma:
            from langgraph_memstate.hooks.chroma import ChromaSyncHook

            memory.add_hook(ChromaSyncHook(path=path / "chroma"))
        else:
            memory.add_hook(JournalHook(path / "index.journal", point))
        yield memory


def write(sender: int, setup: Setup, path: Path, reached: Mapping[str, int], until: int | None, at: int) -> None:
    """Let every writer go on from the operation it has reached, `until` another one or for ever.

    Killed at point number `at`, where 0 is never.
    """
    switch = KillSwitch(at)
    switch.watch_sqlite()
    switch.armed = at > 0

    def go_on(writer: str) -> None:
        act = converse if writer.startswith("graph") else operate
        n = reached[writer]
        try:
            while until is None or n < until:
                os.write(sender, f"begun {writer} {n}\n".encode())
                act(memory, writer, n)
                n += 1
                os.write(sender, f"done {writer} {n}\n".encode())
        except BaseException as error:
            os.write(sender, f"failed {writer} {error!r}\n".encode())
            raise

    with opened(setup, path, switch.point) as memory:
        threads = [threading.Thread(target=go_on, args=(writer,)) for writer in setup.writers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run_and_kill(
    setup: Setup, path: Path, reached: Mapping[str, int], *, after: float = 60.0, until: int | None = None, at: int = 0
) -> tuple[bool, dict[str, Reached]]:
    """Run the writers in a process that is killed `after` seconds or at a point, and hear what they told.

    Returns whether it was killed.
    """
    child, receiver = fork(write, setup, path, reached, until, at, send=True)
    deadline = time.monotonic() + after
    told: list[bytes] = []
    while True:
        ready, _, _ = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + 60.0
        elif part := os.read(receiver, 1 << 16):
            told.append(part)
        else:
            break
    os.close(receiver)
    status = wait_for(child)
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the writers died with status {status}")
    found = {writer: Reached(n, n) for writer, n in reached.items()}
    for line in b"".join(told).decode().splitlines():
        what, writer, n = line.split(" ", 2)
        if what == "begun":
            found[writer].begun = int(n) + 1
        elif what == "done":
            found[writer].done = int(n)
        else:
            raise RuntimeError(f"writer {line}")
    return status != 0, found


# -- what must be there -----------------------------------------------------------------------------


@dataclass
class Found:
    """What a look at the memory after a death found, and how far each writer had come."""

    violations: list[str] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)


def examine(setup: Setup, path: Path, told: Mapping[str, Reached]) -> Found:
    """Compare what is there with what the writers told; first as the death left it, then with the index settled."""
    found = Found()
    with frozen_outbox(), opened(setup, path) as memory:
        for writer, reached in told.items():
            look = examine_graph if writer.startswith("graph") else examine_writer
            number, wrong = look(memory, writer, reached)
            found.reached[writer] = number
            found.violations += wrong
        found.violations += [f"before replay: {what}" for what in untrue_search(memory)]
    found.violations += audit(path / "memory.db")
    with opened(setup, path) as memory:
        memory.flush()
        report = memory.verify()
        if not report.ok:
            found.violations.append(f"verify: {report}")
        found.violations += [f"after replay: {what}" for what in untrue_search(memory)]
    found.violations += audit(path / "memory.db", settled=True)
    if not setup.chroma:
        held, wanted = journal_ids(path / "index.journal"), vector_ids(path / "memory.db")
        if held != wanted:
            found.violations.append(f"index: {len(held - wanted)} too many, {len(wanted - held)} missing")
    return found


def examine_writer(memory: MemoryStore, writer: str, reached: Reached) -> tuple[int, list[str]]:
    """What is there must be what the acknowledged operations left, or with the one that was in flight."""
    held = {
        (kind, fact.id): fact.payload["n"]
        for kind in (f"batch.{writer}", f"counter.{writer}", f"single.{writer}")
        for fact in memory.query(kind, limit=100_000)
    }
    for number in (reached.done, reached.begun):
        if held == facts_of(writer, number):
            return number, []
    wanted = facts_of(writer, reached.done)
    return reached.done, [
        f"{writer} was told {reached}: missing {sorted(wanted.items() - held.items())}, "
        f"not acknowledged {sorted(held.items() - wanted.items())}"
    ]


def examine_graph(memory: MemoryStore, writer: str, reached: Reached) -> tuple[int, list[str]]:
    """Acknowledged turns are in the state, and the state and the memory say the same."""
    turns = turns_of(memory, writer)
    stored = memory.checkpointer.get_tuple({"configurable": {"thread_id": writer}})
    log = stored.checkpoint["channel_values"].get("log", []) if stored else []
    found = compare(log, [item.key for item in memory.store.search((writer,), limit=100_000)])
    wrong = [] if found.clean else [f"{writer}: {found}"]
    # The turn in flight may have been begun by an earlier process, which this one did not live to tell.
    if turns not in (list(range(reached.done)), list(range(reached.done + 1))):
        wrong.append(f"{writer} was told {reached}, and its state has turns {turns}")
    if not 2 * reached.done <= len(log) <= 2 * len(turns):
        wrong.append(f"{writer} was told {reached}, and its state has {len(log)} steps")
    # A turn whose steps have not all run is resumed under its own number.
    return len(log) // 2, wrong


# -- the checks -------------------------------------------------------------------------------------


def kill_at_random(root: str, seed: int, kills: int, setup: Setup = Setup()) -> list[str]:
    """Violations after each of many deaths of the same memory."""
    dice = random.Random(seed)
    path = Path(root) / uuid4().hex
    path.mkdir(parents=True)
    reached = dict.fromkeys(setup.writers, 0)
    violations: list[str] = []
    for death in range(kills):
        killed, told = run_and_kill(setup, path, reached, after=dice.uniform(0.02, 0.3))
        assert killed, "the writers stopped by themselves"
        found = in_child(examine, setup, path, told)
        violations += [f"seed {seed}, death {death}: {what}" for what in found.violations]
        reached = found.reached
    return violations


def kill_everywhere(root: str, setup: Setup, until: int = KINDS, stride: int = 1) -> tuple[int, list[str]]:
    """How many points there were from the first open to the close, and violations after a death at each."""
    deaths = 0
    violations: list[str] = []
    for at in count(1, stride):
        path = Path(root) / uuid4().hex
        path.mkdir(parents=True)
        killed, told = run_and_kill(setup, path, dict.fromkeys(setup.writers, 0), until=until, at=at)
        found = in_child(examine, setup, path, told)
        violations += [f"killed at {at}: {what}" for what in found.violations]
        deaths += killed
        if not killed:
            return deaths, violations
    raise AssertionError


def kill_during_upkeep(root: str) -> tuple[int, list[str]]:
    """The same for pruning and deleting a thread: its checkpoints are whole, or gone; its facts stay."""
    setup = Setup(writers=("graph",))
    start = Path(root) / uuid4().hex
    start.mkdir(parents=True)
    run_and_kill(setup, start, {"graph": 0}, until=2)
    violations: list[str] = []
    for at in count(1):
        path = Path(root) / uuid4().hex
        shutil.copytree(start, path)
        killed = in_child(upkeep, setup, path, at) is KILLED
        violations += [f"killed at {at}: {what}" for what in in_child(examine_upkeep, setup, path)]
        if not killed:
            return at - 1, violations
    raise AssertionError


def upkeep(setup: Setup, path: Path, at: int) -> None:
    switch = KillSwitch(at)
    switch.watch_sqlite()
    with opened(setup, path, switch.point) as memory:
        switch.armed = True
        memory.checkpointer.copy_thread("graph", "copy")
        memory.checkpointer.prune(["graph"])
        memory.checkpointer.delete_thread("graph")


def examine_upkeep(setup: Setup, path: Path) -> list[str]:
    with opened(setup, path) as memory:
        facts = len(memory.store.search(("graph",), limit=100))
        steps: dict[str, Sequence[Any]] = {}
        for thread in ("graph", "copy"):
            steps[thread] = list(memory.checkpointer.list({"configurable": {"thread_id": thread}}))
        counts = memory.stats()
    wrong = [] if facts == 4 else [f"{facts} facts of 4"]
    whole = 8
    allowed = {(whole, 0), (whole, whole), (1, whole), (0, whole)}
    if (found := (len(steps["graph"]), len(steps["copy"]))) not in allowed:
        wrong.append(f"{found} checkpoints of the thread and its copy")
    if any(len(one[0].checkpoint["channel_values"]["log"]) != 4 for one in steps.values() if one):
        wrong.append("the latest checkpoint lost its steps")
    if not any(steps.values()) and counts["channel_values"]:
        wrong.append("values of a deleted thread are left")
    return wrong
