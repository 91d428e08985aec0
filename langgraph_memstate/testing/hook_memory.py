"""The contract of a hook under a memory: search stays right while the vector database fails, and mends afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from langgraph_memstate.errors import MemStateError, VectorSyncError
from langgraph_memstate.hooks.base import IndexState, VectorRecord
from langgraph_memstate.memory import MemoryStore
from langgraph_memstate.testing.faults import FaultPoints, FaultyHook
from langgraph_memstate.testing.hook_calls import id_of
from langgraph_memstate.testing.hook_making import needs_fork, needs_outbox
from langgraph_memstate.testing.hook_search import (
    FIRST,
    HookSearch,
    check_search,
    check_settled,
    commit,
    eventually,
    held_by_sql,
)
from langgraph_memstate.testing.kills import Children, die_in, say
from langgraph_memstate.testing.texts import note, notes, vector_of

_POINTS = 500  # more than any run passes


class HookFollows(HookSearch):
    """Tests of a memory whose vector database fails."""

    # -- a database that is away ------------------------------------------------------------------------

    def test_a_failed_write_takes_the_commit_back(self, tmp_path: Path) -> None:
        for late in (False, True):
            hook = FaultyHook(self.make_hook(tmp_path))
            needs_outbox(hook)
            with self.open_memory(tmp_path, hook) as memory:
                commit(memory, FIRST)
                memory.flush()
                hook.fail("apply", times=1, late=late, error=TimeoutError("read timed out"))
                with pytest.raises(VectorSyncError, match="read timed out"):
                    memory.commit([note("new", "green tea again"), note("n1", "black coffee again")])
                check_search(memory, FIRST)
                check_settled(memory)
                commit(memory, {"new": "green tea again"})
                check_search(memory, FIRST | {"new": "green tea again"})
                memory.delete("note", "new")
                check_settled(memory)

    def test_away_and_back(self, tmp_path: Path) -> None:
        hook = FaultyHook(self.make_hook(tmp_path))
        needs_outbox(hook)
        with self.open_memory(tmp_path, hook, vector_sync="deferred") as memory:
            commit(memory, FIRST)
            memory.flush()
            hook.go_away()
            commit(memory, notes(6, start=100) | {"n0": "trains to paris"})
            memory.delete("note", "n2")
            texts = FIRST | notes(6, start=100) | {"n0": "trains to paris"}
            del texts["n2"]
            check_search(memory, texts)
            hook.heal()
            hook.fail("apply")  # it answers searches again, from the past
            check_search(memory, texts)
            with pytest.raises(VectorSyncError):
                memory.flush()
            hook.heal()
            eventually(lambda: not any(index.pending for index in memory.verify().indexes))
            check_search(memory, texts)
            check_settled(memory)

    def test_away_at_open(self, tmp_path: Path) -> None:
        with self.open_memory(tmp_path) as memory:
            commit(memory, FIRST)
        hook = FaultyHook(self.make_hook(tmp_path))
        needs_outbox(hook)
        hook.go_away()
        with self.open_memory(tmp_path, hook) as memory:
            check_search(memory, FIRST)
            with pytest.raises(VectorSyncError, match="repair"):
                commit(memory, {"new": "green tea again"})
            check_search(memory, FIRST)
            hook.heal()
            assert memory.repair().ok
            commit(memory, {"new": "green tea again"})
            check_search(memory, FIRST | {"new": "green tea again"})
            check_settled(memory)

    @pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
    def test_a_fault_at_every_point(self, tmp_path: Path, vector_sync: Any, for_ever: bool) -> None:
        """Before and after every call of the hook, from the first `open` on: search never errs, and all is mended."""
        for at in range(1, _POINTS):
            folder = tmp_path / str(at)
            folder.mkdir()
            points = FaultPoints(at, OSError("a fault"), for_ever=for_ever)
            hook = FaultyHook(self.make_hook(folder))
            points.watch(hook)
            with self.open_memory(folder, hook, vector_sync=vector_sync) as memory:
                texts: dict[str, str] = {}
                for change in ({"a": "green tea", "b": "a cat"}, {"a": "trains to berlin", "c": "the roof"}):
                    try:
                        commit(memory, change)
                        texts |= change
                    except MemStateError:
                        assert vector_sync == "atomic", "a deferred commit does not ask the vector database"
                    check_search(memory, texts)
                memory.delete("note", "b")
                texts.pop("b", None)
                check_search(memory, texts)
                points.heal()
                assert memory.repair().ok
                check_settled(memory)
                check_search(memory, texts)
            if not points.struck:
                return
        pytest.fail("the run never came to an end without a fault")

    # -- an index that is wrong -------------------------------------------------------------------------

    def test_verify_finds_what_differs_and_repair_mends_it(self, tmp_path: Path) -> None:
        hook = self.make_hook(tmp_path)
        with self.open_memory(tmp_path, hook) as memory:
            commit(memory, FIRST)
            lost = memory.query("note", filter={"text": FIRST["n3"]})[0].version
            assert lost is not None
            green = np.array(vector_of("green tea in the morning"), np.float32)
            green /= np.linalg.norm(green)
            ghosts = [id_of("a ghost"), id_of("another ghost")]
            hook.apply([VectorRecord(id_, green, ("note",)) for id_ in ghosts], [lost])
            report = memory.verify().indexes[0]
            assert (report.missing, report.orphaned) == ((lost,), tuple(sorted(ghosts)))
            found = memory.search("green tea in the morning", limit=20)
            assert {fact.id for fact in found} <= FIRST.keys(), "a ghost is never shown"
            assert memory.repair().ok
            check_search(memory, FIRST)
            check_settled(memory)

    def test_the_index_of_another_database_is_rebuilt(self, tmp_path: Path) -> None:
        other = tmp_path / "other"
        other.mkdir()
        with self.open_memory(other, self.make_hook(tmp_path)) as memory:
            commit(memory, notes(8, start=50))
        with self.open_memory(tmp_path) as memory:
            commit(memory, FIRST)
            check_search(memory, FIRST)
            check_settled(memory)
            assert len(list(memory._outbox.indexes[0].held_ids())) == len(FIRST)

    def test_facts_from_before_the_hook(self, tmp_path: Path) -> None:
        texts = notes(70)
        with MemoryStore(self.make_storage(tmp_path)) as memory:
            commit(memory, texts)
        with self.open_memory(tmp_path) as memory:
            check_search(memory, texts)
            check_settled(memory)
            check_search(memory, texts)

    # -- processes --------------------------------------------------------------------------------------

    def commit_until_killed(self, folder: str, start: str, delay: str, vector_sync: Any) -> None:
        """In a child: say what was acknowledged, one line a commit."""
        memory = self.open_memory(Path(folder), vector_sync=vector_sync)
        number = int(start)
        die_in(float(delay))
        while True:
            memory.commit([note(f"k{number % 7}", f"green tea number {number}"), note(f"n{number}", "a cat")])
            if number % 3 == 0:
                memory.delete("note", f"n{number}")
            say(number)
            number += 1

    @needs_fork
    def test_killed_in_the_middle(self, tmp_path: Path, vector_sync: Any, children: Children) -> None:
        """What was acknowledged is there, whole; search says what SQL holds before anything is mended and after."""
        if not self.persists:
            pytest.skip("nothing outlives a process")
        texts: dict[str, str] = {}
        number = 0
        for delay in (0.017, 0.06, 0.131):
            lines, status = children.call("commit_until_killed", tmp_path, number, delay, vector_sync)
            assert status < 0, "it was to be killed"
            for done in map(int, lines):
                number = done + 1
                texts |= _written(done)
                if done % 3 == 0:
                    del texts[f"n{done}"]
            with self.open_memory(tmp_path, vector_sync=vector_sync) as memory:
                held = held_by_sql(memory)
                outcomes = [texts, texts | _written(number)]  # the commit in flight is whole, or absent
                if number % 3 == 0:
                    outcomes.append({k: v for k, v in outcomes[1].items() if k != f"n{number}"})
                assert held in outcomes
                check_search(memory, held)
                check_settled(memory)
                check_search(memory, held)
            texts, number = held, number + 1

    def hold_a_memory(self, folder: str, until: str) -> None:
        """In a child: a memory that is open until a file is there."""
        with self.open_memory(Path(folder)) as memory:
            commit(memory, FIRST)
            say("ready")
            eventually(Path(until).exists)

    @needs_fork
    def test_two_memories_on_one_database(self, tmp_path: Path, children: Children) -> None:
        if not self.persists:
            pytest.skip("an index in memory is for one process")
        enough = tmp_path / "enough"
        children.start("hold_a_memory", tmp_path, enough)
        assert children.line() == "ready"
        try:
            with self.open_memory(tmp_path) as memory:
                index = memory._outbox.indexes[0]
                assert index.hook is not None
                if not index.hook.capabilities.multiprocess:
                    assert index.state is IndexState.BUSY
                texts = FIRST | {"n0": "trains to paris", "ours": "green tea"}
                commit(memory, {"n0": "trains to paris", "ours": "green tea"})
                check_search(memory, texts)
        finally:
            enough.touch()
            ended = children.line()
        assert ended.endswith(" 0")
        with self.open_memory(tmp_path) as memory:
            check_search(memory, texts)
            check_settled(memory)


def _written(number: int) -> dict[str, str]:
    return {f"k{number % 7}": f"green tea number {number}", f"n{number}": "a cat"}
