"""All we know of LangGraph's internals: where a running task is, and how its write set is read.

Written against LangGraph 1.2.22. Each task runs with a config whose `configurable` carries the task's own read and
send functions. The read function is a `functools.partial` that holds the task's `PregelTaskWrites`, and with it the
write set: cleared when the task is retried, dropped when it fails, applied when its step ends. A memory write leaves a
marker there under `__no_writes__`, a channel that LangGraph skips when it applies writes.

A subgraph's tasks do not know the task they run inside of. As it enters a graph, in the context of whoever invokes it,
LangGraph asks the store for its truth value (`Runtime.merge`), and a graph that checkpoints loads its checkpoint; at
both moments `enter_graph` notes the invoking task. A function that another one called (functional API) knows the other
by its own path, and finds its write set in the loop that schedules the calls.

Where something is not as expected, `StagingError` is raised at the first write: nothing is guessed.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph._internal._constants import (
    CONF,
    CONFIG_KEY_CALL,
    CONFIG_KEY_CHECKPOINT_MAP,
    CONFIG_KEY_CHECKPOINT_NS,
    CONFIG_KEY_CHECKPOINTER,
    CONFIG_KEY_DURABILITY,
    CONFIG_KEY_READ,
    CONFIG_KEY_RESUMING,
    CONFIG_KEY_RUNTIME,
    CONFIG_KEY_SEND,
    CONFIG_KEY_TASK_ID,
    ERROR,
    INTERRUPT,
    NO_WRITES,
    NS_END,
    NS_SEP,
    NULL_TASK_ID,
    PUSH,
    RETURN,
    TASKS,
)
from langgraph._internal._fields import get_cached_annotated_keys, get_update_as_tuples
from langgraph._internal._runnable import RunnableSeq
from langgraph._internal._typing import MISSING as MISSING
from langgraph.channels.base import BaseChannel
from langgraph.channels.binop import _get_overwrite
from langgraph.channels.untracked_value import UntrackedValue
from langgraph.checkpoint.base import get_checkpoint_id
from langgraph.checkpoint.base.id import uuid6
from langgraph.constants import START
from langgraph.pregel._algo import task_path_str
from langgraph.pregel._checkpoint import channels_from_checkpoint, versions_seen_without_bumps
from langgraph.runtime import RunControl, Runtime
from langgraph.types import Command, Send

from langgraph_memstate.errors import StagingError
from langgraph_memstate.storage.values import StepKey

SENDS: str = TASKS
"""the channel of the `Send`s that the next step runs"""

WriteSet = deque[tuple[str, Any]]

_TOKEN_PREFIX = "memstate:"
_ADVICE = "this release of LangGraph keeps its tasks elsewhere; use the LangGraph version this package was tested with"


def new_token() -> str:
    """A marker for one staged batch: a plain string, since LangGraph may serialise it into a node cache."""
    return _TOKEN_PREFIX + uuid4().hex


class Caller(NamedTuple):
    """A task that calls others through the functional API."""

    task_id: str
    path: str
    writes: WriteSet


@dataclass(frozen=True, slots=True, eq=False)
class RunningTask:
    """One task of a running step, as seen from inside its node."""

    run: RunControl
    """one object for the whole run, shared by the subgraphs it runs"""
    thread_id: str
    graph_ns: str
    """the namespace of the graph the task belongs to"""
    checkpoint_id: str
    """the checkpoint its step starts from"""
    task_id: str
    task_ns: str
    path: str
    node: str
    run_id: str | None
    writes: WriteSet = field(repr=False)
    send: Callable[[Sequence[tuple[str, Any]]], None] = field(repr=False)
    saver: Any = field(repr=False)
    versions_seen: Mapping[str, Mapping[str, Any]] | None = field(default=None, repr=False)
    """what the nodes of its graph have seen, itself included; None where that cannot be told"""
    inside: RunningTask | None = None
    """the task that invoked this task's graph"""
    callers: tuple[Caller, ...] = ()
    """the tasks that called this one through the functional API, the first of them first"""

    @property
    def chain(self) -> tuple[RunningTask, ...]:
        """This task, then the tasks it runs inside of."""
        return (self,) if self.inside is None else (self, *self.inside.chain)

    def mark(self, token: str) -> None:
        """Leave a marker in the write sets of the task and its callers.

        One that comes after the task's attempt timed out has no effect there.
        """
        self.send([(NO_WRITES, token)])
        for caller in self.callers:
            caller.writes.append((NO_WRITES, token))


