"""Recovery: what a process that died had booked on its leases gets to the shared store, from the journal it left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bursar.accounts import Rule
from bursar.commands import Drawn, Ended, Rejected, Settle
from bursar.errors import StoreError
from bursar.stores.base import Store
from bursar.stores.leases.journal import Journal, Kept, left_behind, put_aside
from bursar.stores.leases.lease import draw, sums

MAX_DRAW = 1_500  # entries that travel at a time: Redis is busy with so many for some 15 ms

log = logging.getLogger("bursar")


class Recovered(NamedTuple):
    """One lease: how many records the store lacked, and what stays booked as estimated, by unit, since nobody can tell."""

    journal: Path
    lease: str
    records: int
    estimated: dict[str, int]


def recover(store: Store, folder: Path, *, but: Path | None = None) -> list[Recovered]:
    """Book what the journals of dead processes in this folder hold, and delete them; journals that are in use are left alone.

    Raises StoreError: what was booked until then stays booked, and another try goes on from there.
    """
    found: list[Recovered] = []
    rejected: StoreError | None = None
    for journal in left_behind(folder, but=but):
        delete = False
        try:
            try:
                leases = journal.kept()
            except StoreError as error:
                if error.fault != "damaged":
                    raise
                put_aside(journal.path, error)
                continue
            for kept in leases:
                found.append(_recover(store, journal, kept))
            delete = True
        except StoreError as error:
            if error.fault != "damaged":
                raise
            rejected = rejected or error  # its file stays; the other journals are none the worse
        finally:
            journal.close(delete=delete)
    for one in found:
        log.warning(
            "recovered %d records of the lease %s from %s; booked as estimated: %s",
            *(one.records, one.lease, one.journal, one.estimated),
        )
    if rejected is not None:
        raise rejected
    return found


def _recover(store: Store, journal: Journal, kept: Kept) -> Recovered:
    drawn, new, left = kept.drawn, 0, None
    numbers = list(kept.entries)
    for start in range(0, max(len(numbers), 1), MAX_DRAW):  # at least once: to see what the lease still holds
        some = numbers[start : start + MAX_DRAW]
        entries = [kept.entries[number] for number in some]
        answer = store.execute(draw(kept.id, kept.rules, entries, {}))
        if type(answer) is not Drawn:
            raise StoreError(
                f"The store rejects the records of {journal.path}: {answer}. Nothing of them is lost: keep the file, and report "
                "this as a defect.",
                fault="damaged",
            )
        new, left = new + answer.new, answer.left
        drawn = sums(kept.rules, entries, drawn)
        journal.sent(kept.id, some, drawn)
    estimated = unaccounted(kept.rules, kept.granted, drawn)
    # the calls in flight may have been billed: what is left stands for them, for each account what it held
    actuals = {} if left is not None else estimated
    reason = "the process died: the outcome of its last calls is unknown"
    if not settle(store, kept.id, actuals, estimated.get("USD", 0), reason):
        estimated = dict.fromkeys(estimated, 0)  # nothing of it is on the books
    journal.ended(kept.id)
    return Recovered(journal.path, kept.id, new, estimated)


def unaccounted(rules: Iterable[Rule], granted: dict[str, int], drawn: dict[str, int]) -> dict[str, int]:
    """What nobody has spent of a lease, by unit: of the account on which the least was spent."""
    found: dict[str, int] = {}
    for rule in rules:
        left = max(0, granted[rule.key] - drawn.get(rule.key, 0))
        found[rule.unit] = max(found.get(rule.unit, 0), left)
    return found


def settle(store: Store, id: str, actuals: dict[str, int], cost_nanos: int, reason: str) -> bool:
    """End a lease, or correct its expiry: of what it held, this much was spent. False where it was given back before."""
    answer = store.execute(Settle(id, actuals, cost_nanos, {}, "cancelled", True, reason))
    if type(answer) is Ended:
        return True
    if answer != Rejected("ended", "release") and answer != Rejected(
        "unknown", id
    ):  # it was given back, or never granted
        log.error("the end of the lease %s was rejected: %s", id, answer)
    return False
