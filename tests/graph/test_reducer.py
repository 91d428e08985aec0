"""A typed channel in a graph: nothing invalid reaches a checkpoint, on any way in, and no thread is stuck with it."""

from __future__ import annotations

import asyncio
import operator
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import Command, Overwrite, RetryPolicy, Send, StateUpdate, interrupt
from pydantic import BaseModel, create_model, model_validator

from langgraph_memstate import MemoryStore, TypedReducer
from langgraph_memstate.errors import SchemaError
from langgraph_memstate.storage.operations import DropWrites

DURABILITIES = ("sync", "async", "exit")
CONFIG: Any = {"configurable": {"thread_id": "t"}}
GOOD = '```json\n{"name": "Ann"}\n```'
BAD = '{"name": "Ann", "age": "old"}'


class Profile(BaseModel):
    name: str
    age: int = 0


class Contact(BaseModel):
    id: str
    phone: str = ""


class Range(BaseModel):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def check(self) -> Range:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class State(TypedDict, total=False):
    before: Annotated[list[str], operator.add]
    profile: Annotated[Profile, TypedReducer(Profile)]
    log: Annotated[list[str], operator.add]


class Model(BaseModel):
    profile: Annotated[Profile | None, TypedReducer(Profile)] = None
    n: int = 0


Shared = Annotated[Profile, TypedReducer(Profile)]


class Two(TypedDict, total=False):
    left: Shared
    right: Shared


class Untyped(TypedDict, total=False):
    profile: Any


class Face:
    """A graph, sync or async, in one durability."""

    def __init__(self, graph: Any, sync: bool, durability: str = "sync") -> None:
        self.graph, self.sync, self.durability = graph, sync, durability

    def invoke(self, given: Any) -> Any:
        if self.sync:
            return self.graph.invoke(given, CONFIG, durability=self.durability)
        return asyncio.run(self.graph.ainvoke(given, CONFIG, durability=self.durability))

    def update(self, values: Any, as_node: str, config: Any = CONFIG) -> None:
        if self.sync:
            self.graph.update_state(config, values, as_node=as_node)
        else:
            asyncio.run(self.graph.aupdate_state(config, values, as_node=as_node))

    def refuses(self, given: Any, match: str = ".") -> SchemaError:
        with pytest.raises(SchemaError, match=match) as caught:
            self.invoke(given)
        return caught.value

    @property
    def state(self) -> Any:
        return self.graph.get_state(CONFIG) if self.sync else asyncio.run(self.graph.aget_state(CONFIG))


def notes(memory: MemoryStore) -> list[str]:
    """The keys under ("notes",) as anyone sees them, and what is staged for nobody knows when."""
    return sorted(item.key for item in memory.store.search(("notes",), limit=100))


def rows(memory: MemoryStore) -> dict[str, int]:
    with memory.storage.snapshot() as reader:
        counts = reader.counts()
    return {table: counts[table] for table in ("checkpoints", "writes", "staged")}


def stored_anywhere(memory: MemoryStore, text: str) -> bool:
    """Whether a checkpoint or a pending write of any thread holds a text; an error shows the output it is about."""
    with memory.storage.snapshot() as reader:
        stored = reader.checkpoints(thread_id=None, checkpoint_ns=None, checkpoint_id=None, before=None, limit=-1)
    writes = [write.value for one in stored for write in one.writes if write.channel != "__error__"]
    values = [one.checkpoint["channel_values"] for one in memory.checkpointer.list(None)]
    return any(text.encode() in blob.data for blob in writes) or any(text in repr(value) for value in values)


@pytest.fixture(params=[True, False], ids=["invoke", "ainvoke"])
def sync(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=DURABILITIES)
def durability(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Agent:
    """first → (writer | sibling) → last: the writer's profile is what the test says, and each node notes something."""

    def __init__(self) -> None:
        self.output: Any = {"profile": BAD}
        self.ran: list[str] = []

    def node(self, name: str, store: BaseStore, **more: Any) -> Any:
        self.ran.append(name)
        store.put(("notes",), f"{name} {self.ran.count(name)}", {"text": name})
        return {"log": [name], **more}

    def graph(self, memory: MemoryStore, schema: Any = State) -> Any:
        def first(state: Any, *, store: BaseStore) -> Any:
            return self.node("first", store)

        def writer(state: Any, *, store: BaseStore) -> Any:
            noted = self.node("writer", store)
            return {**noted, "before": ["w"], **self.output} if isinstance(self.output, dict) else self.output

        def sibling(state: Any, *, store: BaseStore) -> Any:
            return self.node("sibling", store)

        def last(state: Any, *, store: BaseStore) -> Any:
            return self.node("last", store)

        workflow = StateGraph(schema)
        for node in (first, writer, sibling, last):
            workflow.add_node(node.__name__, node)
        workflow.add_edge(START, "first")
        workflow.add_edge("first", "writer")
        workflow.add_edge("first", "sibling")
        workflow.add_edge(["writer", "sibling"], "last")
        return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)


# -- the first write, and every way in ------------------------------------------------------------


def test_the_first_write_is_validated_and_typed(memory: MemoryStore, sync: bool) -> None:
    agent = Agent()
    agent.output = {"profile": GOOD}
    face = Face(agent.graph(memory), sync)
    assert face.invoke({})["profile"] == Profile(name="Ann")
    assert type(face.state.values["profile"]) is Profile


