"""What can happen to a step, written once and run on any saver and store, sync and async, in every durability.

A scenario is a graph and one or more phases; every phase runs in a process of its own. A node is a list of actions.
Memory is written under a new key each time, so a write that happens twice is seen twice.
"""

from __future__ import annotations

import asyncio
import inspect
import operator
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import md5
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import uuid4

from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import InjectedStore, ToolNode
from langgraph.store.base import BaseStore
from langgraph.store.sqlite import SqliteStore
from langgraph.store.sqlite.aio import AsyncSqliteStore
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, TimeoutPolicy, interrupt

from langgraph_memstate import MemoryStore, PostgresStorage, RedisStorage

NAMESPACE = ("memories",)
THREAD = {"configurable": {"thread_id": "t"}}
RETRY = RetryPolicy(max_attempts=3, initial_interval=0.001, jitter=False)


class Boom(Exception):
    """What nodes fail with."""


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    items: list[str]


@dataclass
class Env:
    """One run: who keeps the state, how, and which phase of the scenario it is."""

    phase: int
    sync: bool
    durability: str
    saver: Any
    store: Any
    attempts: Counter[str] = field(default_factory=Counter)
    seen: dict[str, Any] = field(default_factory=dict)

    async def invoke(self, graph: Any, input: Any, **options: Any) -> Any:
        if self.sync:
            return graph.invoke(input, THREAD, durability=self.durability, **options)
        return await graph.ainvoke(input, THREAD, durability=self.durability, **options)

    def node(self, name: str, *actions: Action) -> Callable[..., Any]:
        """A node that runs actions in order and logs its name in the state."""
        if self.sync:

            def run(state: State, *, store: BaseStore) -> dict[str, Any]:
                for action in actions:
                    action(self, store)
                return {"log": [name]}

            return run

        async def arun(state: State, *, store: BaseStore) -> dict[str, Any]:
            for action in actions:
                outcome = action(self, store)
                if inspect.isawaitable(outcome):
                    await outcome
            return {"log": [name]}

        return arun

    def compile(self, graph: StateGraph[Any], **options: Any) -> Any:
        return graph.compile(checkpointer=self.saver, store=self.store, **options)

    def line(self, *nodes: tuple[str, Callable[..., Any]], **options: Any) -> StateGraph[Any]:
        """A graph that runs nodes one after another."""
        graph = StateGraph(State)
        for name, run in nodes:
            graph.add_node(name, run, **options.get(name, {}))
        for before, after in zip(
            (START, *(name for name, _ in nodes)), (*(name for name, _ in nodes), END), strict=True
        ):
            graph.add_edge(before, after)
        return graph


Action = Callable[[Env, BaseStore], Awaitable[None] | None]


def put(name: str) -> Action:
    def action(env: Env, store: BaseStore) -> Awaitable[None] | None:
        key = f"{name}/{uuid4().hex}"
        write = store.put if env.sync else store.aput
        return write(NAMESPACE, key, {"text": f"memory {name}"})

    return action


def fail(*, until_phase: int = 1, attempts: int | None = None) -> Action:
    """Fail in the phases before `until_phase`, or in the first `attempts` attempts of this process."""

    def action(env: Env, store: BaseStore) -> None:
        env.attempts["fail"] += 1
        if attempts is not None:
            if env.attempts["fail"] <= attempts:
                raise Boom
        elif env.phase < until_phase:
            raise Boom

    return action


def ask(env: Env, store: BaseStore) -> None:
    interrupt("go on?")


def look(label: str) -> Action:
    """Note what the node can see."""

    def action(env: Env, store: BaseStore) -> Awaitable[None] | None:
        if env.sync:
            env.seen[label] = names(store.search(NAMESPACE, limit=100))
            return None

        async def later() -> None:
            env.seen[label] = names(await store.asearch(NAMESPACE, limit=100))

        return later()

    return action


def wait(seconds: float) -> Action:
    """Only for async runs: time passes."""

    async def later() -> None:
        await asyncio.sleep(seconds)

    return lambda env, store: later()


def names(items: Any) -> Counter[str]:
    return Counter(item.key.split("/")[0] for item in items)


async def swallow(call: Awaitable[Any], *errors: type[BaseException]) -> None:
    try:
        await call
    except (Boom, *errors):
        return


# -- the scenarios ----------------------------------------------------------------------------------


@dataclass
class Scenario:
    """`run` plays one phase; `expect` says per phase what everybody must see afterwards."""

    name: str
    run: Callable[[Env], Awaitable[None]]
    expect: list[dict[str, int]]
    skip: Callable[[bool, str], bool] = lambda sync, durability: False