# -- from inside a node -----------------------------------------------------------------------------

_invoker: ContextVar[RunningTask | None] = ContextVar("memstate_invoker", default=None)


def enter_graph() -> None:
    """Note the running task, if any, as the one that the graph being entered runs inside of."""
    task = running_task()
    if task is not None:
        _invoker.set(task)


def running_saver() -> Any:
    """The checkpointer of the graph of the node we are in; None outside a graph, and where it has none.

    Raises:
        StagingError: there is a node, and it does not say.
    """
    configurable: Mapping[str, Any] = (var_child_runnable_config.get() or {}).get(CONF) or {}
    if CONFIG_KEY_TASK_ID not in configurable or CONFIG_KEY_READ not in configurable:
        return None
    if CONFIG_KEY_CHECKPOINTER not in configurable:
        raise StagingError(f"the running task does not say who saves its graph: {_ADVICE}")
    return configurable[CONFIG_KEY_CHECKPOINTER]


def running_task() -> RunningTask | None:
    """The task of the node we are in; None outside a graph.

    Raises:
        StagingError: there is one, and its write set is not where this release of LangGraph keeps it.
    """
    config = var_child_runnable_config.get()
    configurable: Mapping[str, Any] = (config or {}).get(CONF) or {}
    if CONFIG_KEY_TASK_ID not in configurable or CONFIG_KEY_READ not in configurable:
        return None
    read, send = configurable[CONFIG_KEY_READ], configurable.get(CONFIG_KEY_SEND)
    saver = configurable.get(CONFIG_KEY_CHECKPOINTER)
    if not isinstance(read, functools.partial) or len(read.args) < 4 or not callable(send):
        raise StagingError(f"the running task's read and send functions have another shape: {_ADVICE}")
    own = read.args[3]
    writes, path = getattr(own, "writes", None), getattr(own, "path", None)
    if not isinstance(writes, deque) or not isinstance(path, tuple):
        raise StagingError(f"the running task's write set is not in its read function: {_ADVICE}")
    task_ns = configurable.get(CONFIG_KEY_CHECKPOINT_NS) or ""
    graph_ns, checkpoint_id = _graph_of(task_ns, configurable.get(CONFIG_KEY_CHECKPOINT_MAP) or {})
    run = _run_control(configurable)
    if checkpoint_id is None or run is None:
        raise StagingError(f"the running task does not say which checkpoint it starts from: {_ADVICE}")
    return RunningTask(
        run=run,
        thread_id=str(configurable.get("thread_id", "")),
        graph_ns=graph_ns,
        checkpoint_id=checkpoint_id,
        task_id=configurable[CONFIG_KEY_TASK_ID],
        task_ns=task_ns,
        path=task_path_str(path),
        node=own.name,
        run_id=_run_id(config),
        writes=writes,
        send=send,
        saver=saver,
        versions_seen=_versions_seen(own, configurable.get(CONFIG_KEY_CALL)),
        inside=_invoking_task(graph_ns, configurable) if graph_ns else None,
        callers=_callers(path, configurable.get(CONFIG_KEY_CALL)),
    )


