"""Validation inside the task: retries, error handlers, repair and goto act on what a typed channel would refuse."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.cache.memory import InMemoryCache
from langgraph.errors import NodeError
from langgraph.graph import START, StateGraph
from langgraph.store.base import BaseStore
from langgraph.types import CachePolicy, Command, RetryPolicy
from pydantic import BaseModel

from langgraph_memstate import MemoryStore, TypedReducer, enforce, typed_node
from langgraph_memstate.errors import SchemaError

CONFIG: Any = {"configurable": {"thread_id": "t"}}
GOOD = '```json\n{"name": "Ann"}\n```'
BAD = '{"name": "Ann", "age": "old"}'


class Profile(BaseModel):
    name: str
    age: int = 0


class State(TypedDict, total=False):
    profile: Annotated[Profile, TypedReducer(Profile, merge="update")]
    log: Annotated[list[str], operator.add]


class Narrow(TypedDict, total=False):
    log: list[str]


Run = Callable[[Any, Any], Any]


@pytest.fixture(params=["invoke", "ainvoke"])
def run(request: pytest.FixtureRequest) -> Run:
    def invoke(graph: Any, given: Any) -> Any:
        if request.param == "invoke":
            return graph.invoke(given, CONFIG, durability=request.node.callspec.params.get("durability", "async"))
        durability = request.node.callspec.params.get("durability", "async")
        return asyncio.run(graph.ainvoke(given, CONFIG, durability=durability))

    return invoke


@pytest.fixture(params=["sync", "async", "exit"])
def durability(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def notes(memory: MemoryStore) -> list[str]:
    return sorted(item.key for item in memory.store.search(("notes",), limit=100))


class Agent:
    """first → write → last, each with a note in memory; `write` returns one output after the other."""

    def __init__(self, *outputs: Any) -> None:
        self.outputs = list(outputs)
        self.ran: list[str] = []

    def note(self, name: str, store: BaseStore) -> dict[str, Any]:
        self.ran.append(name)
        store.put(("notes",), f"{name} {self.ran.count(name)}", {})
        return {"log": [name]}

    def workflow(self, **options: Any) -> StateGraph[Any, Any, Any, Any]:
        def first(state: State, *, store: BaseStore) -> Any:
            return self.note("first", store)

        def write(state: State, *, store: BaseStore) -> Any:
            self.note("write", store)
            return self.outputs.pop(0)

        def last(state: State, *, store: BaseStore) -> Any:
            return self.note("last", store)

        def fallback(state: State, *, store: BaseStore) -> Any:
            return self.note("fallback", store)

        workflow = StateGraph(State)
        workflow.add_node("first", first)
        workflow.add_node("write", write, **options)
        workflow.add_node("last", last)
        workflow.add_node("fallback", fallback)
        workflow.add_edge(START, "first")
        workflow.add_edge("first", "write")
        workflow.add_edge("write", "last")
        return workflow


def compiled(workflow: Any, memory: MemoryStore, **options: Any) -> Any:
    return workflow.compile(checkpointer=memory.checkpointer, store=memory.store, **options)


# -- a refusal is a failure of the task -----------------------------------------------------------


def test_the_failing_step_can_be_resumed_in_every_durability(database: Path, run: Run, durability: str) -> None:
    agent = Agent({"profile": BAD}, {"profile": GOOD})
    with MemoryStore.open(database) as memory:
        graph = compiled(enforce(agent.workflow()), memory)
        with pytest.raises(SchemaError, match="profile: the output is no valid Profile: age"):
            run(graph, {})
        state = graph.get_state(CONFIG)
        assert (state.next, state.values["log"], notes(memory)) == (("write",), ["first"], ["first 1"])
        assert "SchemaError" in repr(state.tasks[0].error)
    with MemoryStore.open(database) as memory:
        graph = compiled(enforce(agent.workflow()), memory)
        assert run(graph, None)["profile"] == Profile(name="Ann")
        assert notes(memory) == ["first 1", "last 1", "write 2"]


def test_a_retry_policy(memory: MemoryStore, run: Run, durability: str) -> None:
    agent = Agent({"profile": BAD}, {"profile": "nothing"}, {"profile": GOOD})
    retry = RetryPolicy(retry_on=SchemaError, max_attempts=3, initial_interval=0.001, jitter=False)
    graph = compiled(enforce(agent.workflow(retry_policy=retry)), memory)
    assert run(graph, {})["profile"] == Profile(name="Ann")
    assert notes(memory) == ["first 1", "last 1", "write 3"]


def test_an_error_handler(memory: MemoryStore, run: Run, durability: str) -> None:
    seen: list[Any] = []

    def handler(state: State, error: NodeError) -> Any:
        seen.append(error.error)
        return {"log": ["handled"]}

    graph = compiled(enforce(Agent({"profile": BAD}).workflow(error_handler=handler)), memory)
    assert run(graph, {})["log"][:2] == ["first", "handled"]
    assert isinstance(seen[0], SchemaError)
    assert "write 1" not in notes(memory)


def test_a_node_cache_keeps_no_refused_output(memory: MemoryStore, run: Run) -> None:
    agent = Agent({"profile": BAD}, {"profile": GOOD})
    workflow = enforce(agent.workflow(cache_policy=CachePolicy()))
    graph = compiled(workflow, memory, cache=InMemoryCache())
    with pytest.raises(SchemaError):
        run(graph, {})
    assert run(graph, None)["profile"] == Profile(name="Ann")


# -- repair ---------------------------------------------------------------------------------------


def test_a_repair_callback(memory: MemoryStore, run: Run, durability: str) -> None:
    asked: list[tuple[SchemaError, Any]] = []

    def repair(error: SchemaError, output: Any) -> Any:
        asked.append((error, output))
        return {"profile": GOOD, "log": ["repaired"]}

    output = {"profile": BAD, "log": ["write"]}
    graph = compiled(enforce(Agent(output).workflow(), repair=repair), memory)
    final = run(graph, {})
    assert (final["profile"], final["log"]) == (Profile(name="Ann"), ["first", "repaired", "last"])
    assert asked[0][1] is output
    assert "age: Input should be a valid integer" in str(asked[0][0])
    assert notes(memory) == ["first 1", "last 1", "write 1"]


def test_repair_is_tried_as_often_as_it_may_be(memory: MemoryStore, run: Run) -> None:
    def repair(error: SchemaError, output: Any) -> Any:
        return {"profile": output["profile"] + "}"}

    broken = '{"name": "Ann", "x": {"y": {}'
    graph = compiled(enforce(Agent({"profile": broken}).workflow(), repair=repair, repairs=2), memory)
    assert run(graph, {})["profile"] == Profile(name="Ann")
    graph = compiled(enforce(Agent({"profile": broken}).workflow(), repair=repair, repairs=1), memory)
    with pytest.raises(SchemaError, match="cut off"):
        run(graph, {})


def test_a_model_repairs_its_own_output(memory: MemoryStore, run: Run) -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage(BAD), AIMessage(GOOD)]))

    def ask(state: State) -> Any:
        return {"profile": model.invoke("Describe Ann.")}

    def repair(error: SchemaError, output: Any) -> Any:
        return {"profile": model.invoke([("user", "Describe Ann."), output["profile"], ("user", str(error))])}

    workflow = StateGraph(State)
    workflow.add_node("ask", typed_node(ask, State, repair=repair))
    workflow.add_edge(START, "ask")
    assert run(compiled(workflow, memory), {})["profile"] == Profile(name="Ann")


async def repair_later(error: SchemaError, output: Any) -> Any:
    await asyncio.sleep(0)
    return {"profile": GOOD}


def test_a_repair_that_awaits(memory: MemoryStore) -> None:
    async def write(state: State) -> Any:
        return {"profile": BAD}

    workflow = StateGraph(State)
    workflow.add_node("write", write)
    workflow.add_edge(START, "write")
    graph = compiled(enforce(workflow, repair=repair_later), memory)
    assert asyncio.run(graph.ainvoke({}, CONFIG))["profile"] == Profile(name="Ann")


def test_a_repair_that_awaits_in_a_sync_run(memory: MemoryStore) -> None:
    graph = compiled(enforce(Agent({"profile": BAD}).workflow(), repair=repair_later), memory)
    with pytest.raises(TypeError, match="coroutine function"):
        graph.invoke({}, CONFIG)


# -- going somewhere else -------------------------------------------------------------------------


def test_the_graph_goes_to_another_node(memory: MemoryStore, run: Run, durability: str) -> None:
    agent = Agent({"profile": BAD, "log": ["write"]})
    graph = compiled(enforce(agent.workflow(), on_error="fallback"), memory)
    final = run(graph, {"profile": {"name": "Zoe"}})
    assert final["profile"] == Profile(name="Zoe")
    assert sorted(agent.ran) == ["fallback", "first", "last", "write"]  # its edges are followed, too
    assert "write" not in final["log"]
    assert notes(memory) == ["fallback 1", "first 1", "last 1"]  # what the refused attempt remembered is gone


def test_a_function_of_the_error(memory: MemoryStore, run: Run) -> None:
    def give_up(error: SchemaError) -> Any:
        return Command(goto="fallback", update={"log": [f"gave up on {error.where}: {', '.join(error.fields)}"]})

    graph = compiled(enforce(Agent({"profile": BAD}).workflow(), on_error=give_up), memory)
    assert "gave up on profile: age" in run(graph, {})["log"]


def test_a_function_of_the_error_that_does_no_better(memory: MemoryStore, run: Run) -> None:
    graph = compiled(enforce(Agent({"profile": BAD}).workflow(), on_error=lambda error: {"profile": "x"}), memory)
    with pytest.raises(SchemaError, match="no JSON object"):
        run(graph, {})


def test_a_node_does_not_go_to_itself(memory: MemoryStore, run: Run) -> None:
    graph = compiled(enforce(Agent({"profile": BAD}).workflow(), on_error="write"), memory)
    with pytest.raises(SchemaError):
        run(graph, {})


def test_memory_of_a_subgraph_goes_with_the_refused_output(memory: MemoryStore, run: Run) -> None:
    def remember(state: State, *, store: BaseStore) -> Any:
        store.put(("notes",), "inner", {})
        return {"log": ["inner"]}

    inner = StateGraph(State)
    inner.add_node("remember", remember)
    inner.add_edge(START, "remember")
    subgraph = inner.compile(checkpointer=False)

    def outer(state: State, config: RunnableConfig) -> Any:
        subgraph.invoke({}, config)
        return {"profile": BAD}

    workflow = StateGraph(State)
    workflow.add_node("outer", outer)
    workflow.add_node("fallback", lambda state: {"log": ["fallback"]})
    workflow.add_edge(START, "outer")
    graph = compiled(enforce(workflow, on_error="fallback"), memory)
    assert run(graph, {})["log"] == ["fallback"]
    assert notes(memory) == []


# -- what a node may be ---------------------------------------------------------------------------


async def later(state: Any) -> Any:
    return {"profile": BAD}


class Callable_:
    def __call__(self, state: Any) -> Any:
        return {"profile": BAD}


class AwaitedCallable:
    async def __call__(self, state: Any) -> Any:
        return {"profile": BAD}


NODES: dict[str, Any] = {
    "a function": lambda state: {"profile": BAD},
    "a command": lambda state: Command(update={"profile": BAD}, goto="end"),
    "a list of commands": lambda state: [Command(goto="end"), Command(update={"profile": BAD})],
    "a coroutine function": later,
    "an object": Callable_(),
    "an object that is awaited": AwaitedCallable(),
    "a Runnable": RunnableLambda(lambda state: {"profile": BAD}),
    "a sequence": RunnableLambda(lambda state: BAD) | RunnableLambda(lambda text: {"profile": text}),
    "a Runnable with both faces": RunnableLambda(lambda state: {"profile": BAD}, later),
}


@pytest.mark.parametrize("wrap", ["enforce", "typed_node"])
@pytest.mark.parametrize("kind", NODES)
def test_every_kind_of_node(kind: str, wrap: str, memory: MemoryStore) -> None:
    node = NODES[kind]
    workflow = StateGraph(State)
    workflow.add_node("write", typed_node(node, State, on_error="end") if wrap == "typed_node" else node)
    workflow.add_node("end", lambda state: {"log": ["end"]})
    workflow.add_edge(START, "write")
    if wrap == "enforce":
        enforce(workflow, on_error="end")
    graph = compiled(workflow, memory)
    assert asyncio.run(graph.ainvoke({}, CONFIG)) == {"log": ["end"]}
    if "await" not in kind and "coroutine" not in kind:
        assert graph.invoke({}, {"configurable": {"thread_id": "sync"}}) == {"log": ["end"]}


def test_a_good_output_passes_as_it_is(memory: MemoryStore, run: Run) -> None:
    output = {"profile": GOOD, "log": ["write"]}
    graph = compiled(enforce(Agent(output).workflow()), memory)
    updates: list[Any] = list(graph.stream({}, CONFIG, stream_mode="updates"))
    assert updates[1]["write"] == output
    run(graph, None)


def test_an_update_is_checked_against_the_value_it_meets(memory: MemoryStore, run: Run) -> None:
    graph = compiled(enforce(Agent({"profile": {"age": 4}}).workflow()), memory)
    with pytest.raises(SchemaError, match="name: Field required"):
        run(graph, {})
    graph = compiled(enforce(Agent({"profile": {"age": 4}}).workflow()), memory)
    assert run(graph, {"profile": {"name": "Ann"}})["profile"] == Profile(name="Ann", age=4)


def test_a_typed_node_keeps_its_signature(memory: MemoryStore) -> None:
    seen: list[Any] = []

    def write(state: Narrow, config: RunnableConfig, *, store: BaseStore) -> Command[Literal["end"]]:
        """Writes."""
        seen.append((dict(state), config["configurable"]["thread_id"], store))
        return Command(update={"profile": GOOD}, goto="end")

    node = typed_node(write, State)
    assert (node.__name__, node.__doc__) == ("write", "Writes.")
    workflow = StateGraph(State)
    workflow.add_node(node)
    workflow.add_node("end", lambda state: {})
    workflow.add_edge(START, "write")
    graph = compiled(workflow, memory)
    graph.invoke({"profile": {"name": "Zoe"}, "log": ["in"]}, CONFIG)
    assert seen == [({"log": ["in"]}, "t", memory.store)]
    assert [(edge.source, edge.target) for edge in graph.get_graph().edges if edge.conditional] == [("write", "end")]


def test_a_typed_node_outside_a_graph() -> None:
    node = typed_node(lambda state: {"profile": state}, {"profile": TypedReducer(Profile)})
    assert node(GOOD) == {"profile": GOOD}
    with pytest.raises(SchemaError, match="profile"):
        node(BAD)


def test_a_subgraph_is_still_found(memory: MemoryStore, run: Run, durability: str) -> None:
    inner = StateGraph(State)
    outputs: list[Any] = [{"profile": BAD}, {"profile": GOOD}]
    inner.add_node("write", lambda state: outputs.pop(0))
    inner.add_edge(START, "write")
    workflow = StateGraph(State)
    workflow.add_node("sub", enforce(inner).compile())
    workflow.add_edge(START, "sub")
    graph = compiled(enforce(workflow), memory)
    assert [name for name, _ in graph.get_subgraphs()] == ["sub"]
    with pytest.raises(SchemaError):
        run(graph, {})
    state = graph.get_state(CONFIG, subgraphs=True)
    assert state.next == ("sub",)
    assert state.tasks[0].state.next == ("write",)
    assert run(graph, None)["profile"] == Profile(name="Ann")


def test_enforce_twice_and_without_typed_channels(memory: MemoryStore) -> None:
    checks: list[Any] = []

    def repair(error: SchemaError, output: Any) -> Any:
        checks.append(error)
        return output

    workflow = Agent({"profile": BAD}).workflow()
    assert enforce(workflow, repair=repair) is workflow
    enforce(workflow, repair=repair)
    with pytest.raises(SchemaError):
        compiled(workflow, memory).invoke({}, CONFIG)
    assert len(checks) == 1
    untyped = StateGraph(Narrow)
    untyped.add_node("node", lambda state: {"log": ["a"]})
    untyped.add_edge(START, "node")
    before = untyped.nodes["node"]
    assert enforce(untyped).nodes["node"] is before


def test_a_drawing_shows_where_errors_go() -> None:
    graph = enforce(Agent().workflow(), on_error="fallback").compile()
    drawn = {(edge.source, edge.target) for edge in graph.get_graph().edges}
    assert {("first", "fallback"), ("write", "fallback"), ("last", "fallback")} <= drawn
    assert ("fallback", "fallback") not in drawn
