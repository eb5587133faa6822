"""Backups that are taken under load: what is restored adds up, what was open is booked as estimated, nothing is spent twice."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from bursar.audit import audit
from bursar.clock import SystemClock
from bursar.commands import Ended, Granted
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import TTL_US, reserve, rule, settle

LIMIT = rule("b", 10**9)
HELD, ACTUAL = 60, 25

# The store's URL, and what backs it up and gives the URL of what was restored from that.
Kept = tuple[str, Callable[[], str]]


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kept]:
    with globals()[request.param](tmp_path) as found:
        yield found


@contextlib.contextmanager
def sqlite(folder: Path) -> Iterator[Kept]:
    def back_up() -> str:
        with contextlib.closing(sqlite3.connect(folder / "bursar.db")) as connection:
            connection.execute("VACUUM INTO ?", (str(folder / "backup.db"),))
        return f"sqlite:///{folder}/backup.db"

    yield f"sqlite:///{folder}/bursar.db", back_up


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Kept]:
    from postgres_server import SCHEMA, fresh_url, server

    url = fresh_url()
    name = f"restored_{SCHEMA}"
    restored = server().get_uri(database=name)
    programs = Path(server().bin_path)

    def back_up() -> str:
        file = str(folder / "backup")
        subprocess.run([programs / "pg_dump", "-Fc", "-n", SCHEMA, "-f", file, server().get_uri()], check=True)
        subprocess.run([programs / "pg_restore", "-d", restored, file], check=True)
        return f"{restored}&schema={SCHEMA}"

    with psycopg.connect(server().get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield url, back_up
        connection.execute(f"DROP DATABASE {name}")


@contextlib.contextmanager
def redis(_folder: Path) -> Iterator[Kept]:
    from redis_server import own

    with own() as running, own(appendonly="no") as restored:

        def back_up() -> str:
            with contextlib.closing(running.client()) as client:
                before = client.lastsave()
                while True:  # its time is in whole seconds
                    client.bgsave()
                    while client.info("persistence")["rdb_bgsave_in_progress"]:
                        continue
                    if client.lastsave() != before:
                        break
            restored.kill()
            shutil.copy(running.folder / "dump.rdb", restored.folder)
            restored.start()
            return restored.url

        yield running.url, back_up


def under_load(store: Store, back_up: Callable[[], str]) -> tuple[set[str], str]:
    """Calls in three threads while the backup is taken: what had been settled before that, and the URL of what was restored."""
    done: list[str] = []
    stop, begun, wrong = threading.Event(), threading.Event(), []

    def work(number: int) -> None:
        count = 0
        while not stop.is_set():
            id = f"{number}-{count}"
            answers = store.execute(reserve(id, (LIMIT, HELD))), store.execute(settle(id, ACTUAL))
            wrong.extend(one for one in answers if type(one) not in (Granted, Ended))
            done.append(id)
            count += 1
            if count == 10:
                begun.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    begun.wait()
    before = set(done)
    try:
        url = back_up()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    return before, url


def test_i7_what_is_restored_adds_up_and_nothing_is_spent_twice(kept: Kept) -> None:
    url, back_up = kept
    store = open_store(url)
    for number in range(3):
        store.execute(reserve(f"open {number}", (LIMIT, HELD)))
    before, restored_url = under_load(store, back_up)
    clock = ManualClock(SystemClock().now_us())
    restored = open_store(restored_url, clock)
    settled = {entry.id for entry in restored.entries()}
    assert before <= settled
    assert audit(restored) == []

    was_open = {one.id for one in restored.reservations()}
    assert was_open >= {"open 0", "open 1", "open 2"}
    clock.advance(us=TTL_US + 1)
    assert restored.sweep() == len(was_open)
    booked = {entry.id: entry for entry in restored.entries() if entry.id in was_open}
    assert {(entry.kind, entry.estimated, entry.amounts[LIMIT.key]) for entry in booked.values()} == {
        ("expiry", True, HELD)
    }
    assert audit(restored) == []

    for id in sorted(settled | was_open):  # what their callers kept, or ask again
        answer = restored.execute(settle(id, ACTUAL))
        assert type(answer) is Ended
        assert answer.again == (id in settled)
    (account,) = restored.accounts([LIMIT.key])
    assert (account.spent, account.reserved) == (ACTUAL * len(settled | was_open), 0)
    assert audit(restored) == []
    for one in (store, restored):
        one.close()
