"""The contract of a storage, as tests: subclass it, say how one is made, and run pytest.

    class TestMine(StorageContract):
        @pytest.fixture
        def make_storage(self, tmp_path):
            return lambda: MyStorage(tmp_path / "database")

Every call of what `make_storage` returns names the same database, which is new for each test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from langgraph_memstate.errors import CommitRaced, StorageClosedError, StorageError, TransientError
from langgraph_memstate.storage.base import COUNTED, Storage
from langgraph_memstate.storage.operations import (
    Append,
    Clear,
    Commit,
    CopyThread,
    DeleteCheckpoints,
    DeleteRuns,
    DeleteThread,
    Expect,
    Forget,
    Load,
    Op,
    OutboxDone,
    Prepare,
    PutEmbeddings,
    PutIndexMeta,
    PutVectors,
    QueueIndex,
    RebuildIndex,
    Settle,
    Stage,
    Touch,
    Unstage,
)
from langgraph_memstate.storage.values import Blob, OutboxRow, PreparedRow
from langgraph_memstate.testing.samples import (
    NOTES,
    NOW,
    append,
    checkpoint,
    commit,
    delete,
    elements,
    listed,
    put,
    step,
    unchanged,
    writes,
)
from langgraph_memstate.testing.storage_checkpoints import CheckpointContract
from langgraph_memstate.testing.storage_log import LogContract
from langgraph_memstate.testing.storage_rows import MARK, RowsContract
from langgraph_memstate.testing.storage_vectors import INDEX, META, MODEL, VectorContract, embedding, vector

MakeStorage = Callable[[], Storage]
FIRST = put("first")

CHANGES: dict[str, Op] = {
    "checkpoint": checkpoint(2, {"a": Blob("b", b"2")}, lists={"l": ("l", listed(b"x"))}, elements=elements(b"x")),
    "checkpoint again": checkpoint(1, {"a": Blob("b", b"2")}),
    "writes": writes(1, "another", (0, "a", b"1")),
    "stage": Stage(step(1), "another", "", (put("staged"),)),
    "unstage": Unstage(step(1)),
    "append": Append((put("first", {"n": 2}), put("x"))),
    "delete": Append((delete("first"),)),
    "embeddings": PutEmbeddings((embedding("new"),)),
    "vectors": PutVectors((vector(FIRST.version, "new", 1),), frozenset([INDEX])),
    "prepare": Prepare(PreparedRow("new", INDEX, ("x",), "me", NOW)),
    "settle": Settle("prepared"),
    "queue": QueueIndex(INDEX, (FIRST.version,), ("gone",)),
    "done": OutboxDone((OutboxRow(1, INDEX, "upsert", FIRST.version, FIRST.version, 0),)),
    "rebuild": RebuildIndex(INDEX),
    "meta": PutIndexMeta("another", "model", 2, 1),
    "touch": Touch(((NOTES, "mortal"),), NOW + 50),
    "forget": Forget(NOTES),
    "delete thread": DeleteThread("t"),
    "delete runs": DeleteRuns(("run",)),
    "copy": CopyThread("t", "copy"),
    "delete checkpoints": DeleteCheckpoints((step(1),)),
    "load": Load("embeddings", ((MODEL, b"moved", b"vector"),)),
    "clear": Clear(),
}
"""Operations that change what `filled` holds."""


class StorageContract(LogContract, CheckpointContract, VectorContract, RowsContract):
    """Needs one fixture of the subclass: `make_storage`."""

    is_durable = True
    """Whether what was closed can be opened again, also while another storage has it open."""

    @pytest.fixture
    def storage(self, make_storage: MakeStorage) -> Iterator[Storage]:
        made = make_storage()
        made.open()
        yield made
        made.close()

    @pytest.fixture
    def filled(self, storage: Storage) -> Storage:
        """A row in every table."""
        commit(storage, META, PutEmbeddings((embedding("text"),)))
        commit(storage, PutVectors((vector(FIRST.version),), frozenset([INDEX])), Append((FIRST,), (INDEX,)))
        append(storage, put("mortal", ttl=1.0))
        commit(storage, checkpoint(1, {"a": Blob("b", b"1")}, run_id="run"), writes(1, "task", (0, "a", b"1")))
        commit(storage, Stage(step(1), "task", "", (put("later"),)))
        commit(storage, Prepare(PreparedRow("prepared", INDEX, ("lost",), "me", NOW)), MARK)
        return storage

    # -- opening and closing ------------------------------------------------------------------------

    def test_the_id_stays_for_life(self, make_storage: MakeStorage) -> None:
        ids = []
        for _ in range(2):
            storage = make_storage()
            ids.append(storage.open())
            storage.close()
        assert ids[0]
        assert (ids[0] == ids[1]) is self.is_durable

    def test_open_twice_is_refused_and_closed_is_closed(self, make_storage: MakeStorage) -> None:
        storage = make_storage()
        storage.open()
        with pytest.raises(StorageError):
            storage.open()
        append(storage, put())
        storage.close()
        storage.close()
        with pytest.raises(StorageClosedError):
            storage.apply(((Append((put(),)),),))
        with pytest.raises(StorageClosedError), storage.snapshot():
            pytest.fail("a closed storage was read")

    def test_what_landed_is_there_when_opened_again(self, filled: Storage, make_storage: MakeStorage) -> None:
        if not self.is_durable:
            pytest.skip("gone when closed")
        with filled.snapshot() as reader:
            before = reader.counts(), list(reader.log()), reader.checkpoint("t", "", None)
        filled.close()
        again = make_storage()
        again.open()
        try:
            with again.snapshot() as reader:
                assert (reader.counts(), list(reader.log()), reader.checkpoint("t", "", None)) == before
                assert all(before[0].values()) or before[0]["lists"] == 0
            append(again, put("x"))
        finally:
            again.close()

    def test_many_open_a_new_database_at_once(self, make_storage: MakeStorage) -> None:
        if not self.is_durable:
            pytest.skip("a database of its own each")
        storages = [make_storage() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            ids = set(pool.map(lambda storage: storage.open(), storages))
        assert len(ids) == 1
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda storage: append(storage, put(delete().version)), storages))
        with storages[0].snapshot() as reader:
            assert [entry.seq for entry in reader.log()] == list(range(1, 9))
        for storage in storages:
            storage.close()

    # -- all or nothing -----------------------------------------------------------------------------

    def test_nothing_is_a_commit_too(self, storage: Storage) -> None:
        assert storage.apply(()) == []
        with unchanged(storage):
            assert storage.apply(((), (Append(()),), (PutEmbeddings(()), PutVectors((), frozenset())))) == [None] * 3

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_commit_that_fails_leaves_nothing(self, filled: Storage, name: str) -> None:
        before = _everything(filled)
        with pytest.raises(TransientError):
            commit(filled, CHANGES[name], Settle("unknown"))
        assert _everything(filled) == before
        commit(filled, CHANGES[name])
        assert _everything(filled) != before

    @pytest.mark.parametrize("name", CHANGES)
    def test_of_a_group_each_commit_stays_whole(self, filled: Storage, name: str) -> None:
        bad: Commit = (Append((put("bad"),)), Expect((), (step(7),)))
        group: tuple[Commit, ...] = (
            (Append((put("one"),)),), bad, (CHANGES[name], Settle("unknown")), (CHANGES[name],), bad,
            (Append((put("two"),)),),
        )  # fmt: skip
        outcomes = filled.apply(group)
        assert [type(outcome) for outcome in outcomes][:2] == [type(None), CommitRaced]
        assert isinstance(outcomes[2], TransientError)
        assert [type(outcome) for outcome in outcomes][3:] == [type(None), CommitRaced, type(None)]
        with filled.snapshot() as reader:
            seqs = [(entry.seq, entry.key) for entry in reader.log()]
            assert [seq for seq, _ in seqs] == list(range(1, len(seqs) + 1))
            expected = {"two"} if name == "clear" else {"one", "two"}
            assert expected <= {key for _, key in seqs}
            assert "bad" not in {key for _, key in seqs}

    def test_what_the_database_cannot_hold_hurts_nobody_else(self, storage: Storage) -> None:
        broken = put("\ud800")
        outcomes = storage.apply(((Append((put("a"),)),), (Append((broken,)),), (Append((put("b"),)),)))
        assert (outcomes[0], outcomes[2]) == (None, None)
        assert isinstance(outcomes[1], Exception)
        with storage.snapshot() as reader:
            assert [entry.key for entry in reader.log()] == ["a", "b"]

    def test_a_commit_sees_those_before_it_in_the_group(self, storage: Storage) -> None:
        draft = put()
        ops = [(Append((draft,)),), (Expect(((NOTES, "k", draft.version),)), Append((delete(),)))]
        assert storage.apply(ops) == [None, None]
        with storage.snapshot() as reader:
            assert reader.last_seq() == 2
            assert not list(reader.items((), NOW))

    # -- at the same time ---------------------------------------------------------------------------

    def test_a_snapshot_stays_while_commits_land(self, storage: Storage, make_storage: MakeStorage) -> None:
        """Two items that are always written together are always read together, however long the reader looks."""
        append(storage, put("a", {"n": 0}), put("b", {"n": 0}))
        done = threading.Event()
        faults: list[object] = []

        def read() -> None:
            while not done.is_set():
                with storage.snapshot() as reader:
                    left = reader.item(NOTES, "a", NOW)
                    seq = reader.last_seq()
                    right = next(record for record in reader.items(NOTES, NOW) if record.key == "b")
                    if left is None or left.value != right.value or len(list(reader.log())) != seq or seq % 2:
                        faults.append((left, right, seq))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 41):
            append(storage, put("a", {"n": number}), put("b", {"n": number}))
        done.set()
        for thread in threads:
            thread.join()
        assert faults == []

    def test_a_thread_may_hold_many_snapshots(self, storage: Storage) -> None:
        append(storage, put())

        def nested(_: int) -> int:
            with ExitStack() as stack:
                readers = [stack.enter_context(storage.snapshot()) for _ in range(3)]
                return sum(reader.last_seq() for reader in readers)

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(nested, range(64))) == [3] * 64

    def test_storages_that_write_at_once_number_one_log(self, make_storage: MakeStorage) -> None:
        if not self.is_durable:
            pytest.skip("a database of its own each")
        storages = [make_storage() for _ in range(3)]
        for storage in storages:
            storage.open()

        def write(storage: Storage) -> None:
            name = delete().version
            for number in range(15):
                commit(storage, checkpoint(number, {"a": Blob("b", b"%d" % number)}, thread_id=name))
                append(storage, put("shared", {"n": number}), put(f"{name}-{number}"))
                commit(storage, writes(number, "x", (0, "a", b""), thread_id="shared"), DeleteThread("nobody"))

        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(write, storages))
            with storages[0].snapshot() as reader:
                log = list(reader.log())
                assert [entry.seq for entry in log] == list(range(1, 91))
                assert all(log[index].commit_id == log[index + 1].commit_id for index in range(0, 90, 2))
                shared = [entry for entry in log if entry.key == "shared"]
                assert [entry.supersedes for entry in shared] == [None, *(entry.version for entry in shared[:-1])]
                assert reader.counts()["checkpoints"] == 45
                assert reader.counts()["items"] == 46
                times = [entry.ts for entry in log]
                assert reader.seq_at(max(time.timestamp() for time in times) * 2) == 90
        finally:
            for storage in storages:
                storage.close()

    # -- upkeep -------------------------------------------------------------------------------------

    def test_sizes_are_of_rows_and_follow_them(self, storage: Storage) -> None:
        with storage.snapshot() as reader:
            empty = reader.sizes()
        if not empty:
            return  # this storage does not tell
        assert empty.keys() == {*COUNTED, "total"}
        append(storage, *(put(f"{number}", {"text": "x" * 1000}) for number in range(20)))
        with storage.snapshot() as reader:
            sizes = reader.sizes()
        assert sizes["facts"] > empty["facts"]
        assert sizes["items"] > empty["items"]
        assert sizes["checkpoints"] == empty["checkpoints"]
        assert sizes["total"] >= sum(size for table, size in sizes.items() if table != "total") // 2

    def test_vacuum_loses_nothing(self, filled: Storage) -> None:
        before = _everything(filled)
        filled.vacuum()
        assert _everything(filled) == before
        append(filled, put("after"))


def _everything(storage: Storage) -> object:
    """All that a reader sees of `filled`, but for the numbers of rows."""
    with storage.snapshot() as reader:
        found = reader.checkpoint("t", "", None)
        return (
            reader.counts(),
            list(reader.log()),
            list(reader.items((), NOW)),
            [(row.op, row.vector_id, row.version, row.attempts) for row in reader.outbox(INDEX, due=None, limit=100)],
            found,
            None if found is None else reader.values("t", list(found.manifest.values())),
            reader.staged(step(1)),
            reader.prepared(),
            sorted(reader.vector_ids(INDEX)),
            reader.vector_mark().epoch,
            reader.index_meta("another"),
        )
