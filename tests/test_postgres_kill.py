"""Kill -9 of a client of PostgreSQL, at every point and at random times: books stay whole, and the same call ends the same."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Generator
from typing import Any

import psycopg
import pytest
from kills import NEVER, Points, Survivor, killed_at, pair
from postgres_server import connect, fresh_url
from test_kill import BUDGETS, COST_NANOS, guarded_call, in_child, opened, total_nanos

from bursar.policy import Policy
from bursar.stores.postgres import PostgresStore

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

# What the reservations hold and the records book, beside what the accounts say; both in one snapshot, as the server may still
# be busy with a statement of the process that was killed.
_BOOKS = """
SELECT key, spent, reserved,
    (SELECT coalesce(sum((value)::bigint), 0) FROM records, json_each_text(amounts::json) AS one WHERE one.key = accounts.key),
    (SELECT coalesce(sum((one ->> 2)::bigint), 0) FROM reservations, json_array_elements(held::json) AS one
        WHERE one ->> 0 = accounts.key),
    (SELECT count(*) FROM reservations JOIN records USING (id))
FROM accounts
"""


def check() -> None:
    """I2, I3, I5, from the rows alone."""
    with connect() as connection:
        for key, spent, reserved, booked, held, both in connection.execute(_BOOKS).fetchall():
            assert (spent, reserved) == (booked, held), key
            assert both == 0


def run(kills: int, seed: int) -> None:
    url = fresh_url()
    PostgresStore(url).close()  # its tables exist
    at_random = random.Random(seed)
    acknowledged = 0
    for number in range(kills):
        id = f"call-{number:05}"
        done, _ = in_child(url, id, NEVER, delay_s=at_random.uniform(0, 0.06))
        acknowledged += done
        check()
        with opened(url) as bursar:
            kinds = [record.kind for record in bursar.records() if record.id == id]
            assert kinds == ["settlement"] or not done, "I7: an acknowledged settlement is lost"
            record = guarded_call(bursar, id)
            assert record is not None
            assert record.cost_nanos == COST_NANOS
            assert bursar.store.open_reservations() == 0
        check()
    assert acknowledged < kills, "no call was killed"
    assert total_nanos(url) == kills * COST_NANOS


def watch() -> None:
    """From now on this process passes a point before and after every statement, and whenever one waits for the server."""
    wait = psycopg.Connection.wait

    def pointed(steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        answer = None
        try:
            while True:
                step = steps.send(answer)
                Points.hit()  # what there is to send has been sent
                answer = yield step
        except StopIteration as stop:
            return stop.value

    def watched(self: psycopg.Connection[Any], steps: Generator[Any, Any, Any], *options: Any) -> Any:
        Points.hit()
        try:
            return wait(self, pointed(steps), *options)
        finally:
            Points.hit()

    psycopg.Connection.wait = watched  # type: ignore[assignment]


def kill_pairs(kills: int, first: int) -> None:
    policy = Policy([BUDGETS[0], BUDGETS[1], BUDGETS[3]])
    store = PostgresStore(fresh_url())
    survivor = Survivor(store)
    for id in ("first", "second"):
        commands = pair(policy, id, store.now_us())
        acknowledged, points = killed_at(store, commands, NEVER, watch)
        assert acknowledged == "rs"
        survivor.goes_on(commands, acknowledged)
    died = Counter()
    for number in range(kills):
        commands = pair(policy, f"call-{number:05}", store.now_us())
        acknowledged, _ = killed_at(store, commands, 1 + (first + number) % points, watch)
        check()
        survivor.goes_on(commands, acknowledged, at_work=True)
        died[acknowledged] += 1
    store.close()
    assert died[""] + died["r"] >= kills * 0.8, "they were not killed"
    check()


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 100])
def test_i7_200_kills_at_every_point_of_a_reservation_and_its_settlement(first: int) -> None:
    kill_pairs(100, first)


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_i7_20000_kills_of_a_reservation_and_its_settlement() -> None:
    for round in range(40):
        kill_pairs(500, 500 * round)


def test_i7_kill_at_random() -> None:
    run(20, 1)


@pytest.mark.nightly
def test_i7_kill_at_random_400_times() -> None:
    run(400, 2)
