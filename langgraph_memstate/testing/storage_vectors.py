"""What every storage promises about vectors, the outbox and prepare records."""

from __future__ import annotations

import pytest

from langgraph_memstate.errors import TransientError
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.storage.base import Reader, Storage
from langgraph_memstate.storage.operations import (
    Append,
    Forget,
    Op,
    OutboxDone,
    OutboxFailed,
    Prepare,
    PutEmbeddings,
    PutIndexMeta,
    PutVectors,
    QueueIndex,
    RebuildIndex,
    Settle,
)
from langgraph_memstate.storage.values import EXACT, EmbeddingRow, OutboxRow, PreparedRow, VectorRow
from langgraph_memstate.testing.samples import NOTES, NOW, ODD, append, commit, delete, put

INDEX, MODEL = "index", "model"
META = PutIndexMeta(INDEX, MODEL, 2, 1)


def embedding(text: str, model: str = MODEL) -> EmbeddingRow:
    return EmbeddingRow(model, text.encode(), (text * 8)[:8].encode())


def vector(version: str, text: str = "text", ord: int = 0, index: str = INDEX) -> VectorRow:
    return VectorRow(index, version if not ord else f"{version}#{ord}", version, ord, text.encode())


def entries(storage: Storage, index: str = INDEX, due: float | None = None) -> list[tuple[str, str]]:
    with storage.snapshot() as reader:
        return [(row.op, row.vector_id) for row in reader.outbox(index, due=due, limit=100)]


def outbox(reader: Reader) -> tuple[OutboxRow, ...]:
    return tuple(reader.outbox(INDEX, due=None, limit=100))


