"""What every storage promises about the rows in which a memory moves; see `storage.tables`."""

from __future__ import annotations

import json

import pytest

from langgraph_memstate.errors import CommitRaced
from langgraph_memstate.facts import encode_namespace
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import (
    Append,
    Clear,
    Load,
    OutboxFailed,
    Prepare,
    PutEmbeddings,
    PutVectors,
    Stage,
)
from langgraph_memstate.storage.tables import META, MOVED, TABLES, UNFINISHED, Row
from langgraph_memstate.storage.values import Blob, PreparedRow
from langgraph_memstate.testing.samples import (
    NOW,
    ODD,
    append,
    checkpoint,
    commit,
    delete,
    elements,
    listed,
    put,
    read_list,
    step,
    writes,
)
from langgraph_memstate.testing.storage_vectors import INDEX, embedding, vector
from langgraph_memstate.testing.storage_vectors import META as INDEX_META

MARK = Load(META, ((UNFINISHED, "a test"),))
_LONG = Blob("msgpack", b"\x00\x01" + b"long " * 500)  # longer than what is stored as it is


def dumped(storage: Storage) -> dict[str, list[Row]]:
    """Everything that moves."""
    with storage.snapshot() as reader:
        return {table: list(reader.dump(table)) for table in MOVED}


class RowsContract:
    """Needs the fixture `storage`: one that is open and empty."""

    @pytest.fixture
    def varied(self, storage: Storage) -> Storage:
        """Rows in every table, of which no two are in the order they were written in."""
        texts = ("text", *ODD)
        commit(storage, INDEX_META, PutEmbeddings(tuple(map(embedding, texts))))
        drafts = [put(key, {"text": key}, ns=("odd", key), type=key, ttl=1.5) for key in reversed(ODD)]
        rows = tuple(vector(draft.version, draft.key) for draft in drafts)
        commit(storage, PutVectors(rows, frozenset([INDEX])), Append(tuple(drafts), (INDEX,)))
        append(storage, put("plain"), put("gone", {"n": 2}), put("by another", index=("text",)))
        append(storage, delete("gone"), put("plain", {"n": 3}))
        for number, name in enumerate(("z", *ODD, "a")):
            short, long = Blob("msgpack", name.encode()), _LONG
            lists = {"l": (f"list of {number}", listed(b"x", b"%d" % number))}
            made = checkpoint(number, {name: short, "b": long}, thread_id=name, lists=lists,
                              elements=elements(b"x", b"%d" % number), run_id=name)  # fmt: skip
            commit(storage, made, writes(number, name, (0, name, b"1"), (-1, "b", _LONG.data), thread_id=name))
        more = {"l": ("longer", listed(b"y", base="list of 0", keep=1, depth=2))}
        commit(storage, checkpoint(50, lists=more, elements=elements(b"y"), thread_id="z", parent=0))
        commit(storage, *(Stage(step(1, name), name, name, (put(name), put("later"))) for name in ODD))
        commit(storage, Prepare(PreparedRow("prepared", INDEX, ("lost",), "me", NOW)))
        with storage.snapshot() as reader:
            first, second, *_ = reader.outbox(INDEX, due=None, limit=10)
        commit(storage, OutboxFailed((first.id,), "why", None), OutboxFailed((second.id,), "once", NOW))
        return storage

    def test_rows_come_with_their_columns_by_their_keys(self, varied: Storage) -> None:
        for table, rows in dumped(varied).items():
            columns, key = TABLES[table]
            assert rows, f"{table} should have rows"
            assert all(len(row) == len(columns) for row in rows), table
            keys = [row[:key] for row in rows]
            assert keys == sorted(set(keys)), f"{table} is not in the order of its keys"

    def test_rows_say_what_was_written(self, varied: Storage) -> None:
        found = {
            table: [dict(zip(TABLES[table].columns, row, strict=True)) for row in rows]
            for table, rows in dumped(varied).items()
        }
        assert [row["seq"] for row in found["facts"]] == list(range(1, len(ODD) + 6))
        assert {row["key"] for row in found["items"]} == {*ODD, "plain", "by another"}
        assert {row["ns"] for row in found["items"] if row["key"] in ODD} == {
            encode_namespace(("odd", key)) for key in ODD
        }
        assert _LONG.data in {row["data"] for row in found["channel_values"]}
        assert _LONG.data in {row["data"] for row in found["writes"]}
        assert found["checkpoints"][0]["head"] == b"head %d" % int(str(found["checkpoints"][0]["checkpoint_id"]))
        manifests = {row["thread_id"]: row["manifest"] for row in found["checkpoints"] if row["thread_id"] != "z"}
        assert manifests.keys() == {*ODD, "a"}
        for name, manifest in manifests.items():
            assert list(json.loads(str(manifest))) == [name, "b", "l"]
        named = {(row["thread_id"], row["id"]): row["digest"] for row in found["elements"]}
        (longer,) = (row for row in found["lists"] if row["value_id"] == "longer")
        assert [named["z", id_] for id_ in json.loads(str(longer["elements"]))] == [b"y"]
        (base,) = (row for row in found["lists"] if row["id"] == longer["base"])
        assert base["value_id"] == "list of 0"

    def test_what_was_loaded_is_what_was_dumped(self, varied: Storage) -> None:
        before = dumped(varied)
        commit(varied, MARK, Clear())
        assert not any(dumped(varied).values())
        with varied.snapshot() as reader:
            assert reader.counts()["prepared"] == 0
        for table, rows in before.items():
            for part in (rows[:3], rows[3:4], rows[4:]):
                commit(varied, Load(table, tuple(part)))
        assert dumped(varied) == before
        with varied.snapshot() as reader:
            assert read_list(reader, "longer", "z") == [b"element x", b"element y"]
            assert reader.index_meta(INDEX) == INDEX_META

    def test_numbers_go_on_after_those_that_were_loaded(self, varied: Storage) -> None:
        before = dumped(varied)
        commit(varied, MARK, Clear(), *(Load(table, tuple(rows)) for table, rows in before.items()))
        fresh = put("fresh")
        commit(varied, PutVectors((vector(fresh.version),), frozenset([INDEX])), Append((fresh,), (INDEX,)))
        more = {"l": ("new", listed(b"new", base="longer", keep=1, depth=3))}
        commit(varied, checkpoint(60, lists=more, elements=elements(b"new"), thread_id="z", parent=50))
        after = dumped(varied)
        for table in ("facts", "vectors", "outbox", "lists", "elements"):
            *old, new = after[table]
            assert old == before[table], table
            assert _number(new) > _number(old[-1]), table
        assert _number(after["facts"][-1]) == len(ODD) + 6

    def test_a_number_that_is_taken_is_not_loaded_again(self, varied: Storage) -> None:
        before = dumped(varied)
        commit(varied, MARK)
        for table, rows in before.items():
            (outcome,) = varied.apply(((Append((put("with it"),)), Load(table, (rows[-1],))),))
            assert isinstance(outcome, Exception), table
        assert dumped(varied) == before

    def test_notes_are_replaced_and_stay(self, varied: Storage) -> None:
        with varied.snapshot() as reader:
            before = {key for key, _ in reader.dump(META)}
        commit(varied, Load(META, (("note", "one"), ("other", "x"))))
        commit(varied, Load(META, (("note", "two"),)), MARK, Clear())
        with varied.snapshot() as reader:
            after = list(reader.dump(META))
        assert {("note", "two"), ("other", "x"), *MARK.rows} <= set(after)
        assert {key for key, _ in after} == {*before, "note", "other", *(key for key, _ in MARK.rows)}

    @pytest.mark.parametrize("ended", [False, True])
    def test_a_finished_database_takes_no_rows_and_is_not_emptied(self, varied: Storage, ended: bool) -> None:
        if ended:
            commit(varied, MARK)
            commit(varied, Load(META, ((UNFINISHED, ""),)))
        before = dumped(varied)
        for op in (Clear(), Load("embeddings", (("model", b"moved", b"vector"),))):
            with pytest.raises(CommitRaced):
                commit(varied, op)
        assert dumped(varied) == before


def _number(row: Row) -> int:
    assert isinstance(row[0], int)
    return row[0]
