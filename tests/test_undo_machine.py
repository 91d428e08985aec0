"""Steps, commits, rollbacks, rollbacks of rollbacks, the past, forgetting and reopening, against lists and dicts.

The model keeps every entry ever written, and says what an undo means in the plainest words: the value of a fact is the
last one that somebody wrote who is not undone.
"""

from __future__ import annotations

import operator
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore

sys.path.insert(0, str(Path(__file__).parent))
from truth import DIMS, Words, cosine, rows

from langgraph_memstate import Fact, MemoryStore, RollbackNode
from langgraph_memstate.errors import RollbackConflict, RollbackError

KEYS = st.sampled_from([("a", "x"), ("a", "y"), ("a", "z"), ("b", "x"), ("b", "y")])
WORDS = st.sampled_from(["green tea", "black coffee", "trains to berlin", "a cat", "the roof"])
THREADS = st.sampled_from(["t", "u"])
WRITES = st.dictionaries(KEYS, st.one_of(WORDS, st.none()), max_size=3)
CONFLICTS = st.sampled_from(["raise", "keep", "overwrite"])
PLACES = st.integers(0, 1_000)

Address = tuple[str, str]
Held = dict[Address, str]


@dataclass
class Entry:
    address: Address
    text: str | None
    thread: str | None
    commit: int
    in_graph: bool = False
    takes_back: frozenset[int] | None = None
    """for an undo: the sequences of this fact that it takes back"""


@dataclass
class Checkpoint:
    """What a thread's checkpoint has to say, and how far the log had come."""

    id: str
    seq: int
    log: list[str]
    parent: Checkpoint | None
    source: str
    writes: bool = False


@dataclass
class Model:
    log: list[Entry] = field(default_factory=list)
    moments: list[Held] = field(default_factory=lambda: [{}])
    """by sequence"""
    ends: list[int] = field(default_factory=lambda: [0])
    """sequences at which a commit ends: in which order an undo writes is nobody's business"""
    heads: dict[str, Checkpoint | None] = field(default_factory=dict)
    checkpoints: dict[str, list[Checkpoint]] = field(default_factory=dict)

    @property
    def held(self) -> Held:
        return self.moments[-1]

    def append(self, writes: dict[Address, str | None], thread: str | None, **how: Any) -> None:
        """One commit."""
        commit = len(self.log) + 1
        for address, text in writes.items():
            self.log.append(Entry(address, text, thread, commit, **how))
            now = dict(self.held)
            now.pop(address, None)
            if text is not None:
                now[address] = text
            self.moments.append(now)
        self.ends.append(len(self.log))

    def standing(self, address: Address, without: frozenset[int] = frozenset()) -> list[int]:
        """Sequences of a fact that nobody has undone, the latest first; an undo that is undone undoes nothing."""
        gone, stands = set(without), []
        for seq in range(len(self.log), 0, -1):
            entry = self.log[seq - 1]
            if entry.address == address and seq not in gone:
                if entry.takes_back is None:
                    stands.append(seq)
                else:
                    gone |= entry.takes_back
        return stands

    def is_theirs(self, address: Address, ours: frozenset[int]) -> bool:
        """Whether somebody else has changed a fact since: by a write that stands, not by undoing one."""
        last = max(seq for seq, entry in enumerate(self.log, 1) if entry.address == address)
        stands = self.standing(address)
        return last not in ours and bool(stands) and stands[0] not in ours and stands[0] > min(ours)

    def undo(
        self, undone: set[int], is_ours: Callable[[Entry], bool], thread: str | None, how: str, **options: Any
    ) -> bool:
        """Whether it is allowed; then the log ends with it. In a fact, all that is ours since the first goes."""
        writes: dict[Address, str | None] = {}
        takes_back: dict[Address, frozenset[int]] = {}
        for address in {self.log[seq - 1].address for seq in undone}:
            first = min(seq for seq in undone if self.log[seq - 1].address == address)
            since = {
                seq: entry for seq, entry in enumerate(self.log, 1) if seq >= first and entry.address == address
            }  # fmt: skip
            ours = frozenset(seq for seq, entry in since.items() if is_ours(entry))
            takes_back[address] = ours
            if self.is_theirs(address, ours):
                if how == "keep" or self.log[self.standing(address)[0] - 1].thread == thread:
                    continue
                if how == "raise":
                    return False
                takes_back[address] = frozenset(since)
            before = self.standing(address, takes_back[address])
            writes[address] = self.log[before[0] - 1].text if before else None
        at = len(self.log)
        self.append(writes, thread, **options)
        for entry in self.log[at:]:
            entry.takes_back = takes_back[entry.address]
        return True


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    plan: list[dict[Address, str | None]]
    back: int


