"""The contract of stores, kept by the memory store and by SQLite at both durabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bursar.clock import Clock
from bursar.stores.base import Store
from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore
from bursar.testing import StoreContract


class TestMemory(StoreContract):
    durable = False

    @pytest.fixture
    def open_store(self) -> Callable[[Clock], Store]:
        return MemoryStore


class TestSqliteFull(StoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[Clock], Store]:
        return lambda clock: SqliteStore(tmp_path / "bursar.db", clock=clock)


class TestSqliteProcess(StoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[Clock], Store]:
        return lambda clock: SqliteStore(tmp_path / "bursar.db", durability="process", clock=clock)
