"""Fail-over: the primary is gone, its replica takes over, and the processes go on there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from postgres_server import Running, Standby

from bursar.audit import audit
from bursar.commands import Ended, Granted
from bursar.stores.leases import LeasedStore
from bursar.stores.postgres import PostgresStore
from bursar.testing.store_contract.made import reserve, rule, settle

A = rule("a", 10**12)


@pytest.fixture
def pair() -> Iterator[tuple[Running, Standby]]:
    """A primary that acknowledges what its replica has, too."""
    primary = Running()
    standby = Standby(primary)
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
    yield primary, standby
    primary.stop()
    standby.stop()


def url(primary: Running, standby: Standby) -> str:
    return f"postgresql://postgres@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/postgres"


def test_i9_what_was_acknowledged_is_there_and_calls_go_on_at_the_replica(
    pair: tuple[Running, Standby], tmp_path: Path
) -> None:
    primary, standby = pair
    store = PostgresStore(url(*pair))
    leased = LeasedStore(PostgresStore(url(*pair)), tmp_path, durability="process", background=False)
    for number in range(30):  # often enough for a lease
        assert type(leased.execute(reserve(f"w{number}", (A, 10), digest=""))) is Granted
        assert type(leased.execute(settle(f"w{number}", 7))) is Ended
        leased.tend()
    for id in ("x", "y", "z"):
        assert type(store.execute(reserve(id, (A, 100)))) is Granted
    assert type(store.execute(settle("x", 25))) is Ended
    assert type(leased.execute(reserve("l", (A, 10), digest=""))) is Granted

    primary.kill()
    ended = leased.execute(settle("l", 9))  # out of the lease, into the journal
    assert type(ended) is Ended
    standby.promote()

    assert store.execute(settle("x", 25)).again  # type: ignore[union-attr]
    assert type(store.execute(settle("y", 30))) is Ended
    assert type(asyncio.run(store.aexecute(settle("z", 40)))) is Ended
    leased.close()
    assert {entry.id for entry in store.entries() if entry.cost_nanos} >= {"x", "y", "z", "l", "w29"}
    (account,) = store.accounts([A.key])
    assert (account.spent, account.reserved) == (30 * 7 + 25 + 30 + 40 + 9, 0)
    assert audit(store) == []
    store.close()
