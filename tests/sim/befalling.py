"""What befalls a world from outside of its processes: operators, outages, clocks, and somebody who sweeps."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from bursar.commands import Extend, Release
from bursar.errors import StoreError
from sim.market import book
from sim.policies import usd
from sim.world import Steps

if TYPE_CHECKING:
    from sim.programs import Scenario


def operator(scenario: Scenario) -> Steps:
    """Limits are raised and lowered, prices change, what has expired is taken off the books."""
    random, world = scenario.random, scenario.world
    while world.faults.on:
        yield random.randrange(10**6, 20 * 10**6)
        if world.faults.hits("prices"):
            scenario.table = 1 - scenario.table
            for host in scenario.hosts:
                host.bursar.guard.book = book(scenario.table)
        if world.faults.hits("limits") and not world.is_away():
            budget = random.choice(scenario.budgets)
            if budget.limit.endswith("USD"):
                scenario.lowered = True
                limit = random.choice((1_000, 10_000, 50_000, 200_000)) * scenario.scale
                with contextlib.suppress(StoreError):
                    world.server.publish({budget.name: budget.definition() | {"limit": usd(limit)}})
        if world.faults.hits("reversal") and not world.is_away():
            expired = [
                id
                for id, call in world.auditor.books.calls.items()
                if call.state == "expiry" and id not in underway(scenario)
            ]
            if expired:
                with contextlib.suppress(StoreError):
                    world.server.execute(Release(random.choice(expired), "cancelled", "an operator"))
        if world.faults.hits("extension") and not world.is_away():
            begun = [id for id, call in world.auditor.books.calls.items() if call.state == "open"]
            if begun:
                with contextlib.suppress(StoreError):
                    world.server.execute(Extend(random.choice(begun), random.choice((1_000_000, 10**9))))


def weather(scenario: Scenario) -> Steps:
    """Outages, clocks that step, a store that comes back without its last commands."""
    random, world = scenario.random, scenario.world
    while world.faults.on:
        yield random.randrange(5 * 10**6, 40 * 10**6)
        if world.faults.hits("outage"):
            world.away_until_us = world.now_us + random.choice((10**6, 10**7, 6 * 10**7))
        if world.faults.hits("clock_back"):
            world.skew_us -= random.choice((1, 10**6, 5 * 10**7, 6 * 10**8))
        if world.faults.hits("clock_forward"):
            world.skew_us += random.choice((1, 10**6, 6 * 10**8, 86_400 * 10**6))
        if world.faults.hits("tail_lost"):
            world.lose_tail()
    world.away_until_us = 0
    world.skew_us = max(world.skew_us, world.server._clock._high - world.now_us)


def sweeper(scenario: Scenario) -> Steps:
    """Somebody sweeps, whether or not a process lives."""
    while not scenario.over:
        yield 10_000_000 if scenario.world.faults.on else 120_000_000
        if not scenario.world.is_away():
            try:
                scenario.world.server.sweep()
            except StoreError:
                continue


def underway(scenario: Scenario) -> set[str]:
    """What a process with leases does not know to have arrived: an operator who sees it must wait a moment."""
    stores = [host.store._tender.books for host in scenario.hosts if scenario.leased and host.alive]
    return {entry.id for books in stores for lease in books.leases.values() for entry in lease.unsent.values()}
