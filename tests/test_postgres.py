"""The contract of stores, kept by PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from postgres_server import fresh_url

from bursar.clock import Clock
from bursar.stores.base import Store
from bursar.stores.leases import LeasedStore
from bursar.stores.postgres import PostgresStore
from bursar.testing import StoreContract


class TestPostgres(StoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[Clock], Store]:
        url = fresh_url()
        return lambda clock: PostgresStore(url, clock=clock)


class TestLeasedPostgres(StoreContract):
    """What is not hot goes through a store with leases as it is."""

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[Clock], Store]:
        url = fresh_url()
        return lambda clock: LeasedStore(PostgresStore(url, clock=clock), tmp_path)
