"""What every storage promises about the state of threads."""

from __future__ import annotations

import pytest

from langgraph_memstate.errors import CommitRaced
from langgraph_memstate.storage.base import Reader, Storage
from langgraph_memstate.storage.operations import (
    Append,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Drain,
    DropWrites,
    Stage,
    Unstage,
)
from langgraph_memstate.storage.values import Blob, StepKey, digest_of
from langgraph_memstate.testing.samples import (
    ODD,
    append,
    checkpoint,
    commit,
    elements,
    listed,
    put,
    read_list,
    step,
    unchanged,
    value_id,
    writes,
)

LIKE_IDS = (
    "0" * 32, "0" * 31, "0" * 33, "A" * 32, "g" * 32, "-" * 36, "1f1e75b1-585e-6996-8bb6-134ff0922017",
    "1F1E75B1-585E-6996-8BB6-134FF0922017", "1f1e75b1585e-6996-8bb6--134ff0922017", "é" * 16, "é" * 18,
)  # fmt: skip
LARGE = bytes(range(256)) * 2  # more than a storage repeats
THREAD_TABLES = ("checkpoints", "channel_values", "lists", "elements", "writes", "staged")


def stored(reader: Reader, *tables: str) -> dict[str, int]:
    counts = reader.counts()
    return {table: counts[table] for table in tables or THREAD_TABLES}


