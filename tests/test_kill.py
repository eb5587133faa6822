"""Kill -9 at every statement of a guarded call on SQLite: the books stay whole, and the same call, made again, ends the same."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import NEVER, Points, Survivor, killed_at, pair

from bursar import Budget, Bursar, PriceBook, Usage
from bursar.policy import Policy
from bursar.records import UsageRecord
from bursar.stores.sqlite import SqliteStore

BUDGETS = [
    Budget("run", "1000 USD", per="run"),
    Budget("hour", "1000 USD", window="rolling 1h"),
    Budget("rate", "1000000 tokens/minute"),
    Budget("flight", "8 slots"),
]
USAGE = Usage(input_tokens=1_000, output_tokens=420)
PROVIDER, MODEL = "openai", "gpt-4o"
COST_NANOS = PriceBook.packaged().cost(PROVIDER, MODEL, USAGE, at_us=time.time_ns() // 1_000, tags={}).cost_nanos
VM_STEPS = 40  # a point at every so many instructions of SQLite's machine, besides one before and one after a statement

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


class WatchedCursor(sqlite3.Cursor):
    """A cursor with a point before and after every statement."""

    def execute(self, *args: Any) -> sqlite3.Cursor:
        Points.hit()
        try:
            return super().execute(*args)
        finally:
            Points.hit()

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        Points.hit()
        try:
            return super().executemany(*args)
        finally:
            Points.hit()


class Watched(sqlite3.Connection):
    """A connection with watched cursors, its own of each statement too, and with points inside long statements."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_progress_handler(Points.hit, VM_STEPS)

    def cursor(self, factory: Any = WatchedCursor) -> Any:
        return super().cursor(factory)


def watch() -> None:
    """From now on this process's connections pass points."""
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, **{"factory": Watched} | options)  # type: ignore[assignment]


@contextlib.contextmanager
def opened(url: str) -> Iterator[Bursar]:
    with Bursar(url, BUDGETS) as bursar, bursar.scope(run="r"):
        yield bursar


def guarded_call(bursar: Bursar, id: str) -> UsageRecord | None:
    reservation = bursar.reserve(PROVIDER, MODEL, input_tokens=1_000, max_output_tokens=500, id=id)
    return reservation.settle(USAGE)


def in_child(url: str, id: str, last: int, *, delay_s: float | None = None) -> tuple[bool, int]:
    """Make the call in a child that dies at point `last`, or after `delay_s`; whether it was acknowledged, points passed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            watch()
            os.write(writing, b"b")  # begun
            with opened(url) as bursar:
                Points.passed, Points.last = 0, last
                guarded_call(bursar, id)
                Points.last = NEVER
                os.write(writing, b"s%d." % Points.passed)  # settled
                if delay_s is not None:
                    signal.pause()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read(1) == b"b"
        if delay_s is not None:
            until = time.perf_counter() + delay_s
            while time.perf_counter() < until:  # finer than a sleep can be
                continue
            os.kill(child, signal.SIGKILL)
        told = pipe.read()
    os.waitpid(child, 0)
    return told.startswith(b"s"), int(told[1:-1] or 0)


def check(path: Path) -> None:
    """I2, I3, I10 and the file itself, from its rows alone."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        held: Counter[str] = Counter()
        for key, amount in connection.execute(
            "SELECT json_extract(value, '$[0]'), json_extract(value, '$[2]') FROM reservations, json_each(held)"
        ):
            held[key] += amount
        spent: Counter[str] = Counter()
        for key, amount in connection.execute("SELECT key, atom FROM records, json_each(amounts)"):
            spent[key] += amount
        both = "SELECT count(*) FROM reservations WHERE id IN (SELECT id FROM records)"
        assert connection.execute(both).fetchone() == (0,)
        for key, booked, reserved in connection.execute("SELECT key, spent, reserved FROM accounts"):
            assert (booked, reserved) == (spent[key], held[key])


