"""Bugs of leases and journals, which only worlds with leases can show."""

from __future__ import annotations

from itertools import count
from typing import Any

from bursar.commands import Draw
from bursar.stores.leases import books, journal, lease, recovery, tender
from sim.planting import Patch, function, handler


def _journal_empty(original: Any) -> Any:
    return lambda self: [kept._replace(entries={}) for kept in original(self)]


def _draw_over(original: Any) -> Any:
    """What has been sent comes under another id each time it is sent."""

    def draw(id: str, rules: Any, entries: Any, *more: Any) -> Any:
        command = original(id, rules, entries, *more)
        again = tuple(entry._replace(id=f"{entry.id}.{len(entries)}") for entry in command.entries)
        return command._replace(entries=again)

    return draw


def _draw_unpaid(original: Any, read: Any, command: Any, now_us: int) -> Any:
    """What is spent of a lease does not come out of it."""
    return original(lambda key: None if key == command.id else read(key), command, now_us)


def _lease_kept(original: Any) -> Any:
    return lambda self, lease: self.books.drop(lease)


def _unwritten(original: Any) -> Any:
    """Answered before it is in the journal."""

    def write(self: Any, leases: Any) -> None:
        for one in leases:
            for id in list(one.unwritten):
                one.unsent[next(_numbers)] = one.unwritten.pop(id)

    return write


_numbers = count(10**9)


def _lease_unbounded(original: Any) -> Any:
    """A lease gives out more than it holds."""

    def reserve(self: Any, *told: Any) -> Any:
        self._lines = tuple(rule._replace(limit=10**15) for rule in self._lines)
        return original(self, *told)

    return reserve


def _dead_are_free(original: Any) -> Any:
    """What a dead process had leased and not spent is given back, though its last calls may have been billed."""
    nothing = {"USD": 0, "tokens": 0, "requests": 0}
    return lambda store, id, actuals, cost_nanos, reason: original(store, id, nothing, 0, reason)


LEASE_BUGS: dict[str, Patch] = {
    "a journal is read without its entries": function(journal.Journal, "kept", _journal_empty),
    "what is sent again is booked again": function(tender, "draw", _draw_over),
    "what is spent of a lease does not come out of it": handler(Draw, _draw_unpaid),
    "a lease that is over is not given back": function(tender.Tender, "_give_back", _lease_kept),
    "an end is answered before it is in the journal": function(books.Books, "write", _unwritten),
    "a lease gives out more than it holds": function(lease.Lease, "reserve", _lease_unbounded),
    "the last calls of a dead process are free": function(recovery, "settle", _dead_are_free),
}
