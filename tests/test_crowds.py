"""The promise with 4, 16 and 64 processes on each store, direct and with leases: ten calls fit, ten are billed, whoever dies.

As in test_scenarios: a provider bills $0.0075 per call, under a cap of $0.078.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import test_scenarios as scenarios
from crowd import MESSAGES, Member, attempt, caller, crowd
from postgres_server import Running
from redis_server import fresh_cluster_url

from bursar.audit import audit
from bursar.testing import ManualClock
from bursar.testing.provider import Fault, Provider

provider = scenarios.provider
THREADS = {4: 13, 16: 4, 64: 1}  # a process's
LATE = [4, 16, pytest.param(64, marks=pytest.mark.nightly)]
GIVEN = {"input_tokens": 1_000}
WAITING = ({"on_exceed": "wait"}, {"messages": MESSAGES})
# A process has up to three connections while it opens, two afterwards.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "400", "shared_buffers": "64MB"}


@cache
def postgres() -> Running:
    return Running(**_SETTINGS)


@pytest.fixture(params=["sqlite", "postgres", "postgres-leased", "redis", "redis-leased"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    store, _, leased = request.param.partition("-")
    leases = f"leases={tmp_path}&durability=process" if leased else ""
    if store == "sqlite":
        return f"sqlite:///{tmp_path / 'budgets.db'}?durability=process"
    if store == "postgres":
        return f"{postgres().url}?schema=s{abs(hash(tmp_path))}&{leases}"
    return f"{fresh_cluster_url()}?org=acme&{leases}"


def told(members: list[Member], word: str) -> None:
    for member in members:
        assert member.pipe.recv() == word


def sent(members: list[Member]) -> int:
    """Let them go at once; how many calls they have sent."""
    for member in members:
        member.pipe.send("go")
    answers = [answer for member in members for answer in member.pipe.recv()]
    assert set(answers) <= {True, False}
    return sum(answers)


def ten_are_billed(url: str, provider: Provider, count: int, options: dict[str, Any], said: dict[str, Any]) -> None:
    port = int(provider.url.rpartition(":")[2])
    with (
        scenarios.guard_of(url, **options) as guard,
        crowd(caller, count, url, port, options, said, THREADS[count]) as members,
    ):
        told(members, "ready")
        assert sent(members) == scenarios.FIT
        assert provider.billed_calls == scenarios.FIT
        scenarios.check_books(guard, provider)
        assert audit(guard.store) == []


def test_sixteen_open_an_empty_store_at_once(url: str) -> None:
    with crowd(caller, 16, url, 0, {}, GIVEN, 0) as members:
        told(members, "ready")
        assert sent(members) == 0


@pytest.mark.parametrize("count", THREADS)
def test_ten_are_billed(url: str, provider: Provider, count: int) -> None:
    ten_are_billed(url, provider, count, {}, GIVEN)


@pytest.mark.parametrize("count", LATE)
def test_ten_are_billed_where_all_wait_for_headroom(url: str, provider: Provider, count: int) -> None:
    ten_are_billed(url, provider, count, *WAITING)


@pytest.mark.parametrize("count", LATE)
def test_ten_are_billed_where_one_is_killed_with_five_in_flight(url: str, provider: Provider, count: int) -> None:
    """And no more after all that it held has expired."""
    port = int(provider.url.rpartition(":")[2])
    with scenarios.guard_of(url) as guard:
        with crowd(caller, count - 1, url, port, {}, GIVEN, THREADS[count]) as members:
            told(members, "ready")
            provider.script([Fault("hang")] * 5)
            with crowd(caller, 1, url, port, {}, GIVEN, 5) as victims:
                told(victims, "ready")
                victims[0].pipe.send("go")
                provider.wait_requests(5, timeout_s=60)
            assert guard.store.open_reservations() == 5
            assert sent(members) == 5
        later = ManualClock(guard.store.now_us() + (scenarios.TTL_S + 1) * 1_000_000)
    with scenarios.guard_of(url, later) as guard, guard.scope(team="research"):
        guard.tend()
        assert not any(attempt(guard, port, **GIVEN) for _ in range(30))
        assert provider.billed_calls == scenarios.FIT
        scenarios.check_books(guard, provider, estimated=5)
        assert audit(guard.store) == []
