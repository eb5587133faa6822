"""The contract of stores, kept by PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from postgres_server import fresh_url

from bursar import Budget, BudgetExceeded, Bursar
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


def test_tools_are_counted_in_calls_and_slots() -> None:
    with Bursar(fresh_url(), [Budget("tools", "2 calls"), Budget("flight", "3 slots")]) as bursar:
        for _ in range(2):
            with bursar.tool("search", cost="0.001 USD"):
                pass
        with pytest.raises(BudgetExceeded), bursar.tool("search"):
            pass
        assert [record.cost_nanos for record in bursar.records() if record.kind == "settlement"] == [1_000_000] * 2