def kill_and_replay(path: Path, url: str, number: int, last: int, delay_s: float | None = None) -> bool:
    """One kill, and the same call made again by somebody else. Whether the killed one had been acknowledged."""
    id = f"call-{number:05}"
    acknowledged, _ = in_child(url, id, last, delay_s=delay_s)
    check(path)
    with opened(url) as bursar:
        kinds = [record.kind for record in bursar.records() if record.id == id]
        assert kinds == ["settlement"] or not acknowledged, "I7: an acknowledged settlement is lost"
        record = guarded_call(bursar, id)
        assert record is not None
        assert record.cost_nanos == COST_NANOS
        assert bursar.store.open_reservations() == 0
    check(path)
    return acknowledged


def total_nanos(url: str) -> int:
    with opened(url) as bursar:
        assert all(record.kind == "settlement" for record in bursar.records())
        (run,) = (status for status in bursar.status(run="r") if status.name == "run")
        assert run.spent == sum(record.cost_usd for record in bursar.records())
        return sum(record.cost_nanos for record in bursar.records())


def points_of_a_call(url: str) -> int:
    """How many points a call passes when nobody ends it; the second one, as the first makes the accounts."""
    for id in ("first", "second"):
        acknowledged, points = in_child(url, id, NEVER)
        assert acknowledged
    return points


def run(path: Path, durability: str, kills: int, seed: int) -> None:
    """Kill at every point in turn, from the first to the last, until that many calls have been killed."""
    url = f"sqlite:////{path}?durability={durability}"
    points = points_of_a_call(url)
    assert points > 20, "nothing is watched"
    acknowledged = sum(kill_and_replay(path, url, number, 1 + number % points) for number in range(kills))
    assert acknowledged <= kills // points + 1, "the calls were not killed"
    at_random = random.Random(seed)
    for number in range(kills, kills + kills // 5):
        kill_and_replay(path, url, number, NEVER, delay_s=at_random.uniform(0, 0.012))
    assert total_nanos(url) == (2 + kills + kills // 5) * COST_NANOS


def kill_pairs(path: Path, durability: str, kills: int, first: int) -> None:
    """Kill a reservation and its settlement at each point in turn, from `first` on."""
    policy = Policy([BUDGETS[0], BUDGETS[1], BUDGETS[3]])
    store = SqliteStore(path, durability=durability)
    survivor = Survivor(store)
    for id in ("first", "second"):  # the first makes the accounts
        commands = pair(policy, id, store.now_us())
        acknowledged, points = killed_at(store, commands, NEVER, watch)
        assert acknowledged == "rs"
        survivor.goes_on(commands, acknowledged)
    assert points > 40, "nothing is watched"
    died = Counter()
    for number in range(kills):
        commands = pair(policy, f"call-{number:05}", store.now_us())
        acknowledged, _ = killed_at(store, commands, 1 + (first + number) % points, watch)
        survivor.goes_on(commands, acknowledged)
        died[acknowledged] += 1
    store.close()
    assert died[""] + died["r"] >= kills * 0.95, "they were not killed"
    assert min(died[""], died["r"]) > kills // 10
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1_000, 250))
def test_i7_1000_kills_at_every_point_of_a_reservation_and_its_settlement(tmp_path: Path, first: int) -> None:
    kill_pairs(tmp_path / "bursar.db", "full" if first else "process", 250, first)


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("durability", ["process", "full"])
def test_i7_50000_kills_of_a_reservation_and_its_settlement(tmp_path: Path, durability: str) -> None:
    for round in range(100):
        kill_pairs(tmp_path / f"{round}.db", durability, 500, 500 * round)


@pytest.mark.slow
@pytest.mark.parametrize(("durability", "kills"), [("process", 60), ("full", 30)])
def test_i7_kill_at_every_statement(tmp_path: Path, durability: str, kills: int) -> None:
    run(tmp_path / "bursar.db", durability, kills, 1)


@pytest.mark.nightly
@pytest.mark.parametrize("durability", ["process", "full"])
def test_i7_kill_at_every_statement_500_times(tmp_path: Path, durability: str) -> None:
    run(tmp_path / "bursar.db", durability, 500, 2)