REFUSED: dict[str, Any] = {
    "a node's output": {"profile": BAD},
    "a command": Command(update={"profile": BAD, "log": ["command"]}),
    "a command of pairs": Command(update=[("log", ["command"]), ("profile", BAD)]),
    "a list with a command": [{"log": ["l"]}, Command(update={"profile": BAD})],
    "an overwrite": {"profile": Overwrite(BAD)},
    "an overwrite as a dict": {"profile": {"__overwrite__": {"name": 5, "mark": "old"}}},
    "an overwrite that went through JSON": {"profile": {"type": "__overwrite__", "value": {"name": 5, "mark": "old"}}},
    "an instance made without validation": {"profile": Profile.model_construct(name="old", age="old")},
}


@pytest.mark.parametrize("way", REFUSED)
def test_a_refused_output_leaves_a_thread_that_goes_on(way: str, database: Path, sync: bool, durability: str) -> None:
    agent = Agent()
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync, durability)
        agent.output = REFUSED[way]
        error = face.refuses({}, "profile")
        assert "old" in str(error)
        kept, staged = face.state, rows(memory)
        assert "profile" not in kept.values
        assert "before" not in kept.values or kept.values["before"] == []
        assert not stored_anywhere(memory, "old")
        if durability == "exit":
            assert (kept.values, kept.next, notes(memory)) == ({}, (), [])
            assert staged == {"checkpoints": 0, "writes": 0, "staged": 0}
        else:
            assert (kept.next, notes(memory)) == (("writer",), ["first 1"])
            assert staged["staged"] == 1  # the sibling's, and not the writer's
    with MemoryStore.open(database) as memory:  # another process
        face = Face(agent.graph(memory), sync, durability)
        assert (face.state.values, face.state.next) == (kept.values, kept.next)
        agent.output = {"profile": GOOD}
        final = face.invoke({} if durability == "exit" else None)
        assert final["profile"] == Profile(name="Ann")
        again = ["first 2", "last 1", "sibling 2", "writer 2"]
        assert notes(memory) == (again if durability == "exit" else ["first 1", "last 1", "sibling 1", "writer 2"])
        assert rows(memory)["staged"] == 0


def test_a_thread_can_be_refused_again_and_again(database: Path, sync: bool, durability: str) -> None:
    agent = Agent()
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync, durability)
        face.refuses({})
        for given in (None, None, {}) if durability != "exit" else ({}, {}, {}):
            before = face.state
            face.refuses(given)
            if given is None:
                assert face.state.config == before.config
                assert (face.state.values, face.state.next) == (before.values, ("writer",))
        agent.output = {"profile": GOOD}
        face.invoke({})
        assert face.state.values["profile"] == Profile(name="Ann")
        assert notes(memory).count("writer 5") == 1
        assert not any(note.startswith("writer") and note != "writer 5" for note in notes(memory))


def test_refused_graph_input_leaves_the_thread_as_it_was(database: Path, sync: bool, durability: str) -> None:
    agent = Agent()
    agent.output = {"profile": GOOD}
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync, durability)
        face.refuses({"profile": BAD, "log": ["in"]}, "profile")
        assert (face.state.values, face.state.next) == ({}, ())
        face.invoke({})
        before, held = face.state, rows(memory)
        for given in ({"profile": BAD}, {"profile": Overwrite(BAD)}, {"profile": {"__overwrite__": 5}}):
            face.refuses({**given, "log": ["in"]}, "profile")
            assert face.state == before
            assert rows(memory) == held
        assert not stored_anywhere(memory, "old")
        agent.output = {}
        assert face.invoke({"profile": Profile(name="Bob")})["profile"] == Profile(name="Bob")


def test_input_refused_on_an_unfinished_step_keeps_that_step(database: Path, sync: bool, durability: str) -> None:
    agent = Agent()
    agent.output = {"profile": GOOD}
    with MemoryStore.open(database) as memory:
        workflow = agent.graph(memory).builder
        graph = workflow.compile(checkpointer=memory.checkpointer, store=memory.store, interrupt_before=["last"])
        face = Face(graph, sync, durability)
        face.invoke({})
        before = face.state
        face.refuses({"profile": BAD})
        assert face.state == before
        face.invoke(None)
        assert notes(memory) == ["first 1", "last 1", "sibling 1", "writer 1"]


def test_a_refused_command_as_input(database: Path, sync: bool, durability: str) -> None:
    asked: list[Any] = []

    def ask(state: Any, *, store: BaseStore) -> Any:
        answer = interrupt("who?")
        asked.append(answer)
        store.put(("notes",), f"asked {len(asked)}", {})
        more = interrupt("and?")
        return {"log": [f"{answer} {more}"]}

    def graph(memory: MemoryStore) -> Any:
        workflow = StateGraph(State)
        workflow.add_node("ask", ask)
        workflow.add_edge(START, "ask")
        return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)

    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        face.invoke({})
        face.refuses(Command(resume="Ann", update={"log": ["no"], "profile": BAD}), "profile")
        assert (face.state.next, asked) == (("ask",), [])
        assert face.state.values.get("log", []) == []
        face.invoke(Command(resume="Ann", update={"log": ["yes"], "profile": GOOD}))
        assert face.state.values["log"] == ["yes"]
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        face.refuses(Command(resume="more", update={"log": ["no"], "profile": BAD}), "profile")
        assert face.state.values["log"] == ["yes"]  # the input before it stays
        final = face.invoke(Command(resume="Bob"))
        assert (final["log"], final["profile"]) == (["yes", "Ann Bob"], Profile(name="Ann"))
        assert notes(memory) == [f"asked {len(asked)}"]


