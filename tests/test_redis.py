"""The contract of stores, kept by Redis: on a server, and in a cluster in one organisation's slot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from redis_server import fresh_cluster_url, fresh_url

from bursar.clock import Clock
from bursar.stores.base import Store
from bursar.stores.redis import RedisStore
from bursar.testing import StoreContract


class TestRedis(StoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[Clock], Store]:
        url = fresh_url()
        return lambda clock: RedisStore(url, clock=clock)


class TestCluster(StoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[Clock], Store]:
        url = f"{fresh_cluster_url()}?org=acme"
        return lambda clock: RedisStore(url, clock=clock)
