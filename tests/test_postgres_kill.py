"""Kill -9 of a client of PostgreSQL at random times: the books stay whole, and the same call, made again, ends the same."""

from __future__ import annotations

import os
import random

import pytest
from postgres_server import connect, fresh_url
from test_kill import COST_NANOS, NEVER, guarded_call, in_child, opened, total_nanos

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


def test_i7_kill_at_random() -> None:
    run(20, 1)


@pytest.mark.nightly
def test_i7_kill_at_random_400_times() -> None:
    run(400, 2)
