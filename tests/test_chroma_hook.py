"""ChromaSyncHook against real Chroma: in memory, in a directory, and behind a server started from the wheel."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromadb
import numpy as np
import pytest
from chromadb.errors import ChromaError, InternalError, InvalidArgumentError, NotFoundError
from chromadb.utils.embedding_functions import register_embedding_function
from langchain_chroma import Chroma
from langchain_core.embeddings import DeterministicFakeEmbedding

from langgraph_memstate.errors import IndexConfigError, VectorSyncError
from langgraph_memstate.hooks.base import IndexSpec, IndexState, VectorRecord
from langgraph_memstate.hooks.chroma import ChromaSyncHook

ROOT = Path(__file__).parents[1]
DIMS = 8
SPEC = IndexSpec("store", 1, DIMS, "model")
LOGGER = "langgraph_memstate.hooks.chroma"
MakeHook = Callable[..., ChromaSyncHook]
_names = (f"hook-test-{number}" for number in itertools.count())


def axis(number: int, towards: int | None = None, share: float = 0.0) -> np.ndarray:
    """A unit vector along one axis, leaning a little towards another."""
    vector = np.zeros(DIMS, np.float32)
    vector[number] = 1.0
    if towards is not None:
        vector[towards] = share
    return vector / np.linalg.norm(vector)


def record(id_: str, number: int = 0, namespace: tuple[str, ...] = ("users", "u1"), **rest: Any) -> VectorRecord:
    vector = rest.pop("vector", axis(number % DIMS))
    return VectorRecord(id_, vector, namespace, **rest)


def many(count: int) -> list[VectorRecord]:
    random = np.random.default_rng(count)
    vectors = random.normal(size=(count, DIMS)).astype(np.float32)
    return [record(f"r{n}", vector=v / np.linalg.norm(v)) for n, v in enumerate(vectors)]


def python(script: str, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the names of this module's imports at hand."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


PRELUDE = """
import os, signal, sys, time
import numpy as np
from langgraph_memstate.errors import VectorSyncError
from langgraph_memstate.hooks.base import IndexSpec, IndexState, VectorRecord
from langgraph_memstate.hooks.chroma import ChromaSyncHook
from langgraph_memstate.hooks.chroma_directory import ChromaDirectory
SPEC = IndexSpec("store", 1, 8, "model")
def records(count):
    vectors = np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [VectorRecord(f"r{n}", v, ("users", "u1")) for n, v in enumerate(vectors)]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Chroma server on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [Path(sys.executable).with_name("chroma"), "run", "--path", folder / "data", "--port", str(port)]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log) as process,
    ):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            process.kill()
            pytest.fail(f"the Chroma server did not start: {(folder / 'log').read_text()}")
        yield port
        process.terminate()


def connect(port: int) -> Any:
    return chromadb.HttpClient(host="127.0.0.1", port=port)


def disconnect(client: Any) -> None:
    """Close a client, and the connections that Chroma leaves open when it closes one to a server."""
    client.close()
    for api in (client._server, client._admin_client._server):
        if hasattr(api, "_session"):
            api._session.close()


@pytest.fixture
def served(server: int) -> Iterator[Any]:
    client = connect(server)
    yield client
    disconnect(client)


