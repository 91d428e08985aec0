"""A memory over real Chroma against a dict, while the vector database fails in every way at any moment."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

sys.path.insert(0, str(Path(__file__).parent))
from truth import (
    check_search,
    check_settled,
    collection_of,
    cosine,
    directory,
    exact_below,
    faulty_chroma,
    hook_of,
    note,
    open_memory,
    vector_of,
)

from langgraph_memstate import MemoryStore
from langgraph_memstate.errors import VectorSyncError

KEYS = st.sampled_from([f"k{n}" for n in range(8)])
WORDS = st.sampled_from(["green", "tea", "black", "coffee", "trains", "berlin", "cat", "roof", "morning"])
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
MODES = st.sampled_from(["atomic", "deferred"])


class Crash(BaseException):
    """Ends a commit where it is, as the death of its process would: nothing cleans up."""


class IndexedMemory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="memstate-"))
        self.database = self.folder / "memory.db"
        self.texts: dict[str, str] = {}
        self.strangers = 0
        self.memory: MemoryStore

    @initialize(mode=MODES)
    def open(self, mode: Any) -> None:
        self.memory = open_memory(self.database, vector_sync=mode)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            hook_of(self.memory).heal()
            self.memory.close()
        shutil.rmtree(self.folder)

    def write(self, change: Mapping[str, str | None], write: Any) -> None:
        """Write, and expect the change where that is acknowledged and only there."""
        try:
            write()
        except (VectorSyncError, Crash):
            return
        for key, text in change.items():
            if text is None:
                self.texts.pop(key, None)
            else:
                self.texts[key] = text

    # -- writing --------------------------------------------------------------------------------------

    @rule(texts=st.dictionaries(KEYS, TEXTS, min_size=1, max_size=4))
    def commit(self, texts: dict[str, str]) -> None:
        self.write(texts, lambda: self.memory.commit([note(key, text) for key, text in texts.items()]))

    @rule(key=KEYS, first=TEXTS, second=TEXTS)
    def commit_twice_at_once(self, key: str, first: str, second: str) -> None:
        self.write({key: second}, lambda: self.memory.commit([note(key, first), note(key, second)]))

    @rule(key=KEYS, text=TEXTS)
    def put(self, key: str, text: str) -> None:
        self.write({key: text}, lambda: self.memory.store.put(("note",), key, {"text": text}))

    @rule(key=KEYS, text=TEXTS)
    def try_again(self, key: str, text: str) -> None:
        """As a step does that could not land: the same versions."""
        drafts = [self.memory.draft_put(("note",), key, {"text": text}, type="note")]
        for _ in range(3):
            before = dict(self.texts)
            self.write({key: text}, lambda: self.memory.land(drafts))
            if self.texts != before:
                return

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.write({key: None}, lambda: self.memory.delete("note", key))

    # -- faults ---------------------------------------------------------------------------------------

    @rule(
        methods=st.sets(st.sampled_from(["apply", "query", "ids", "count"]), min_size=1),
        times=st.integers(1, 4),
        late=st.booleans(),
    )
    def fail(self, methods: set[str], times: int, late: bool) -> None:
        hook_of(self.memory).fail(*methods, times=times, late=late)

    @rule()
    def refuse_removals(self) -> None:
        hook_of(self.memory).fail("apply", times=2, only=lambda upserts, deletes: bool(deletes))

    @rule(key=KEYS, text=TEXTS, late=st.booleans())
    def crash(self, key: str, text: str, late: bool) -> None:
        hook_of(self.memory).fail("apply", times=1, late=late, error=Crash(), only=lambda *args: bool(args[0]))
        if self.memory._outbox.mode == "atomic":
            self.commit({key: text})
        hook_of(self.memory).heal()

    @rule()
    def go_away(self) -> None:
        hook_of(self.memory).go_away()

    @rule()
    def heal(self) -> None:
        hook_of(self.memory).heal()

    @rule()
    def flush(self) -> None:
        try:
            self.memory.flush()
        except VectorSyncError:
            assert self.memory._outbox.waiting()

    @rule(mode=MODES, lost=st.sampled_from([None, None, "directory", "marker"]), away=st.booleans())
    def reopen(self, mode: Any, lost: str | None, away: bool) -> None:
        marker = None
        if lost == "marker" and self.memory._outbox.indexes[0].follows:
            marker = directory(self.database) / f"INFLIGHT-{collection_of(self.memory).id}"
        self.memory.close()
        if marker is not None:
            marker.touch()
        if lost == "directory":
            shutil.rmtree(directory(self.database), ignore_errors=True)
        if lost:
            self.strangers = 0
        hook = faulty_chroma(self.database)
        if away:
            hook.go_away()
        self.memory = open_memory(self.database, vectors=hook, vector_sync=mode)

    @rule(text=TEXTS)
    def stranger(self, text: str) -> None:
        if not self.memory._outbox.indexes[0].follows:
            return
        self.strangers += 1
        collection_of(self.memory).add(
            ids=[f"00000000-0000-4000-8000-{self.strangers:012}"],
            embeddings=[vector_of(text)],  # type: ignore[list-item]
            metadatas=[{"ns0": "note\x1f"}],
        )

    # -- what must hold -------------------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        hook_of(self.memory).heal()
        if self.strangers or not self.memory._outbox.indexes[0].follows:
            self.memory.repair()
            self.strangers = 0
        self.memory._outbox.settle_abandoned()
        self.memory.flush()
        check_settled(self.memory, self.database)

    @rule(query=TEXTS, limit=st.integers(0, 5), offset=st.integers(0, 3), wanted=WORDS)
    def search(self, query: str, limit: int, offset: int, wanted: str) -> None:
        matching = {key: text for key, text in self.texts.items() if text != wanted}
        scores = sorted((cosine(query, text) for text in matching.values()), reverse=True)
        found = self.memory.search(query, limit=limit, offset=offset, filter={"text": {"$ne": wanted}})
        assert [fact.score for fact in found] == pytest.approx(scores[offset : offset + limit], abs=1e-6)
        assert {str(fact.id): fact.payload["text"] for fact in found}.items() <= matching.items()

    @precondition(lambda self: hasattr(self, "memory"))
    @invariant()
    def search_tells_the_truth(self) -> None:
        assert {str(fact.id): fact.payload["text"] for fact in self.memory.query("note", limit=20)} == self.texts
        check_search(self.memory, self.texts, ["green tea", "a cat on the roof"])


def test_a_memory_agrees_with_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langgraph_memstate.index._REST", 0.0)
    machine = settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))

    with exact_below(2):
        run_state_machine_as_test(IndexedMemory, settings=machine)
