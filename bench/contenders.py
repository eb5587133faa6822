"""The stores that are compared, each with the floor of its driver: what one process does, on everybody's accounts or its own."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from floors import postgres_pair, redis_pair, sqlite_pair
from pair import LINES, Lines, commands, own
from turns import Work

import bursar.stores.leases
import bursar.stores.postgres
import bursar.stores.redis
import bursar.stores.sqlite  # noqa: F401 - what a process would otherwise import when it opens a store
from bursar.commands import Ended, Granted
from bursar.errors import StoreError
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.stores.leases import LeasedStore
from bursar.stores.sqlite import SqliteStore

HOT, OWN = "hot", "own"
FLOOR, BURSAR = "raw driver", "Bursar"
LEASED = LINES[:3]  # a rate is for all processes at once, so it has no leases


class Contender(NamedTuple):
    """A store by its URL, with {} for where its server is, or its folder. `wanted`: the least ratio to the floor, 0 for none."""

    name: str
    server: str
    url: str
    wanted: float
    leased: bool = False


CONTENDERS = (
    Contender("SQLite process", "disk", "sqlite:///{}/process.db?durability=process", 0.67),
    Contender("SQLite full", "disk", "sqlite:///{}/full.db", 0.67),
    Contender("PostgreSQL", "postgres", "{}", 0.65),
    Contender("PostgreSQL, leased", "postgres", "{}&leases={}&durability=process", 30, leased=True),
    Contender("Redis always", "redis always", "{}", 0.8),
    Contender("Redis always, leased", "redis always", "{}?leases={}&durability=process", 0, leased=True),
    Contender("Redis everysec", "redis everysec", "{}", 0.8),
)


def ours(store: Store, lines: Lines) -> Callable[[], None]:
    version = store.version()

    def run() -> None:
        reserve, settle = commands(lines, version)
        assert type(store.execute(reserve)) is Granted
        assert type(store.execute(settle)) is Ended

    return run


def floor(url: str, store: Store, lines: Lines) -> Callable[[], None]:
    """A pair of the raw driver, on a connection of its own as the store makes them, on accounts that exist."""
    if isinstance(store, SqliteStore):
        return sqlite_pair(store._connect(), lines)
    if url.startswith("postgres"):
        shared: Any = store.shared if isinstance(store, LeasedStore) else store
        return postgres_pair(shared._connect(), lines)
    import redis

    return redis_pair(redis.Redis.from_url(url.partition("?")[0]), lines)


def works(number: int, url: str, leased: bool) -> dict[str, Work]:
    """The four works of one process: the floor and Bursar, on everybody's accounts and on its own."""
    logging.getLogger("bursar").setLevel(logging.ERROR)  # that everysec may lose a second is known here
    store = open_store(url)
    Finalize(None, store.close, exitpriority=0)  # else its leases would wait to be recovered
    found = {}
    for accounts in (HOT, OWN):
        lines = LEASED if leased else LINES
        if accounts == OWN:
            lines = own(lines, str(number))
        run = ours(store, lines)
        run()  # the accounts exist
        # a leased turn is over when the shared store has every record
        finish = store.tend if isinstance(store, LeasedStore) else bool
        found[f"{BURSAR}, {accounts}"] = Work(run, finish, (StoreError,))
        found[f"{FLOOR}, {accounts}"] = Work(floor(url, store, lines), passes=(sqlite3.OperationalError,))
    return found