def _callers(path: tuple[Any, ...], call: object) -> tuple[Caller, ...]:
    """Found by their paths in the loop that schedules what they call."""
    wanted: list[Any] = []
    while path[0] == PUSH and path[-1] is True:
        path = path[1]
        wanted.insert(0, path)
    if not wanted:
        return ()
    tasks = {task.path: task for task in tuple(getattr(_loop(call), "tasks", {}).values()) if task.path in wanted}
    if len(tasks) < len(wanted):
        raise StagingError(f"the tasks that called the running one are not in its loop: {_ADVICE}")
    return tuple(Caller(tasks[path].id, task_path_str(path), tasks[path].writes) for path in wanted)


def _graph_of(task_ns: str, checkpoint_map: Mapping[str, str]) -> tuple[str, str | None]:
    """The namespace of a task's graph, and the checkpoint its step starts from.

    A call of the functional API and an error handler are listed one level below the task they belong to, yet start from
    the same checkpoint: they are tasks of the same graph.
    """
    graph_ns = task_ns.rpartition(NS_SEP)[0]
    checkpoint_id = checkpoint_map.get(graph_ns)
    while graph_ns and checkpoint_map.get(above := graph_ns.rpartition(NS_SEP)[0]) == checkpoint_id:
        graph_ns = above
    return graph_ns, checkpoint_id


def _invoking_task(graph_ns: str, configurable: Mapping[str, Any]) -> RunningTask:
    """The task a subgraph runs inside of: the nearest noted one that is on this subgraph's checkpoint map."""
    checkpoint_map = configurable[CONFIG_KEY_CHECKPOINT_MAP]
    task = _invoker.get()
    while task is not None:
        if task.graph_ns != graph_ns and checkpoint_map.get(task.graph_ns) == task.checkpoint_id:
            return task
        task = task.inside
    raise StagingError(
        f"the task that runs subgraph {graph_ns!r} is unknown: compile the outermost graph with this memory's store "
        "(store=memory.store), which is told when a subgraph is entered"
    )


def _versions_seen(own: Any, call: object) -> Mapping[str, Mapping[str, Any]] | None:
    """From the checkpoint in memory: the function that calls further tasks holds the loop that schedules them."""
    checkpoint = getattr(_loop(call), "checkpoint", None)
    if checkpoint is None:
        return None
    versions = checkpoint["channel_versions"]
    triggers = {channel: versions[channel] for channel in own.triggers if channel in versions}
    return {**checkpoint["versions_seen"], own.name: triggers}


def _loop(call: object) -> Any:
    """The loop that schedules what a function calls; None where it cannot be found."""
    if not isinstance(call, functools.partial):  # a closure, under a timeout
        around = getattr(call, "__closure__", None) or ()
        call = next((cell.cell_contents for cell in around if isinstance(cell.cell_contents, functools.partial)), None)
    return getattr(call.keywords.get("schedule_task"), "__self__", None) if call is not None else None


def _run_control(configurable: Mapping[str, Any]) -> RunControl | None:
    runtime = configurable.get(CONFIG_KEY_RUNTIME)
    control = runtime.control if isinstance(runtime, Runtime) else None
    return control if isinstance(control, RunControl) else None


def _run_id(config: RunnableConfig | None) -> str | None:
    run_id = ((config or {}).get("metadata") or {}).get("run_id")
    return None if run_id is None else str(run_id)


def task_is_saved() -> bool:
    """Whether the graph of the node we are in has checkpoints of its own; True where that cannot be told."""
    call = ((var_child_runnable_config.get() or {}).get(CONF) or {}).get(CONFIG_KEY_CALL)
    loop = _loop(call)
    return loop is None or getattr(loop, "checkpointer", None) is not None


def task_saves_at_exit() -> bool:
    """Whether the run of the node we are in saves only when it ends."""
    return saves_at_exit(var_child_runnable_config.get() or {})


def current_channels() -> Mapping[str, BaseChannel[Any, Any, Any]]:
    """The state channels of the graph of the node we are in, as its step found them."""
    read = ((var_child_runnable_config.get() or {}).get(CONF) or {}).get(CONFIG_KEY_READ)
    channels = read.args[1] if isinstance(read, functools.partial) and len(read.args) > 1 else None
    if not isinstance(channels, Mapping):
        raise StagingError(f"the running task's channels are not in its read function: {_ADVICE}")
    return {
        name: channel
        for name, channel in channels.items()
        if not name.startswith(_CONTROL_CHANNELS) and not isinstance(channel, UntrackedValue)
    }


