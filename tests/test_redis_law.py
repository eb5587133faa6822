"""The law on Redis: histories that memory, the server's script and the oracle have to tell in the same way."""

from __future__ import annotations

from hypothesis import settings
from redis_server import fresh_url
from test_law import World

from bursar.stores.base import Store
from bursar.stores.redis import RedisStore


class RedisWorld(World):
    """The world of the law's own test, with Redis in SQLite's place."""

    url = ""

    def reopen(self) -> Store:
        self.url = self.url or fresh_url()
        return RedisStore(self.url, clock=self.clock)


TestLaw = RedisWorld.TestCase
TestLaw.settings = settings(stateful_step_count=40, max_examples=settings().max_examples // 5)
