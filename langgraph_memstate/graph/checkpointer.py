"""The LangGraph checkpointer: a checkpoint and the memory writes of the step that made it are one commit."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    get_checkpoint_id,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.errors import CommitRaced, CorruptRowError, SerializationError
from langgraph_memstate.facts import Draft
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.channel_values import ChannelValues, Encoded, Fetched, Manifest, Manifests
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.opening import Opening, ready
from langgraph_memstate.graph.staging import Landing, Part, Staging
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.storage.base import (
    Blob,
    Commit,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    Op,
    PutCheckpoint,
    PutWrites,
    Stage,
    StagedDraft,
    StepKey,
    StoredCheckpoint,
    StoredWrite,
    Unstage,
    WriteRow,
)

_PAGE = 50  # checkpoints that `list` reads at a time: no snapshot is open while it yields
_RACES = 8  # how often a commit is prepared anew when the database moved under it


class MemStateCheckpointer(BaseCheckpointSaver[str]):
    """Saves thread state in a `MemoryStore`, and lands each step's memory writes with it.

    Sync and async, in one class. `serde` replaces the safe default serializer (`MemStateSerializer`).
    """

    def __init__(self, memory: MemoryStore, *, serde: SerializerProtocol | None = None) -> None:
        super().__init__(serde=serde or MemStateSerializer())
        self.memory = memory
        self._staging = cast(Staging, memory.join_steps(Staging))
        self._manifests = Manifests()
        self._values = ChannelValues()

    @classmethod
    def from_conn_string(cls, url: str, *, serde: SerializerProtocol | None = None, **options: Any) -> Opening[Any]:
        """A context manager, sync and async, over a checkpointer with a memory of its own.

        `options` are those of `MemoryStore.open`; the memory closes with the context.
        """
        return Opening(lambda: MemoryStore.open(url, **options), lambda memory: cls(memory, serde=serde))

    def setup(self) -> Any:
        """Nothing is left to do once the memory is open. May be called or awaited, as upstream's."""
        return ready()

    # -- reading ------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that `config` names, or the latest of its thread and namespace.

        Raises:
            DeserializationError: a value's type is unknown or refused; the message names it.
            CorruptRowError: the row is not what a checkpointer wrote.
        """
        pregel.enter_graph()
        configurable = config["configurable"]
        with self.memory.storage.snapshot() as reader:
            stored = reader.checkpoint(
                str(configurable["thread_id"]), configurable.get("checkpoint_ns", ""), get_checkpoint_id(config)
            )
            staged = [] if stored is None else reader.staged(stored.step)
            latest = None if stored is None or not staged else reader.checkpoint(*stored.step[:2], None)
            (fetched,) = self._values.fetch(reader, self.serde, () if stored is None else (stored,)) or ({},)
        if stored is None:
            self._staging.begin(config, None, ())
            return None
        if latest is None:
            self._staging.begin(config, stored.step, ())
        else:
            again = pregel.runs_again(
                config,
                _metadata(stored).get("source"),
                is_latest=latest.step == stored.step,
                waits=pregel.waits((write.task_id, write.channel) for write in stored.writes),
            )
            self._staging.begin(config, stored.step, staged, self._head(stored), runs_again=again)
        return self._load(stored, fetched)

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
        matches = compile_filter(filter)
        configurable = config["configurable"] if config else {}
        thread_id = configurable.get("thread_id")
        cursor: tuple[str, str, str] | str | None = get_checkpoint_id(before) if before else None
        left = limit
        while left is None or left > 0:
            with self.memory.storage.snapshot() as reader:
                page = reader.checkpoints(
                    thread_id=None if thread_id is None else str(thread_id),
                    checkpoint_ns=configurable.get("checkpoint_ns"),
                    checkpoint_id=get_checkpoint_id(config) if config else None,
                    before=cursor,
                    limit=_PAGE if left is None or matches else min(left, _PAGE),
                )
                wanted = [stored for stored in page if matches is None or matches(_metadata(stored))][:left]
                fetched = self._values.fetch(reader, self.serde, wanted)
            for stored, values in zip(wanted, fetched, strict=True):
                yield self._load(stored, values)
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
        configurable = config["configurable"]
        thread_id, checkpoint_ns = str(configurable["thread_id"]), configurable.get("checkpoint_ns", "")
        checkpoint_id = get_checkpoint_id(config)
        with self.memory.storage.snapshot() as reader:
            if channels and checkpoint_id is None:
                checkpoint_id = reader.latest_id(thread_id, checkpoint_ns)
            step = StepKey(thread_id, checkpoint_ns, checkpoint_id or "")
            for channel, value_id, write in reader.ancestor_writes(step, channels) if channels else ():
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
                histories[channel]["seed"] = self._values.decode(self.serde, fetched[seeds[channel]])
        return histories

    def _load(self, stored: StoredCheckpoint, fetched: Fetched) -> CheckpointTuple:
        step = stored.step
        head = self._head(stored)
        values = {
            channel: self._values.decode(self.serde, fetched[value_id]) for channel, value_id in stored.manifest.items()
        }
        checkpoint = cast(Checkpoint, {**head, "channel_values": values})
        self._manifests.remember(step, _manifest(checkpoint, stored.manifest))
        parent = None if stored.parent_id is None else step._replace(checkpoint_id=stored.parent_id)
        return CheckpointTuple(
            config=_config(step),
            checkpoint=checkpoint,
            metadata=cast(CheckpointMetadata, _metadata(stored)),
            parent_config=None if parent is None else _config(parent),
            pending_writes=[
                (write.task_id, write.channel, self.serde.loads_typed(write.value)) for write in stored.writes
            ],
        )

    def _head(self, stored: StoredCheckpoint) -> dict[str, Any]:
        """A checkpoint without its channel values."""
        head = self.serde.loads_typed(stored.head)
        if not isinstance(head, dict):
            raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id} is a {type(head).__name__}, not a dict")
        return head

    # -- writing ------------------------------------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Commit a checkpoint. One that ends a step lands the step's memory writes in the same transaction.

        Raises:
            VectorSyncError: the index failed; nothing was committed, and a resume does not run the tasks again.
        """
        step = _step(config, checkpoint["id"])
        parent = None if (parent_id := get_checkpoint_id(config)) is None else _step(config, parent_id)
        encoded = Encoded()
        put = self._encode(config, step, parent, checkpoint, metadata, new_versions, encoded)
        landing = Landing()
        ends_step = self._ends_step(parent, checkpoint, metadata)
        if not (ends_step and pregel.saves_at_exit(config)):  # else its run may have had new input in between
            self._staging.decide(config, parent, resumed=ends_step)
        if ends_step:
            landing = self._staging.landing(config, step, parent_id)
        for attempt in range(_RACES):
            drafts, before = self._prepare(config, step, parent, checkpoint, landing, ends_step, fresh=attempt == 0)
            try:
                self.memory.land(drafts, before, (put,))
            except CommitRaced:
                if attempt + 1 == _RACES:
                    raise
                self._forget(step.thread_id)
                encoded = Encoded()
                put = self._encode(config, step, None, checkpoint, metadata, new_versions, encoded)
            else:
                break
        if ends_step or not pregel.saves_at_exit(config):  # else it ends nothing: such as the root of delta channels
            self._staging.landed(config, step, parent_id, frozenset(draft.version for draft in drafts))
        self._values.landed(step.thread_id, encoded)
        self._manifests.remember(step, _manifest(checkpoint, put.manifest))
        return _config(step)

    def _prepare(
        self,
        config: RunnableConfig,
        step: StepKey,
        parent: StepKey | None,
        checkpoint: Checkpoint,
        landing: Landing,
        ends_step: bool,
        *,
        fresh: bool,
    ) -> tuple[tuple[Draft, ...], Commit]:
        """The drafts a checkpoint lands, and what happens to the work that is staged on its parent.

        On the first try (`fresh`), only what this process staged is considered: a step that was never interrupted has
        nothing else, and the commit itself finds out if it had.
        """
        if not ends_step:
            return (), (() if parent is None else (Unstage(parent),))
        parts = list(landing.parts)
        before: list[Op] = []
        if parent is not None:
            expected = {part.draft.version for part in parts}
            again = self._staging.runs_again(config, parent)
            rows, stored = ([], None) if fresh or again else self._staged_on(parent)
            if again or (rows and pregel.saves_at_exit(config) and not self._was_resumed(stored, checkpoint)):
                before.append(Unstage(parent))  # the run dropped the unfinished step: it had new input, or forked
            else:
                # A task that ran in this process is accounted for by what it staged here.
                parts += [
                    Part(parent.checkpoint_id, row.task_path, row.draft)
                    for row in rows
                    if row.task_id not in landing.tasks
                ]
                parts.sort(key=lambda part: part[:2])  # stable: a task's writes stay in their order
                expected |= {row.draft.version for row in rows}
            before.append(Drain(parent, frozenset(expected)))
        for inner, saved in self._staging.unsaved_subgraphs(config, step):
            parts[:0] = [Part(inner.checkpoint_id, row.task_path, row.draft) for row in saved]
            before.append(Drain(inner, frozenset(row.draft.version for row in saved)))
        lands_as = {"checkpoint_ns": step.checkpoint_ns, "checkpoint_id": step.checkpoint_id}
        drafts = (replace(part.draft, origin=replace(part.draft.origin, **lands_as)) for part in parts)
        return tuple(drafts), tuple(before)

    def _ends_step(self, parent: StepKey | None, checkpoint: Checkpoint, metadata: CheckpointMetadata) -> bool:
        if parent is None or metadata.get("source") != "update":
            return metadata.get("source") == "loop"
        rows, stored = self._staged_on(parent)
        if not rows or stored is None:
            return False
        return pregel.ended_by_update(self._head(stored)["versions_seen"], checkpoint["versions_seen"])

    def _staged_on(self, parent: StepKey) -> tuple[Sequence[StagedDraft], StoredCheckpoint | None]:
        with self.memory.storage.snapshot() as reader:
            return reader.staged(parent), reader.checkpoint(*parent)

    def _was_resumed(self, parent: StoredCheckpoint | None, checkpoint: Checkpoint) -> bool:
        if parent is None:
            return False
        return pregel.resumed_from(self._head(parent), checkpoint["versions_seen"])

    def _encode(
        self,
        config: RunnableConfig,
        step: StepKey,
        parent: StepKey | None,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
        encoded: Encoded,
    ) -> PutCheckpoint:
        """The rows of a checkpoint. A channel that kept its version since `parent` refers to the stored value."""
        known = self._manifests.recall(parent) if parent is not None else {}
        versions = checkpoint["channel_versions"]
        manifest: dict[str, str] = {}
        for channel, value in checkpoint["channel_values"].items():
            version, value_id = known.get(channel, (None, None))
            if value_id is None or channel in new_versions or version != versions.get(channel):
                value_id = self._values.encode(self.serde, step.thread_id, value, value_id, encoded)
            manifest[channel] = value_id
        head = {name: part for name, part in checkpoint.items() if name != "channel_values"}
        described = get_serializable_checkpoint_metadata(config, metadata)
        run_id = described.get("run_id")
        return PutCheckpoint(
            step=step,
            parent_id=get_checkpoint_id(config),
            head=Blob(*self.serde.dumps_typed(head)),
            metadata=_dump_metadata(described),
            run_id=None if run_id is None else str(run_id),
            manifest=manifest,
            values=encoded.values,
            lists=encoded.lists,
            elements=encoded.elements,
        )

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Save a task's pending writes, and with them its memory writes if it finished. Idempotent."""
        step = _step(config, str(config["configurable"]["checkpoint_id"]))
        if task_path:  # a task of this step ran, so the run goes on with it
            self._staging.decide(config, step, resumed=True)
        drafts = self._staging.finished(config, step, task_id, writes)
        rows = tuple(
            WriteRow(WRITES_IDX_MAP.get(channel, position), channel, Blob(*self.serde.dumps_typed(value)))
            for position, (channel, value) in enumerate(pregel.without_tokens(writes))
        )
        ops: list[Op] = [PutWrites(step, task_id, task_path, rows)]
        if pregel.unfinished(writes):
            ops.append(Unstage(step, task_id))
        elif drafts:
            ops.append(Stage(step, task_id, task_path, drafts))
        self.memory.land((), tuple(ops))

    def get_next_version(self, current: str | int | float | None, channel: None) -> str:
        """Versions sort by time; a random part keeps branches of a fork apart."""
        number = 0 if current is None else pregel.version_number(current)
        return f"{number + 1:032}.{random.random():016}"

    # -- upkeep -------------------------------------------------------------------------------------

    def delete_thread(self, thread_id: str) -> None:
        """Delete a thread's checkpoints, values, writes and staged work. Facts are not thread state and stay."""
        self._change(DeleteThread(str(thread_id)), str(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of these runs. A `DeltaChannel` whose history crosses them loses it."""
        self._change(DeleteRuns(tuple(map(str, run_ids))))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a thread's checkpoints and pending writes, with their ids, to another thread.

        Memory writes that wait for a step to end land once, with whichever of the two threads ends it first.
        """
        self._change(CopyThread(str(source_thread_id), str(target_thread_id)), str(target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete all checkpoints of threads (``"delete"``), or all but the latest of each namespace.

        What a `DeltaChannel` of the latest checkpoint is rebuilt from stays too.
        """
        if strategy not in ("keep_latest", "delete"):
            raise ValueError(f"strategy is 'keep_latest' or 'delete', not {strategy!r}")
        for thread_id in map(str, thread_ids):
            if strategy == "delete":
                self.delete_thread(thread_id)
            elif doomed := self._prunable(thread_id):
                self._change(DeleteCheckpoints(doomed), thread_id)

    def _prunable(self, thread_id: str) -> tuple[StepKey, ...]:
        with self.memory.storage.snapshot() as reader:
            stored = reader.checkpoints(
                thread_id=thread_id, checkpoint_ns=None, checkpoint_id=None, before=None, limit=-1
            )
        by_step = {row.step: row for row in stored}
        latest: dict[str, StoredCheckpoint] = {}
        for row in stored:  # newest first
            latest.setdefault(row.step.checkpoint_ns, row)
        kept: set[StepKey] = set()
        for row in latest.values():
            kept.add(row.step)
            kept |= self._delta_ancestors(row, by_step)
        return tuple(step for step in by_step if step not in kept)

    def _delta_ancestors(self, row: StoredCheckpoint, by_step: Mapping[StepKey, StoredCheckpoint]) -> set[StepKey]:
        """The checkpoints back to the nearest stored value of every delta channel that has none here.

        A channel without a version was never written: it is empty, and counted all the same.
        """
        counted = set(_metadata(row).get("counters_since_delta_snapshot") or ())
        rebuilt = (counted & self._head(row)["channel_versions"].keys()) - row.manifest.keys()
        needed: set[StepKey] = set()
        cursor: StoredCheckpoint | None = row
        while rebuilt and cursor is not None and cursor.parent_id is not None:
            cursor = by_step.get(cursor.step._replace(checkpoint_id=cursor.parent_id))
            if cursor is not None:
                needed.add(cursor.step)
                rebuilt -= cursor.manifest.keys()
        return needed

    def _change(self, op: Op, thread_id: str | None = None) -> None:
        self._forget(thread_id)
        self.memory.land((), (op,))
        self._forget(thread_id)

    def _forget(self, thread_id: str | None) -> None:
        self._manifests.forget(thread_id)
        self._values.forget(thread_id)

    # -- the async face: the same calls, awaited ----------------------------------------------------

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        pregel.enter_graph()  # in the caller's own context, which the thread only copies
        return await self.memory.run(self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        pregel.enter_graph()
        found = self.list(config, filter=filter, before=before, limit=limit)
        while (one := await self.memory.run(next, found, None)) is not None:
            yield one

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await self.memory.run(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        await self.memory.run(self.put_writes, config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        await self.memory.run(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await self.memory.run(self.delete_for_runs, run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await self.memory.run(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await self.memory.run(self.prune, thread_ids, strategy=strategy)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self.memory.run(self.get_delta_channel_history, config=config, channels=channels)


def _step(config: RunnableConfig, checkpoint_id: str) -> StepKey:
    configurable = config["configurable"]
    return StepKey(str(configurable["thread_id"]), configurable.get("checkpoint_ns", ""), checkpoint_id)


def _manifest(checkpoint: Checkpoint, value_ids: Mapping[str, str]) -> Manifest:
    versions = checkpoint["channel_versions"]
    return {channel: (versions.get(channel), value_id) for channel, value_id in value_ids.items()}


def _config(step: StepKey) -> RunnableConfig:
    return {"configurable": step._asdict()}


def _metadata(stored: StoredCheckpoint) -> dict[str, Any]:
    try:
        metadata = json.loads(stored.metadata)
    except ValueError as error:
        raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id}: its metadata is not JSON") from error
    if not isinstance(metadata, dict):
        raise CorruptRowError(f"checkpoint {stored.step.checkpoint_id}: its metadata is not an object")
    return metadata


def _dump_metadata(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(metadata)  # escaped: SQL text cannot hold a lone surrogate
    except (TypeError, ValueError) as error:
        raise SerializationError(f"checkpoint metadata cannot be stored as JSON: {error}") from error