def test_update_state(database: Path, sync: bool) -> None:
    agent = Agent()
    agent.output = {"profile": GOOD}
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync)
        for values in ({"profile": BAD, "log": ["u"]}, {"profile": Overwrite(BAD)}, {"profile": {"__overwrite__": 5}}):
            with pytest.raises(SchemaError, match="profile"):
                face.update(values, "writer")
            assert rows(memory) == {"checkpoints": 0, "writes": 0, "staged": 0}
        face.invoke({})
        before, held = face.state, rows(memory)
        for values in ({"profile": BAD, "log": ["u"]}, {"profile": Overwrite(BAD)}):
            with pytest.raises(SchemaError, match="profile"):
                face.update(values, "writer")
            assert (face.state, rows(memory)) == (before, held)
        face.update({"profile": '{"name": "Bob"}'}, "writer")
        assert face.state.values["profile"] == Profile(name="Bob")


def test_update_state_between_tasks_that_finished(database: Path, sync: bool) -> None:
    """A refused update shares the ids of the tasks that wait; what the finished one has saved is not its own."""
    agent = Agent()
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync)
        face.refuses({})
        before, held = face.state, rows(memory)
        for node in ("sibling", "writer"):
            with pytest.raises(SchemaError, match="profile"):
                face.update({"profile": BAD, "log": ["u"]}, node)
            assert (face.state, rows(memory)) == (before, held)
        agent.output = {"profile": GOOD}
        face.invoke(None)
        assert notes(memory) == ["first 1", "last 1", "sibling 1", "writer 2"]


# -- what was saved before the channel saw it -----------------------------------------------------


def test_a_refusal_that_a_killed_process_did_not_live_to_see(database: Path, sync: bool) -> None:
    """A process that dies between saving a task's writes and applying them leaves them for the next one to refuse."""
    agent = Agent()
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync)
        face.refuses({})
        saved = face.state
        config = saved.config["configurable"] | {"checkpoint_ns": ""}
        waiting = next(one for one in saved.tasks if one.name == "writer")
        memory.checkpointer.put_writes({"configurable": config}, [("log", ["w"]), ("profile", BAD)], waiting.id)
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync)
        with pytest.raises(SchemaError, match="profile"):
            repr(face.state)
        assert face.state.next == ("writer",)  # it is gone, durably
        memory.checkpointer.put_writes({"configurable": config}, [("log", ["w"]), ("profile", BAD)], waiting.id)
    with MemoryStore.open(database) as memory:
        face = Face(agent.graph(memory), sync)
        face.refuses(None)
        agent.output = {"profile": GOOD}
        assert face.invoke(None)["profile"] == Profile(name="Ann")
        assert notes(memory) == ["first 1", "last 1", "sibling 1", "writer 2"]


PROCESS = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_reducer import Agent, Face, MemoryStore, SchemaError, GOOD, notes
    agent = Agent()
    with MemoryStore.open({database!r}) as memory:
        face = Face(agent.graph(memory), {sync}, {durability!r})
        if {good}:
            agent.output = {{"profile": GOOD}}
            print(face.state.next, face.invoke(None)["profile"], notes(memory))
        else:
            try:
                face.invoke({{}})
            except SchemaError:
                import os
                print("refused", flush=True)
                os._exit(9)
"""


@pytest.mark.parametrize(("sync", "durability"), [(True, "async"), (False, "sync")])
def test_a_refusal_outlives_the_process(database: Path, sync: bool, durability: str) -> None:
    """It is durable when the error is raised: the process ends there, with nothing closed."""

    def run(good: bool) -> subprocess.CompletedProcess[str]:
        code = textwrap.dedent(PROCESS).format(
            tests=str(Path(__file__).parent), database=str(database), sync=sync, durability=durability, good=good
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    died = run(good=False)
    assert (died.returncode, died.stdout) == (9, "refused\n"), died.stderr
    resumed = run(good=True)
    assert resumed.stdout.splitlines() == [
        "('writer',) name='Ann' age=0 ['first 1', 'last 1', 'sibling 1', 'writer 1']"
    ], resumed.stderr


@pytest.mark.parametrize("slow", ["save", "land"])
def test_a_write_that_is_saved_while_it_is_refused(
    slow: str, database: Path, sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes before the write is queued, or while it waits to land: either way it does not stay."""
    agent = Agent()
    with MemoryStore.open(database) as memory:
        refused = threading.Event()
        if slow == "save":
            saver: Any = memory.checkpointer
            put_writes = saver.put_writes

            def late(config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
                if any(channel == "profile" for channel, _ in writes):
                    refused.wait(2)
                put_writes(config, writes, task_id, task_path)

            monkeypatch.setattr(saver, "put_writes", late)
        else:
            apply = memory.storage.apply

            def slow_apply(commits: Any) -> Any:
                refused.wait(0.05)
                return apply(commits)

            monkeypatch.setattr(memory.storage, "apply", slow_apply)
        refuse = TypedReducer._refuse

        def noted(self: Any, output: Any, unusable: Any) -> SchemaError:
            try:
                return refuse(self, output, unusable)
            finally:
                refused.set()

        monkeypatch.setattr(TypedReducer, "_refuse", noted)
        face = Face(agent.graph(memory), sync, "async")
        face.refuses({})
        assert face.state.next == ("writer",)
        assert rows(memory)["staged"] == 1
        monkeypatch.undo()
        agent.output = {"profile": GOOD}
        face.invoke(None)
        assert notes(memory) == ["first 1", "last 1", "sibling 1", "writer 2"]


def test_a_sibling_that_waits_at_an_interrupt(database: Path, sync: bool, durability: str) -> None:
    output: dict[str, Any] = {"profile": BAD}

    def ask(state: Any, *, store: BaseStore) -> Any:
        answer = interrupt("who?")
        store.put(("notes",), "asked", {})
        return {"log": [answer]}

    def write(state: Any, *, store: BaseStore) -> Any:
        store.put(("notes",), "wrote", {"n": len(output)})
        return output

    def graph(memory: MemoryStore) -> Any:
        workflow = StateGraph(State)
        workflow.add_node("ask", ask)
        workflow.add_node("write", write)
        workflow.add_edge(START, "ask")
        workflow.add_edge(START, "write")
        return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)

    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        face.refuses({}, "profile")
        assert set(face.state.next) == {"ask", "write"}
        assert [one.value for one in face.state.interrupts] == ["who?"]
        assert rows(memory)["staged"] == 0
        output["profile"] = GOOD
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        final = face.invoke(Command(resume="Ann"))
        assert (final["profile"], final["log"]) == (Profile(name="Ann"), ["Ann"])
        assert notes(memory) == ["asked", "wrote"]