SCENARIOS: dict[str, Scenario] = {}


def scenario(*expect: dict[str, int], skip: Callable[[bool, str], bool] | None = None) -> Callable[..., Any]:
    def register(run: Callable[[Env], Awaitable[None]]) -> Callable[[Env], Awaitable[None]]:
        entry = Scenario(run.__name__, run, list(expect))
        if skip is not None:
            entry.skip = skip
        SCENARIOS[run.__name__] = entry
        return run

    return register


def only_async(sync: bool, durability: str) -> bool:
    return sync


@scenario({"a": 1, "b": 1})
async def plain_steps(env: Env) -> None:
    await env.invoke(env.compile(env.line(("a", env.node("a", put("a"))), ("b", env.node("b", put("b"))))), {"log": []})


@scenario({"a": 1}, {"a": 1, "b": 1})
async def a_node_fails_after_writing(env: Env) -> None:
    graph = env.compile(env.line(("a", env.node("a", put("a"))), ("b", env.node("b", put("b"), fail()))))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))


@scenario({"a": 1})
async def a_node_is_retried(env: Env) -> None:
    node = env.node("a", put("a"), fail(attempts=2))
    await env.invoke(env.compile(env.line(("a", node), a={"retry_policy": RETRY})), {"log": []})


@scenario({}, {"a": 1})
async def all_retries_fail(env: Env) -> None:
    node = env.node("a", put("a"), fail())
    graph = env.compile(env.line(("a", node), a={"retry_policy": RETRY}))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))


@scenario({"late": 1}, skip=only_async)
async def a_node_times_out_and_is_retried(env: Env) -> None:
    async def slow_at_first(state: State, *, store: BaseStore) -> dict[str, Any]:
        env.attempts["a"] += 1
        if env.attempts["a"] == 1:
            await store.aput(NAMESPACE, f"early/{uuid4().hex}", {"text": "early"})
            try:
                await asyncio.sleep(5)
            finally:
                # What a cancelled attempt still tries to write belongs to nobody.
                store.put(NAMESPACE, f"zombie/{uuid4().hex}", {"text": "zombie"})
        await store.aput(NAMESPACE, f"late/{uuid4().hex}", {"text": "late"})
        return {"log": ["a"]}

    options = {"retry_policy": RETRY, "timeout": TimeoutPolicy(run_timeout=timedelta(seconds=0.1))}
    await env.invoke(env.compile(env.line(("a", slow_at_first), a=options)), {"log": []})


@scenario({"handled": 1})
async def an_error_handler_takes_over(env: Env) -> None:
    graph = StateGraph(State)
    graph.add_node("a", env.node("a", put("a"), fail()), error_handler=env.node("handler", put("handled")))
    graph.add_edge(START, "a")
    graph.add_edge("a", END)
    await env.invoke(env.compile(graph), {"log": []})


@scenario({}, {"asked": 1, "answered": 1})
async def an_interrupt_is_resumed(env: Env) -> None:
    graph = env.compile(env.line(("a", env.node("a", put("asked"), ask, put("answered")))))
    await env.invoke(graph, {"log": []} if env.phase == 0 else Command(resume="yes"))


@scenario({}, {"done": 1, "failing": 1, "after": 1})
async def a_sibling_fails(env: Env) -> None:
    graph = StateGraph(State)
    graph.add_node("good", env.node("good", put("done")))
    graph.add_node("bad", env.node("bad", put("failing"), *([] if env.sync else [wait(0.05)]), slow_down, fail()))
    graph.add_node("after", env.node("after", look("after"), put("after")))
    graph.add_edge(START, "good")
    graph.add_edge(START, "bad")
    graph.add_edge(["good", "bad"], "after")
    graph.add_edge("after", END)
    await swallow(env.invoke(env.compile(graph), {"log": []} if env.phase == 0 else None))
    if env.phase == 1:
        assert env.seen["after"] == Counter({"done": 1, "failing": 1}), env.seen


def slow_down(env: Env, store: BaseStore) -> None:
    """Let the parallel tasks finish first. An async node that blocks would hold up its siblings instead."""
    if env.sync:
        time.sleep(0.05)


@scenario({}, {"done": 1, "asked": 1})
async def a_sibling_is_interrupted(env: Env) -> None:
    graph = StateGraph(State)
    graph.add_node("good", env.node("good", put("done")))
    graph.add_node("asks", env.node("asks", put("asked"), ask))
    graph.add_edge(START, "good")
    graph.add_edge(START, "asks")
    graph.add_edge("good", END)
    graph.add_edge("asks", END)
    await env.invoke(env.compile(graph), {"log": []} if env.phase == 0 else Command(resume="yes"))


