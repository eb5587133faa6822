"""Simulated worlds: the real guard, law and stores under faults; every operation is audited, and I1 to I12 at the end."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator

import pytest
from sim import run
from sim.bugs import BUGS
from sim.lease_bugs import LEASE_BUGS
from sim.replay import compare

from bursar.stores.base import Store
from bursar.testing import ManualClock

BATCHES, WORLDS = 20, 500  # 10,000 worlds, spread over the workers
SEEDS = 300  # within which every planted bug is caught


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What the product warns of is what these worlds are made of; and worlds are cycles, which only the collector frees."""
    logging.disable(logging.CRITICAL)
    gc.enable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_invariant_holds_in_every_world(batch: int) -> None:
    """I1 to I12; a failure's last line shows it again."""
    ops = sum(run.play(seed).world.auditor.ops for seed in range(batch * WORLDS, (batch + 1) * WORLDS))
    assert ops >= 100 * WORLDS, "too little happens"  # a million in all


def test_the_same_seed_gives_the_same_history() -> None:
    first = [run.play(seed).world.trace for seed in range(20)]
    assert [run.play(seed).world.trace for seed in range(20)] == first
    assert len(set(first)) == len(first)


def test_the_canary_dies() -> None:
    """A world whose books were tampered with fails; were it to pass, no other world's pass would say anything."""
    assert run.told(run.CANARY).failure.startswith("Broken: I3")


@pytest.mark.slow
@pytest.mark.parametrize("bug", [*BUGS, *LEASE_BUGS])
def test_every_planted_bug_is_caught(bug: str) -> None:
    seeds = range(SEEDS) if bug in BUGS else [seed for seed in range(SEEDS) if run.kind_of(seed) == "leased"]
    with (BUGS | LEASE_BUGS)[bug]():
        assert any(run.told(seed).failure for seed in seeds), f"nobody sees that {bug}"


def told_to(store: str) -> Callable[[ManualClock], Store]:
    """A fresh store of that kind; skipped where its server cannot be had."""
    if store == "postgres":
        from postgres_server import fresh_url

        from bursar.stores.postgres import PostgresStore

        url = fresh_url()
        return lambda clock: PostgresStore(url, clock=clock)
    from redis_server import fresh_url as fresh_redis

    from bursar.stores.redis import RedisStore

    url = fresh_redis()
    return lambda clock: RedisStore(url, clock=clock)


def replay(store: str, seeds: range) -> None:
    for seed in seeds:
        if "tail_lost" not in (world := run.play(seed).world).faults.rates:
            compare(world, told_to(store)(world.clock))


@pytest.mark.parametrize("store", ["postgres", "redis"])
def test_other_stores_give_the_same_answers(store: str) -> None:
    """Five worlds, as they happened in memory, told to a server; every hundredth of all worlds is told to SQLite."""
    replay(store, range(0, 500, 100))


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("store", ["postgres", "redis"])
def test_other_stores_give_the_same_answers_in_1000_worlds(store: str) -> None:
    replay(store, range(0, 100_000, 100))


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_every_invariant_holds_for_hours() -> None:
    failed = run.for_hours(4.0, first=10**6)
    assert not failed, failed