def test_a_conditional_edge_reads_what_the_channel_refuses(database: Path, sync: bool, durability: str) -> None:
    output: dict[str, Any] = {"profile": BAD}

    def write(state: Any, *, store: BaseStore) -> Any:
        store.put(("notes",), "wrote", {})
        return output

    def graph(memory: MemoryStore) -> Any:
        workflow = StateGraph(State)
        workflow.add_node("write", write)
        workflow.add_edge(START, "write")
        workflow.add_conditional_edges("write", lambda state: END if state["profile"].age < 50 else "write")
        return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)

    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        face.refuses({})
        assert (face.state.next, notes(memory)) == (("write",), [])
        assert "SchemaError" in repr(face.state.tasks[0].error)
        output["profile"] = GOOD
        assert face.invoke(None)["profile"] == Profile(name="Ann")
        assert notes(memory) == ["wrote"]


def test_another_process_reads_at_once_what_was_refused(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a sync run raises, the refusal has been committed, not only queued."""
    agent = Agent()
    with MemoryStore.open(database) as memory, MemoryStore.open(database) as other:
        apply = memory.storage.apply

        def slow_apply(commits: Any) -> Any:
            if any(isinstance(op, DropWrites) for commit in commits for op in commit):
                time.sleep(0.3)
            return apply(commits)

        monkeypatch.setattr(memory.storage, "apply", slow_apply)
        reader = Face(agent.graph(other), sync=True)
        Face(agent.graph(memory), sync=True, durability="sync").refuses({})
        assert reader.state.next == ("writer",)


def test_a_graph_that_runs_after_a_refusal_in_the_same_context(memory: MemoryStore) -> None:
    workflow = StateGraph(Untyped)
    workflow.add_node("noop", lambda state: {"profile": "anything"})
    workflow.add_edge(START, "noop")
    untyped = workflow.compile(checkpointer=memory.checkpointer)

    async def both(sync: bool) -> None:
        typed = Agent().graph(memory)
        with pytest.raises(SchemaError):
            typed.invoke({}, CONFIG, durability="exit") if sync else await typed.ainvoke({}, CONFIG, durability="exit")
        given: Any = {"profile": "in"}
        if sync:
            untyped.invoke(given, CONFIG, durability="exit")
        else:
            await untyped.ainvoke(given, CONFIG, durability="exit")
        assert untyped.get_state(CONFIG).values == {"profile": "anything"}
        memory.checkpointer.delete_thread("t")

    for sync in (True, False):
        asyncio.run(both(sync))


def test_a_bulk_update_is_refused_as_a_whole(database: Path, sync: bool) -> None:
    agent = Agent()
    with MemoryStore.open(database) as memory:
        graph = agent.graph(memory).builder.compile(
            checkpointer=memory.checkpointer, store=memory.store, interrupt_before=["writer"]
        )
        face = Face(graph, sync)
        face.invoke({})
        before, held = face.state, rows(memory)
        updates = [[StateUpdate({"log": ["s"]}, "sibling"), StateUpdate({"profile": BAD}, "writer")]]
        with pytest.raises(SchemaError, match="profile"):
            graph.bulk_update_state(CONFIG, updates) if sync else asyncio.run(graph.abulk_update_state(CONFIG, updates))
        assert (face.state, rows(memory)) == (before, held)


def test_what_an_earlier_step_wrote_stays(memory: MemoryStore, sync: bool) -> None:
    """The same object, taken by one step and refused by the next."""

    def once(before: Profile | None, written: Profile) -> Profile:
        if before is not None:
            raise ValueError("once only")
        return written

    schema: Any = TypedDict("schema", {"profile": Annotated[Profile, TypedReducer(Profile, merge=once)]})
    output = {"profile": GOOD}
    workflow = StateGraph(schema)
    workflow.add_node("a", lambda state: output)
    workflow.add_node("b", lambda state: output)
    workflow.add_edge(START, "a")
    workflow.add_edge("a", "b")
    face = Face(workflow.compile(checkpointer=memory.checkpointer), sync)
    face.refuses({}, "once only")
    results = [[task.result for task in one.tasks] for one in face.graph.get_state_history(CONFIG)]
    assert results == [[None], [output], [{}]]


# -- merging --------------------------------------------------------------------------------------


def merge(reducer: TypedReducer, *steps: Any) -> Any:
    """The value after steps of one write each; a tuple holds the writes of one step."""
    reducer.key = "value"
    for step in steps:
        reducer.update(list(step) if isinstance(step, tuple) else [step])
    return reducer.get()


def test_replace() -> None:
    assert merge(TypedReducer(Profile), {"name": "Ann", "age": 3}, {"name": "Bob"}) == Profile(name="Bob")


def test_two_tasks_that_replace_with_the_same_value_agree() -> None:
    assert merge(TypedReducer(Profile), ({"name": "Ann"}, '{"name": "Ann"}', Profile(name="Ann"))).name == "Ann"
    with pytest.raises(SchemaError, match="another task of the same step wrote another value"):
        merge(TypedReducer(Profile), ({"name": "Ann"}, {"name": "Bob"}))


def test_an_overwrite_wins_over_the_other_writes_of_its_step() -> None:
    values = ({"id": "a"}, Overwrite([{"id": "b"}]), {"id": "c"})
    assert merge(TypedReducer(list[Contact], key="id"), {"id": "z"}, values) == [Contact(id="b")]
    with pytest.raises(SchemaError, match="another task"):
        merge(TypedReducer(list[Contact], key="id"), (Overwrite([]), Overwrite([{"id": "b"}])))


def test_update_sets_fields() -> None:
    def reducer() -> TypedReducer:
        return TypedReducer(Profile, merge="update")

    assert merge(reducer(), {"name": "Ann"}, {"age": 4}) == Profile(name="Ann", age=4)
    assert merge(reducer(), {"name": "Ann", "age": 4}, Profile(name="Bob")) == Profile(name="Bob", age=4)
    assert merge(reducer(), {"name": "Ann"}, ('{"age": 4}', '{"name": "Bob"}')) == Profile(name="Bob", age=4)
    assert merge(reducer(), {"name": "Ann", "age": 4}, Overwrite({"name": "Bob"})) == Profile(name="Bob")
    assert merge(reducer(), {"name": "Ann"}, {"age": 4}).model_fields_set == {"name", "age"}
    assert merge(reducer(), {"name": "Ann"}, "{}") == Profile(name="Ann")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"age": "old"}, "age: Input should be a valid integer"),
        ({"aeg": 4}, "names none of the fields name, age"),
        ([4], "an update is an object"),
        ('{"age": 4} {"age": 5}', "two different objects"),
    ],
)
def test_an_update_that_is_refused_changes_nothing(output: Any, reason: str) -> None:
    reducer = TypedReducer(Profile, merge="update")
    merge(reducer, {"name": "Ann", "age": 3})
    with pytest.raises(SchemaError, match=reason):
        reducer.update([{"age": 7}, output])
    assert reducer.get() == Profile(name="Ann", age=3)


def test_the_first_update_is_a_whole_value() -> None:
    with pytest.raises(SchemaError, match="name: Field required"):
        merge(TypedReducer(Profile, merge="update"), {"age": 3})


def test_fields_that_do_not_go_together_are_refused() -> None:
    reducer = TypedReducer(Range, merge="update")
    merge(reducer, {"high": 5})
    with pytest.raises(SchemaError, match="low is above high"):
        reducer.update([{"low": 4}, {"high": 3}])
    assert reducer.get() == Range(high=5)


def test_items_are_replaced_by_key_and_appended() -> None:
    def reducer() -> TypedReducer:
        return TypedReducer(list[Contact], key="id")

    first = [{"id": "a", "phone": "1"}, {"id": "b"}]
    expected = [Contact(id="a", phone="2"), Contact(id="b"), Contact(id="c")]
    assert merge(reducer(), first, [{"id": "c"}, {"id": "a", "phone": "2"}]) == expected
    assert merge(reducer(), first, {"id": "c"}, Contact(id="a", phone="2")) == expected
    assert merge(reducer(), first, ('{"id": "c"}', '[{"id": "a", "phone": "2"}]')) == expected
    assert merge(reducer(), []) == []
    with pytest.raises(SchemaError, match="two different items with id='a'"):
        merge(reducer(), [{"id": "a"}, {"id": "a", "phone": "1"}])
    with pytest.raises(SchemaError, match=r"1\.id: Field required"):
        merge(reducer(), [{"id": "a"}, {}])


@pytest.mark.parametrize("stored", ["text", [Contact.model_construct(id=5)], [{"id": 5}], 7, {"id": "a"}])
def test_items_that_were_stored_invalid_are_not_kept_beside_new_ones(stored: Any) -> None:
    reducer = TypedReducer(list[Contact], key="id").from_checkpoint(stored)
    for _ in range(2):
        with pytest.raises(SchemaError):
            reducer.update([{"id": "b"}])
        assert reducer.get() == stored
    reducer.update([Overwrite([{"id": "b"}])])
    reducer.update([{"id": "c"}])
    assert reducer.get() == [Contact(id="b"), Contact(id="c")]


@pytest.mark.parametrize("stored", ["text", [1], 7, {"nickname": 5, "name": 6}])
def test_an_update_of_something_else_that_was_stored(stored: Any) -> None:
    reducer = TypedReducer(Profile, merge="update").from_checkpoint(stored)
    with pytest.raises(SchemaError):
        reducer.update([{"age": 4}])
    assert reducer.get() == stored
    reducer.update([{"name": "Ann"}])
    assert reducer.get() == Profile(name="Ann")


def test_several_tool_calls_are_an_item_each() -> None:
    from langchain_core.messages import AIMessage

    calls: Any = [{"name": "Contact", "args": {"id": each}, "id": each} for each in "ab"]
    assert merge(TypedReducer(list[Contact], key="id"), AIMessage("", tool_calls=calls)) == [
        Contact(id="a"),
        Contact(id="b"),
    ]


def test_a_function_that_merges() -> None:
    def oldest(before: Profile | None, written: Profile) -> Profile:
        if before is not None:
            before.name = "changed in place"
        return written if before is None or written.age > before.age else before.model_copy(update={"name": "kept"})

    assert merge(TypedReducer(Profile, merge=oldest), {"name": "Ann", "age": 3}, {"name": "Bob"}).name == "kept"

    def failing(before: Profile | None, written: Profile) -> Any:
        if before is None:
            return written
        before.name = "changed in place"
        return {"age": "wrong"} if written.age else 1 / 0

    for written, reason in (({"name": "B"}, "ZeroDivisionError"), ({"name": "B", "age": 1}, "name: Field required")):
        reducer = TypedReducer(Profile, merge=failing)
        merge(reducer, {"name": "Ann"})
        with pytest.raises(SchemaError, match=reason):
            reducer.update([written])
        assert reducer.get() == Profile(name="Ann")


# -- parallel nodes, subgraphs, schemas -----------------------------------------------------------


class Contacts(TypedDict, total=False):
    contacts: Annotated[list[Contact], TypedReducer(list[Contact], key="id")]
    range: Annotated[Range, TypedReducer(Range, merge="update")]
    profile: Annotated[Profile, TypedReducer(Profile)]


def parallel(memory: MemoryStore, outputs: dict[str, Any]) -> Any:
    workflow = StateGraph(Contacts)

    def node(name: str) -> Callable[..., Any]:
        def run(state: Any, *, store: BaseStore) -> Any:
            store.put(("notes",), name, {})
            return outputs[name]

        return run

    for name in outputs:
        workflow.add_node(name, node(name))
        workflow.add_edge(START, name)
    return workflow.compile(checkpointer=memory.checkpointer, store=memory.store)


def test_parallel_nodes_write_one_channel(memory: MemoryStore, sync: bool, durability: str) -> None:
    outputs = {name: {"contacts": {"id": name}, "range": {field: 4}} for name, field in (("a", "low"), ("b", "high"))}
    final = Face(parallel(memory, outputs), sync, durability).invoke({"range": {}})
    assert final["contacts"] == [Contact(id="a"), Contact(id="b")]
    assert final["range"] == Range(low=4, high=4)


def test_writes_that_do_not_go_together_run_one_task_again(database: Path, sync: bool) -> None:
    """Each is valid alone: the first in task order stays, and the one that does not fit runs again."""
    outputs: dict[str, Any] = {"a": {"range": {"low": 4}}, "b": {"range": {"high": 3}}}
    with MemoryStore.open(database) as memory:
        face = Face(parallel(memory, outputs), sync, "async")
        face.refuses({"range": {}}, "low is above high")
        assert face.state.next == ("b",)
    outputs["b"] = {"range": {"high": 5}}
    with MemoryStore.open(database) as memory:
        face = Face(parallel(memory, outputs), sync, "async")
        assert face.invoke(None)["range"] == Range(low=4, high=5)
        assert notes(memory) == ["a", "b"]


def test_two_tasks_refused_in_one_step_come_to_light_one_by_one(database: Path, sync: bool) -> None:
    same = {"profile": BAD}
    outputs: dict[str, Any] = {"a": same, "b": {"contacts": {"id": 5}}, "c": same, "d": {"contacts": {"id": "d"}}}
    with MemoryStore.open(database) as memory:
        face = Face(parallel(memory, outputs), sync, "async")
        face.refuses({}, "profile")
        held = rows(memory)["checkpoints"]
        for name in "abc":
            outputs[name] = {"contacts": {"id": name}}
        while True:
            try:
                final = face.invoke(None)
                break
            except SchemaError:
                assert rows(memory)["checkpoints"] == held
        assert [contact.id for contact in final["contacts"]] == ["a", "b", "c", "d"]
        assert notes(memory) == ["a", "b", "c", "d"]


def test_sends_that_write_one_channel(memory: MemoryStore, sync: bool, durability: str) -> None:
    workflow = StateGraph(Contacts)
    workflow.add_node("work", lambda given: {"contacts": {"id": str(given["n"])}})
    workflow.add_conditional_edges(START, lambda state: [Send("work", {"n": n}) for n in range(20)], ["work"])
    graph = workflow.compile(checkpointer=memory.checkpointer, store=memory.store)
    final = Face(graph, sync, durability).invoke({})
    assert [contact.id for contact in final["contacts"]] == [str(n) for n in range(20)]


@pytest.mark.parametrize("saver", [None, True, False], ids=["inherited", "its own", "none"])
def test_a_subgraph_with_a_typed_channel(database: Path, sync: bool, durability: str, saver: bool | None) -> None:
    if saver is False and durability == "sync":
        pytest.skip("LangGraph cannot run such a subgraph with durability='sync'")
    output: dict[str, Any] = {"profile": BAD}

    def before(state: Any, *, store: BaseStore) -> Any:
        store.put(("notes",), "before", {})
        return {"log": ["before"]}

    def write(state: Any, *, store: BaseStore) -> Any:
        store.put(("notes",), "write", {})
        return {"log": ["write"], **output}

    def graph(memory: MemoryStore) -> Any:
        inner = StateGraph(State)
        inner.add_node("before", before)
        inner.add_node("write", write)
        inner.add_edge(START, "before")
        inner.add_edge("before", "write")
        outer = StateGraph(State)
        outer.add_node("first", lambda state: {"log": ["first"]})
        outer.add_node("sub", inner.compile(checkpointer=saver))
        outer.add_edge(START, "first")
        outer.add_edge("first", "sub")
        return outer.compile(checkpointer=memory.checkpointer, store=memory.store)

    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        face.refuses({}, "profile")
        assert face.state.next == ("sub",)
        assert "profile" not in face.state.values
        assert "write" not in notes(memory)
        assert not stored_anywhere(memory, "old")
        inner = face.graph.get_state(CONFIG, subgraphs=True).tasks[0].state
        if saver is not False and durability != "exit":
            assert inner.next == ("write",)
        output["profile"] = GOOD
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory), sync, durability)
        final = face.invoke(None)
        assert final["profile"] == Profile(name="Ann")
        assert notes(memory) == ["before", "write"]
        assert rows(memory)["staged"] == 0


@pytest.mark.parametrize("saver", [None, True, False], ids=["inherited", "its own", "none"])
def test_a_subgraph_that_is_retried(file_memory: MemoryStore, sync: bool, durability: str, saver: bool | None) -> None:
    """The run goes on after the refusal, with the subgraph's next attempt at the same place."""
    memory = file_memory
    if saver is False and durability == "sync":
        pytest.skip("LangGraph cannot run such a subgraph with durability='sync'")
    outputs: list[Any] = [{"profile": BAD}, {"profile": BAD}, {"profile": GOOD}]

    def write(state: Any, *, store: BaseStore) -> Any:
        store.put(("notes",), f"{len(outputs)} left", {})
        return outputs.pop(0)

    inner = StateGraph(State)
    inner.add_node("before", lambda state: {"log": ["before"]})
    inner.add_node("write", write)
    inner.add_edge(START, "before")
    inner.add_edge("before", "write")
    outer = StateGraph(State)
    retry = RetryPolicy(retry_on=SchemaError, max_attempts=3, initial_interval=0.001, jitter=False)
    outer.add_node("sub", inner.compile(checkpointer=saver), retry_policy=retry)
    outer.add_node("last", lambda state, store: store.put(("notes",), "last", {}))
    outer.add_edge(START, "sub")
    outer.add_edge("sub", "last")
    face = Face(outer.compile(checkpointer=memory.checkpointer, store=memory.store), sync, durability)
    assert face.invoke({})["profile"] == Profile(name="Ann")
    assert face.state.values["profile"] == Profile(name="Ann")
    assert (face.state.next, notes(memory)) == ((), ["1 left", "last"])
    assert rows(memory)["staged"] == 0


def appended(items: list[str] | None, writes: list[list[str]]) -> list[str]:
    return [*(items or []), *(item for written in writes for item in written)]


class Deltas(TypedDict, total=False):
    log: Annotated[list[str], DeltaChannel(appended)]
    profile: Annotated[Profile, TypedReducer(Profile)]


def test_beside_a_delta_channel(file_memory: MemoryStore, sync: bool, durability: str) -> None:
    """Its writes are kept on the checkpoint before, those of a refused step must not be."""
    memory = file_memory
    output: dict[str, Any] = {"profile": GOOD}
    workflow = StateGraph(Deltas)
    workflow.add_node("a", lambda state: {"log": ["a"]})
    workflow.add_node("b", lambda state: {"log": ["b"], **output})
    workflow.add_edge(START, "a")
    workflow.add_edge("a", "b")
    face = Face(workflow.compile(checkpointer=memory.checkpointer, store=memory.store), sync, durability)
    face.invoke({"log": ["1"]})
    output["profile"] = BAD
    face.refuses({"log": ["2"]})
    whole = ["1", "a", "b"] if durability == "exit" else ["1", "a", "b", "2", "a"]
    assert face.state.values["log"] == whole
    face.refuses({"log": ["3"], "profile": BAD})
    with pytest.raises(SchemaError):
        face.update({"log": ["4"], "profile": BAD}, "a")
    assert face.state.values["log"] == whole
    output["profile"] = GOOD
    assert face.invoke({"log": ["5"]})["log"] == [*whole, "5", "a", "b"]
    assert face.state.values["log"] == [*whole, "5", "a", "b"]


def test_a_channel_of_one_node_and_an_input_schema(memory: MemoryStore, sync: bool, durability: str) -> None:
    class Private(TypedDict):
        draft: Annotated[Contact, TypedReducer(Contact)]

    class Given(TypedDict):
        profile: Annotated[Profile, TypedReducer(Profile)]

    class Result(TypedDict):
        log: list[str]

    workflow = StateGraph(State, input_schema=Given, output_schema=Result)
    draft: dict[str, Any] = {"draft": '{"id": 5}'}

    def make(state: Given) -> Private:
        return draft  # type: ignore[return-value]

    def use(state: Private) -> State:
        return {"log": [state["draft"].id]}

    workflow.add_node("make", make)
    workflow.add_node("use", use, input_schema=Private)
    workflow.add_edge(START, "make")
    workflow.add_edge("make", "use")
    face = Face(workflow.compile(checkpointer=memory.checkpointer), sync, durability)
    face.refuses({"profile": BAD}, "profile")
    face.refuses({"profile": GOOD}, "draft")
    draft["draft"] = '{"id": "d"}'
    assert face.invoke({"profile": GOOD}) == {"log": ["d"]}


def test_a_state_that_is_a_pydantic_model(memory: MemoryStore, sync: bool, durability: str) -> None:
    output: dict[str, Any] = {"profile": BAD}
    workflow = StateGraph(Model)
    workflow.add_node("write", lambda state: output)
    workflow.add_edge(START, "write")
    face = Face(workflow.compile(checkpointer=memory.checkpointer), sync, durability)
    face.refuses({"n": 1}, "profile")
    output["profile"] = GOOD
    assert face.invoke(Model(n=2)) == {"profile": Profile(name="Ann"), "n": 2}
    assert face.invoke(Model(profile=Profile(name="Bob"), n=2))["profile"] == Profile(name="Ann")


def test_one_annotation_for_two_channels(memory: MemoryStore) -> None:
    output: dict[str, Any] = {"left": GOOD, "right": BAD}
    workflow = StateGraph(Two)
    workflow.add_node("write", lambda state: output)
    workflow.add_edge(START, "write")
    face = Face(workflow.compile(checkpointer=memory.checkpointer), sync=True)
    face.refuses({}, "left or right")
    assert face.state.next == ("write",)
    output["right"] = '{"name": "Bob"}'
    assert face.invoke(None) == {"left": Profile(name="Ann"), "right": Profile(name="Bob")}


def test_without_a_checkpointer(sync: bool) -> None:
    workflow = StateGraph(State)
    workflow.add_node("write", lambda state: {"profile": BAD})
    workflow.add_edge(START, "write")
    graph = workflow.compile()
    with pytest.raises(SchemaError, match="profile"):
        graph.invoke({}) if sync else asyncio.run(graph.ainvoke({}))


def test_a_node_that_changes_the_value_in_place(memory: MemoryStore, sync: bool, durability: str) -> None:
    def change(state: Any) -> Any:
        state["profile"].age = "unknown"
        return {"log": ["changed"]}

    workflow = StateGraph(State)
    workflow.add_node("change", change)
    workflow.add_node("again", change)
    workflow.add_edge(START, "change")
    workflow.add_edge("change", "again")
    face = Face(workflow.compile(checkpointer=memory.checkpointer), sync, durability)
    assert face.invoke({"profile": GOOD})["profile"] == Profile(name="Ann")
    assert face.state.values["profile"] == Profile(name="Ann")


# -- stored values of another time ----------------------------------------------------------------


@pytest.mark.parametrize("stored", [{"name": "Ann"}, {"name": 5}], ids=["valid", "invalid"])
def test_a_thread_from_before_the_channel_was_typed(
    database: Path, stored: Any, sync: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def graph(memory: MemoryStore, schema: Any) -> Any:
        workflow = StateGraph(schema)
        workflow.add_node("noop", lambda state: {})
        workflow.add_edge(START, "noop")
        return workflow.compile(checkpointer=memory.checkpointer)

    with MemoryStore.open(database) as memory:
        Face(graph(memory, Untyped), sync).invoke({"profile": stored})
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory, State), sync)
        valid = stored == {"name": "Ann"}
        assert face.state.values["profile"] == (Profile(name="Ann") if valid else stored)
        assert ("no valid Profile any more" in caplog.text) is not valid
        face.invoke({})
        assert face.state.values["profile"] == (Profile(name="Ann") if valid else stored)
        face.refuses({"profile": {"name": 6}})
        assert face.invoke({"profile": {"name": "Bob"}})["profile"] == Profile(name="Bob")