@scenario({f"item{n}": 1 for n in range(5)})
async def a_fan_out_by_send(env: Env) -> None:
    if env.sync:

        def one(item: str, *, store: BaseStore) -> dict[str, Any]:
            store.put(NAMESPACE, f"{item}/{uuid4().hex}", {"text": item})
            return {"log": [item]}
    else:

        async def one(item: str, *, store: BaseStore) -> dict[str, Any]:
            await store.aput(NAMESPACE, f"{item}/{uuid4().hex}", {"text": item})
            return {"log": [item]}

    graph = StateGraph(State)
    graph.add_node("split", lambda state: {"log": ["split"]})
    graph.add_node("one", one)
    graph.add_edge(START, "split")
    graph.add_conditional_edges("split", lambda state: [Send("one", f"item{n}") for n in range(5)], ["one"])
    graph.add_edge("one", END)
    await env.invoke(env.compile(graph), {"log": []})


@scenario({"inner": 1, "outer": 1})
async def a_subgraph_finishes(env: Env) -> None:
    inner = env.line(("i", env.node("i", put("inner")))).compile()
    await env.invoke(env.compile(env.line(("sub", inner), ("o", env.node("o", look("o"), put("outer"))))), {"log": []})
    assert env.seen["o"] == Counter({"inner": 1}), env.seen


@scenario({"first": 1}, {"first": 1, "second": 1})
async def a_subgraph_fails_in_its_second_step(env: Env) -> None:
    inner = env.line(("i1", env.node("i1", put("first"))), ("i2", env.node("i2", put("second"), fail()))).compile()
    graph = env.compile(env.line(("sub", inner)))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))


@scenario({"first": 1}, {"first": 1, "second": 1})
async def a_subgraph_is_interrupted(env: Env) -> None:
    inner = env.line(("i1", env.node("i1", put("first"))), ("i2", env.node("i2", put("second"), ask))).compile()
    graph = env.compile(env.line(("sub", inner)))
    await env.invoke(graph, {"log": []} if env.phase == 0 else Command(resume="yes"))


def broken_in_langgraph(sync: bool, durability: str) -> bool:
    """A subgraph without checkpoints fails with `sync` on every saver of LangGraph 1.2."""
    return durability == "sync"


@scenario({"inner": 1, "outer": 1}, skip=broken_in_langgraph)
async def a_subgraph_without_checkpoints_finishes(env: Env) -> None:
    inner = env.line(("i", env.node("i", put("inner")))).compile(checkpointer=False)
    await env.invoke(env.compile(env.line(("sub", inner), ("o", env.node("o", look("o"), put("outer"))))), {"log": []})
    assert env.seen["o"] == Counter({"inner": 1}), env.seen


@scenario({}, {"first": 1, "second": 1}, skip=broken_in_langgraph)
async def a_subgraph_without_checkpoints_fails(env: Env) -> None:
    inner = env.line(("i1", env.node("i1", put("first"))), ("i2", env.node("i2", put("second"), fail())))
    graph = env.compile(env.line(("sub", inner.compile(checkpointer=False))))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))


@scenario({"inner": 1}, skip=broken_in_langgraph)
async def a_node_is_retried_after_its_subgraph_finished(env: Env) -> None:
    inner = env.line(("i", env.node("i", put("inner")))).compile(checkpointer=False)

    if env.sync:

        def outer(state: State) -> dict[str, Any]:
            inner.invoke({"log": []})
            fail(attempts=1)(env, env.store)
            return {"log": ["outer"]}
    else:

        async def outer(state: State) -> dict[str, Any]:
            await inner.ainvoke({"log": []})
            fail(attempts=1)(env, env.store)
            return {"log": ["outer"]}

    await env.invoke(env.compile(env.line(("o", outer), o={"retry_policy": RETRY})), {"log": []})


@scenario({"inner": 1, "handed": 1})
async def a_subgraph_hands_over_to_its_parent(env: Env) -> None:
    if env.sync:

        def leave(state: State, *, store: BaseStore) -> Command[Any]:
            store.put(NAMESPACE, f"inner/{uuid4().hex}", {"text": "inner"})
            return Command(graph=Command.PARENT, goto="next", update={"log": ["left"]})
    else:

        async def leave(state: State, *, store: BaseStore) -> Command[Any]:
            await store.aput(NAMESPACE, f"inner/{uuid4().hex}", {"text": "inner"})
            return Command(graph=Command.PARENT, goto="next", update={"log": ["left"]})

    inner = StateGraph(State).add_node("leave", leave).add_edge(START, "leave").compile()
    graph = StateGraph(State)
    graph.add_node("sub", inner, destinations=("next",))
    graph.add_node("next", env.node("next", put("handed")))
    graph.add_edge(START, "sub")
    graph.add_edge("next", END)
    await env.invoke(env.compile(graph), {"log": []})


