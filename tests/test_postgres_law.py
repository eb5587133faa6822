"""The law on PostgreSQL: histories that memory, the server's functions and the oracle have to tell in the same way."""

from __future__ import annotations

from hypothesis import settings
from postgres_server import fresh_url
from test_law import World

from bursar.stores.base import Store
from bursar.stores.postgres import PostgresStore


class PostgresWorld(World):
    """The world of the law's own test, with PostgreSQL in SQLite's place."""

    url = ""

    def reopen(self) -> Store:
        self.url = self.url or fresh_url()
        return PostgresStore(self.url, clock=self.clock)


TestLaw = PostgresWorld.TestCase
TestLaw.settings = settings(stateful_step_count=40, max_examples=settings().max_examples // 5)
