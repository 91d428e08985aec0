"""What every storage promises about the log and its items."""

from __future__ import annotations

from typing import Any

import pytest

from langgraph_memstate.errors import CommitRaced, ConstraintError, FactRaced, FilterError
from langgraph_memstate.facts import SESSION, Origin, decode_value, encode_namespace
from langgraph_memstate.filters import compile_filter
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.storage.operations import Append, CheckUnchanged, CheckUnique, Expect, Forget, Touch
from langgraph_memstate.storage.values import Claim
from langgraph_memstate.testing.samples import (
    NOTES,
    NOW,
    ODD,
    append,
    checkpoint,
    commit,
    delete,
    put,
    step,
    unchanged,
)

VALUES: tuple[dict[str, Any], ...] = (
    {"a": 1}, {"a": 1.0}, {"a": True}, {"a": False}, {"a": 0}, {"a": None}, {}, {"a": "1"}, {"a": "x"}, {"a": "x\0y"},
    {"a": "\1"}, {"a": "é"}, {"a": "Z"}, {"a": "z"}, {"a": "\U0001f600"}, {"a": "\ufb01"}, {"a": [1]}, {"a": {"b": 1}},
    {"a": {"b": "x"}}, {"a": 0.1}, {"a": -2}, {"a": 2**53}, {"a": 2.0**53}, {"a": 10**30}, {"a": 1e300}, {"a": 5e-324},
    {"a": 10**400}, {"a": ""}, {"a": []}, {"a": 12}, {"a": 9}, {"a": "a\\u0000"}, {"é\\ ": 1}, {"a": 1, "n": "\0"},
)  # fmt: skip
"""What filters and claims have to tell apart, or take for the same."""

CLAIMED = tuple(value for value in VALUES if isinstance(value.get("a"), str | int | float))
OPERANDS = (
    1,
    0,
    True,
    False,
    1.0,
    0.1,
    9,
    -2,
    "x",
    "",
    "1",
    "é",
    "z",
    "\1",
    "\U0001f600",
    2**53 - 1,
    1e300,
    10**400,
    0.0,
)