@scenario({}, {"called": 1, "own": 1})
async def an_entrypoint_fails_after_its_task(env: Env) -> None:
    if env.sync:

        @task
        def remember(name: str) -> str:
            env.store.put(NAMESPACE, f"{name}/{uuid4().hex}", {"text": name})
            return name

        @entrypoint(checkpointer=env.saver, store=env.store)
        def workflow(input: str) -> str:
            remember("called").result()
            look("caller")(env, env.store)
            put("own")(env, env.store)
            fail()(env, env.store)
            return "done"
    else:

        @task
        async def remember(name: str) -> str:
            await env.store.aput(NAMESPACE, f"{name}/{uuid4().hex}", {"text": name})
            return name

        @entrypoint(checkpointer=env.saver, store=env.store)
        async def workflow(input: str) -> str:
            await remember("called")
            await look("caller")(env, env.store)
            await put("own")(env, env.store)
            fail()(env, env.store)
            return "done"

    await swallow(env.invoke(workflow, "go" if env.phase == 0 else None))
    assert env.seen["caller"]["called"] == 1, env.seen


@scenario({"tool": 1})
async def a_tool_writes_with_an_injected_store(env: Env) -> None:
    if env.sync:

        @tool
        def remember(text: str, store: Annotated[Any, InjectedStore()]) -> str:
            """Remember a text."""
            store.put(NAMESPACE, f"tool/{uuid4().hex}", {"text": text})
            return "ok"
    else:

        @tool
        async def remember(text: str, store: Annotated[Any, InjectedStore()]) -> str:
            """Remember a text."""
            await store.aput(NAMESPACE, f"tool/{uuid4().hex}", {"text": text})
            return "ok"

    class Messages(TypedDict):
        messages: Annotated[list[Any], operator.add]

    graph = StateGraph(Messages)
    graph.add_node("tools", ToolNode([remember]))
    graph.add_node("late", env.node("late", put("late"), fail()))
    graph.add_edge(START, "tools")
    graph.add_edge("tools", "late")
    call = {"name": "remember", "args": {"text": "x"}, "id": "1", "type": "tool_call"}
    await swallow(env.invoke(env.compile(graph), {"messages": [AIMessage("", tool_calls=[call])]}))


@scenario({}, {"b": 1}, skip=only_async)
async def a_run_is_cancelled(env: Env) -> None:
    started = asyncio.Event()

    async def a(state: State, *, store: BaseStore) -> dict[str, Any]:
        await store.aput(NAMESPACE, f"a/{uuid4().hex}", {"text": "a"})
        started.set()
        await asyncio.sleep(10)
        return {"log": ["a"]}

    if env.phase == 0:
        run = asyncio.create_task(env.invoke(env.compile(env.line(("a", a))), {"log": []}))
        await started.wait()
        run.cancel()
        await swallow(run, asyncio.CancelledError)
    else:
        await env.invoke(env.compile(env.line(("b", env.node("b", put("b"))))), {"log": []})


@scenario({"b": 1, "c": 1})
async def a_stream_is_abandoned(env: Env) -> None:
    """The consumer leaves after the first step; the thread goes on with new input in the same process."""
    first = env.compile(env.line(("a", env.node("a", put("a"))), ("x", env.node("x", put("x")))))
    second = env.compile(env.line(("b", env.node("b", put("b"))), ("c", env.node("c", put("c")))))
    options = {"durability": env.durability, "stream_mode": "tasks"}
    if env.sync:
        stream = first.stream({"log": []}, THREAD, **options)
        next(stream)  # the task of the first step starts; its writes never land
        await env.invoke(second, {"log": []})
        del stream
    else:
        astream = first.astream({"log": []}, THREAD, **options)
        await anext(astream)
        await env.invoke(second, {"log": []})


@scenario({"a": 1})
async def a_cached_node_is_not_run_again(env: Env) -> None:
    graph = env.line(("a", env.node("a", put("a"))), a={"cache_policy": CachePolicy(key_func=lambda state: "same")})
    compiled = env.compile(graph, cache=InMemoryCache())
    await env.invoke(compiled, {"log": []})
    await env.invoke(compiled, {"log": []})
    assert env.saver is not None


