"""The law on Redis: histories that memory, the server's script and the oracle have to tell in the same way."""

from __future__ import annotations

import pytest
from hypothesis import settings
from redis_server import fresh_url
from test_law import World

from bursar.accounts import Mark
from bursar.commands import Ended, Settle
from bursar.stores.base import Store
from bursar.stores.redis import RedisStore, wire
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import SECOND_US, reserve, rule


class RedisWorld(World):
    """The world of the law's own test, with Redis in SQLite's place."""

    url = ""

    def reopen(self) -> Store:
        self.url = self.url or fresh_url()
        return RedisStore(self.url, clock=self.clock)


TestLaw = RedisWorld.TestCase
TestLaw.settings = settings(stateful_step_count=40, max_examples=settings().max_examples // 5)


def test_a_process_is_answered_the_same_of_its_own_reservations_and_of_others() -> None:
    """Its own settlements go the short way, without reading what was reserved; so do not those of others."""
    clock, tomorrow_us = ManualClock(), 86_400 * SECOND_US
    plain = (
        (rule("window", 1_000), 60),
        (rule("day", 1_000, unit="tokens", end_us=clock.now_us() + tomorrow_us), 30),
        (rule("rate", 100, "refill", "requests", period_us=60 * SECOND_US), 7),
        (rule("slots", 9, "slots", "slots"), 1),
    )
    marked = (*plain, (rule("marked", 1_000, marks=(Mark(20, "notify"),)), 60))
    rolling = (*plain, (rule("rolling", 1_000, "rolling", period_us=600 * SECOND_US), 60))
    for number, lines in enumerate((plain, marked, rolling, plain)):
        told = []
        for others in (False, True):
            own = RedisStore(url := fresh_url(), clock=clock)
            settling = RedisStore(url, clock=clock) if others else own
            for id in ("a", "b"):
                own.execute(reserve(id, *lines))
            if number == 3:  # its limit has been raised meanwhile
                own.execute(reserve("c", (rule("window", 2_000), 60)))
            assert "a" in own._wire._open
            ended = settling.execute(Settle("a", {"USD": 25, "requests": 2}, 25, {"output_tokens": 5}))
            assert type(ended) is Ended
            assert "a" not in settling._wire._open
            told.append((ended, list(own.accounts()), list(own.entries()), list(own.reservations())))
            own.close()
            settling.close()
        assert told[0] == told[1]
        clock.advance(1)


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_OPEN", 2)
    store = RedisStore(fresh_url())
    ids = ("a", "b", "c")
    for id in ids:
        store.execute(reserve(id, (rule("window", 1_000), 60)))
    assert set(store._wire._open) == {"b", "c"}
    for id in ids:
        assert type(store.execute(Settle(id, {"USD": 25}, 25, {}))) is Ended
    assert not store._wire._open
    store.close()