class LogContract:
    """Needs the fixture `storage`: one that is open and empty."""

    # -- what is written comes back -----------------------------------------------------------------

    @pytest.mark.parametrize("name", ODD)
    def test_any_name_is_taken_for_what_it_is(self, storage: Storage, name: str) -> None:
        origin = Origin(name, name, name, name, name, name, name, name)
        draft = put(name, {name: name}, ns=(name, "x"), type=name, origin=origin)
        append(storage, draft, put(ns=("x", name)))
        with storage.snapshot() as reader:
            record = reader.item((name, "x"), name, NOW)
            assert record is not None
            assert (record.namespace, record.key, record.type) == ((name, "x"), name, name)
            assert decode_value(record.value) == {name: name}
            assert reader.draft(draft.version) == draft
            assert sorted(reader.namespaces((), NOW)) == sorted([(name, "x"), ("x", name)])
            assert [found.key for found in reader.items((name,), NOW)] == [name]
            (entry,) = reader.log(prefix=(name,), key=name, origin={"thread_id": name, "actor": name})
            assert (entry.thread_id, entry.reason, entry.type) == (name, name, name)

    @pytest.mark.parametrize("value", VALUES, ids=ascii)
    def test_a_value_comes_back_as_the_same_text(self, storage: Storage, value: dict[str, Any]) -> None:
        draft = put(value=value)
        append(storage, draft)
        with storage.snapshot() as reader:
            record = reader.item(NOTES, "k", NOW)
            assert record is not None
            assert record.value == draft.value
            assert [entry.value for entry in reader.log()] == [value]

    def test_a_prefix_is_one_of_labels(self, storage: Storage) -> None:
        namespaces = [
            ("a",),
            ("a", "b"),
            ("ab",),
            ("a\0",),
            ("a\x1f",),
            ("a b",),
            ("b",),
            ("A",),
            ("é",),
            ("a", "\U0010ffff"),
        ]
        append(storage, *(put(ns=ns) for ns in namespaces))
        with storage.snapshot() as reader:
            in_order = sorted(namespaces, key=encode_namespace)
            for limit in (None, 0, 1, len(namespaces) - 1, len(namespaces) + 1, 10**30):
                assert reader.namespaces((), NOW, limit) == in_order[:limit]
            for prefix in ((), *namespaces):
                expected = {ns for ns in namespaces if ns[: len(prefix)] == prefix}
                assert {record.namespace for record in reader.items(prefix, NOW)} == expected
                assert set(reader.namespaces(prefix, NOW)) == expected
                assert {entry.namespace for entry in reader.log(prefix=prefix)} == expected

    def test_the_successor_keeps_when_the_item_came_to_be(self, storage: Storage) -> None:
        first, second, third = put(), put(value={"n": 2}, ts=NOW + 1), put(value={"n": 3}, ts=NOW + 3)
        append(storage, first)
        append(storage, second)
        with storage.snapshot() as reader:
            record = reader.item(NOTES, "k", NOW)
            assert record is not None
            assert (record.version, record.created_at, record.updated_at) == (second.version, NOW, NOW + 1)
        append(storage, delete(ts=NOW + 2))
        append(storage, third)
        with storage.snapshot() as reader:
            record = reader.item(NOTES, "k", NOW)
            assert record is not None
            assert (record.version, record.created_at, record.seq) == (third.version, NOW + 3, 4)
            log = list(reader.log())
            assert [entry.op for entry in log] == ["put", "put", "delete", "put"]
            assert [entry.supersedes for entry in log] == [None, first.version, second.version, None]
            assert list(reader.superseded(0)) == [first.version, second.version]
            assert list(reader.superseded(2)) == [second.version]
            assert [found.version for found in reader.records([first.version, third.version], NOW)] == [third.version]

    def test_last_written_first(self, storage: Storage) -> None:
        append(storage, put("a"), put("b"), put("c"))
        append(storage, put("a", {"n": 2}))
        with storage.snapshot() as reader:
            assert [record.key for record in reader.items(NOTES, NOW)] == ["a", "c", "b"]

    def test_many_items_are_read_whole_and_by_a_reader_who_stops(self, storage: Storage) -> None:
        append(storage, *(put(f"{number:04}") for number in range(1_200)))
        with storage.snapshot() as reader:
            found = reader.items(NOTES, NOW)
            assert [next(found).key for _ in range(3)] == ["1199", "1198", "1197"]
            nested = reader.log()
            assert [next(nested).seq, next(found).key, next(nested).seq] == [1, "1196", 2]
            assert len(list(reader.items(NOTES, NOW))) == 1_200
            assert [entry.seq for entry in reader.log()] == list(range(1, 1_201))

    # -- the log ------------------------------------------------------------------------------------

    def test_the_log_has_no_gaps(self, storage: Storage) -> None:
        append(storage, put("a"), put("b"))
        late = put("c")
        storage.apply(((Append((late,)), Expect(((NOTES, "a", "another version"),))),))
        storage.apply(((Append((late,)), Expect(((NOTES, "a", "another version"),))), (Append((put("d"),)),)))
        append(storage, put("e"))
        with storage.snapshot() as reader:
            assert [(entry.seq, entry.key, entry.commit_id) for entry in reader.log()] == [
                (1, "a", 1), (2, "b", 1), (3, "d", 3), (4, "e", 4),
            ]  # fmt: skip
            assert reader.last_seq() == 4

    def test_a_version_lands_once(self, storage: Storage) -> None:
        draft, other = put(), put("other")
        append(storage, draft, draft)
        append(storage, put(value={"n": 2}))
        append(storage, draft, other)
        with storage.snapshot() as reader:
            assert [entry.version for entry in reader.log()][::2] == [draft.version, other.version]
            record = reader.item(NOTES, "k", NOW)
            assert record is not None
            assert record.value == '{"n":2}'

    def test_one_address_several_times_in_a_commit(self, storage: Storage) -> None:
        first, last = put(), put(value={"n": 3}, ts=NOW + 2)
        append(storage, first, put(value={"n": 2}, ts=NOW + 1), delete(ts=NOW + 1), last, put("gone"), delete("gone"))
        with storage.snapshot() as reader:
            (record,) = reader.items((), NOW)
            assert (record.version, record.created_at) == (last.version, NOW + 2)
            assert len(list(reader.log())) == 6

    def test_the_log_is_asked_by_part(self, storage: Storage) -> None:
        append(storage, put("a", origin=Origin(thread_id="t", node="n")), put("b", origin=Origin(thread_id="t")))
        append(storage, put("a", ns=("other",)))
        with storage.snapshot() as reader:

            def seqs(**asked: Any) -> list[int]:
                return [entry.seq for entry in reader.log(**asked)]

            assert seqs() == [1, 2, 3]
            assert seqs(newest_first=True, limit=2) == [3, 2]
            assert seqs(after=1, until=2, limit=10**30) == seqs(after=1, until=2) == [2]
            assert seqs(key="a") == [1, 3]
            assert seqs(prefix=("other",)) == [3]
            assert seqs(origin={"thread_id": "t", "node": "n"}) == [1]
            assert seqs(limit=0) == []
            with pytest.raises(FilterError, match="value"):
                seqs(origin={"value": "x"})
            assert reader.seq_at(NOW * 10) == 3
            assert reader.seq_at(0.0) == 0
            assert reader.draft("unknown") is None

    def test_what_is_appended_only_over_an_expired_version(self, storage: Storage) -> None:
        old = put(ttl=1.0)
        append(storage, old)
        late = NOW + 61
        commit(storage, Append((delete(ts=NOW + 59),), (), frozenset([old.version])))
        commit(storage, Append((delete(ts=late),), (), frozenset(["another"])))
        commit(storage, Append((delete("other", ts=late),), (), frozenset([old.version])))
        with storage.snapshot() as reader:
            assert reader.last_seq() == 1
        commit(storage, Append((delete(ts=late),), (), frozenset([old.version])))
        with storage.snapshot() as reader:
            assert reader.last_seq() == 2
            assert not list(reader.items((), NOW))

    # -- time ---------------------------------------------------------------------------------------

    def test_an_item_expires(self, storage: Storage) -> None:
        mortal = put("mortal", ns=("gone",), ttl=2.0)
        append(storage, mortal, put("stays"))
        with storage.snapshot() as reader:
            for now, there in ((NOW + 119.9, True), (NOW + 120, False)):
                assert (reader.item(("gone",), "mortal", now) is not None) is there
                assert ("gone",) in reader.namespaces((), now) or not there
                assert len(list(reader.items((), now))) == 1 + there
                assert [record.key for record in reader.expired(now)] == [] if there else ["mortal"]
                assert len(reader.records([mortal.version], now)) == there
        append(storage, put("mortal", ns=("gone",), ts=NOW + 200))
        with storage.snapshot() as reader:
            record = reader.item(("gone",), "mortal", NOW + 200)
            assert record is not None
            assert (record.created_at, record.expires_at) == (NOW + 200, None)

    def test_time_to_live_begins_again(self, storage: Storage) -> None:
        append(storage, put("mortal", ttl=2.0), put("stays"))
        commit(storage, Touch(((NOTES, "mortal"), (NOTES, "stays"), (NOTES, "nobody")), NOW + 60))
        commit(storage, Touch(((NOTES, "mortal"),), NOW + 30))
        with storage.snapshot() as reader:
            assert reader.item(NOTES, "mortal", NOW + 179) is not None
            assert [record.key for record in reader.expired(NOW + 180)] == ["mortal"]

    def test_as_of(self, storage: Storage) -> None:
        append(storage, put("a", ttl=10.0), put("b", ns=("other",)))
        append(storage, put("a", {"n": 2}, ts=NOW + 1), delete("b", ns=("other",)))
        with storage.snapshot() as reader:
            past = reader.as_of(2)
            assert {record.key: record.value for record in past.items((), NOW)} == {"a": '{"n":1}', "b": '{"n":1}'}
            assert past.namespaces((), NOW) == [NOTES, ("other",)]
            assert past.namespaces((), NOW, 1) == [NOTES]
            assert past.namespaces((), NOW + 600) == [("other",)]
            assert [record.key for record in past.items((), NOW, compile_filter({"n": 1}).conditions)] == ["b", "a"]  # type: ignore[union-attr]
            assert [record.key for record in past.holders(Claim(NOTES, (("n", 1),)), NOW)] == ["a"]
            assert not list(reader.as_of(0).items((), NOW))
            now = reader.as_of(reader.last_seq())
            assert list(now.items((), NOW)) == list(reader.items((), NOW))

    # -- filters ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("operand", OPERANDS, ids=ascii)
    def test_conditions_leave_out_nothing_that_matches(self, storage: Storage, operand: Any) -> None:
        append(storage, *(put(str(number), value) for number, value in enumerate(VALUES)))
        operators = ("$eq", "$gt", "$gte", "$lt", "$lte", "$ne")
        filters = [{path: {operator: operand}} for operator in operators for path in ("a", "é\\ ")]
        filters += [{"a": {"b": {operator: operand}}} for operator in operators]
        with storage.snapshot() as reader:
            for wanted in filters:
                matches = compile_filter(wanted)
                assert matches is not None
                expected = {str(number) for number, value in enumerate(VALUES) if matches(value)}
                found = {record.key for record in reader.items(NOTES, NOW, matches.conditions)}
                assert expected <= found, wanted
                past = {record.key for record in reader.as_of(len(VALUES)).items(NOTES, NOW, matches.conditions)}
                assert expected <= past, wanted

    def test_conditions_leave_something_out(self, storage: Storage) -> None:
        append(storage, *(put(str(number), value) for number, value in enumerate(VALUES)))
        narrow = compile_filter({"a": {"$gte": 9, "$lte": 12}})
        assert narrow is not None
        with storage.snapshot() as reader:
            assert len(list(reader.items(NOTES, NOW, narrow.conditions))) < len(VALUES) / 2

    # -- checks -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("value", CLAIMED, ids=ascii)
    def test_a_claim_finds_equal_values_alone(self, storage: Storage, value: dict[str, Any]) -> None:
        wanted = value["a"]
        append(storage, *(put(str(number), other) for number, other in enumerate(VALUES)))
        claim = Claim(NOTES, (("a", wanted),))
        expected = {str(number) for number, other in enumerate(VALUES) if claim.made_by(other)}
        with storage.snapshot() as reader:
            assert {record.key for record in reader.holders(claim, NOW)} == expected

    def test_a_claim_is_made_once(self, storage: Storage) -> None:
        claim = Claim("person", (("mail", "a@b"),))
        holder = put("1", {"mail": "a@b"}, ns=("person",), type="person", ttl=1.0)
        append(storage, holder)
        for rival in (
            put("2", {"mail": "a@b"}, ns=("elsewhere",), type="person"),
            put("2", {"mail": "a@b"}, ns=(SESSION, "s", "person"), type="person"),
        ):
            with unchanged(storage), pytest.raises(ConstraintError, match="unique"):
                commit(storage, Append((rival,)), CheckUnique(rival, claim))
            with unchanged(storage), pytest.raises(FactRaced):
                commit(storage, Append((rival,)), CheckUnique(rival, claim, replaces=True))
        same = put("1", {"mail": "a@b"}, ns=("person",), type="person", ttl=1.0)
        commit(storage, Append((same,)), CheckUnique(same, claim))
        commit(storage, CheckUnique(holder, claim))  # superseded: it claims nothing any more
        late = put("2", {"mail": "a@b"}, ns=("person",), type="person", ts=NOW + 100)
        commit(storage, Append((late,)), CheckUnique(late, claim))
        elsewhere = put("3", {"mail": "a@b"}, ns=("other",), ts=NOW + 100)
        commit(storage, Append((elsewhere,)), CheckUnique(elsewhere, Claim("person", (("mail", "a@b"),), ("other",))))

    def test_what_is_immutable(self, storage: Storage) -> None:
        append(storage, put(value={"n": 1}, type="frozen", ttl=5.0))
        same = put(value={"n": 1.0}, type="frozen", ttl=5.0)
        commit(storage, CheckUnchanged((same,), ("frozen",)), Append((same,)))
        commit(storage, CheckUnchanged((same,), ("frozen",)))  # it has landed
        for change in (put(value={"n": 2}, type="frozen", ttl=5.0), put(value={"n": 1}, type="frozen"), delete()):
            with unchanged(storage), pytest.raises(ConstraintError, match="immutable"):
                commit(storage, CheckUnchanged((change,), ("frozen",)), Append((change,)))
            commit(storage, CheckUnchanged((change,), ("other",)))
        twice = (put("new", {"n": 1}, type="frozen"), put("new", {"n": 2}, type="frozen"))
        with pytest.raises(ConstraintError):
            commit(storage, CheckUnchanged(twice, ("frozen",)), Append(twice))
        late = put(value={"n": 2}, type="frozen", ts=NOW + 400)
        commit(storage, CheckUnchanged((late,), ("frozen",)), Append((late,)))

    def test_what_a_commit_was_prepared_from(self, storage: Storage) -> None:
        draft = put()
        append(storage, draft)
        commit(storage, checkpoint(1))
        latest = step(1)
        commit(storage, Expect(((NOTES, "k", draft.version), (NOTES, "absent", None)), (latest,)))
        for expected in ((NOTES, "k", None), (NOTES, "k", "another"), (NOTES, "absent", draft.version)):
            with unchanged(storage), pytest.raises(FactRaced):
                commit(storage, Append((put("x"),)), Expect((expected,)))
        with unchanged(storage), pytest.raises(CommitRaced):
            commit(storage, Append((put("x"),)), Expect((), (step(2),)))
        with pytest.raises(CommitRaced):
            commit(storage, Expect((), (step(1, "nobody"),)))

    # -- erasing ------------------------------------------------------------------------------------

    def test_what_is_forgotten_leaves_its_entries(self, storage: Storage) -> None:
        append(storage, put("a", {"s": "secret"}), put("a", {"s": "other"}), put("b", origin=Origin(thread_id="t")))
        append(storage, put("c", ns=("notes2",)), delete("a"))
        commit(storage, Forget(NOTES, "a"))
        with storage.snapshot() as reader:
            log = list(reader.log())
            assert [entry.value for entry in log] == [None, None, {"n": 1}, {"n": 1}, None]
            assert [entry.forgotten for entry in log] == [True, True, False, False, False]
            assert [record.key for record in reader.as_of(3).items((), NOW)] == ["b"]
            erasures = reader.vector_mark().epoch
        commit(storage, Append((delete("b"),)), Forget((), None, "t"))
        storage.scrub()
        with storage.snapshot() as reader:
            assert [entry.key for entry in reader.log() if entry.value is not None] == ["c"]
            assert reader.vector_mark().epoch == erasures + 1