@scenario({}, {"new": 1})
async def new_input_drops_unfinished_work(env: Env) -> None:
    graph = StateGraph(State)
    graph.add_node("good", env.node("good", put("old") if env.phase == 0 else put("new")))
    graph.add_node("bad", env.node("bad", slow_down, *([] if env.sync else [wait(0.05)]), fail()))
    graph.add_edge(START, "good")
    graph.add_edge(START, "bad")
    await swallow(env.invoke(env.compile(graph), {"log": []}))


@scenario({"a": 1, "b": 1, "c": 1})
async def parallel_tasks_do_not_see_each_other(env: Env) -> None:
    graph = StateGraph(State)
    pause: list[Action] = [slow_down] if env.sync else [wait(0.05)]
    graph.add_node("a", env.node("a", put("a"), *pause, look("a")))
    graph.add_node("b", env.node("b", put("b"), *pause, look("b")))
    graph.add_node("c", env.node("c", look("c"), put("c")))
    graph.add_edge(START, "a")
    graph.add_edge(START, "b")
    graph.add_edge(["a", "b"], "c")
    await env.invoke(env.compile(graph), {"log": []})
    assert env.seen == {
        "a": Counter({"a": 1}),
        "b": Counter({"b": 1}),
        "c": Counter({"a": 1, "b": 1}),
    }, env.seen


@scenario({"deep": 1, "outer": 1})
async def three_graphs_deep(env: Env) -> None:
    innermost = env.line(("c", env.node("c", look("c"), put("deep")))).compile()
    middle = env.line(("b", innermost), ("b2", env.node("b2", look("b2")))).compile()
    graph = env.compile(env.line(("a", middle), ("o", env.node("o", look("o"), put("outer")))))
    await env.invoke(graph, {"log": []})
    assert env.seen == {"c": Counter(), "b2": Counter({"deep": 1}), "o": Counter({"deep": 1})}, env.seen


@scenario({"inner": 2, "between": 1})
async def a_stateful_subgraph_runs_twice(env: Env) -> None:
    inner = env.line(("i", env.node("i", look("i"), put("inner")))).compile(checkpointer=True)
    if env.sync:

        def call(state: State) -> dict[str, Any]:
            inner.invoke({"log": []})
            return {"log": ["call"]}
    else:

        async def call(state: State) -> dict[str, Any]:
            await inner.ainvoke({"log": []})
            return {"log": ["call"]}

    between = env.node("between", put("between"))
    graph = env.line(("first", call), ("between", between), ("second", call))
    await env.invoke(env.compile(graph), {"log": []})
    assert env.seen["i"] == Counter({"inner": 1, "between": 1}), env.seen


@scenario({}, {"kept": 1, "own": 1})
async def an_entrypoint_in_a_node_fails_after_its_task(env: Env) -> None:
    """The functional API below a graph: a finished call is kept, its caller runs again."""
    if env.sync:

        @task
        def remember() -> None:
            put("kept")(env, env.store)

        @entrypoint()
        def inner(input: str) -> str:
            remember().result()
            put("own")(env, env.store)
            fail()(env, env.store)
            return "done"

        def outer(state: State) -> dict[str, Any]:
            inner.invoke("go")
            return {"log": ["outer"]}
    else:

        @task
        async def remember() -> None:
            await put("kept")(env, env.store)

        @entrypoint()
        async def inner(input: str) -> str:
            await remember()
            await put("own")(env, env.store)
            fail()(env, env.store)
            return "done"

        async def outer(state: State) -> dict[str, Any]:
            await inner.ainvoke("go")
            return {"log": ["outer"]}

    await swallow(env.invoke(env.compile(env.line(("o", outer))), {"log": []} if env.phase == 0 else None))


@scenario({"outer": 1})
async def a_node_catches_the_failure_of_its_subgraph(env: Env) -> None:
    """The subgraph's step never ends, so nothing of it lands; the node's own writes do."""
    inner = env.line(("i", env.node("i", put("inner"), fail()))).compile()
    if env.sync:

        def outer(state: State) -> dict[str, Any]:
            with suppress(Boom):
                inner.invoke({"log": []})
            put("outer")(env, env.store)
            return {"log": ["outer"]}
    else:

        async def outer(state: State) -> dict[str, Any]:
            with suppress(Boom):
                await inner.ainvoke({"log": []})
            await put("outer")(env, env.store)
            return {"log": ["outer"]}

    await env.invoke(env.compile(env.line(("o", outer))), {"log": []})