_CONTROL_CHANNELS = ("__", "branch:", "join:")


def is_sent_to(saver: Any, step: StepKey, node: str) -> bool:
    """Whether the step that starts from a checkpoint runs a node because of a `Send`."""
    found = saver.get_tuple(config_of(step))
    return found is not None and any(
        isinstance(sent, Send) and sent.node == node for sent in found.checkpoint["channel_values"].get(SENDS, ())
    )


def emptied(channel: BaseChannel[Any, Any, Any]) -> BaseChannel[Any, Any, Any]:
    """The same kind of channel as a new thread has it."""
    return channel.from_checkpoint(MISSING)


def channels_at(saver: Any, config: RunnableConfig) -> tuple[Mapping[str, Any], dict[str, BaseChannel[Any, Any, Any]]]:
    """The channel versions of a checkpoint, and these channels as they were there."""
    found = saver.get_tuple(config)
    if found is None:
        raise StagingError(f"the checkpoint that {config} names has gone")
    specs = dict(current_channels())
    channels, _ = channels_from_checkpoint(specs, found.checkpoint, saver=saver, config=config)
    return found.checkpoint["channel_versions"], dict(channels)


# -- write sets -------------------------------------------------------------------------------------


def tokens(writes: Iterable[tuple[str, Any]]) -> list[str]:
    """The markers among a task's writes, in order."""
    return [value for channel, value in writes if _is_token(channel, value)]


def _is_token(channel: str, value: object) -> bool:
    return channel == NO_WRITES and isinstance(value, str) and value.startswith(_TOKEN_PREFIX)