def define(**fields: Any) -> type[BaseModel]:
    """A class of the same name in another release of the application."""
    module = sys.modules.setdefault("released", types.ModuleType("released"))
    made: Any = create_model("Person", __module__="released", **fields)
    module.Person = made  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("merging", ["replace", "update"])
def test_a_class_that_has_changed_since(
    database: Path, merging: Any, sync: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def graph(memory: MemoryStore, model: Any, output: Any) -> Any:
        schema: Any = TypedDict("schema", {"person": Annotated[model, TypedReducer(model, merge=merging)]}, total=False)
        workflow = StateGraph(schema)
        workflow.add_node("write", lambda state: output)
        workflow.add_edge(START, "write")
        return workflow.compile(checkpointer=memory.checkpointer)

    with MemoryStore.open(database) as memory:
        Face(graph(memory, define(name=(str, ...)), {"person": {"name": "Ann"}}), sync).invoke({})
    grown = define(name=(str, ...), age=(int, 0))
    with MemoryStore.open(database) as memory:
        value = Face(graph(memory, grown, {}), sync).state.values["person"]
        assert (type(value), value.name, value.age) == (grown, "Ann", 0)
    assert not caplog.records
    other = define(name=(int, ...), mail=(str, ...))
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory, other, {"person": {"mail": "a@b"}}), sync)
        stored = face.state.values["person"]
        assert (type(stored), stored.name) == (other, "Ann")
        assert "person: the stored value is handed out as it is: released.Person cannot be made" in caplog.text
        face.refuses({}, "name: Field required" if merging == "replace" else "name: Input should be a valid integer")
        assert face.state.values["person"].name == "Ann"
        if merging == "update":
            face.refuses({"person": {"mail": "a@b"}}, "name: Input should be a valid integer")
            face.update({"person": {"name": 7, "mail": "a@b"}}, "write")
        else:
            face.update({"person": Overwrite({"name": 7, "mail": "a@b"})}, "write")
        assert face.state.values["person"] == other(name=7, mail="a@b")


def test_a_pending_write_of_a_class_that_has_changed_since(database: Path, sync: bool) -> None:
    def graph(memory: MemoryStore, model: Any, output: Any) -> Any:
        schema: Any = TypedDict("schema", {"person": Annotated[model, TypedReducer(model)]}, total=False)
        workflow = StateGraph(schema)
        workflow.add_node("ask", lambda state: {"other": interrupt("who?")})
        workflow.add_node("write", lambda state: output)
        workflow.add_edge(START, "ask")
        workflow.add_edge(START, "write")
        return workflow.compile(checkpointer=memory.checkpointer)

    old = define(name=(str, ...))
    with MemoryStore.open(database) as memory:
        Face(graph(memory, old, {"person": old(name="Ann")}), sync).invoke({})
    new = define(name=(int, ...))
    with MemoryStore.open(database) as memory:
        face = Face(graph(memory, new, {"person": new(name=1)}), sync)
        with pytest.raises(SchemaError, match="name: Input should be a valid integer"):
            repr(face.state)
        assert set(face.state.next) == {"ask", "write"}
        assert face.invoke(Command(resume="x"))["person"] == new(name=1)