class VectorContract:
    """Needs the fixture `storage`: one that is open and empty."""

    def fill(self, storage: Storage, *keys: str, deferred: bool = False) -> list[str]:
        """Items with a vector each; their versions."""
        drafts = [put(key) for key in keys]
        rows = tuple(vector(draft.version, key) for draft, key in zip(drafts, keys, strict=True))
        ops: tuple[Op, ...] = (
            META, PutEmbeddings(tuple(map(embedding, keys))), PutVectors(rows, frozenset([INDEX] if deferred else [])),
            Append(tuple(drafts), (INDEX,)),
        )  # fmt: skip
        commit(storage, *ops)
        return [draft.version for draft in drafts]

    def test_embeddings_are_stored_once(self, storage: Storage) -> None:
        first = embedding("a")
        commit(storage, PutEmbeddings((first, embedding("b"))))
        commit(storage, PutEmbeddings((first._replace(vector=b"another."), embedding("a", "other"))))
        with storage.snapshot() as reader:
            assert reader.embeddings(MODEL, [b"a", b"unknown"]) == {b"a": first.vector}
            assert reader.embeddings(MODEL, []) == {}
            assert reader.counts()["embeddings"] == 3

    @pytest.mark.parametrize("name", ODD)
    def test_any_name_of_an_index(self, storage: Storage, name: str) -> None:
        draft = put(name, ns=(name,))
        row = VectorRow(name, name + draft.version, draft.version, 0, b"hash")
        meta = PutIndexMeta(name, name, 2, 1)
        commit(storage, meta, PutEmbeddings((EmbeddingRow(name, b"hash", b"\0\1\2\3\4\5\6\7"),)))
        commit(storage, PutVectors((row,), frozenset([name])), Append((draft,), (name,)))
        with storage.snapshot() as reader:
            assert reader.index_meta(name) == meta
            (found,) = reader.vectors(name, name, (name,), NOW)
            assert (found.vector_id, found.vector) == (row.vector_id, b"\0\1\2\3\4\5\6\7")
            assert list(reader.new_vectors(name, name, 0)) == [(encode_namespace((name,)), draft.version, found.vector)]
            assert reader.pending_upserts(name) == [row.vector_id]

    def test_vectors_of_current_versions_are_found(self, storage: Storage) -> None:
        a, b = self.fill(storage, "a", "b")
        commit(storage, PutVectors((vector(a, "b", 1),), frozenset()))
        commit(storage, PutVectors((vector(a, "b", 1)._replace(vector_id="another"),), frozenset()))
        with storage.snapshot() as reader:
            mark = reader.vector_mark()
            found = {
                (row.record.key, row.vector_id, row.ord, row.vector) for row in reader.vectors(INDEX, MODEL, (), NOW)
            }
            assert found == {
                ("a", a, 0, b"aaaaaaaa"), ("a", f"{a}#1", 1, b"bbbbbbbb"), ("b", b, 0, b"bbbbbbbb"),
            }  # fmt: skip
            assert not list(reader.vectors(INDEX, "other", (), NOW))
            assert not list(reader.vectors("other", MODEL, (), NOW))
            assert not list(reader.vectors(INDEX, MODEL, ("other",), NOW))
            by_id = reader.vectors_by_id(INDEX, MODEL, [a, "unknown"], NOW)
            assert sorted(row.ord for row in by_id) == [0, 1]
            assert sorted(reader.vector_ids(INDEX)) == sorted([a, f"{a}#1", b])
            assert list(reader.vector_ids(INDEX, after=1)) == [b]
            assert (reader.vector_count(INDEX, NOTES, 100), reader.vector_count(INDEX, (), 2)) == (3, 2)
            assert reader.vector_bytes(INDEX, MODEL, 1_000) == 3 * 8
            assert reader.vectors_of([a, "unknown"]) == 2
            assert set(reader.upsert_rows(INDEX, MODEL, [a, "unknown"])) == {a}
            assert not reader.outbox(INDEX, due=None, limit=10)
        (c,) = self.fill(storage, "c")
        append(storage, put("a"))
        with storage.snapshot() as reader:
            assert [version for _, version, _ in reader.new_vectors(INDEX, MODEL, mark.vector)] == [c]
            assert list(reader.superseded(mark.seq)) == [a]
            assert reader.vector_mark().epoch == mark.epoch
            assert {row.record.key for row in reader.vectors(INDEX, MODEL, (), NOW)} == {"b", "c"}
            past = reader.as_of(mark.seq)
            assert {row.record.key for row in past.vectors(INDEX, MODEL, (), NOW)} == {"a", "b"}
            assert [record.key for record, _ in reader.unindexed(INDEX)] == ["a"]
            assert reader.vectors_of([a]) == 2

    def test_superseded_vectors_go_through_the_outbox(self, storage: Storage) -> None:
        a, b = self.fill(storage, "a", "b", deferred=True)
        commit(storage, PutVectors((vector(a, index=EXACT),), frozenset()))
        assert entries(storage) == [("upsert", a), ("upsert", b)]
        commit(storage, Append((put("a"), delete("b")), (INDEX,)))
        assert sorted(entries(storage)) == sorted([("delete", a), ("delete", b)])
        assert entries(storage, EXACT) == []
        with storage.snapshot() as reader:
            assert reader.pending_upserts(INDEX) == []
            assert reader.pending_deletes(INDEX) == 2
            rows = outbox(reader)
        commit(storage, OutboxDone(rows))
        assert entries(storage) == []

    def test_a_removal_becomes_an_upsert_when_the_commit_is_tried_again(self, storage: Storage) -> None:
        draft = put("a")
        row = vector(draft.version)
        commit(storage, META, QueueIndex(INDEX, (), (row.vector_id,)))
        commit(storage, PutVectors((row,), frozenset()), Append((draft,), (INDEX,)))
        with storage.snapshot() as reader:
            assert [(one.op, one.version) for one in outbox(reader)] == [("upsert", draft.version)]

    def test_an_entry_that_changed_meanwhile_stays(self, storage: Storage) -> None:
        (a,) = self.fill(storage, "a")
        commit(storage, QueueIndex(INDEX, (a,), ()))
        with storage.snapshot() as reader:
            (row,) = outbox(reader)
        commit(storage, OutboxDone((row._replace(op="delete"),)))
        assert ("upsert", a) in entries(storage)
        commit(storage, OutboxDone((row,)))
        with storage.snapshot() as reader:
            ids = [one.id for one in outbox(reader)]
        assert row.id not in ids

    def test_an_entry_that_was_replaced_gives_its_id_to_no_other(self, storage: Storage) -> None:
        """Who applies entries confirms them by their ids later, when others may have taken their place."""
        self.fill(storage, "a", "b", "c", deferred=True)
        with storage.snapshot() as reader:
            *confirmed, applied = outbox(reader)
        commit(storage, OutboxDone(tuple(confirmed)))
        commit(storage, Append((delete("c"),), (INDEX,)))
        others = self.fill(storage, "d", "e", "f", deferred=True)
        commit(storage, OutboxDone((applied,)))
        assert [id_ for op, id_ in entries(storage) if op == "upsert"] == others

    def test_what_was_removed_and_is_current_again_is_looked_at(self, storage: Storage) -> None:
        (a,) = self.fill(storage, "a")
        commit(storage, QueueIndex(INDEX, (), (a, "prepared")))
        commit(storage, Prepare(PreparedRow("p", INDEX, ("prepared",), "me", NOW)))
        with storage.snapshot() as reader:
            rows = outbox(reader)
        commit(storage, OutboxDone(rows))
        assert set(entries(storage)) == {("delete", "prepared"), ("upsert", a)}

    def test_what_was_stored_and_is_current_no_more_is_looked_at(self, storage: Storage) -> None:
        """A store that came after the removal of the same vector."""
        (a,) = self.fill(storage, "a", deferred=True)
        with storage.snapshot() as reader:
            (late,) = outbox(reader)
        commit(storage, Append((delete("a"),), (INDEX,)))
        with storage.snapshot() as reader:
            (removal,) = outbox(reader)
        commit(storage, OutboxDone((late,)))
        assert entries(storage) == [("delete", a)], "it waits already"
        commit(storage, OutboxDone((removal,)))
        assert entries(storage) == []
        commit(storage, OutboxDone((late,)))
        assert entries(storage) == [("delete", a)]

    def test_who_claims_entries_is_given_what_is_due(self, storage: Storage) -> None:
        a, b = self.fill(storage, "a", "b", deferred=True)
        with storage.snapshot() as reader:
            first, second = outbox(reader)
        commit(storage, OutboxFailed((first.id,), "why", NOW + 10))
        assert storage.claim(INDEX, due=NOW, limit=5, lease=60.0) == [second]
        due = storage.claim(INDEX, due=NOW + 10, limit=5, lease=60.0)
        assert [row.vector_id for row in due] == [a, b]
        assert storage.claim(INDEX, due=NOW + 10, limit=1, lease=60.0) == due[:1]

    def test_failures_wait_and_quarantine(self, storage: Storage) -> None:
        a, b = self.fill(storage, "a", "b", deferred=True)
        with storage.snapshot() as reader:
            first, second = outbox(reader)
            assert reader.outbox(INDEX, due=None, limit=1) == [first]
        commit(storage, OutboxFailed((first.id,), "why\0", NOW + 10), OutboxFailed((second.id,), "why", None))
        assert entries(storage, due=NOW) == []
        assert entries(storage, due=NOW + 10) == [("upsert", a)]
        with storage.snapshot() as reader:
            assert [row.attempts for row in outbox(reader)] == [1, 1]
            assert reader.pending_upserts(INDEX) == [a, b]
        commit(storage, OutboxFailed((), "nothing", None))

    def test_an_index_that_others_have_embeds_by_itself(self, storage: Storage) -> None:
        append(storage, put("before", index=("text",)))
        commit(storage, META)
        commit(storage, PutIndexMeta(INDEX, MODEL, 2, 2))
        append(storage, put("not", index=False), put("twice"))
        append(storage, put("twice"), put("after"))
        with storage.snapshot() as reader:
            waiting = reader.to_embed(INDEX, 100)
            assert [(record and record.key, paths) for _, record, paths in waiting] == [
                ("before", ("text",)), ("twice", None), ("after", None),
            ]  # fmt: skip
            assert [row[0] for row in reader.to_embed(INDEX, 1)] == [waiting[0][0]]
            assert reader.outbox(INDEX, due=None, limit=10) == []
            meta = reader.index_meta(INDEX)
            assert meta is not None
            assert meta.generation == 2
            assert reader.index_meta("other") is None
        versions = [record.version for _, record, _ in waiting if record is not None]
        commit(storage, PutVectors((vector(versions[0]),), frozenset([INDEX])))
        commit(storage, OutboxFailed((waiting[1][0],), "poison", None))
        with storage.snapshot() as reader:
            assert [record and record.key for _, record, _ in reader.to_embed(INDEX, 100)] == ["after"]
        commit(storage, OutboxDone((OutboxRow(waiting[2][0], INDEX, "embed", "", None, 0),)))
        with storage.snapshot() as reader:
            assert reader.to_embed(INDEX, 100) == []

    def test_what_another_has_embedded_meanwhile_is_not_queued_again(self, storage: Storage) -> None:
        (a,) = self.fill(storage, "a", deferred=True)
        with storage.snapshot() as reader:
            done = OutboxDone(outbox(reader))
        commit(storage, done, PutVectors((vector(a), vector(a, "b", 1)), frozenset([INDEX])))
        assert entries(storage) == [("upsert", f"{a}#1")]

    def test_a_rebuild_queues_what_is_current(self, storage: Storage) -> None:
        a, b = self.fill(storage, "a", "b", deferred=True)
        commit(storage, Append((delete("a"),), (INDEX,)), Prepare(PreparedRow("p", INDEX, (a,), "me", NOW)))
        commit(storage, RebuildIndex(INDEX))
        assert entries(storage) == [("upsert", b)]
        with storage.snapshot() as reader:
            assert reader.prepared() == []
        with pytest.raises(TransientError):
            commit(storage, Settle("p"))

    def test_prepare_and_settle(self, storage: Storage) -> None:
        draft = put()
        row = PreparedRow("p", INDEX, (draft.version, "never\0landed"), "host/1", NOW + 0.25)
        commit(storage, META, Prepare(row))
        with storage.snapshot() as reader:
            assert reader.prepared() == [row]
        commit(storage, PutVectors((vector(draft.version),), frozenset()), Append((draft,), (INDEX,)), Settle("p"))
        assert entries(storage) == [("delete", "never\0landed")]
        with pytest.raises(TransientError):
            commit(storage, Settle("p"))

    def test_what_is_forgotten_takes_its_vectors_along(self, storage: Storage) -> None:
        a, b, _ = self.fill(storage, "a", "b", "c", deferred=True)
        commit(storage, PutVectors((vector(b, "shared", 1), vector(a, "shared", 1)), frozenset()))
        commit(storage, PutEmbeddings((embedding("shared"),)))
        commit(storage, Append((delete("a"),), (INDEX,)), Forget(NOTES, "a"))
        with storage.snapshot() as reader:
            assert reader.embeddings(MODEL, [b"a", b"b", b"shared"]).keys() == {b"b", b"shared"}
            assert reader.vectors_of([a]) == 0
            assert reader.vectors_of([b]) == 2
            assert {row.vector_id for row in outbox(reader) if row.op == "delete"} == {a, f"{a}#1"}
            assert a not in reader.pending_upserts(INDEX)