def without_tokens(writes: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """A task's writes as LangGraph would have made them without us.

    A finished task always leaves one output write, or LangGraph would run it again; a failed one must not gain any.
    """
    marked = set(tokens(writes))
    kept = [(channel, value) for channel, value in writes if not (channel == NO_WRITES and value in marked)]
    if marked and not unfinished(writes) and not any(channel not in _CONTROL for channel, _ in kept):
        kept.append((NO_WRITES, None))
    return kept


_CONTROL = frozenset((ERROR, INTERRUPT, "__resume__", "__error_source_node__"))


def failed(writes: Iterable[tuple[str, Any]]) -> bool:
    """Whether a write set is of a task that failed or was cancelled, and that LangGraph will run again.

    One that left an output before it failed counts as finished: LangGraph applies that output when the step goes on.
    """
    return _runs_again(writes, (ERROR,))


def unfinished(writes: Iterable[tuple[str, Any]]) -> bool:
    """Whether saved writes are of a task that LangGraph will run again: it failed, was cancelled, or waits."""
    return _runs_again(writes, (ERROR, INTERRUPT))


def _runs_again(writes: Iterable[tuple[str, Any]], endings: tuple[str, ...]) -> bool:
    channels = {channel for channel, value in writes if not _is_token(channel, value)}
    return not channels.isdisjoint(endings) and channels <= _CONTROL


def returned(writes: Iterable[tuple[str, Any]]) -> bool:
    """Whether a task of the functional API has finished."""
    return any(channel == RETURN for channel, _ in writes)


def calls(caller: str, path: str) -> bool:
    """Whether the task at `path` was called, directly or not, by the task at `caller` (functional API)."""
    return caller in lineage(path)[:-1]


def lineage(path: str) -> tuple[str, ...]:
    """The paths of the tasks that called the one at `path` (functional API), the first of them first, and its own."""
    push, _, called = path.partition(", ")
    if push != f"~{PUSH}" or not called.startswith("~"):
        return (path,)
    caller, _number, _is_call = called.rsplit(", ", 2)
    return (*lineage(caller), path)


def is_input(task_id: str) -> bool:
    """Whether pending writes are input of the graph, as from ``invoke(Command(update=…))``, not of a task."""
    return task_id == NULL_TASK_ID


def without_output(task_id: str, writes: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What stays of a task's writes if its output does not count: its error, and answers it has had."""
    return [] if is_input(task_id) else [(channel, value) for channel, value in writes if channel in _CONTROL]


# -- from inside a saver ----------------------------------------------------------------------------


def run_of(config: RunnableConfig) -> RunControl | None:
    """The run a saver is called by; None for a call that no run makes, such as `update_state`."""
    return _run_control(config.get(CONF) or {})


def run_anchor(config: RunnableConfig) -> object | None:
    """An object that lives as long as the run's config and can be referred to weakly."""
    runtime = (config.get(CONF) or {}).get(CONFIG_KEY_RUNTIME)
    return runtime.stream_writer if isinstance(runtime, Runtime) else None


def steps_around(config: RunnableConfig) -> Mapping[str, str]:
    """By namespace, the checkpoints that the steps start from inside of which a subgraph runs.

    LangGraph also lists a call of the functional API and an error handler there, with the checkpoint of their graph.
    """
    listed: Mapping[str, str] = (config.get(CONF) or {}).get(CONFIG_KEY_CHECKPOINT_MAP) or {}
    return {ns: at for ns, at in listed.items() if not ns or listed.get(ns.rpartition(NS_SEP)[0]) != at}


def subgraph_resumes(config: RunnableConfig) -> bool | None:
    """Whether a subgraph was told to go on from its checkpoint; None for a root graph, which decides by its input."""
    return None if is_root(config) else bool((config.get(CONF) or {}).get(CONFIG_KEY_RESUMING))


def is_root(config: RunnableConfig) -> bool:
    """Whether a config is of a root graph, not of one that a task runs."""
    return CONFIG_KEY_TASK_ID not in (config.get(CONF) or {})


def saves_at_exit(config: RunnableConfig) -> bool:
    """Whether the run saves only when it ends (``durability="exit"``)."""
    return (config.get(CONF) or {}).get(CONFIG_KEY_DURABILITY) == "exit"


def resumed_from(parent: Mapping[str, Any], versions_seen: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a run whose nodes have seen these channel versions went on from a checkpoint, not from new input on it.

    New input has a channel of its own, which the first step reads. A graph that names it otherwise shows only the
    resume: that marks every channel of the checkpoint as seen, under the interrupt's name.
    """
    versions, seen_before = parent["channel_versions"], parent["versions_seen"]
    if START in versions or _inputs_seen(versions_seen):
        return _inputs_seen(versions_seen) <= {versions.get(START), *_inputs_seen(seen_before)}
    before, after = seen_before.get(INTERRUPT, {}), versions_seen.get(INTERRUPT, {})
    return after != before or all(after.get(channel) == version for channel, version in versions.items())


def _inputs_seen(versions_seen: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    return {seen[START] for seen in versions_seen.values() if START in seen}


def runs_again(config: RunnableConfig, source: object, *, is_latest: bool, waits: bool) -> bool:
    """Whether a run that names the checkpoint it starts from runs its finished tasks again too.

    It does, unless it answers an interrupt (`waits`) of the latest checkpoint. A run that forks says so with a
    checkpoint of its own, but not when it saves at exit or starts from a fork already.
    """
    if not get_checkpoint_id(config):
        return False
    return not is_latest or ((saves_at_exit(config) or source in ("update", "fork")) and not waits)


def waits(writes: Iterable[tuple[str, str]]) -> bool:
    """Whether a task waits at an interrupt, by the task and the channel of every pending write."""
    channels: dict[str, set[str]] = {}
    for task_id, channel in writes:
        channels.setdefault(task_id, set()).add(channel)
    return any(INTERRUPT in written and written <= _CONTROL for written in channels.values())


def ended_by_update(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an update ended the step of its parent, as ``update_state(…, None, as_node=END)`` does.

    It applies what finished tasks wrote, and marks what triggered the step's tasks as seen. Other updates do neither,
    but the marks that LangGraph moves when it stores a snapshot of a delta channel.
    """
    known = versions_seen_without_bumps({node: dict(seen) for node, seen in before.items()})
    now = versions_seen_without_bumps({node: dict(seen) for node, seen in after.items()})
    return any(seen and seen != known.get(node) for node, seen in now.items())


def applied_by_update(path: str, writes: Iterable[tuple[str, str]]) -> bool:
    """Whether an update that ended a step applied a task, by the path and the channel of every pending write.

    What a task called (functional API) counts with the task, which may have failed or wait since.
    """
    outermost = lineage(path)[0]
    return any(written == outermost and channel not in _CONTROL for written, channel in writes)


def config_of(step: StepKey) -> RunnableConfig:
    """The config that names a checkpoint."""
    return {"configurable": step._asdict()}


def is_within(checkpoint_ns: str, graph_ns: str) -> bool:
    """Whether a namespace is that of a graph, or of a subgraph inside it."""
    return not graph_ns or checkpoint_ns == graph_ns or checkpoint_ns.startswith(graph_ns + NS_SEP)


def outlives_its_task(checkpoint_ns: str) -> bool:
    """Whether a namespace is of a subgraph that keeps its state from one call to the next (``checkpointer=True``)."""
    return bool(checkpoint_ns) and NS_END not in checkpoint_ns


def new_checkpoint_id(after: str) -> str:
    """An id that LangGraph sorts behind that one, whatever the clock of its maker said."""
    made = str(uuid6())
    if made > after:
        return made
    try:
        return str(UUID(int=UUID(after).int + 1))
    except ValueError:  # not one of LangGraph's
        return f"{after}+"


# -- channels ---------------------------------------------------------------------------------------


def overwritten(value: Any) -> tuple[bool, Any]:
    """Whether a write is an `Overwrite`, in any of the forms LangGraph knows, and of what."""
    return _get_overwrite(value)


def graph_input(values: Mapping[str, Any], channels: Sequence[str]) -> list[tuple[str, Any]]:
    """What the input that a checkpoint keeps for its first step writes to these channels."""
    return updates(values[START], channels) if START in values else []


def updates(output: Any, channels: Sequence[str]) -> list[tuple[str, Any]]:
    """What a node's output writes to these channels of its own graph, in order."""
    if isinstance(output, Mapping):
        return [(name, value) for name, value in output.items() if name in channels]
    if isinstance(output, Command):
        own = () if output.graph == Command.PARENT or output.update is None else output._update_as_tuples()
        return [(name, value) for name, value in own if name in channels]
    if isinstance(output, list | tuple):
        return [update for one in output for update in updates(one, channels)]
    if output is not None and get_cached_annotated_keys(type(output)):
        return get_update_as_tuples(output, channels)
    return []


def in_sequence(node: Runnable[Any, Any], then: Runnable[Any, Any]) -> Runnable[Any, Any]:
    """A node followed by another step, in which LangGraph still finds a subgraph."""
    return RunnableSeq(node, then)


@contextmanager
def running(config: RunnableConfig | None) -> Iterator[None]:
    """Run in the context of a task, as its first step does and those after it do not."""
    token = var_child_runnable_config.set(config)
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def current_values(channels: Sequence[str]) -> Mapping[str, Any]:
    """The values of these channels that the running task's step started from; none of those that have none."""
    configurable: Mapping[str, Any] = (var_child_runnable_config.get() or {}).get(CONF) or {}
    read = configurable.get(CONFIG_KEY_READ)
    return {} if read is None else read(list(channels))


def version_number(version: Any) -> int:
    """How many steps a channel version counts; what follows the point keeps branches apart."""
    return int(str(version).partition(".")[0])