def build(memory: MemoryStore) -> Any:
    """A step for each entry of the plan, which writes it; then, where asked, one that goes back."""

    def step(state: State, *, store: BaseStore) -> State:
        for (namespace, key), text in state["plan"][0].items():
            if text is None:
                store.delete((namespace,), key)
            else:
                store.put((namespace,), key, {"text": text})
        return {"log": [f"{len(state['log'])}"], "plan": state["plan"][1:]}

    def after(state: State) -> str:
        return "step" if state["plan"] else ("back" if state["back"] else END)

    builder = StateGraph(State)
    builder.add_node("step", step)
    builder.add_node("back", RollbackNode(1, keep=("plan", "back"), on_conflict="overwrite"))
    builder.add_conditional_edges(START, after, ["step", "back", END])
    builder.add_conditional_edges("step", after, ["step", "back", END])
    return builder.compile(checkpointer=memory.checkpointer, store=memory.store)


class Past(RuleBasedStateMachine):
    """Facts and threads of a memory with an index that is scanned exactly."""

    rules = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="memstate-", dir=_quick()))
        self.model = Model()
        self.embedded = Words()

    @initialize()
    def open(self) -> None:
        index = {"dims": DIMS, "embed": self.embedded, "fields": ["text"]}
        self.memory = MemoryStore.open(self.folder / "memory.db")
        self.memory._index_config = index
        self.memory._attach(None)  # no vector database: SQL is scanned
        self.graph = build(self.memory)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()
        shutil.rmtree(self.folder)

    # -- writing ------------------------------------------------------------------------------------

    @rule(writes=WRITES, thread=st.sampled_from([None, "t", "u", "direct"]))
    def commit(self, writes: dict[Address, str | None], thread: str | None) -> None:
        Past.rules += 1
        with self.memory.transaction() as memory:
            for (namespace, key), text in writes.items():
                if text is None:
                    memory.delete(namespace, key)
                else:
                    memory.commit(Fact(namespace, {"text": text}, id=key), thread_id=thread)
        self.model.append(writes, thread)
        for entry in self.model.log[len(self.model.log) - len(writes) :]:
            entry.thread = None if entry.text is None else thread

    @rule(
        thread=THREADS,
        plan=st.lists(WRITES, min_size=1, max_size=3),
        durability=st.sampled_from(["sync", "async", "exit"]),
    )
    def run(self, thread: str, plan: list[dict[Address, str | None]], durability: Any) -> None:
        Past.rules += 1
        self.graph.invoke({"log": ["in"], "plan": plan, "back": 0}, _at(thread), durability=durability)
        for writes in plan:
            self.model.append(writes, thread, in_graph=True)
        self._note(thread)

    @rule(thread=THREADS, first=WRITES, second=WRITES)
    def run_with_a_rollback_node(
        self, thread: str, first: dict[Address, str | None], second: dict[Address, str | None]
    ) -> None:
        Past.rules += 1
        self.graph.invoke({"log": ["in"], "plan": [first, second], "back": 1}, _at(thread), durability="sync")
        self.model.append(first, thread, in_graph=True)
        at = len(self.model.log)
        self.model.append(second, thread, in_graph=True)
        undone = set(range(at + 1, len(self.model.log) + 1))
        self.model.undo(undone, lambda entry: entry.thread == thread, thread, "overwrite", in_graph=True)
        self._note(thread)
        assert self.graph.get_state(_at(thread)).values["log"][-2:] == ["in", self._last_number(thread)]

    def _last_number(self, thread: str) -> str:
        log = self.graph.get_state(_at(thread)).values["log"]
        return str(len(log) - 1)

    def _note(self, thread: str) -> None:
        """Take the checkpoints that a run has made into the model, as they tell of themselves now."""
        known = {one.id: one for one in self.model.checkpoints.setdefault(thread, [])}
        seqs = dict(
            rows(self.folder / "memory.db", "SELECT checkpoint_id, seq FROM checkpoints WHERE thread_id = ?", thread)
        )
        for stored in reversed(list(self.memory.checkpointer.list(_at(thread)))):
            id = stored.checkpoint["id"]
            if id not in known:
                parent = stored.parent_config and known[stored.parent_config["configurable"]["checkpoint_id"]]
                made = Checkpoint(
                    id, seqs[id], list(stored.checkpoint["channel_values"].get("log", [])), parent or None,
                    stored.metadata["source"],
                )  # fmt: skip
                known[id] = made
                self.model.checkpoints[thread].append(made)
        self.model.heads[thread] = known[max(known)] if known else None

    # -- going back ---------------------------------------------------------------------------------

    @rule(steps=st.integers(1, 6), thread=st.sampled_from([None, "direct"]), how=CONFLICTS)
    def roll_commits_back(self, steps: int, thread: str | None, how: Any) -> None:
        Past.rules += 1
        is_ours = _direct(thread)
        undone: set[int] = set()
        left = steps
        for commit in sorted({entry.commit for entry in self.model.log}, reverse=True):
            stands = {
                seq
                for seq, entry in enumerate(self.model.log, 1)
                if entry.commit == commit and is_ours(entry) and seq in self.model.standing(entry.address)
            }
            undone |= stands
            left -= any(not self._is_kept(seq, is_ours, thread, how) for seq in stands)
            if not left:
                break
        if left:
            with pytest.raises(RollbackError, match="commits to undo"):
                self.memory.rollback(steps, thread_id=thread, on_conflict=how)
            return
        allowed = self.model.undo(undone, is_ours, thread, how)
        self._same_outcome(lambda: self.memory.rollback(steps, thread_id=thread, on_conflict=how), allowed)

    def _is_kept(self, seq: int, is_ours: Callable[[Entry], bool], thread: str | None, how: str) -> bool:
        address = self.model.log[seq - 1].address
        ours = frozenset(
            one
            for one, entry in enumerate(self.model.log, 1)
            if one >= seq and entry.address == address and is_ours(entry)
        )
        latest = self.model.log[self.model.standing(address)[0] - 1]
        return self.model.is_theirs(address, ours) and (how == "keep" or latest.thread == thread)

    @rule(place=PLACES, thread=st.sampled_from([None, "direct"]), how=CONFLICTS)
    def roll_commits_back_to(self, place: int, thread: str | None, how: Any) -> None:
        Past.rules += 1
        to = self.model.ends[place % len(self.model.ends)]
        is_ours = _direct(thread)
        undone = {seq for seq, entry in enumerate(self.model.log, 1) if seq > to and is_ours(entry)}
        allowed = self.model.undo(undone, is_ours, thread, how)
        self._same_outcome(lambda: self.memory.rollback(to=to, thread_id=thread, on_conflict=how), allowed)

    def _same_outcome(self, rollback: Callable[[], Any], allowed: bool) -> Any:
        asked = len(self.embedded.texts)
        if not allowed:
            with pytest.raises(RollbackConflict):
                rollback()
            return None
        report = rollback()
        assert len(self.embedded.texts) == asked
        return report

    @rule(thread=THREADS, steps=st.one_of(st.integers(1, 6), st.none()), how=CONFLICTS)
    def roll_a_thread_back(self, thread: str, steps: int | None, how: Any) -> None:
        """So many steps, or all that there are."""
        Past.rules += 1
        head = self.model.heads.get(thread)
        chain = list(_ancestors(head))
        undoable = len(chain) - bool(chain and chain[-1].source == "empty")
        if head is None:
            return
        steps = max(undoable, 1) if steps is None else steps
        if steps > undoable:
            with pytest.raises(RollbackError, match="steps to undo"):
                self.memory.rollback(steps, thread_id=thread, on_conflict=how)
            return
        target = chain[steps] if steps < len(chain) else None
        self._roll_thread_back(thread, target, how, steps=steps)

    @rule(thread=THREADS, place=PLACES, how=CONFLICTS)
    def roll_a_thread_to(self, thread: str, place: int, how: Any) -> None:
        """Any checkpoint it ever had: also one that a rollback left."""
        Past.rules += 1
        others = [one for one in self.model.checkpoints.get(thread, []) if one is not self.model.heads[thread]]
        if others:
            target = others[place % len(others)]
            self._roll_thread_back(thread, target, how, to=target.id)

    def _roll_thread_back(self, thread: str, target: Checkpoint | None, how: Any, **where: Any) -> None:
        to = self._before_all(thread) if target is None else target.seq

        undone = {seq for seq, entry in enumerate(self.model.log, 1) if seq > to and entry.thread == thread}
        allowed = self.model.undo(undone, lambda entry: entry.thread == thread, thread, how, in_graph=True)
        report = self._same_outcome(lambda: self.memory.rollback(**where, thread_id=thread, on_conflict=how), allowed)
        if report is None:
            return
        old = self.model.heads[thread]
        assert old is not None
        assert report.undone == old.id
        twin = Checkpoint(
            report.head, len(self.model.log), [] if target is None else target.log,
            None if target is None else target.parent,
            "empty" if target is None or target.source == "empty" else target.source,
        )  # fmt: skip
        self.model.checkpoints[thread].append(twin)
        self.model.heads[thread] = twin
        if twin.source == "empty":
            with pytest.raises(RollbackError, match="0 steps"):
                self.memory.rollback(1, thread_id=thread, on_conflict="overwrite")

    def _before_all(self, thread: str) -> int:
        """The log before the thread's first step. What it committed without a graph before that stays."""
        in_graph = [seq for seq, entry in enumerate(self.model.log, 1) if entry.thread == thread and entry.in_graph]
        first = self.model.checkpoints[thread][0].seq
        return min([first, *(seq - 1 for seq in in_graph)])

    # -- erasing and reopening ----------------------------------------------------------------------

    @rule(address=KEYS, whole=st.booleans())
    def forget(self, address: Address, whole: bool) -> None:
        Past.rules += 1
        namespace, key = address
        self.memory.forget(namespace, None if whole else key)
        gone = [
            one
            for one in {entry.address for entry in self.model.log}
            if (one[0] == namespace and whole) or one == address
        ]
        for moment in self.model.moments:
            for one in gone:
                moment.pop(one, None)
        current = [one for one in sorted(gone) if self._last_text(one) is not None]
        for entry in self.model.log:
            if entry.address in gone:
                entry.text = None
        self.model.append(dict.fromkeys(current), None)

    def _last_text(self, address: Address) -> str | None:
        return [entry.text for entry in self.model.log if entry.address == address][-1]

    @rule()
    def reopen(self) -> None:
        Past.rules += 1
        self.memory.close()
        self.open()

    # -- what must hold -----------------------------------------------------------------------------

    @rule(place=PLACES)
    def the_past(self, place: int) -> None:
        Past.rules += 1
        seq = self.model.ends[place % len(self.model.ends)]
        self._compare(self.memory.as_of(seq), self.model.moments[seq])

    @rule(thread=THREADS, place=PLACES)
    def the_past_of_a_checkpoint(self, thread: str, place: int) -> None:
        Past.rules += 1
        known = self.model.checkpoints.get(thread)
        if known:
            one = known[place % len(known)]
            self._compare(self.memory.as_of(one.id), self.model.moments[one.seq])

    @rule(first=PLACES, second=PLACES)
    def a_diff(self, first: int, second: int) -> None:
        Past.rules += 1
        first, second = (self.model.ends[place % len(self.model.ends)] for place in (first, second))
        before, after = self.model.moments[first], self.model.moments[second]
        found = {
            (change.namespace[0], change.key): (
                change.before and change.before["text"], change.after and change.after["text"],
            )
            for change in self.memory.diff(first, second)
        }  # fmt: skip
        touched = before.keys() | after.keys()
        wanted = {one: (before.get(one), after.get(one)) for one in touched if before.get(one) != after.get(one)}
        assert found == wanted

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        if not hasattr(self, "memory"):
            return
        self._compare(self.memory.store, self.model.held)
        log = [(entry.namespace[0], entry.key) for entry in self.memory.log()]
        assert len(log) == len(self.model.log)
        for thread, head in self.model.heads.items():
            values = self.graph.get_state(_at(thread)).values
            assert values.get("log", []) == ([] if head is None else head.log)

    @staticmethod
    def _compare(store: Any, wanted: Held) -> None:
        items = store.search((), limit=100)
        assert {(item.namespace[0], item.key): item.value["text"] for item in items} == wanted
        found = store.search((), query="green tea", limit=3)
        best = sorted((cosine("green tea", text) for text in wanted.values()), reverse=True)[:3]
        assert [item.score for item in found] == pytest.approx(best, abs=1e-6)
        assert {(item.namespace[0], item.key): item.value["text"] for item in found}.items() <= wanted.items()


def _direct(thread: str | None) -> Callable[[Entry], bool]:
    """What no graph wrote, of one thread or of any."""
    return lambda entry: not entry.in_graph and thread in (None, entry.thread)


def _ancestors(checkpoint: Checkpoint | None) -> Iterator[Checkpoint]:
    while checkpoint is not None:
        yield checkpoint
        checkpoint = checkpoint.parent


def _at(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def _quick() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def play(examples: int, steps: int) -> int:
    Past.rules = 0
    machine = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Past, settings=machine)
    return Past.rules


def test_undo_and_the_past_agree_with_a_model() -> None:
    print(f"\n{play(40, 25)} rules")


@pytest.mark.slow
def test_undo_and_the_past_agree_with_a_model_for_long() -> None:
    rules = play(140, 50)
    print(f"\n{rules} rules")
    assert rules > 2_000
