"""Every storage of this package keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langgraph_memstate import InMemoryStorage, PostgresStorage, SQLiteStorage
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