@scenario({"b": 1})
async def a_delete_is_part_of_the_step(env: Env) -> None:
    def forget(env: Env, store: BaseStore) -> Awaitable[None] | None:
        if env.sync:
            for item in store.search(NAMESPACE):
                store.delete(NAMESPACE, item.key)
            return None

        async def later() -> None:
            for item in await store.asearch(NAMESPACE):
                await store.adelete(NAMESPACE, item.key)

        return later()

    nodes = (("a", env.node("a", put("a"))), ("b", env.node("b", forget, look("b"), put("b"), fail(attempts=1))))
    await env.invoke(env.compile(env.line(*nodes, b={"retry_policy": RETRY})), {"log": []})
    assert env.seen["b"] == Counter(), env.seen


def pair(env: Env, *after_good: Action, bad: tuple[Action, ...] = (), writes: bool = True) -> StateGraph[Any]:
    """After a node `pre`: `good`, beside a `bad` that goes on when `good` has finished; then `after`."""
    pause: list[Action] = [slow_down] if env.sync else [wait(0.05)]
    graph = StateGraph(State)
    graph.add_node("pre", lambda state: {"log": ["pre"]})
    graph.add_node("good", env.node("good", *(after_good or (put("good"),))))
    graph.add_node("bad", env.node("bad", *([put("bad")] if writes else []), *pause, *bad))
    graph.add_node("after", env.node("after", look("after")))
    graph.add_edge(START, "pre")
    graph.add_edge("pre", "good")
    graph.add_edge("pre", "bad")
    graph.add_edge(["good", "bad"], "after")
    return graph


async def invoke_at(env: Env, graph: Any, input: Any, config: Any) -> None:
    """Run from a checkpoint that is named."""
    if env.sync:
        graph.invoke(input, config, durability=env.durability)
    else:
        await graph.ainvoke(input, config, durability=env.durability)


@scenario({}, {"good": 1})
async def an_update_ends_the_step(env: Env) -> None:
    """``as_node=END`` applies what finished tasks wrote and clears the rest."""
    graph = env.compile(pair(env, bad=(fail(),)))
    if env.phase == 0:
        await swallow(env.invoke(graph, {"log": []}))
        return
    await graph.aupdate_state(THREAD, None, as_node=END)
    assert (await graph.aget_state(THREAD)).values["log"] == ["pre", "good"]


@scenario({}, {})
async def an_update_replaces_the_step(env: Env) -> None:
    """Any other update drops what finished tasks wrote."""
    graph = env.compile(pair(env, bad=(fail(),)))
    if env.phase == 0:
        await swallow(env.invoke(graph, {"log": []}))
        return
    await graph.aupdate_state(THREAD, {"log": ["by hand"]}, as_node="bad")
    await env.invoke(graph, None)
    assert (await graph.aget_state(THREAD)).values["log"] == ["pre", "by hand"]


@scenario({}, {"good": 1, "bad": 1})
async def a_step_is_resumed_with_an_update(env: Env) -> None:
    graph = env.compile(pair(env, bad=(fail(),)))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else Command(update={"log": ["update"]})))


@scenario({}, {"good": 1, "bad": 1})
async def a_failed_step_is_run_again_by_its_checkpoint_id(env: Env) -> None:
    """LangGraph forks, and runs the finished task again too."""
    graph = env.compile(pair(env, bad=(fail(),)))
    if env.phase == 0:
        await swallow(env.invoke(graph, {"log": []}))
        return
    await invoke_at(env, graph, None, (await graph.aget_state(THREAD)).config)
    assert sorted((await graph.aget_state(THREAD)).values["log"]) == ["after", "bad", "good", "pre"]


@scenario({}, {"good": 1})
async def an_interrupt_is_answered_by_its_checkpoint_id(env: Env) -> None:
    """LangGraph goes on, with what the finished task had done; the task that asks touches no memory."""
    graph = env.compile(pair(env, bad=(ask,), writes=False))
    if env.phase == 0:
        await env.invoke(graph, {"log": []})
        return
    await invoke_at(env, graph, Command(resume="yes"), (await graph.aget_state(THREAD)).config)
    assert sorted((await graph.aget_state(THREAD)).values["log"]) == ["after", "bad", "good", "pre"]


