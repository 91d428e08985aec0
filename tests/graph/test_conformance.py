"""LangGraph's own conformance suite: every capability, async and through the sync methods, on each storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver, Checkpoint, CheckpointTuple
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES, BASE_CAPABILITIES
from langgraph.checkpoint.conformance.initializer import RegisteredCheckpointer
from langgraph.checkpoint.conformance.report import CapabilityReport, ProgressCallbacks

from langgraph_memstate import InMemoryStorage, MemoryStore, MemStateCheckpointer, SQLiteStorage
from langgraph_memstate.storage.base import Storage

BASE_TESTS = 58
EXTENDED_TESTS = {"delete_for_runs": 7, "copy_thread": 8, "prune": 8}


class SyncFace(BaseCheckpointSaver[str]):
    """A saver whose async methods call another one's sync methods, on the loop's own thread."""

    def __init__(self, saver: MemStateCheckpointer) -> None:
        super().__init__(serde=saver.serde)
        self._saver = saver

    async def aget_tuple(self, config: Any) -> CheckpointTuple | None:
        return self._saver.get_tuple(config)

    async def alist(self, config: Any, **options: Any) -> AsyncIterator[CheckpointTuple]:
        for found in self._saver.list(config, **options):
            yield found

    async def aput(self, config: Any, checkpoint: Checkpoint, metadata: Any, new_versions: Any) -> Any:
        return self._saver.put(config, checkpoint, metadata, new_versions)

    async def aput_writes(self, config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        self._saver.put_writes(config, writes, task_id, task_path)

    async def adelete_thread(self, thread_id: str) -> None:
        self._saver.delete_thread(thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        self._saver.delete_for_runs(run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        self._saver.copy_thread(source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        self._saver.prune(thread_ids, strategy=strategy)


NewStorage = Callable[[int], Storage]


def registered(new_storage: NewStorage, face: type[Any] | None) -> RegisteredCheckpointer:
    """The suite takes a fresh saver for each capability, so a database gets a new name each time."""
    opened = Counter[str]()

    @checkpointer_test(name=f"memstate {new_storage} {face}")
    async def fresh() -> AsyncGenerator[BaseCheckpointSaver[Any], None]:
        opened["memories"] += 1
        async with MemoryStore(new_storage(opened["memories"])) as memory:
            yield memory.checkpointer if face is None else face(memory.checkpointer)

    return fresh


@pytest.fixture(params=["file", "in-memory", "postgres", "redis"])
def new_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NewStorage]:
    if request.param == "file":
        yield lambda number: SQLiteStorage(tmp_path / f"conformance-{number}.db")
    elif request.param == "in-memory":
        yield lambda number: InMemoryStorage()
    else:
        server = request.getfixturevalue("postgres" if request.param == "postgres" else "redis_server")
        fresh = server.schema if request.param == "postgres" else server.memory
        with ExitStack() as names:
            yield lambda number: server.storage(names.enter_context(fresh()))


async def run(suite: RegisteredCheckpointer) -> tuple[CapabilityReport, list[str]]:
    failures: list[str] = []

    def on_result(capability: str, name: str, passed: bool, error: str | None) -> None:
        if not passed:
            failures.append(f"{capability}.{name}\n{error}")

    return await validate(suite, progress=ProgressCallbacks(on_test_result=on_result)), failures


@pytest.mark.parametrize("face", [None, SyncFace], ids=["async", "sync"])
async def test_every_capability_is_detected_and_passes(new_storage: NewStorage, face: type[Any] | None) -> None:
    report, failures = await run(registered(new_storage, face))

    assert not failures, "\n".join(failures)
    assert set(report.results) == {capability.value for capability in ALL_CAPABILITIES}
    undetected = [name for name, result in report.results.items() if not result.detected]
    assert undetected == []
    passed = {name: result.tests_passed for name, result in report.results.items()}
    base = {capability.value for capability in BASE_CAPABILITIES}
    assert sum(passed[name] for name in base) >= BASE_TESTS
    for name, count in EXTENDED_TESTS.items():
        assert passed[name] >= count
    assert report.conformance_level() == "FULL"


async def test_the_suite_fails_a_saver_that_forgets_a_capability() -> None:
    """Without this, a suite that detects nothing would pass as well."""

    class Forgetful(SyncFace):
        aprune = BaseCheckpointSaver.aprune

        async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
            return

    report, failures = await run(registered(lambda _: InMemoryStorage(), Forgetful))

    assert not report.results["prune"].detected
    assert report.results["copy_thread"].tests_failed > 0
    assert any(failure.startswith("copy_thread.") for failure in failures)
