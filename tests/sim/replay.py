"""Replays: what reached one store is told to another, at the same times; both must give the same answers, and end the same."""

from __future__ import annotations

import json
from typing import Any

from bursar.stores.base import Store
from bursar.testing import ManualClock
from sim.books import Broken
from sim.world import World


def compare(world: World, other: Store) -> None:
    """Tell `other`, whose clock is the world's, all that the world's store was told, then close it. Raises Broken."""
    clock: ManualClock = world.clock
    try:
        for now_us, kind, told, answer in world.log:
            clock.set(now_us)
            found: Any = other.publish(told, kind) if kind else other.execute(told)
            if found != answer:
                raise Broken(f"I6: another store answers {told} by {found}, this one did by {answer}")
        clock.set(max(clock.now_us(), world.auditor.books.now_us))
        for what in ("accounts", "entries", "reservations", "alerts"):
            ours, theirs = ({_told(one) for one in getattr(store, what)()} for store in (world.server, other))
            if ours != theirs:
                raise Broken(f"I4: the {what} of two stores differ: {sorted(ours ^ theirs)[:4]}")
    finally:
        other.close()


def _told(row: object) -> str:
    """All of a row; a server may tell the keys of its JSON in an order of its own."""
    return json.dumps(row, sort_keys=True)
