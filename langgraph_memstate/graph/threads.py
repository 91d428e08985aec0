"""Thread state, read: checkpoints as LangGraph knows them, from what a memory stores of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import (
    CorruptRowError,
    DeserializationError,
    RollbackError,
)
from langgraph_memstate.facts import check_text, is_unicode
from langgraph_memstate.filters import Filter, compile_filter
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.allocation import made_ahead
from langgraph_memstate.graph.channel_values import ChannelValues, Fetched, Manifest, Recent, weight_of
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.lists import ListVersion
from langgraph_memstate.graph.reducer import typed_names
from langgraph_memstate.graph.refusals import Ledger, Scope, Write, current, enter
from langgraph_memstate.graph.rewind import TimeTravel, left_behind, rewind
from langgraph_memstate.graph.staging import Staging
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.storage.operations import Commit
from langgraph_memstate.storage.values import Blob, StepKey, StoredCheckpoint, StoredHead, StoredWrite
from langgraph_memstate.timeline import metadata_of

logger = logging.getLogger("langgraph_memstate")

_PAGE = 50  # checkpoints that `list` reads at a time: no snapshot is open while it yields


class ThreadReader(BaseCheckpointSaver[str]):
    """The half of the checkpointer that reads. It tells the run it reads for what it may go on with."""

    def __init__(
        self, memory: MemoryStore, *, serde: SerializerProtocol | None = None, time_travel: TimeTravel = "keep"
    ) -> None:
        if time_travel not in ("keep", "rewind"):
            raise RollbackError(f"time_travel is 'keep' or 'rewind', not {time_travel!r}")
        super().__init__(serde=serde or MemStateSerializer())
        self._rewinds = time_travel == "rewind"
        self.memory = memory
        self._staging = cast(Staging, memory.join_steps(Staging))
        self._manifests: Recent[StepKey, Manifest] = Recent()
        """Which stored value each channel of a checkpoint refers to."""
        self._values = ChannelValues()

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the latest of its thread and namespace.

        Raises:
            DeserializationError: a value's type is unknown or refused; the message names it.
            CorruptRowError: the row is not what a checkpointer wrote.
        """
        pregel.enter_graph()
        found, ledger = self._read_tuple(config)
        self._enter(config, found, is_async=False)
        _note(config, ledger)
        return found

    def _read_tuple(self, config: RunnableConfig) -> tuple[CheckpointTuple | None, Ledger]:
        checkpoint_id = get_checkpoint_id(config)
        place = step_of(config, checkpoint_id or "")
        self._await_removals()
        with self.memory.storage.snapshot() as reader:
            stored = reader.checkpoint(place.thread_id, place.checkpoint_ns, checkpoint_id)
            # Memory writes are staged with the channel writes of their task.
            staged = [] if stored is None or not stored.writes else reader.staged(stored.step)
            latest = None if stored is None or not staged else reader.checkpoint(*stored.step[:2], None)
            base = left_behind(reader, stored.step) if self._rewinds and stored is not None else None
            rewound = () if base is None else tuple(rewind(reader, base, base.step, self.memory.claims_of).drafts)
            (fetched,) = self._values.fetch(reader, self.serde, () if stored is None else (stored,)) or ({},)
        if stored is None:
            self._staging.begin(config, None, ())
            return None, self._staging.ledger(config) or Ledger()
        if latest is None:
            self._staging.begin(config, stored.step, (), rewound=rewound)
        else:
            again = pregel.runs_again(
                config,
                metadata_of(stored).get("source"),
                is_latest=latest.step == stored.step,
                waits=pregel.waits((write.task_id, write.channel) for write in stored.writes),
            )
            self._staging.begin(config, stored.step, staged, self.head_of(stored), runs_again=again, rewound=rewound)
        ledger = self._staging.ledger(config) or Ledger()
        return self._load(stored, fetched, ledger), ledger

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, newest first: of a thread, a namespace, or everything.

        `filter` compares metadata by type, with the operators of the store's filters.
        """
        pregel.enter_graph()  # a subgraph that is replayed looks for its checkpoint here
        self._enter(config, None, is_async=False)
        for found, ledger in self._read_list(config, filter, before, limit):
            self._enter(config, found, is_async=False)
            _note(found.config, ledger)
            yield found

    def _read_list(
        self,
        config: RunnableConfig | None,
        filter: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Iterator[tuple[CheckpointTuple, Ledger]]:
        self._await_removals()

        def load(row: tuple[StoredCheckpoint, Fetched]) -> tuple[CheckpointTuple, Ledger]:
            ledger = (self._staging.ledger(config) if config else None) or Ledger()
            return self._load(*row, ledger), ledger

        rows = self._list_stored(config, compile_filter(filter), before, limit)
        yield from made_ahead(rows, load, lambda row: weight_of(row[1]))

    def _list_stored(
        self,
        config: RunnableConfig | None,
        matches: Filter | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Iterator[tuple[StoredCheckpoint, Fetched]]:
        configurable = config["configurable"] if config else {}
        thread_id = configurable.get("thread_id")
        thread_id = None if thread_id is None else check_text("thread_id", str(thread_id))
        checkpoint_ns = check_text("checkpoint_ns", configurable.get("checkpoint_ns"))
        checkpoint_id = check_text("checkpoint_id", get_checkpoint_id(config) if config else None)
        cursor: tuple[str, str, str] | str | None = check_text("before", get_checkpoint_id(before) if before else None)
        left = limit
        while left is None or left > 0:
            with self.memory.storage.snapshot() as reader:
                page = reader.checkpoints(
                    thread_id=thread_id,
                    checkpoint_ns=checkpoint_ns,
                    checkpoint_id=checkpoint_id,
                    before=cursor,
                    limit=_PAGE if left is None or matches else min(left, _PAGE),
                )
                wanted = [stored for stored in page if matches is None or matches(metadata_of(stored))][:left]
                fetched = self._values.fetch(reader, self.serde, wanted)
            yield from zip(wanted, fetched, strict=True)
            left = None if left is None else left - len(wanted)
            if len(page) < _PAGE:
                return
            last = page[-1].step
            cursor = (last.checkpoint_id, last.thread_id, last.checkpoint_ns)

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """The writes of each channel since its nearest stored value (`seed`), along a checkpoint's ancestors."""
        writes: dict[str, list[StoredWrite]] = {channel: [] for channel in channels}
        seeds: dict[str, str] = {}
        step = step_of(config, get_checkpoint_id(config) or "")
        with self.memory.storage.snapshot() as reader:
            if channels and not step.checkpoint_id:
                step = step._replace(checkpoint_id=reader.latest_id(step.thread_id, step.checkpoint_ns) or "")
            stored = list(filter(is_unicode, channels))  # no other name can have been
            for channel, value_id, write in reader.ancestor_writes(step, stored):
                if value_id is not None:
                    seeds[channel] = value_id
                if write is not None:
                    writes[channel].append(write)
            fetched = self._values.fetch_some(reader, self.serde, step, seeds)
        histories: dict[str, DeltaChannelHistory] = {}
        for channel, oldest_first in writes.items():
            loaded = [(one.task_id, channel, self.serde.loads_typed(one.value)) for one in oldest_first]
            histories[channel] = {"writes": loaded}
            if channel in seeds:
                self._values.seeds.remember((*step[:2], channel), seeds[channel])
                histories[channel]["seed"] = self._values.decode(self.serde, fetched[seeds[channel]])
        return histories

    def _load(self, stored: StoredCheckpoint, fetched: Fetched, ledger: Ledger) -> CheckpointTuple:
        step = stored.step
        head = self.head_of(stored)
        values = {channel: self._value(channel, fetched[value_id]) for channel, value_id in stored.manifest.items()}
        checkpoint = cast(Checkpoint, {**head, "id": step.checkpoint_id, "ts": stored.ts, "channel_values": values})
        self._manifests.remember(step, manifest_of(checkpoint, stored.manifest))
        parent = None if stored.parent_id is None else step._replace(checkpoint_id=stored.parent_id)
        writes = [(write, self._value(write.channel, write.value)) for write in stored.writes]
        self._note_loaded(ledger, step, writes)
        return CheckpointTuple(
            config=pregel.config_of(step),
            checkpoint=checkpoint,
            metadata=cast(CheckpointMetadata, metadata_of(stored)),
            parent_config=None if parent is None else pregel.config_of(parent),
            pending_writes=[(write.task_id, write.channel, value) for write, value in writes],
        )

    def _value(self, channel: str, stored: Blob | ListVersion) -> Any:
        """A value of a channel. A typed channel deals with one that its class does not accept any more itself."""
        try:
            return self._values.decode(self.serde, stored)
        except DeserializationError as error:
            if (
                channel not in typed_names
                or not isinstance(self.serde, MemStateSerializer)
                or not isinstance(stored, Blob)
            ):
                raise
            value = self.serde.loads_as_stored(stored)
            logger.warning("%s: the stored value is handed out as it is: %s", channel, error)
            return value

    def _note_loaded(self, ledger: Ledger, step: StepKey, writes: Sequence[tuple[StoredWrite, Any]]) -> None:
        """Which tasks the loaded writes are of; input of several calls is a write each."""
        tasks: dict[tuple[str, int], list[Write]] = {}
        for stored, value in writes:
            if stored.idx >= 0:
                alone = stored.idx if pregel.is_input(stored.task_id) else -1
                tasks.setdefault((stored.task_id, alone), []).append(Write(stored.idx, stored.channel, value))
        for (task_id, _), loaded in tasks.items():
            ledger.loaded(step, task_id, loaded, self._remove)

    def head_of(self, stored: StoredHead) -> dict[str, Any]:
        """A checkpoint without its id, time and channel values."""
        head = self.serde.loads_typed(stored.head)
        if not isinstance(head, dict):
            raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id} is a {type(head).__name__}, not a dict")
        return head

    # -- the async face: the same calls, awaited ----------------------------------------------------

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        pregel.enter_graph()  # in the caller's own context, which the thread only copies
        found, ledger = await self.memory.run(self._read_tuple, config)
        self._enter(config, found, is_async=True)
        _note(config, ledger)
        return found

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        pregel.enter_graph()
        self._enter(config, None, is_async=True)
        listed = self._read_list(config, filter, before, limit)
        while (one := await self.memory.run(next, listed, None)) is not None:
            found, ledger = one
            self._enter(config, found, is_async=True)
            _note(found.config, ledger)
            yield found

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self.memory.run(self.get_delta_channel_history, config=config, channels=channels)

    def _enter(self, config: RunnableConfig | None, found: CheckpointTuple | None, *, is_async: bool) -> None:
        """Tell the run, if one asks, where its graph starts from."""
        order = None if config is None else self._staging.order(config)
        if config is not None and order is not None:
            order.enter(step_of(config, "")[:2], found and found.checkpoint["id"], is_async=is_async)

    # -- refused writes -----------------------------------------------------------------------------

    def _ledger(self, config: RunnableConfig) -> Ledger:
        """The ledger of the run that saves; outside a run, of the call that loaded what is changed now."""
        scope = current()
        loaded = scope.ledger if scope is not None and scope.place == step_of(config, "")[:2] else None
        return self._staging.ledger(config) or loaded or Ledger()

    def _remove(self, commit: Commit) -> Future[None]:
        removal = self.memory.submit(commit)
        self._staging.removals.add(removal)
        removal.add_done_callback(self._removed)
        return removal

    def _removed(self, removal: Future[None]) -> None:
        self._staging.removals.discard(removal)
        if (error := removal.exception()) is not None:
            logger.warning("a refused write could not be removed, and will be refused again when it is read: %r", error)

    def _await_removals(self) -> None:
        """What a channel refused on an event loop is gone before anything is read again."""
        if self._staging.removals:
            wait(tuple(self._staging.removals))


def _note(config: RunnableConfig, ledger: Ledger) -> None:
    """Tell the channels that LangGraph is about to make where their values come from."""
    enter(Scope(ledger, step_of(config, "")[:2]))


def step_of(config: RunnableConfig, checkpoint_id: str) -> StepKey:
    """A checkpoint of the thread and namespace that `config` names.

    Raises:
        KeyTypeError: a name holds half a surrogate pair.
    """
    configurable = config["configurable"]
    step = StepKey(str(configurable["thread_id"]), configurable.get("checkpoint_ns", ""), checkpoint_id)
    for name, text in zip(StepKey._fields, step, strict=True):
        check_text(name, text)
    return step


def manifest_of(checkpoint: Checkpoint, value_ids: Mapping[str, str]) -> Manifest:
    versions = checkpoint["channel_versions"]
    return {channel: (versions.get(channel), value_id) for channel, value_id in value_ids.items()}
