"""The contract of stores, on many callers at once, on reading the books, and on opening them again."""

from __future__ import annotations

import asyncio
import threading
from itertools import count

import pytest

from bursar.commands import (
    Answer,
    Ended,
    Granted,
    Release,
)
from bursar.errors import StoreError
from bursar.stores.base import Store
from bursar.testing.clock import ManualClock
from bursar.testing.store_contract.made import SECOND_US, Base, OpenStore, Run, reserve, rule, settle


class Together(Base):
    """Threads, tasks, processes one after another."""

    def test_i1_sixteen_threads_are_granted_exactly_what_fits(self, store: Store, run: Run) -> None:
        shared = rule("b", 50)
        numbers, granted = count(), []

        def work() -> None:
            while (number := next(numbers)) < 200:
                own = rule("own", 10**9, of=str(number % 16))
                lines = ((shared, 1), (own, 1)) if number % 2 else ((own, 1), (shared, 1))
                if type(store.execute(reserve(f"a{number}", *lines))) is Granted:
                    granted.append(f"a{number}")

        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == 50
        assert self.account(store, shared).reserved == 50
        for id in granted:
            run(settle(id, 1))
        assert self.account(store, shared).spent == 50

    def test_i1_a_hundred_tasks_are_granted_exactly_what_fits(self, store: Store) -> None:
        shared = rule("b", 30)

        async def all_at_once() -> list[Answer]:
            return await asyncio.gather(*(store.aexecute(reserve(f"a{n}", (shared, 1))) for n in range(100)))

        answers = asyncio.run(all_at_once())
        assert [type(answer) for answer in answers].count(Granted) == 30
        answers = asyncio.run(all_at_once())  # another loop: the same commands, the same answers
        assert [type(answer) for answer in answers].count(Granted) == 30
        assert self.account(store, shared).reserved == 30

    def test_what_is_posted_is_done(self, store: Store, run: Run) -> None:
        dollar = rule("b", 100)
        run(reserve("a", (dollar, 60)))
        store.post(Release("a"))
        answer = run(Release("a"))
        assert type(answer) is Ended

    def test_entries_are_found_by_their_tags_in_the_order_of_ids(self, store: Store) -> None:
        dollar = rule("b", 10**9)
        reserves, settles = [], []
        for number in range(1_205):
            tags = {"run": f"r{number % 3}", "colour": "red" if number % 2 else 'a "quoted" blue'}
            draft = {"path": [], "tags": tags, "cost_nanos": 1, "usage": {}}
            reserves.append(reserve(f"{number:05}", (dollar, 1), draft=draft))
            settles.append(settle(f"{number:05}", 1))

        async def all_of_them() -> None:
            await asyncio.gather(*map(store.aexecute, reserves))
            await asyncio.gather(*map(store.aexecute, settles))

        asyncio.run(all_of_them())
        ids = [entry.id for entry in store.entries({})]
        assert ids == sorted(ids)
        assert len(ids) == 1_205
        assert sum(1 for _ in store.entries({"run": "r1", "colour": "red"})) == 201
        assert sum(1 for _ in store.entries({"colour": 'a "quoted" blue'})) == 603
        assert list(store.entries({"run": "none"})) == []

    def test_i7_reopening_shows_the_same_books(
        self, open_store: OpenStore, store: Store, run: Run, clock: ManualClock
    ) -> None:
        if not self.durable:
            pytest.skip("this store does not outlive its process")
        minute = rule("m", 100, "rolling", period_us=60 * SECOND_US)
        rate = rule("r", 7, "refill", "requests", period_us=60 * SECOND_US)
        run(reserve("a", (minute, 60), (rate, 3)))
        run(settle("a", 25, requests=2))
        run(reserve("b", (minute, 30), (rate, 1)))
        run(reserve("c", (minute, 500), (rate, 1)))
        store.publish({"m": {"limit": "100"}})
        before = list(store.accounts()), list(store.entries()), store.definitions(), store.open_reservations()
        again = open_store(clock)
        try:
            assert (
                list(again.accounts()),
                list(again.entries()),
                again.definitions(),
                again.open_reservations(),
            ) == before
            assert type(again.execute(reserve("b", (minute, 30), (rate, 1)))) is Granted
            assert type(again.execute(settle("b", 30))) is Ended
            settled = run(settle("b", 30))
            assert type(settled) is Ended
            assert settled.again
        finally:
            again.close()

    def test_i8_a_store_that_is_opened_again_does_not_run_back(
        self, open_store: OpenStore, store: Store, run: Run, clock: ManualClock
    ) -> None:
        if not self.durable:
            pytest.skip("this store does not outlive its process")
        run(reserve("a", (rule("b", 100), 60)))
        start_us = clock.now_us()
        clock.advance(-50)
        again = open_store(clock)
        try:
            assert again.now_us() == start_us
        finally:
            again.close()

    def test_a_closed_store_says_so(self, store: Store, run: Run) -> None:
        store.close()
        with pytest.raises(StoreError, match="closed") as caught:
            run(reserve("a", (rule("b", 100), 60)))
        assert caught.value.fault == "closed"
        store.close()