@scenario({}, {}, {"bad": 1})
async def an_updated_step_runs_again_and_writes_less(env: Env) -> None:
    """Started by the id of an update, LangGraph runs the finished task again without a fork; now it writes nothing."""

    def at_first(env: Env, store: BaseStore) -> Awaitable[None] | None:
        if env.phase == 1:
            return put("good")(env, store)
        return None

    graph = env.compile(pair(env, at_first, bad=(fail(until_phase=2),)))
    if env.phase == 0:
        await graph.aupdate_state(THREAD, {"log": []}, as_node="pre")
    elif env.phase == 1:
        await swallow(env.invoke(graph, None))
    else:
        await invoke_at(env, graph, None, (await graph.aget_state(THREAD)).config)


@scenario({"good": 1, "bad": 1}, {"good": 1, "bad": 1}, {"good": 2, "bad": 2})
async def a_fork_fails_and_new_input_follows(env: Env) -> None:
    def on_replay(env: Env, store: BaseStore) -> None:
        if env.phase == 1:
            raise Boom

    graph = env.compile(pair(env, bad=(on_replay,)))
    if env.phase == 1:
        history = [state async for state in graph.aget_state_history(THREAD)]
        (before,) = [state for state in history if set(state.next) == {"good", "bad"}]
        await swallow(invoke_at(env, graph, None, before.config))
        return
    durability, env.durability = env.durability, "sync" if env.phase == 0 else env.durability  # a history to fork
    await env.invoke(graph, {"log": []})
    env.durability = durability


@scenario({}, {"good": 1})
async def a_resumed_step_is_seen_by_the_next(env: Env) -> None:
    """What a finished task wrote in another process, when the task that ran again touched no memory."""
    graph = env.compile(pair(env, bad=(fail(),), writes=False))
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))
    if env.phase == 1:
        assert env.seen["after"] == Counter({"good": 1}), env.seen


@scenario({}, {"good": 1, "bad": 1})
async def a_step_is_resumed_in_another_durability(env: Env) -> None:
    graph = env.compile(pair(env, bad=(fail(),)))
    if env.phase == 1:
        env.durability = "sync" if env.durability == "exit" else "exit"
    await swallow(env.invoke(graph, {"log": []} if env.phase == 0 else None))
    if env.phase == 1:
        assert env.seen["after"] == Counter({"good": 1, "bad": 1}), env.seen


@scenario({}, {"kept": 1, "asked": 1, "beside": 1})
async def a_subgraph_with_a_finished_task_is_resumed(env: Env) -> None:
    inner = StateGraph(State)
    inner.add_node("k", env.node("k", put("kept")))
    inner.add_node("q", env.node("q", put("asked"), ask))
    inner.add_edge(START, "k")
    inner.add_edge(START, "q")
    graph = StateGraph(State)
    graph.add_node("sub", inner.compile())
    graph.add_node("beside", env.node("beside", put("beside")))
    graph.add_node("after", env.node("after", look("after")))
    graph.add_edge(START, "sub")
    graph.add_edge(START, "beside")
    graph.add_edge(["sub", "beside"], "after")
    await env.invoke(env.compile(graph), {"log": []} if env.phase == 0 else Command(resume="yes"))
    if env.phase == 1:
        assert env.seen["after"] == Counter({"kept": 1, "asked": 1, "beside": 1}), env.seen


@scenario({}, {"other": 1}, {"other": 2, "kept": 1, "inner": 1})
async def a_node_runs_another_thread_beside_a_resumed_subgraph(env: Env) -> None:
    """A checkpoint of the other thread lands nothing of this one, whose step fails once more."""
    pause: list[Action] = [slow_down] if env.sync else [wait(0.05)]
    inner = StateGraph(State)
    inner.add_node("k", env.node("k", put("kept")))
    inner.add_node("i", env.node("i", put("inner"), *pause * 2, fail(until_phase=2)))
    inner.add_edge(START, "k")
    inner.add_edge(START, "i")
    other = env.compile(env.line(("o", env.node("o", put("other")))))

    def run_other(env: Env, store: BaseStore) -> Awaitable[None] | None:
        if env.phase == 0:
            return None
        config = {"configurable": {"thread_id": "other"}}
        if env.sync:
            other.invoke({"log": []}, config)
            return None
        return other.ainvoke({"log": []}, config)

    graph = StateGraph(State)
    graph.add_node("sub", inner.compile())
    graph.add_node("n", env.node("n", run_other, *pause * 4, fail(until_phase=2)))
    graph.add_edge(START, "sub")
    graph.add_edge(START, "n")
    await swallow(env.invoke(env.compile(graph), {"log": []} if env.phase == 0 else None))


