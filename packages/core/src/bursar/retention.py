"""Retention: which records may be pruned, and what an audit tells of those that were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bursar.commands import Entry
from bursar.errors import InvalidInput
from bursar.stores.base import Store
from bursar.stores.pruning import Prunable

DAY_US = 86_400_000_000


class Bound(NamedTuple):
    """Records settled before `before_us` may go; `why` says what stands in the way of going further, if anything does."""

    before_us: int
    why: str = ""


def prunable_store(store: Store) -> Prunable:
    """The store, as one that can be pruned. Raises InvalidInput."""
    if isinstance(store, Prunable):
        return store
    raise InvalidInput(
        "Only stores on SQLite, PostgreSQL and Redis are pruned. Name the URL of one.",
        argument="store",
    )


def bound(store: Store, wanted_us: int) -> Bound:
    """How far records may be pruned that were settled before `wanted_us`: not into the last day, in which commands are made
    again; nor into a window that is open, a rolling one included.

    Records of accounts without an end go like others: their window never closes, and their sums are kept.
    """
    now_us = store.now_us()
    found = min(Bound(wanted_us), Bound(now_us - DAY_US, "commands of the last day may be made again"))
    for account in store.accounts():
        rule = account.rule
        if rule.kind == "rolling":
            oldest_us = now_us - rule.period_us - rule.period_us // 60
        elif rule.end_us is not None and rule.end_us > now_us:
            oldest_us = rule.start_us
        else:
            continue
        if oldest_us < found.before_us:
            found = Bound(oldest_us, f"a window of the budget {rule.budget!r} is open")
    return Bound(max(found.before_us, 0), found.why)


class Kept(NamedTuple):
    """What was pruned, as the records of sums tell it."""

    records: int = 0
    before_us: int = 0
    cost_nanos: int = 0


def kept(entries: Iterable[Entry]) -> Kept:
    """The sums over the records of sums among these entries."""
    found = Kept()
    for entry in entries:
        if entry.kind == "carried":
            found = Kept(
                found.records + entry.facts["records"],
                max(found.before_us, entry.facts["before_us"]),
                found.cost_nanos + entry.cost_nanos,
            )
    return found
