"""Every storage of this package keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate import InMemoryStorage, PostgresStorage, RedisStorage, SQLiteStorage
from langgraph_memstate.storage.base import Storage
from langgraph_memstate.testing.storage import StorageContract


class TestSQLite(StorageContract):
    @pytest.fixture
    def make_storage(self, tmp_path: Path) -> Callable[[], Storage]:
        return lambda: SQLiteStorage(tmp_path / "contract.db")


class TestInMemory(StorageContract):
    is_durable = False

    @pytest.fixture
    def make_storage(self) -> Callable[[], Storage]:
        return InMemoryStorage


class TestPostgres(StorageContract):
    @pytest.fixture
    def make_storage(self, postgres: Any) -> Iterator[Callable[[], Storage]]:
        with postgres.schema() as schema:
            yield lambda: PostgresStorage(postgres.uri, schema=schema)


class TestRedis(StorageContract):
    @pytest.fixture
    def make_storage(self, redis_server: Any) -> Iterator[Callable[[], Storage]]:
        with redis_server.memory() as name:
            yield lambda: RedisStorage(redis_server.url, name=name)


class TestRedisWithAReplicaFile(StorageContract):
    """One file, which all storages of a test share."""

    @pytest.fixture
    def make_storage(self, redis_server: Any, tmp_path: Path) -> Iterator[Callable[[], Storage]]:
        with redis_server.memory() as name:
            yield lambda: RedisStorage(redis_server.url, name=name, replica=tmp_path / "replica.db")