@pytest.fixture(params=["ephemeral", "persistent", "path", "server"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeHook]:
    """Makes hooks on one collection; each call stands for a restart, which closes the hook before."""
    name = next(_names)
    hooks: list[ChromaSyncHook] = []
    clients: list[Any] = []

    def client() -> Any:
        if request.param == "ephemeral":
            return chromadb.EphemeralClient()
        if request.param == "persistent":
            return chromadb.PersistentClient(tmp_path / "chroma")
        return connect(request.getfixturevalue("server"))

    def make_hook(**arguments: Any) -> ChromaSyncHook:
        for hook in hooks:
            hook.close()
        if request.param == "path":
            hooks.append(ChromaSyncHook(path=tmp_path / "chroma", collection_name=name, **arguments))
        else:
            clients.append(client())
            hooks.append(ChromaSyncHook(clients[-1], name, **arguments))
        return hooks[-1]

    yield make_hook
    for hook in hooks:
        hook.close()
    for made in clients:
        disconnect(made)


@pytest.fixture
def hook(make: MakeHook) -> ChromaSyncHook:
    hook = make()
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    return hook


@pytest.fixture
def ephemeral() -> Iterator[Any]:
    with chromadb.EphemeralClient() as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "chroma"


@pytest.fixture
def in_folder(folder: Path) -> Iterator[MakeHook]:
    """Makes hooks with a directory of their own; closes them."""
    hooks: list[ChromaSyncHook] = []

    def make_hook(**arguments: Any) -> ChromaSyncHook:
        hooks.append(ChromaSyncHook(path=folder, **arguments))
        return hooks[-1]

    yield make_hook
    for hook in hooks:
        hook.close()


def filled(hook: ChromaSyncHook, count: int = 3) -> ChromaSyncHook:
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    hook.apply(many(count), [])
    return hook


def collection_id(hook: ChromaSyncHook) -> str:
    collection = hook._collection
    assert collection is not None
    return str(collection.id)


# -- what every Chroma does ---------------------------------------------------------------------------


def test_applying_twice_is_applying_once(hook: ChromaSyncHook) -> None:
    batch = [record("a", 0), record("b", 1)]
    for _ in range(2):
        hook.apply(batch, ["gone", "never-there"])
    hook.apply([record("c", 2), record("c", 2)], [])
    assert sorted(hook.ids()) == ["a", "b", "c"]
    for _ in range(2):
        hook.apply([], ["b", "b"])
    assert sorted(hook.ids()) == ["a", "c"]
    assert hook.count() == 2


def test_an_upsert_and_a_delete_of_one_id_leave_nothing(hook: ChromaSyncHook) -> None:
    hook.apply([record("a")], ["a"])
    assert list(hook.ids()) == []
    assert hook.query(axis(0), 5) == []


def test_more_than_a_batch_and_more_than_a_page(hook: ChromaSyncHook) -> None:
    hook.apply(many(1130), [])
    assert hook.count() == 1130
    assert sorted(hook.ids()) == sorted(f"r{n}" for n in range(1130))
    hook.apply([], [f"r{n}" for n in range(1100)])
    assert sorted(hook.ids()) == sorted(f"r{n}" for n in range(1100, 1130))


def test_nearest_first_and_k_beyond_the_count(hook: ChromaSyncHook) -> None:
    hook.apply([record("far", 3), record("near", vector=axis(0, 1, 0.2)), record("exact", 0)], [])
    assert hook.query(axis(0), 2) == ["exact", "near"]
    assert hook.query(axis(0), 1000) == ["exact", "near", "far"]
    assert hook.query(axis(0), 0) == []


def test_an_empty_collection_answers(hook: ChromaSyncHook) -> None:
    assert hook.query(axis(0), 10) == []
    assert hook.query(axis(0), 10, ("users",)) == []
    assert (hook.count(), list(hook.ids())) == (0, [])
    hook.apply([record("a")], [])
    hook.apply([], ["a"])
    assert hook.query(axis(0), 10, ("users",)) == []


AWKWARD = [
    ("a",),
    ("ab",),
    ("a", "b"),
    ("a.b",),
    ("a\x1f",),
    ("a\x1fb",),
    ("a\x1b", "u"),
    ("a\x1bu",),
    ("%",),
    ("_",),
    ("a*", "b"),
    ("A",),
    ("a ", "b"),
    ("\x00", "b"),
    ("é",),
    ("e\u0301",),
    ("$eq",),
    ("💾" * 300, "b"),
]


def test_namespaces_cannot_be_confused(hook: ChromaSyncHook) -> None:
    hook.apply([record(str(n), 0, namespace) for n, namespace in enumerate(AWKWARD)], [])
    for prefix in AWKWARD:
        under = {str(n) for n, namespace in enumerate(AWKWARD) if namespace[: len(prefix)] == prefix}
        assert set(hook.query(axis(0), 100, prefix)) == under, prefix
    assert hook.query(axis(0), 100, ("nowhere",)) == []
    assert len(hook.query(axis(0), 100)) == len(AWKWARD)


def test_deep_namespaces(hook: ChromaSyncHook) -> None:
    path = tuple(f"level {depth}" for depth in range(40))
    hook.apply([record(str(depth), 0, path[:depth]) for depth in range(1, 41)], [])
    for depth in (1, 2, 17, 39, 40):
        assert set(hook.query(axis(0), 100, path[:depth])) == {str(n) for n in range(depth, 41)}
    assert hook.query(axis(0), 100, (*path, "below")) == []


def test_metadata_and_documents(make: MakeHook) -> None:
    hook = make(metadata_fields=["role", "score", "ok", "size"], store_documents=True)
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    told: dict[str, Any] = {"role": "user", "score": 0.5, "ok": True, "size": -7}
    hook.apply([record("a", metadata=told, document="likes tea"), record("b"), record("c", document="")], [])
    hook.apply([record("huge", metadata={"size": 10**400, "role": "x"})], [])
    assert hook._collection is not None
    held = hook._collection.get(["a", "b", "c", "huge"])
    documents = dict(zip(held["ids"], held["documents"] or (), strict=True))
    metadatas = dict(zip(held["ids"], held["metadatas"] or (), strict=True))
    assert documents == {"a": "likes tea", "b": None, "c": "", "huge": None}
    assert metadatas["a"] == {**told, "ns0": "users\x1f", "ns1": "users\x1fu1\x1f"}
    assert metadatas["huge"] == {"role": "x", "ns0": "users\x1f", "ns1": "users\x1fu1\x1f"}


def test_a_metadata_field_may_be_called_like_ours(make: MakeHook) -> None:
    hook = make(metadata_fields=("ns0",))
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    hook.apply([record("a", 0, ("x",), metadata={"ns0": "y\x1f"}), record("b", 0, ("y",))], [])
    assert hook.query(axis(0), 9, ("x",)) == ["a"]
    assert hook.query(axis(0), 9, ("y",)) == ["b"]
    assert hook._collection is not None
    assert hook._collection.get("a")["metadatas"] == [{"ns0": "y\x1f", "_memstate_ns0": "x\x1f"}]
    assert sorted(hook.ids()) == ["a", "b"]
    assert make().open(SPEC) is IndexState.MISMATCH  # written under other keys


def test_states(make: MakeHook) -> None:
    hook = make()
    assert hook.open(SPEC) is IndexState.EMPTY
    with pytest.raises(VectorSyncError, match="rebuilt"):
        hook.count()
    hook.reset(SPEC)
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.apply([record("a")], [])
    assert hook.open(SPEC) is IndexState.OK
    hook = make()
    assert hook.open(SPEC) is IndexState.OK
    assert list(hook.ids()) == ["a"]
    for other in (
        IndexSpec("another", 1, DIMS, "model"),
        IndexSpec("store", 2, DIMS, "model"),
        IndexSpec("store", 1, 16, "model"),
        IndexSpec("store", 1, DIMS, ""),
    ):
        assert hook.open(other) is IndexState.MISMATCH
        with pytest.raises(VectorSyncError, match="rebuilt"):
            hook.apply([record("b")], [])
    assert hook.open(SPEC) is IndexState.OK
    hook.reset(IndexSpec("store", 2, 3, "model"))
    assert hook.count() == 0
    hook.apply([record("b", vector=np.array([0, 1, 0], np.float32))], [])
    assert make().open(IndexSpec("store", 2, 3, "model")) is IndexState.OK


def test_our_own_settings(hook: ChromaSyncHook) -> None:
    assert hook._collection is not None
    found = hook._collection.configuration_json
    assert (
        found["hnsw"].items()
        >= {
            "space": "cosine",
            "ef_search": 200,
            "max_neighbors": 32,
            "sync_threshold": 1000,
        }.items()
    )
    assert found["embedding_function"] == {"type": "legacy"}  # Chroma's word for none
    assert hook.capabilities.multiprocess == (hook.capabilities.max_batch == 250)
    assert hook.capabilities.max_batch in (50, 250)


def test_a_collection_deleted_behind_our_back(hook: ChromaSyncHook) -> None:
    hook.apply([record("a")], [])
    hook._client.delete_collection(hook._collection_name)
    for call in (
        lambda: hook.apply([record("b")], []),
        lambda: hook.apply([], ["a"]),
        lambda: hook.query(axis(0), 3),
        lambda: list(hook.ids()),
        hook.count,
    ):
        with pytest.raises(NotFoundError):
            call()
    assert hook.open(SPEC) is IndexState.EMPTY
    hook.reset(SPEC)
    hook.apply([record("c")], [])
    assert hook.query(axis(0), 3) == ["c"]


def test_a_refused_record_does_no_harm(hook: ChromaSyncHook) -> None:
    hook.apply([record("a")], [])
    with pytest.raises(InvalidArgumentError):
        hook.apply([record("b", vector=np.ones(3, np.float32))], [])
    with pytest.raises((ChromaError, ValueError)):
        hook.apply([record("c", vector=np.full(DIMS, np.nan, np.float32))], [])
    assert hook.open(SPEC) is IndexState.OK
    assert list(hook.ids()) == ["a"]


def test_a_closed_hook_says_so(hook: ChromaSyncHook) -> None:
    hook.close()
    hook.close()
    with pytest.raises(VectorSyncError, match="closed"):
        hook.count()
    with pytest.raises(VectorSyncError, match="closed"):
        hook.reset(SPEC)
    with pytest.raises(VectorSyncError, match="closed"):
        hook.open(SPEC)


def test_two_clients_share_a_server(server: int, served: Any) -> None:
    name, other = next(_names), connect(server)
    first, second = ChromaSyncHook(served, name), ChromaSyncHook(other, name)
    assert first.capabilities.multiprocess
    filled(first)
    assert second.open(SPEC) is IndexState.OK
    second.apply([record("x")], ["r0"])
    assert sorted(first.ids()) == ["r1", "r2", "x"]
    disconnect(other)


def test_two_clients_that_start_at_once(server: int, served: Any) -> None:
    name, other = next(_names), connect(server)
    first, second = ChromaSyncHook(served, name), ChromaSyncHook(other, name)
    assert (first.open(SPEC), second.open(SPEC)) == (IndexState.EMPTY, IndexState.EMPTY)
    first.reset(SPEC)
    second.reset(SPEC)  # what the first has made serves both
    first.apply([record("a")], [])
    second.apply([record("b")], [])
    assert sorted(first.ids()) == sorted(second.ids()) == ["a", "b"]
    disconnect(other)


# -- the user's objects -------------------------------------------------------------------------------


@register_embedding_function
class Letters(chromadb.EmbeddingFunction):  # type: ignore[type-arg]
    """Counts letters; stands for an embedding function that somebody chose."""

    def __init__(self) -> None:
        self.model_name = "letters"

    def __call__(self, input: list[str]) -> Any:
        return [np.array([text.count(letter) for letter in "abcdefgh"], np.float32) for text in input]

    @staticmethod
    def name() -> str:
        return "memstate_test_letters"

    def get_config(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> Letters:
        return Letters()


def test_the_public_example(ephemeral: Any) -> None:
    name = next(_names)
    hook = ChromaSyncHook(client=ephemeral, collection_name=name, text_field="content", metadata_fields=["role"])
    filled(hook)
    assert (hook.name, hook.fields, hook.metadata_fields) == (f"chroma:{name}", ("content",), ("role",))
    assert hook.embedding is None
    assert ephemeral.get_collection(name).count() == 3
    hook.close()
    assert ephemeral.get_collection(name).count() == 3  # the user's client stays open


def test_a_foreign_collection_is_refused_by_name(ephemeral: Any) -> None:
    name = next(_names)
    theirs = ephemeral.create_collection(name, embedding_function=None)
    theirs.add(["doc"], embeddings=[axis(0)], documents=["theirs"])
    hook = ChromaSyncHook(ephemeral, name)
    with pytest.raises(IndexConfigError, match=f"{name}.*collection_name"):
        hook.open(SPEC)
    with pytest.raises(IndexConfigError, match=name):
        hook.reset(SPEC)
    assert theirs.get()["documents"] == ["theirs"]
    assert (theirs.count(), ephemeral.get_collection(name).metadata) == (1, None)


@pytest.mark.parametrize("kind", ["collection", "langchain"])
def test_beside_a_foreign_collection(ephemeral: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    name = next(_names)
    embeddings = DeterministicFakeEmbedding(size=DIMS)
    store = Chroma(name, embeddings, client=ephemeral)
    store.add_texts(["theirs"], ids=["doc"])
    theirs = ephemeral.get_collection(name, embedding_function=None)
    hook = ChromaSyncHook(theirs if kind == "collection" else store)
    assert hook.name == f"chroma:{name}"
    assert hook.embedding is (embeddings if kind == "langchain" else None)
    with caplog.at_level(logging.WARNING, LOGGER):
        filled(hook)
        assert hook.open(SPEC) is IndexState.OK
        assert hook.open(IndexSpec("store", 2, DIMS, "model")) is IndexState.MISMATCH
        hook.reset(IndexSpec("store", 2, DIMS, "model"))
    assert [entry.message for entry in caplog.records] == [
        f"Chroma collection {name} holds other records and is left alone; "
        f"the vectors of this memory go to {name}-memstate"
    ]
    assert hook.count() == 0
    assert (theirs.get()["ids"], theirs.get()["documents"]) == (["doc"], ["theirs"])
    assert ephemeral.get_collection(f"{name}-memstate").metadata["memstate:generation"] == 2
    hook.close()
    theirs.delete(["doc"])  # ours stays where it is, even when theirs becomes empty
    again = ChromaSyncHook(theirs if kind == "collection" else store)
    assert again.open(IndexSpec("store", 2, DIMS, "model")) is IndexState.EMPTY
    again.reset(IndexSpec("store", 2, DIMS, "model"))
    again.apply([record("a")], [])
    assert theirs.count() == 0
    assert ephemeral.get_collection(f"{name}-memstate").count() == 1
    again.close()


@pytest.mark.parametrize("kind", ["client", "collection", "langchain"])
def test_an_empty_collection_is_adopted_and_never_dropped(ephemeral: Any, kind: str) -> None:
    name = next(_names)
    theirs = ephemeral.create_collection(name, embedding_function=None, metadata={"hnsw:space": "l2", "team": "red"})
    given = {"client": ephemeral, "collection": theirs, "langchain": Chroma(name, client=ephemeral)}[kind]
    hook = ChromaSyncHook(given, name)
    filled(hook)
    assert theirs.count() == 3
    found = ephemeral.get_collection(name)
    assert found.id == theirs.id
    assert found.metadata["team"] == "red"
    theirs.add(["doc"], embeddings=[axis(0)], documents=["theirs"], metadatas=[{"ns0": "theirs"}])
    assert (hook.count(), sorted(hook.ids())) == (3, ["r0", "r1", "r2"])
    newer = IndexSpec("store", 2, DIMS, "model")
    assert hook.open(newer) is IndexState.MISMATCH
    hook.reset(newer)
    assert theirs.get()["ids"] == ["doc"]
    hook.apply([record("a")], [])
    assert hook.open(newer) is IndexState.OK
    assert ephemeral.get_collection(name).id == theirs.id
    wider = IndexSpec("store", 3, 16, "model")
    assert hook.open(wider) is IndexState.MISMATCH
    hook.reset(wider)  # their collection cannot hold these
    hook.apply([record("wide", vector=np.full(16, 0.25, np.float32))], [])
    assert hook.open(wider) is IndexState.OK
    assert theirs.get()["ids"] == ["doc"]
    assert ephemeral.get_collection(f"{name}-memstate").get()["ids"] == ["wide"]
    hook.close()


def test_a_foreign_collection_in_the_place_beside(ephemeral: Any) -> None:
    name = next(_names)
    theirs = [ephemeral.create_collection(each, embedding_function=None) for each in (name, f"{name}-memstate")]
    for each in theirs:
        each.add(["doc"], embeddings=[axis(0)])
    hook = ChromaSyncHook(theirs[0])
    assert hook.open(SPEC) is IndexState.EMPTY
    with pytest.raises(IndexConfigError, match=f"{name}-memstate.*collection_name"):
        hook.reset(SPEC)
    assert [each.get()["ids"] for each in theirs] == [["doc"], ["doc"]]
    assert [ephemeral.get_collection(each.name).metadata for each in theirs] == [None, None]


def test_a_name_of_its_own_beside_an_object(ephemeral: Any) -> None:
    store = Chroma(next(_names), client=ephemeral)
    name = next(_names)
    hook = ChromaSyncHook(store, name)
    filled(hook)
    assert ephemeral.get_collection(name).count() == 3
    assert store._collection.count() == 0


def test_a_collection_behind_a_server(served: Any) -> None:
    theirs = served.create_collection(next(_names), embedding_function=None)
    hook = ChromaSyncHook(theirs)
    assert hook.capabilities.multiprocess
    filled(hook)
    hook.close()
    assert theirs.count() == 3


def test_the_embedding_function_of_a_collection(ephemeral: Any) -> None:
    chosen, default, none = next(_names), next(_names), next(_names)
    letters = ephemeral.create_collection(chosen, embedding_function=Letters())
    plain = ephemeral.create_collection(default)
    ephemeral.create_collection(none, embedding_function=None)
    for given in (ChromaSyncHook(ephemeral, chosen), ChromaSyncHook(letters)):
        assert np.array_equal(given.embedding(["aab"]), [[2, 1, 0, 0, 0, 0, 0, 0]])
        assert given.embedding.model == "letters"
        given.close()
    for given in (ephemeral, plain):  # never the one that downloads a model
        assert ChromaSyncHook(given, default).embedding is None
    assert ChromaSyncHook(ephemeral, none).embedding is None
    assert ChromaSyncHook(ephemeral, chosen, embedding=len).embedding is len


def test_arguments_that_do_not_fit(ephemeral: Any, tmp_path: Path) -> None:
    with pytest.raises(IndexConfigError, match="client"):
        ChromaSyncHook()
    with pytest.raises(IndexConfigError, match="not both"):
        ChromaSyncHook(ephemeral, path=tmp_path)
    with pytest.raises(IndexConfigError, match="collection_name"):
        ChromaSyncHook(ephemeral, "no spaces")
    with pytest.raises(IndexConfigError, match="'role'"):
        ChromaSyncHook(ephemeral, metadata_fields="role")
    for reserved in ("chroma:document", "#embedding", "$and", "", 7):
        with pytest.raises(IndexConfigError, match="metadata_fields"):
            ChromaSyncHook(ephemeral, metadata_fields=["fine", reserved])  # type: ignore[list-item]
    with pytest.raises(IndexConfigError, match="Path"):
        ChromaSyncHook(tmp_path)


async def test_an_async_client_is_refused(server: int) -> None:
    client = await chromadb.AsyncHttpClient(host="127.0.0.1", port=server)
    with pytest.raises(IndexConfigError, match="async"):
        ChromaSyncHook(client)
    await client._server._cleanup()  # type: ignore[attr-defined]


def test_chromadb_is_imported_when_a_hook_is_made(folder: Path) -> None:
    script = """
assert "chromadb" not in sys.modules
ChromaSyncHook(path=sys.argv[1])
assert "chromadb" in sys.modules
"""
    done = python(script, folder)
    assert done.returncode == 0, done.stderr
    assert not folder.exists()  # a hook touches nothing before it is opened


# -- one process a directory --------------------------------------------------------------------------

OWNER = """
if sys.argv[2] == "path":
    hook = ChromaSyncHook(path=sys.argv[1])
else:
    import chromadb
    hook = ChromaSyncHook(chromadb.PersistentClient(sys.argv[1]))
assert hook.open(SPEC) is IndexState.EMPTY
hook.reset(SPEC)
hook.apply(records(3), [])
print("ready", flush=True)
sys.stdin.read()
hook.close()
"""


@pytest.mark.parametrize("owner", ["path", "client"])
@pytest.mark.parametrize("end", ["closes", "is killed"])
def test_busy_while_another_process_owns_it(
    folder: Path, in_folder: MakeHook, owner: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", PRELUDE + OWNER, str(folder), owner]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        hook = in_folder()
        with caplog.at_level(logging.WARNING, LOGGER):
            assert hook.open(SPEC) is IndexState.BUSY
            assert hook.open(SPEC) is IndexState.BUSY
        assert hook._client is None  # Chroma was not touched
        assert [f"chroma run --path {folder}" in entry.message for entry in caplog.records] == [True]
        for call in (lambda: hook.apply([record("x")], []), hook.count, lambda: hook.reset(SPEC)):
            with pytest.raises(VectorSyncError, match="another process owns it"):
                call()
        if end == "closes":
            process.communicate()
        else:
            process.kill()
            process.wait()
    assert hook.open(SPEC) is IndexState.OK
    assert sorted(hook.ids()) == ["r0", "r1", "r2"]


def test_busy_for_a_client_of_the_user(folder: Path, in_folder: MakeHook) -> None:
    filled(in_folder())
    script = """
import chromadb
hook = ChromaSyncHook(chromadb.PersistentClient(sys.argv[1]))
print(hook.open(SPEC), hook.capabilities.multiprocess)
"""
    done = python(script, folder)
    assert done.stdout == "IndexState.BUSY False\n", done.stderr


def test_hooks_of_one_process_share_the_directory(folder: Path, in_folder: MakeHook) -> None:
    def owned() -> str:
        return python("print(ChromaDirectory.acquire(sys.argv[1]) is None)", folder).stdout.strip()

    first, second = filled(in_folder(collection_name="one")), filled(in_folder(collection_name="two"))
    third = in_folder(collection_name="one")
    assert third.open(SPEC) is IndexState.OK
    assert first._client is second._client
    first.close()
    third.close()
    assert owned() == "True"
    second.apply([record("x")], [])
    assert second.count() == 4
    shutil.copytree(folder, folder.with_name("backup"))  # reading the lock file does not unlock it
    assert owned() == "True"
    with chromadb.PersistentClient(folder) as users:  # the user may look, through the same client
        assert users.get_collection("two").count() == 4
    second.close()
    assert owned() == "False"


def test_a_link_to_the_directory_is_the_same_directory(folder: Path, in_folder: MakeHook) -> None:
    hook = filled(in_folder())
    link = folder.with_name("link")
    link.symlink_to(folder)
    with_link = ChromaSyncHook(path=link)
    assert with_link.open(SPEC) is IndexState.OK
    assert with_link._client is hook._client
    with_link.close()


FORK = """
import chromadb
if sys.argv[2] == "path":
    hook = ChromaSyncHook(path=sys.argv[1])
elif sys.argv[2] == "persistent":
    hook = ChromaSyncHook(chromadb.PersistentClient(sys.argv[1]))
else:
    hook = ChromaSyncHook(chromadb.EphemeralClient())
assert hook.open(SPEC) is IndexState.EMPTY
hook.reset(SPEC)
hook.apply(records(3), [])

def in_child():
    assert hook.open(SPEC) is IndexState.BUSY
    one = records(1)
    for call in (
        hook.count,
        lambda: hook.query(one[0].vector, 1),
        lambda: hook.apply(one, []),
        lambda: hook.reset(SPEC),
    ):
        try:
            call()
        except VectorSyncError as error:
            assert "fork" in str(error)
        else:
            raise AssertionError("no error")
    if sys.argv[2] != "ephemeral":
        assert ChromaSyncHook(path=sys.argv[1]).open(SPEC) is IndexState.BUSY
    hook.close()

child = os.fork()
if child == 0:
    code = 1
    try:
        in_child()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)
assert os.waitpid(child, 0)[1] == 0
hook.apply(records(5), [])  # the parent goes on, and still owns the directory
assert hook.count() == 5
if sys.argv[2] != "ephemeral":
    import subprocess
    probe = (
        "import sys; from langgraph_memstate.hooks.chroma_directory import ChromaDirectory; "
        "sys.exit(ChromaDirectory.acquire(sys.argv[1]) is None)"
    )
    assert subprocess.run([sys.executable, "-c", probe, sys.argv[1]]).returncode == 1
hook.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("kind", ["path", "persistent", "ephemeral"])
def test_a_forked_process_is_told_instead_of_hanging(folder: Path, kind: str) -> None:
    done = python(FORK, folder, kind, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_keep_the_directory(folder: Path) -> None:
    script = """
assert ChromaDirectory.acquire(sys.argv[1])
child = os.fork()
if child == 0:
    os.close(1), os.close(2)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    child = int(python(script, folder).stdout)
    try:
        assert python("print(ChromaDirectory.acquire(sys.argv[1]) is None)", folder).stdout == "False\n"
        os.kill(child, 0)  # it still runs
    finally:
        os.kill(child, signal.SIGKILL)


# -- writers that do not finish -----------------------------------------------------------------------

KILLED = """
import chromadb
hook = ChromaSyncHook(path=sys.argv[1])
assert hook.open(SPEC) is IndexState.EMPTY
hook.reset(SPEC)
hook.apply(records(int(sys.argv[2])), [])
add, calls = chromadb.Collection.add, []
def dying(*args, **kwargs):
    add(*args, **kwargs)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "during":
    chromadb.Collection.add = dying
    hook.apply(records(150), [])
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder: Path, count: int, when: str) -> None:
    done = python(KILLED, folder, count, when)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_in_a_write(folder: Path, in_folder: MakeHook) -> None:
    killed(folder, 10, "during")
    for _ in range(2):  # as long as it is not rebuilt
        hook = in_folder()
        assert hook.open(SPEC) is IndexState.SUSPECT
        with pytest.raises(VectorSyncError, match="rebuilt"):
            hook.count()
        hook.close()
    hook = in_folder()
    newer = IndexSpec("store", 2, DIMS, "model")
    assert hook.open(newer) is IndexState.SUSPECT
    hook.reset(newer)
    hook.apply(many(120), [])
    assert hook.open(newer) is IndexState.OK
    assert hook.count() == 120
    hook.close()
    assert in_folder().open(newer) is IndexState.OK


def test_killed_between_writes(folder: Path, in_folder: MakeHook) -> None:
    killed(folder, 60, "after")
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.OK
    assert hook.count() == 60


@pytest.mark.skipif(not Path("/proc/sys/kernel/random/boot_id").exists(), reason="no boot id to compare here")
def test_the_machine_went_down(folder: Path, in_folder: MakeHook) -> None:
    def reboot() -> int:
        marked = list(folder.glob("BOOT-*"))
        for marker in marked:
            marker.write_text("the boot before")
        return len(marked)

    killed(folder, 10, "after")
    assert reboot() == 1
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.close()
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    hook.apply(many(3), [])
    hook.close()
    assert reboot() == 0  # closed in order: everything is on the disk
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.OK
    hook.close()
    assert reboot() == 0


@pytest.mark.parametrize("damage", ["header.bin", "index_metadata.pickle", "everything"])
def test_damaged_files_are_never_loaded(folder: Path, in_folder: MakeHook, damage: str) -> None:
    """A truncated header kills every process that loads it, so this runs in processes of their own."""
    killed(folder, 1100, "during")
    (segment,) = (header.parent for header in folder.glob("*/header.bin"))
    if damage == "everything":
        shutil.rmtree(segment)
    else:
        os.truncate(segment / damage, (segment / damage).stat().st_size // 2)
    if damage == "header.bin":
        loading = "import chromadb; print(chromadb.PersistentClient(sys.argv[1]).get_collection('memory').count())"
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        assert python(loading, copy).returncode != 0  # or this test would prove nothing
    script = """
hook = ChromaSyncHook(path=sys.argv[1])
assert hook.open(SPEC) is IndexState.SUSPECT
hook.reset(SPEC)
hook.apply(records(1100), [])
assert hook.open(SPEC) is IndexState.OK
assert len(hook.query(records(1100)[7].vector, 1100)) == 1100
hook.close()
"""
    done = python(script, folder)
    assert done.returncode == 0, done.stderr
    assert not segment.exists()  # Chroma itself leaves the files of a dropped collection
    assert len(list(folder.glob("*/header.bin"))) == 1
    assert in_folder().open(SPEC) is IndexState.OK


def test_vector_files_deleted_while_closed(folder: Path, in_folder: MakeHook) -> None:
    """Chroma opens such a collection without a word, short of everything it had written to those files."""
    hook = filled(in_folder(), 1100)
    hook.close()
    (segment,) = (header.parent for header in folder.glob("*/header.bin"))
    shutil.rmtree(segment)
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    hook.apply(many(20), [])
    assert hook.open(SPEC) is IndexState.OK


def test_a_directory_deleted_while_closed(folder: Path, in_folder: MakeHook) -> None:
    hook = filled(in_folder())
    hook.close()
    shutil.rmtree(folder)
    assert filled(in_folder()).count() == 3


def test_unreadable_vector_files_without_a_marker(folder: Path, in_folder: MakeHook) -> None:
    hook = filled(in_folder(), 1100)
    hook.close()
    (segment,) = (header.parent for header in folder.glob("*/header.bin"))
    (segment / "index_metadata.pickle").write_bytes(b"\x80\x04garbage")
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    hook.apply(many(20), [])
    assert hook.open(SPEC) is IndexState.OK


@pytest.mark.parametrize("failure", [InternalError("the disk is full"), OSError("gone"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way(
    folder: Path, in_folder: MakeHook, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = filled(in_folder(), 10)

    def fails(*args: object, **kwargs: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(chromadb.Collection, "add", fails)
        with pytest.raises(type(failure)):
            hook.apply([record("x")], [])
    hook.apply([record("y")], [])  # a later success proves nothing about the first
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.close()
    hook = in_folder()
    assert hook.open(SPEC) is IndexState.SUSPECT
    hook.reset(SPEC)
    hook.apply(many(3), [])
    assert hook.open(SPEC) is IndexState.OK
    assert not list(folder.glob("INFLIGHT-*"))


def test_a_marker_lies_there_during_a_write_only(
    folder: Path, in_folder: MakeHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = filled(in_folder(), 1)
    seen: list[list[str]] = []

    def watching(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append([path.name for path in folder.glob("INFLIGHT-*")])
            return method(*args, **kwargs)

        return call

    for method in ("add", "delete"):
        monkeypatch.setattr(chromadb.Collection, method, watching(getattr(chromadb.Collection, method)))
    hook.apply(many(60), ["r1"])
    assert seen == [[f"INFLIGHT-{collection_id(hook)}"]] * 3
    assert not list(folder.glob("INFLIGHT-*"))


def test_a_suspect_collection_of_the_user_is_left_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with chromadb.PersistentClient(folder) as client:
        theirs = client.create_collection("memory", embedding_function=None)
        hook = filled(ChromaSyncHook(client))
        hook.close()
        (folder / f"INFLIGHT-{theirs.id}").touch()
        hook = ChromaSyncHook(client)
        assert hook.open(SPEC) is IndexState.SUSPECT
        with caplog.at_level(logging.WARNING, LOGGER):
            hook.reset(SPEC)
        hook.apply([record("a")], [])
        assert "memory-memstate" in caplog.text
        assert theirs.count() == 3
        assert client.get_collection("memory-memstate").get()["ids"] == ["a"]
        assert hook.open(SPEC) is IndexState.OK
        hook.close()


def test_a_dropped_collection_of_a_client_leaves_no_marker(folder: Path) -> None:
    with chromadb.PersistentClient(folder) as client:
        hook = filled(ChromaSyncHook(client))
        before = collection_id(hook)
        assert (folder / f"BOOT-{before}").exists()
        hook.reset(IndexSpec("store", 2, DIMS, "model"))
        assert collection_id(hook) != before
        assert not (folder / f"BOOT-{before}").exists()
        hook.close()
        assert client.get_collection("memory").count() == 0
