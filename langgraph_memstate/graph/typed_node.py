"""Validation inside the task: what a typed channel would refuse after the step, the node's own task refuses.

There a retry policy, the node's error handler, a repair callback or another node can act on it, a run that saves at
exit keeps the steps before it, and a node cache never gets it. The channel validates all the same, and alone sees what
two tasks of a step write together, or what a `Command` sends to the parent graph.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.graph import StateGraph
from langgraph.types import Command

from langgraph_memstate.errors import SchemaError
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.checkpointer import MemStateCheckpointer
from langgraph_memstate.graph.pregel import MISSING
from langgraph_memstate.graph.reducer import TypedReducer

Repair = Callable[[SchemaError, Any], Any] | Callable[[SchemaError, Any], Awaitable[Any]]
OnError = str | Callable[[SchemaError], Any]
Graph = TypeVar("Graph", bound=StateGraph[Any, Any, Any, Any])
Node = TypeVar("Node", bound=Callable[..., Any])


def typed_node(
    node: Node,
    state: type[Any] | Mapping[str, TypedReducer],
    *,
    repair: Repair | None = None,
    repairs: int = 1,
    on_error: OnError | None = None,
) -> Node:
    """The same node, whose output is validated against the typed channels of a state before its task ends.

    Args:
        node: a function, a coroutine function or a Runnable.
        state: the graph's state class, or its typed channels by name.
        repair: is given the error and the output, and returns a new output: where the node runs async it may be a
            coroutine function. Called up to `repairs` times; what it returns is validated as well.
        on_error: where the graph goes with an output that cannot be repaired: the name of a node, or a function of the
            error that returns an output of its own, such as a `Command`. The task has finished then, without its
            output and without its memory writes. Default: `SchemaError` is raised in the task. LangGraph's default
            retry policy takes it, as any `ValueError`, for permanent: use ``RetryPolicy(retry_on=SchemaError)``.
    """
    channels = dict(state) if isinstance(state, Mapping) else typed_channels(StateGraph(state))
    check = _Check(channels, repair, repairs, on_error)
    if isinstance(node, Runnable):
        return cast(Node, pregel.in_sequence(node, check))
    if inspect.iscoroutinefunction(node) or inspect.iscoroutinefunction(type(node).__call__):

        @functools.wraps(node)
        async def checked_later(*args: Any, **kwargs: Any) -> Any:
            return await check.acheck(await node(*args, **kwargs))

        return cast(Node, checked_later)

    @functools.wraps(node)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return check.check(node(*args, **kwargs))

    return cast(Node, checked)


def enforce(
    workflow: Graph, *, repair: Repair | None = None, repairs: int = 1, on_error: OnError | None = None
) -> Graph:
    """Make every node of a `StateGraph` a `typed_node`, in place; call it once all nodes are added, before `compile`.

    The node that `on_error` names raises its own errors.
    """
    channels = typed_channels(workflow)
    for name, spec in workflow.nodes.items():
        checks = [step for step in getattr(spec.runnable, "steps", ()) if isinstance(step, _Check)]
        if checks or not channels:
            continue
        check = _Check(channels, repair, repairs, None if name == on_error else on_error)
        ends = spec.ends
        if isinstance(on_error, str) and name != on_error and not isinstance(ends, Mapping):
            ends = tuple(dict.fromkeys((*(ends or ()), on_error)))
        runnable: Any = pregel.in_sequence(cast(Any, spec.runnable), check)
        workflow.nodes[name] = dataclasses.replace(spec, runnable=runnable, ends=ends)
    return workflow


def typed_channels(workflow: StateGraph[Any, Any, Any, Any]) -> dict[str, TypedReducer]:
    """The typed channels of a graph by name."""
    return {name: channel for name, channel in workflow.channels.items() if isinstance(channel, TypedReducer)}


class _Check(Runnable[Any, Any]):
    """Passes a node's output on if the typed channels take it."""

    def __init__(
        self, channels: Mapping[str, TypedReducer], repair: Repair | None, repairs: int, on_error: OnError | None
    ) -> None:
        self.channels = channels
        self.repair = repair
        self.repairs = repairs if repair is not None else 0
        self.on_error = on_error

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        with pregel.running(config):
            return self.check(input)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        with pregel.running(config):
            return await self.acheck(input)

    def check(self, output: Any) -> Any:
        error = self._fault(output)
        for _ in range(self.repairs):
            if error is None:
                break
            output = self._repaired(error, output)
            if inspect.isawaitable(output):
                if inspect.iscoroutine(output):
                    output.close()
                raise TypeError("the repair callback is a coroutine function, and the node runs sync: use ainvoke")
            error = self._fault(output)
        return output if error is None else self._failed(error)

    async def acheck(self, output: Any) -> Any:
        error = self._fault(output)
        for _ in range(self.repairs):
            if error is None:
                break
            output = self._repaired(error, output)
            if inspect.isawaitable(output):
                output = await output
            error = self._fault(output)
        return output if error is None else self._failed(error)

    def _repaired(self, error: SchemaError, output: Any) -> Any:
        return None if self.repair is None else self.repair(error, output)

    def _fault(self, output: Any) -> SchemaError | None:
        """Why a typed channel would refuse the output, given the value it has now."""
        written: dict[str, list[Any]] = {}
        for name, value in pregel.updates(output, tuple(self.channels)):
            written.setdefault(name, []).append(value)
        values = pregel.current_values(tuple(written)) if written else {}
        for name, outputs in written.items():
            try:
                self.channels[name].holding(values.get(name, MISSING), name).update(outputs)
            except SchemaError as error:
                return error
        return None

    def _failed(self, error: SchemaError) -> Any:
        if self.on_error is None:
            raise error
        task = pregel.running_task()
        if task is not None and isinstance(task.saver, MemStateCheckpointer):
            task.saver.take_back()
        output = Command(goto=self.on_error) if isinstance(self.on_error, str) else self.on_error(error)
        if (again := self._fault(output)) is not None:
            raise again
        return output