@scenario({}, {}, {"p1": 1, "p2": 1, "q1": 1, "q2": 1})
async def two_nodes_ask_twice_and_are_answered_one_by_one(env: Env) -> None:
    graph = StateGraph(State)
    for name in "pq":
        graph.add_node(name, env.node(name, put(f"{name}1"), ask, put(f"{name}2"), ask))
        graph.add_edge(START, name)
    compiled = env.compile(graph)
    if env.phase == 0:
        await env.invoke(compiled, {"log": []})
        return
    for _ in range(2):
        waiting = (await compiled.aget_state(THREAD)).interrupts
        await env.invoke(compiled, Command(resume={waiting[0].id: "yes"}))


@scenario({}, {"handled": 1, "beside": 1})
async def an_error_handler_fails(env: Env) -> None:
    def always(env: Env, store: BaseStore) -> None:
        raise Boom

    pause: list[Action] = [slow_down] if env.sync else [wait(0.05)]
    graph = StateGraph(State)
    graph.add_node("a", env.node("a", put("a"), always), error_handler=env.node("h", put("handled"), *pause, fail()))
    graph.add_node("beside", env.node("beside", put("beside")))
    graph.add_edge(START, "a")
    graph.add_edge(START, "beside")
    await swallow(env.invoke(env.compile(graph), {"log": []} if env.phase == 0 else None))


@scenario({}, {"t0": 1, "t1": 1, "t2": 1, "own": 1})
async def one_of_three_called_tasks_fails(env: Env) -> None:
    if env.sync:

        @task
        def call(n: int) -> int:
            put(f"t{n}")(env, env.store)
            if n == 1:
                slow_down(env, env.store)
                fail()(env, env.store)
            return n

        @entrypoint(checkpointer=env.saver, store=env.store)
        def workflow(input: str) -> list[int]:
            results = [one.result() for one in [call(n) for n in range(3)]]
            put("own")(env, env.store)
            return results
    else:

        @task
        async def call(n: int) -> int:
            await put(f"t{n}")(env, env.store)
            if n == 1:
                await asyncio.sleep(0.1)
                fail()(env, env.store)
            return n

        @entrypoint(checkpointer=env.saver, store=env.store)
        async def workflow(input: str) -> list[int]:
            results = await asyncio.gather(*[call(n) for n in range(3)])
            await put("own")(env, env.store)
            return results

    await swallow(env.invoke(workflow, "go" if env.phase == 0 else None))


# -- the sides --------------------------------------------------------------------------------------


@contextmanager
def _sync_side(side: str, path: Path) -> Iterator[tuple[Any, Any]]:
    with ExitStack() as stack:
        if side == "memstate":
            memory = stack.enter_context(MemoryStore.open(path / "memory.db"))
            yield memory.checkpointer, memory.store
        elif side.startswith("postgresql://"):
            schema = "s" + md5(str(path).encode()).hexdigest()
            memory = stack.enter_context(MemoryStore(PostgresStorage(side, schema=schema)))
            yield memory.checkpointer, memory.store
        elif side.startswith("redis://"):
            name = md5(str(path).encode()).hexdigest()
            memory = stack.enter_context(MemoryStore(RedisStorage(side, name=name)))
            yield memory.checkpointer, memory.store
        else:
            saver = stack.enter_context(SqliteSaver.from_conn_string(str(path / "saver.db")))
            store = stack.enter_context(SqliteStore.from_conn_string(str(path / "store.db")))
            store.setup()
            yield saver, store


async def _play(side: str, path: Path, name: str, sync: bool, durability: str, phase: int) -> Counter[str]:
    path.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        if side != "upstream" or sync:
            saver, store = stack.enter_context(_sync_side(side, path))
        else:
            saver = await stack.enter_async_context(AsyncSqliteSaver.from_conn_string(str(path / "saver.db")))
            store = await stack.enter_async_context(AsyncSqliteStore.from_conn_string(str(path / "store.db")))
            await store.setup()
        await SCENARIOS[name].run(Env(phase, sync, durability, saver, store))
        return names(await store.asearch(NAMESPACE, limit=1000) if not sync else store.search(NAMESPACE, limit=1000))


def play(side: str, path: str, name: str, sync: bool, durability: str, phase: int) -> dict[str, int] | str:
    """Play one phase and return what is remembered afterwards, or what went wrong."""
    try:
        return dict(asyncio.run(_play(side, Path(path), name, sync, durability, phase)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def play_all(side: str, cells: list[tuple[str, str, bool, str, int]]) -> list[dict[str, int] | str]:
    """Play many cells, each `(path, name, sync, durability, phase)`, in this process."""
    return [play(side, *cell) for cell in cells]
