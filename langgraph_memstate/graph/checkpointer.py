"""The LangGraph checkpointer: a checkpoint and the memory writes of the step that made it are one commit."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    get_checkpoint_id,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from langgraph_memstate.awaited import is_own
from langgraph_memstate.commit import Landing as QueuedCommit
from langgraph_memstate.errors import (
    CommitRaced,
    SerializationError,
)
from langgraph_memstate.facts import Draft, check_text
from langgraph_memstate.graph import pregel
from langgraph_memstate.graph.channel_values import Encoded
from langgraph_memstate.graph.codec import MemStateSerializer
from langgraph_memstate.graph.opening import Opening, ready
from langgraph_memstate.graph.parts import in_log_order, saved_part
from langgraph_memstate.graph.pruning import prunable
from langgraph_memstate.graph.reducer import typed_names
from langgraph_memstate.graph.refusals import Write
from langgraph_memstate.graph.rewind import TimeTravel, copied, left_behind, rewind
from langgraph_memstate.graph.staging import Landing
from langgraph_memstate.graph.threads import ThreadReader, manifest_of, step_of
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.storage.operations import (
    Commit,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    DropWrites,
    Op,
    PutCheckpoint,
    PutWrites,
    Stage,
    Unstage,
)
from langgraph_memstate.storage.values import Blob, StagedDraft, StepKey, StoredCheckpoint, WriteRow
from langgraph_memstate.undo import Undo

_RACES = 8  # how often a commit is prepared anew when the database moved under it


class MemStateCheckpointer(ThreadReader):
    """Saves thread state in a `MemoryStore`, and lands each step's memory writes with it.

    Sync and async, in one class.

    Args:
        serde: replaces the safe default serializer (`MemStateSerializer`).
        time_travel: what becomes of memory when a run starts from an earlier checkpoint: ``"keep"``, as LangGraph does,
            or ``"rewind"``: the run sees memory as this thread had left it there, and its first commit undoes what the
            thread wrote since. What other threads changed stays. A thread then runs once at a time: of two runs side by
            side, each takes the other for a branch that was left.
    """

    @classmethod
    def from_conn_string(
        cls,
        url: str,
        *,
        serde: SerializerProtocol | None = None,
        time_travel: TimeTravel = "keep",
        **options: Any,
    ) -> Opening[Any]:
        """A context manager, sync and async, over a checkpointer with a memory of its own.

        `options` are those of `MemoryStore.open`; the memory closes with the context.
        """
        return Opening(
            lambda: MemoryStore.open(url, **options),
            lambda memory: cls(memory, serde=serde, time_travel=time_travel),
        )

    def setup(self) -> Any:
        """Nothing is left to do once the memory is open. May be called or awaited, as upstream's."""
        return ready()

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
            SchemaError: it holds new input that a typed channel refuses, or half a step.
        """
        step = step_of(config, checkpoint["id"])
        order = self._staging.order(config)
        if order is None:
            return self._put(config, step, checkpoint, metadata, new_versions)
        order.await_around(step[:2], pregel.steps_around(config))
        with order.saving(step):
            return self._put(config, step, checkpoint, metadata, new_versions)

    def _put(
        self,
        config: RunnableConfig,
        step: StepKey,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        if pregel.saves_at_exit(config) and (half := self._ledger(config).half(step[:2])):
            raise half
        if metadata.get("source") == "input":
            self._check_input(config, step, checkpoint)
        parent = None if (parent_id := get_checkpoint_id(config)) is None else step_of(config, parent_id)
        encoded = Encoded()
        put = self._encode(config, step, parent, checkpoint, metadata, new_versions, encoded)
        landing = Landing()
        ends_step = self._ends_step(parent, checkpoint, metadata)
        if not (ends_step and pregel.saves_at_exit(config)):  # else its run may have had new input in between
            self._staging.decide(config, parent, resumed=ends_step)
        if ends_step:
            landing = self._staging.landing(config, step, parent_id)
        for attempt in range(_RACES):
            drafts, before = self._prepare(
                config, step, parent, checkpoint, metadata, landing, ends_step, fresh=attempt == 0
            )
            undo = self._rewind(config, step, parent_id, checkpoint, metadata)
            try:
                self.memory.land((*undo.drafts, *drafts), (*undo.expected, *before), (put,))
            except CommitRaced:
                if attempt + 1 == _RACES:
                    raise
                self._forget(step.thread_id)
                encoded = Encoded()
                put = self._encode(config, step, None, checkpoint, metadata, new_versions, encoded)
            else:
                break
        if not step.checkpoint_ns:  # a subgraph may save before the graph around it has committed what it undoes
            self._staging.rewound(config)
        if ends_step or not pregel.saves_at_exit(config):  # else it ends nothing: such as the root of delta channels
            self._staging.landed(config, step, parent_id, frozenset(draft.version for draft in drafts))
        self._values.landed(step.thread_id, encoded)
        self._manifests.remember(step, manifest_of(checkpoint, put.manifest))
        return pregel.config_of(step)

    def _rewind(
        self,
        config: RunnableConfig,
        step: StepKey,
        parent_id: str | None,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
    ) -> Undo:
        """What a checkpoint undoes because it starts a branch."""
        if not self._rewinds or step.checkpoint_ns:
            return Undo()
        with self.memory.storage.snapshot() as reader:
            start = None if parent_id is None else step._replace(checkpoint_id=parent_id)
            if metadata.get("source") == "fork" and pregel.run_of(config) is None:
                start = copied(reader, self.head_of, step, parent_id, checkpoint["channel_versions"])
            base = None if start is None else left_behind(reader, start)
            return Undo() if base is None else rewind(reader, base, step, self.memory.claims_of)

    def _check_input(self, config: RunnableConfig, step: StepKey, checkpoint: Checkpoint) -> None:
        """Input is kept as it came, for the first step to hand out: what a channel would refuse then is refused now."""
        channels = self._ledger(config).channels(step[:2])
        for name, value in pregel.graph_input(checkpoint["channel_values"], list(channels)):
            channels[name].copy().update([value])

    def _prepare(
        self,
        config: RunnableConfig,
        step: StepKey,
        parent: StepKey | None,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
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
            expected = {draft.version for part in parts for draft in part.drafts} | landing.void
            again = self._staging.runs_again(config, parent)
            rows, stored = ([], None) if fresh or again else self._staged_on(parent)
            if again or (rows and pregel.saves_at_exit(config) and not self._was_resumed(stored, checkpoint)):
                before.append(Unstage(parent))  # the run dropped the unfinished step: it had new input, or forked
            else:
                # A task that ran in this process is accounted for by what it staged here.
                rows = [row for row in rows if row.draft.version not in landing.void]
                expected |= {row.draft.version for row in rows}
                if stored is not None and metadata.get("source") == "update":
                    written = [(write.task_path, write.channel) for write in stored.writes]
                    rows = [row for row in rows if pregel.applied_by_update(row.task_path, written)]
                parts += [saved_part(parent, row) for row in rows if row.task_id not in landing.tasks]
            before.append(Drain(parent, frozenset(expected)))
        parts = in_log_order(parts)
        for inner, saved in self._staging.unsaved_subgraphs(config, step):
            parts[:0] = [saved_part(inner, row) for row in saved]
            before.append(Drain(inner, frozenset(row.draft.version for row in saved)))
        lands_as = {"checkpoint_ns": step.checkpoint_ns, "checkpoint_id": step.checkpoint_id}
        drafts = (draft for part in parts for draft in part.drafts)
        return tuple(replace(draft, origin=replace(draft.origin, **lands_as)) for draft in drafts), tuple(before)

    def _ends_step(self, parent: StepKey | None, checkpoint: Checkpoint, metadata: CheckpointMetadata) -> bool:
        if parent is None or metadata.get("source") != "update":
            return metadata.get("source") == "loop"
        rows, stored = self._staged_on(parent)
        if not rows or stored is None:
            return False
        return pregel.ended_by_update(self.head_of(stored)["versions_seen"], checkpoint["versions_seen"])

    def _staged_on(self, parent: StepKey) -> tuple[Sequence[StagedDraft], StoredCheckpoint | None]:
        with self.memory.storage.snapshot() as reader:
            return reader.staged(parent), reader.checkpoint(*parent)

    def _was_resumed(self, parent: StoredCheckpoint | None, checkpoint: Checkpoint) -> bool:
        if parent is None:
            return False
        return pregel.resumed_from(self.head_of(parent), checkpoint["versions_seen"])

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
        known = (self._manifests.recall(parent) if parent is not None else None) or {}
        versions = checkpoint["channel_versions"]
        manifest: dict[str, str] = {}
        for channel, value in checkpoint["channel_values"].items():
            version, value_id = known.get(channel, (None, None))
            if value_id is None or channel in new_versions or version != versions.get(channel):
                # What a typed channel holds is stored whole, so that it can be read whatever has become of its class.
                whole = channel in typed_names
                value_id = value_id or self._values.seeds.recall((*step[:2], channel))
                value_id = self._values.encode(self.serde, step.thread_id, value, value_id, encoded, whole=whole)
            manifest[channel] = value_id
        head = {name: part for name, part in checkpoint.items() if name not in ("id", "ts", "channel_values")}
        described = get_serializable_checkpoint_metadata(config, metadata)
        run_id = described.get("run_id")
        return PutCheckpoint(
            step=step,
            parent_id=get_checkpoint_id(config),
            ts=checkpoint["ts"],
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
        queued = self._begin_writes(config, writes, task_id, task_path)
        if queued is not None:
            queued.wait()

    def _begin_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> QueuedCommit | None:
        """Queue a task's writes, to be waited for, if there is anything left to save."""
        step = step_of(config, str(config["configurable"]["checkpoint_id"]))
        if task_path:  # a task of this step ran, so the run goes on with it
            self._staging.decide(config, step, resumed=True)
        if pregel.saves_at_exit(config) and self._ledger(config).half(step[:2]) and not self._exists(step):
            return None  # of a step that starts from a checkpoint that was never saved
        queued = self._save_writes(config, step, writes, task_id, task_path)
        if queued is None and (left := pregel.without_output(task_id, writes)):
            queued = self._save_writes(config, step, left, task_id, task_path)
        return queued

    def _exists(self, step: StepKey) -> bool:
        with self.memory.storage.snapshot() as reader:
            return reader.checkpoint(*step) is not None

    def _save_writes(
        self, config: RunnableConfig, step: StepKey, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> QueuedCommit | None:
        """Queue the writes; None if a channel has refused one of them meanwhile."""
        drafts = self._staging.finished(config, step, task_id, writes)
        numbered = [
            Write(WRITES_IDX_MAP.get(channel, position), channel, value)
            for position, (channel, value) in enumerate(pregel.without_tokens(writes))
        ]
        rows = tuple(WriteRow(idx, channel, Blob(*self.serde.dumps_typed(value))) for idx, channel, value in numbered)
        ops: list[Op] = [PutWrites(step, task_id, task_path, rows)]
        if drafts:
            ops.append(Stage(step, task_id, task_path, drafts))
        elif pregel.unfinished(writes):
            for call, count in self._staging.drop_calls(config, step, task_id).items():
                ops += [DropWrites(step, call, tuple(range(count))), Unstage(step, call)]
        removable = [write for write in numbered if write.idx >= 0 or pregel.is_input(task_id)]
        commit = tuple(ops)
        return self._ledger(config).save(step, task_id, removable, lambda: self.memory.enqueue(commit), self._remove)

    def get_next_version(self, current: str | int | float | None, channel: None) -> str:
        """Versions sort by time; a random part keeps branches of a fork apart."""
        number = 0 if current is None else pregel.version_number(current)
        return f"{number + 1:032}.{random.random():016}"

    def take_back(self) -> None:
        """Forget what the running task has written to memory: it goes on without its output."""
        self._staging.take_back()

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
            check_text("thread_id", thread_id)
            if strategy == "delete":
                self.delete_thread(thread_id)
                continue
            with self.memory.storage.snapshot() as reader:
                doomed = prunable(reader, self.head_of, thread_id)
            if doomed:
                self._change(DeleteCheckpoints(doomed), thread_id)

    def _change(self, op: Op, thread_id: str | None = None) -> None:
        self._forget(thread_id)
        self.memory.land((), (op,))
        self._forget(thread_id)

    def _forget(self, thread_id: str | None) -> None:
        self._manifests.forget(thread_id)
        self._values.forget(thread_id)

    # -- the async face: the same calls, awaited ----------------------------------------------------

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        order = self._staging.order(config)
        if order is not None:
            await order.aawait_around(step_of(config, "")[:2], pregel.steps_around(config))
        return await self.memory.run(self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        # A serializer of the application may take its time, and other tasks would wait with it.
        if type(self.serde) is MemStateSerializer and is_own(self.put_writes, _put_writes):
            await self.memory.land_together(lambda: self._begin_writes(config, writes, task_id, task_path))
        else:
            await self.memory.run(self.put_writes, config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        await self.memory.run(self.delete_thread, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await self.memory.run(self.delete_for_runs, run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await self.memory.run(self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await self.memory.run(self.prune, thread_ids, strategy=strategy)


_put_writes = MemStateCheckpointer.put_writes  # a saver that has another is asked for it


def _dump_metadata(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(metadata)  # escaped: SQL text cannot hold a lone surrogate
    except (TypeError, ValueError) as error:
        raise SerializationError(f"checkpoint metadata cannot be stored as JSON: {error}") from error