class CheckpointContract:
    """Needs the fixture `storage`: one that is open and empty."""

    @pytest.mark.parametrize("name", ODD)
    def test_any_id_is_taken_for_what_it_is(self, storage: Storage, name: str) -> None:
        op = checkpoint(1, {name: Blob(name, b"\0\1" + name.encode())}, thread_id=name, checkpoint_ns=name, run_id=name)
        commit(storage, op, writes(1, name, (0, name, b"x"), thread_id=name, path=name))
        commit(storage, checkpoint(1, {name: Blob("b", b"")}, thread_id="another"))
        with storage.snapshot() as reader:
            found = reader.checkpoint(name, name, None)
            assert found is not None
            assert (found.step, found.manifest) == (op.step, op.manifest)
            assert reader.values(name, list(op.values)) == op.values
            assert reader.latest_id(name, name) == op.step.checkpoint_id
            assert reader.checkpoint_namespaces(name) == [name]
        commit(storage, CopyThread(name, "copy"), DeleteRuns((name,)))
        with storage.snapshot() as reader:
            assert reader.checkpoint(name, name, None) is None
            assert reader.checkpoint("copy", name, None) is None
            assert reader.checkpoint("another", "", None) is not None

    def test_a_checkpoint_comes_back_whole(self, storage: Storage) -> None:
        append(storage, put())
        values = {"a": Blob("msgpack", b"\0" * 500), "b": Blob("json", b"")}
        first = checkpoint(1, values)
        commit(storage, first)
        second = checkpoint(2, parent=1, reused={"a": first.manifest["a"]})
        commit(storage, second)
        with storage.snapshot() as reader:
            assert reader.checkpoint("t", "", "unknown") is None
            assert reader.checkpoint("unknown", "", None) is None
            found = reader.checkpoint("t", "", first.step.checkpoint_id)
            assert found is not None
            assert (found.step, found.parent_id, found.seq, found.ts) == (first.step, None, 1, first.ts)
            assert (found.head, found.metadata, found.manifest) == (first.head, first.metadata, first.manifest)
            assert not found.writes
            latest = reader.checkpoint("t", "", None)
            assert latest is not None
            assert (latest.step, latest.parent_id) == (second.step, first.step.checkpoint_id)
            assert reader.values("t", [*first.values, "unknown"]) == first.values
            assert reader.values("unknown", list(first.values)) == {}
            assert stored(reader, "channel_values") == {"channel_values": 2}

    def test_what_a_checkpoint_refers_to_has_to_be_there(self, storage: Storage) -> None:
        fresh = checkpoint(1, {"a": Blob("b", b"1")})
        commit(storage, fresh, checkpoint(1, {"a": Blob("b", b"1")}, thread_id="other"))
        commit(storage, DeleteCheckpoints((fresh.step,)))
        for op in (
            checkpoint(2, {"b": Blob("b", b"2")}, reused={"a": fresh.manifest["a"]}),
            checkpoint(2, lists={"l": ("l2", listed(b"y", base="l1", keep=1, depth=2))}, elements=elements(b"y")),
            checkpoint(2, lists={"l": ("l1", listed(b"x", b"y"))}, elements=elements(b"x")),
        ):
            with unchanged(storage), pytest.raises(CommitRaced):
                commit(storage, op)

    def test_put_again_a_checkpoint_is_replaced(self, storage: Storage) -> None:
        commit(storage, checkpoint(1, {"a": Blob("b", b"1")}), writes(1, "task", (0, "a", b"w")))
        commit(storage, checkpoint(1, {"a": Blob("b", b"2")}))
        with storage.snapshot() as reader:
            found = reader.checkpoint("t", "", None)
            assert found is not None
            assert list(reader.values("t", list(found.manifest.values())).values()) == [Blob("b", b"2")]
            assert len(found.writes) == 1
            assert stored(reader, "checkpoints", "channel_values") == {"checkpoints": 1, "channel_values": 1}

    # -- lists --------------------------------------------------------------------------------------

    def grow(self, storage: Storage) -> None:
        """Three checkpoints of a list: ab, abc, ax."""
        commit(storage, checkpoint(1, lists={"l": ("1", listed(b"a", b"b"))}, elements=elements(b"a", b"b")))
        second = listed(b"c", base="1", keep=2, depth=2)
        commit(storage, checkpoint(2, parent=1, lists={"l": ("2", second)}, elements=elements(b"c", b"unused")))
        third = listed(b"x", base="2", keep=1, depth=3)
        commit(storage, checkpoint(3, parent=2, lists={"l": ("3", third)}, elements=elements(b"x")))

    def test_lists_share_their_elements(self, storage: Storage) -> None:
        self.grow(storage)
        with storage.snapshot() as reader:
            assert read_list(reader, "1") == [b"element a", b"element b"]
            assert read_list(reader, "2") == [b"element a", b"element b", b"element c"]
            assert read_list(reader, "3") == [b"element a", b"element x"]
            chain = reader.list_chain("t", "3")
            assert [(version.value_id, version.depth, version.keep) for version in chain] == [
                ("3", 3, 1), ("2", 2, 2), ("1", 1, 0),
            ]  # fmt: skip
            ids = [id_ for version in chain for id_ in version.tail]
            assert set(reader.digests("t", ids).values()) == {b"a", b"b", b"c", b"x"}
            assert reader.digests("other", ids) == {}
            assert reader.elements("other", ids) == {}
            assert reader.list_chain("t", "unknown") == []
            assert reader.list_chain("other", "1") == []
            assert stored(reader, "lists", "elements") == {"lists": 3, "elements": 4}

    def test_the_same_element_twice_and_two_lists_of_one_checkpoint(self, storage: Storage) -> None:
        op = checkpoint(
            1,
            lists={"l": ("1", listed(b"a", b"a")), "m": ("2", listed(b"b", b"a", base="1", keep=1, depth=2))},
            elements=elements(b"a", b"b"),
        )
        commit(storage, op)
        commit(storage, checkpoint(2, reused=op.manifest), checkpoint(3, lists={"e": ("empty", listed())}))
        with storage.snapshot() as reader:
            assert read_list(reader, "1") == [b"element a"] * 2
            assert read_list(reader, "2") == [b"element a", b"element b", b"element a"]
            assert read_list(reader, "empty") == []
            assert stored(reader, "elements") == {"elements": 2}

    @pytest.mark.parametrize("gone", [(1,), (2,), (1, 2), (3,), (1, 3), (2, 3)])
    def test_lists_outlive_what_they_are_based_on(self, storage: Storage, gone: tuple[int, ...]) -> None:
        self.grow(storage)
        commit(storage, DeleteCheckpoints(tuple(map(step, gone))))
        whole = {1: b"ab", 2: b"abc", 3: b"ax"}
        left = [number for number in whole if number not in gone]
        with storage.snapshot() as reader:
            for number in left:
                assert read_list(reader, str(number)) == [b"element %c" % letter for letter in whole[number]]
            assert stored(reader, "lists")["lists"] == len(left)
            assert stored(reader, "elements")["elements"] == len(
                {letter for number in left for letter in whole[number]}
            )

    @pytest.mark.parametrize("name", [*ODD, *LIKE_IDS])
    def test_any_channel_value_and_task_is_found_again(self, storage: Storage, name: str) -> None:
        first = checkpoint(1, lists={name: (name, listed(b"x"))}, elements=elements(b"x"))
        commit(storage, first, writes(1, name, (0, name, LARGE), path=name))
        commit(storage, checkpoint(2, parent=1), checkpoint(3, reused={"l": name}))
        with storage.snapshot() as reader:
            ((channel, list_id, write),) = reader.ancestor_writes(step(2), [name])
            assert write is not None
            assert (channel, list_id, write.task_id, write.value.data) == (name, name, name, LARGE)
            assert [version.value_id for version in reader.list_chain("t", name)] == [name]
        commit(storage, DeleteCheckpoints((step(1),)))
        with storage.snapshot() as reader:
            assert read_list(reader, name) == [b"element x"]
        commit(storage, DeleteCheckpoints((step(3),)))
        with storage.snapshot() as reader:
            assert stored(reader, "lists", "elements", "writes") == {"lists": 0, "elements": 0, "writes": 0}

    def test_no_channel_is_taken_for_another(self, storage: Storage) -> None:
        names = (*ODD, "", "a", "a\0", "a\0\0", "\0a", "a\1", "a\1\1", "a\1\2", "a\\u0000", "a\\0")
        early = {name: f"early {name}".encode() for name in names}
        late = {name: f"late {name}".encode() for name in names}
        op = checkpoint(2, {name: Blob("bytes", late[name]) for name in names[::2]}, parent=1)
        commit(storage, checkpoint(1), writes(1, "1", *((n, *each) for n, each in enumerate(early.items()))))
        commit(storage, op, writes(2, "2", *((n, *each) for n, each in enumerate(late.items()))))
        commit(storage, checkpoint(3, parent=2))
        with storage.snapshot() as reader:
            found = reader.checkpoint(*op.step)
            assert found is not None
            assert found.manifest == op.manifest
            assert {write.channel: write.value.data for write in found.writes} == late
            assert reader.values("t", list(op.values)) == op.values
            for asked in ((), names, names[::-1], *((name,) for name in names)):
                history = reader.ancestor_writes(step(3), asked)
                assert {one.channel for one in history} == {*asked}
                for name in asked:
                    own = [one for one in history if one.channel == name]
                    since = [late[name]] if name in op.manifest else [early[name], late[name]]
                    assert [one.write and one.write.value.data for one in own] == since, ascii(name)
                    assert own[-1].value_id == op.manifest.get(name), ascii(name)

    # -- writes and staged work ---------------------------------------------------------------------

    def test_the_first_regular_write_stays_and_special_ones_are_replaced(self, storage: Storage) -> None:
        commit(storage, checkpoint(1))
        commit(storage, writes(1, "b", (0, "x", b"1"), (1, "y", b"1"), (-1, "error", b"1"), path="~1"))
        commit(storage, writes(1, "b", (0, "x", b"2"), (2, "z", b"2"), (-1, "error", b"2"), path="~1"))
        commit(storage, writes(1, "a", (0, "x", b"3"), path="~2"), writes(1, "c", (0, "x", b"4"), path="~1"))
        with storage.snapshot() as reader:
            found = reader.checkpoint("t", "", None)
            assert found is not None
            assert [(one.task_id, one.idx, one.channel, one.value.data) for one in found.writes] == [
                ("b", -1, "error", b"2"), ("b", 0, "x", b"1"), ("b", 1, "y", b"1"), ("b", 2, "z", b"2"),
                ("c", 0, "x", b"4"), ("a", 0, "x", b"3"),
            ]  # fmt: skip
            assert {one.task_path for one in found.writes} == {"~1", "~2"}
        commit(storage, DropWrites(step(1), "b", (-1, 1, 7)))
        with storage.snapshot() as reader:
            assert stored(reader, "writes") == {"writes": 4}

    def test_a_large_write_and_a_list_that_has_its_value_stand_alone(self, storage: Storage) -> None:
        digest = digest_of(Blob("bytes", LARGE))
        commit(
            storage, checkpoint(1), writes(1, "a", (0, "l", LARGE)), writes(1, "b", (0, "l", LARGE), (-1, "e", LARGE))
        )
        fresh = {digest: Blob("bytes", LARGE)}
        commit(storage, checkpoint(2, parent=1, lists={"l": ("1", listed(digest))}, elements=fresh))
        more = listed(digest, base="1", keep=1, depth=2)
        commit(
            storage, checkpoint(3, parent=2, lists={"l": ("2", more)}, elements=fresh), writes(3, "c", (0, "l", LARGE))
        )

        def written(number: int) -> list[bytes]:
            found = reader.checkpoint(*step(number))
            assert found is not None
            return [one.value.data for one in found.writes]

        with storage.snapshot() as reader:
            assert (written(1), written(3)) == ([LARGE] * 3, [LARGE])
            assert [one.write and one.write.value.data for one in reader.ancestor_writes(step(2), ["l"])] == [LARGE] * 2
        commit(storage, DeleteCheckpoints((step(2), step(3))))
        with storage.snapshot() as reader:
            assert written(1) == [LARGE] * 3
            assert stored(reader, "lists") == {"lists": 0}
        commit(storage, checkpoint(2, parent=1, lists={"l": ("1", listed(digest))}, elements=fresh))
        commit(storage, DropWrites(step(1), "a", (0,)), DropWrites(step(1), "b", (0,)))
        with storage.snapshot() as reader:
            assert written(1) == [LARGE]
            assert read_list(reader, "1") == [LARGE]
        commit(storage, DeleteCheckpoints((step(2),)))
        with storage.snapshot() as reader:
            assert stored(reader, "lists", "elements", "writes") == {"lists": 0, "elements": 0, "writes": 1}

    def test_nothing_is_left_of_a_large_write_that_is_dropped(self, storage: Storage) -> None:
        commit(storage, checkpoint(1), writes(1, "a", (0, "x", LARGE), (1, "y", b"1")))
        commit(storage, writes(1, "a", (0, "x", LARGE + b"another"), (1, "y", LARGE)))  # the first stay
        with storage.snapshot() as reader:
            found = reader.checkpoint(*step(1))
            assert found is not None
            assert [one.value.data for one in found.writes] == [LARGE, b"1"]
        commit(storage, DropWrites(step(1), "a", (0,)))
        with storage.snapshot() as reader:
            assert stored(reader, "elements", "writes") == {"elements": 0, "writes": 1}

    def test_a_thread_of_large_writes_is_copied_deleted_and_put_again(self, storage: Storage) -> None:
        commit(storage, checkpoint(1), writes(1, "a", (0, "x", LARGE)))
        commit(storage, writes(1, "a", (0, "x", LARGE + b"old"), thread_id="copy"), CopyThread("t", "copy"))
        commit(storage, DeleteThread("t"))
        with storage.snapshot() as reader:
            assert reader.checkpoint("t", "", None) is None
            found = reader.checkpoint("copy", "", None)
            assert found is not None
            assert [one.value.data for one in found.writes] == [LARGE]
        commit(storage, writes(1, "a", (0, "x", LARGE)), checkpoint(1))
        with storage.snapshot() as reader:
            found = reader.checkpoint("t", "", None)
            assert found is not None
            assert [one.value.data for one in found.writes] == [LARGE]
        commit(storage, DeleteThread("t"), DeleteThread("copy"))
        with storage.snapshot() as reader:
            assert not any(stored(reader).values())

    def test_staged_work_waits_for_its_step(self, storage: Storage) -> None:
        landed, first, second, late = put("landed"), put("1"), put("2"), put("3")
        append(storage, landed)
        commit(storage, Stage(step(1), "b", "~1", (landed, first, second)), Stage(step(1), "a", "~2", (late,)))
        commit(storage, Stage(step(1), "b", "~1", (put("again"),)))
        with storage.snapshot() as reader:
            staged = reader.staged(step(1))
            assert [(one.task_id, one.task_path, one.draft) for one in staged] == [
                ("b", "~1", first), ("b", "~1", second), ("a", "~2", late),
            ]  # fmt: skip
            assert reader.staged(step(2)) == []
        with unchanged(storage), pytest.raises(CommitRaced):
            commit(storage, Drain(step(1), frozenset([first.version, late.version])), Append((first, late)))
        append(storage, second)
        commit(storage, Drain(step(1), frozenset([first.version, late.version])), Append((first, late)))
        with storage.snapshot() as reader:
            assert reader.staged(step(1)) == []
            assert [entry.key for entry in reader.log()] == ["landed", "2", "1", "3"]

    def test_staged_work_is_dropped(self, storage: Storage) -> None:
        commit(storage, *(Stage(step(1), task, "", (put(task),)) for task in "abc"), Stage(step(2), "a", "", (put(),)))
        commit(storage, Unstage(step(1), "a"))
        with storage.snapshot() as reader:
            assert [one.task_id for one in reader.staged(step(1))] == ["b", "c"]
        commit(storage, Unstage(step(1)))
        with storage.snapshot() as reader:
            assert reader.staged(step(1)) == []
            assert len(reader.staged(step(2))) == 1

    # -- walks --------------------------------------------------------------------------------------

    def test_pages_of_checkpoints(self, storage: Storage) -> None:
        for thread in ("t", "u"):
            commit(
                storage, *(checkpoint(number, thread_id=thread, parent=number - 1 or None) for number in range(1, 6))
            )
        commit(storage, checkpoint(3, checkpoint_ns="sub:1"))
        with storage.snapshot() as reader:

            def page(
                thread_id: str | None = None,
                checkpoint_ns: str | None = None,
                checkpoint_id: str | None = None,
                before: tuple[str, str, str] | str | None = None,
                limit: int = 100,
            ) -> list[StepKey]:
                found = reader.checkpoints(
                    thread_id=thread_id, checkpoint_ns=checkpoint_ns, checkpoint_id=checkpoint_id, before=before,
                    limit=limit,
                )  # fmt: skip
                return [one.step for one in found]

            every = page()
            assert len(every) == 11
            assert every == sorted(every, key=lambda key: (key.checkpoint_id, key.thread_id, key.checkpoint_ns))[::-1]
            seen: list[StepKey] = []
            while found := page(limit=2, before=(seen[-1][2], seen[-1][0], seen[-1][1]) if seen else None):
                seen += found
            assert seen == every
            assert page("t", "") == [step(number) for number in (5, 4, 3, 2, 1)]
            assert page("t", before=step(3).checkpoint_id) == [step(2), step(1)]
            assert page("t", checkpoint_id=step(3).checkpoint_id) == [step(3, "t", "sub:1"), step(3)]
            assert page("nobody") == []
            assert reader.checkpoint_namespaces("t") == ["", "sub:1"]
            assert reader.latest_id("t", "sub:1") == step(3).checkpoint_id
            assert reader.latest_id("t", "other") is None

    def test_ancestors_are_those_of_one_branch(self, storage: Storage) -> None:
        for number, parent in ((1, None), (2, 1), (3, 2), (4, 1), (6, 5)):
            commit(storage, checkpoint(number, parent=parent))
        with storage.snapshot() as reader:

            def ids(number: int | None) -> list[int]:
                wanted = None if number is None else step(number).checkpoint_id
                return [int(head.step.checkpoint_id) for head in reader.ancestors("t", "", wanted)]

            assert ids(3) == [3, 2, 1]
            assert ids(4) == [4, 1]
            assert ids(None) == [6]
            assert ids(9) == []
            assert [int(head.step.checkpoint_id) for head in reader.heads("t", "")] == [6, 4, 3, 2, 1]
            assert not list(reader.heads("nobody", ""))

    def test_writes_of_ancestors_up_to_the_nearest_value(self, storage: Storage) -> None:
        commit(storage, checkpoint(1, {"a": Blob("b", b"0")}), writes(1, "t1", (0, "a", b"1"), (1, "d", b"1")))
        commit(storage, checkpoint(2, {"a": Blob("b", b"9")}, parent=1), writes(2, "t2", (0, "a", b"2")))
        commit(storage, checkpoint(3, parent=2), writes(3, "t3", (0, "d", b"3"), (1, "d", b"4")))
        commit(storage, checkpoint(4, parent=3), writes(4, "t4", (0, "d", b"no")))
        with storage.snapshot() as reader:
            found = reader.ancestor_writes(step(4), ["a", "d"])
            by_channel = {
                channel: [
                    (one.value_id, one.write and (one.write.task_id, one.write.idx, one.write.value.data))
                    for one in found
                    if one.channel == channel
                ]
                for channel in ("a", "d")
            }
            assert by_channel == {
                "a": [(value_id(Blob("b", b"9")), ("t2", 0, b"2")), (None, None)],
                "d": [(None, ("t1", 1, b"1")), (None, None), (None, ("t3", 0, b"3")), (None, ("t3", 1, b"4"))],
            }
            assert reader.ancestor_writes(step(1), ["a"]) == []
            assert reader.ancestor_writes(step(9), ["a"]) == []

    # -- whole threads ------------------------------------------------------------------------------

    def test_a_deleted_thread_leaves_nothing(self, storage: Storage) -> None:
        self.grow(storage)
        commit(storage, writes(1, "x", (0, "a", b"")), Stage(step(3), "x", "", (put(),)))
        commit(storage, checkpoint(1, {"a": Blob("b", b"")}, thread_id="other"))
        commit(storage, DeleteThread("t"))
        commit(storage, DeleteThread("nobody"))
        with storage.snapshot() as reader:
            assert stored(reader) == dict(zip(THREAD_TABLES, (1, 1, 0, 0, 0, 0), strict=True))
            other = reader.checkpoint("other", "", None)
            assert other is not None
            assert len(reader.values("other", list(other.manifest.values()))) == 1

    def test_runs_are_deleted_with_what_only_they_used(self, storage: Storage) -> None:
        commit(storage, checkpoint(1, {"a": Blob("b", b"1")}, run_id="one"), writes(1, "x", (0, "a", b"")))
        commit(storage, checkpoint(2, {"a": Blob("b", b"2")}, run_id="two"))
        commit(storage, checkpoint(1, {"a": Blob("b", b"1")}, thread_id="u", run_id="one"))
        commit(storage, DeleteRuns(("one", "nobody")))
        with storage.snapshot() as reader:
            assert stored(reader, "checkpoints", "channel_values", "writes") == {
                "checkpoints": 1, "channel_values": 1, "writes": 0,
            }  # fmt: skip
            assert reader.latest_id("t", "") == step(2).checkpoint_id

    def test_a_copy_stands_alone(self, storage: Storage) -> None:
        self.grow(storage)
        draft = put("staged")
        value = checkpoint(4, {"a": Blob("b", b"1")}, parent=3, reused={"l": "3"}, run_id="run")
        commit(storage, value, writes(4, "x", (0, "a", b"w")), Stage(value.step, "x", "", (draft,)))
        commit(storage, checkpoint(4, {"old": Blob("b", b"gone")}, thread_id="copy"))
        commit(storage, CopyThread("t", "copy"), CopyThread("t", "t"))
        commit(storage, CopyThread("t", "copy"))
        with storage.snapshot() as reader:
            counts = stored(reader)
            assert counts == dict(zip(THREAD_TABLES, (8, 2, 6, 8, 2, 2), strict=True))
        commit(storage, DeleteThread("t"))
        with storage.snapshot() as reader:
            found = reader.checkpoint("copy", "", None)
            assert found is not None
            assert [one.value.data for one in found.writes] == [b"w"]
            assert reader.values("copy", list(found.manifest.values())) == value.values
            assert read_list(reader, "3", "copy") == [b"element a", b"element x"]
            assert read_list(reader, "2", "copy") == [b"element a", b"element b", b"element c"]
            assert [one.draft for one in reader.staged(found.step)] == [draft]

    def test_what_a_copy_landed_first_is_not_staged_any_more(self, storage: Storage) -> None:
        draft = put()
        commit(storage, checkpoint(1), Stage(step(1), "x", "", (draft,)), CopyThread("t", "copy"))
        commit(storage, Drain(step(1, "copy"), frozenset([draft.version])), Append((draft,)))
        with storage.snapshot() as reader:
            assert reader.staged(step(1)) == []
        commit(storage, Drain(step(1), frozenset()), Append((draft,)))
        with storage.snapshot() as reader:
            assert reader.last_seq() == 1
