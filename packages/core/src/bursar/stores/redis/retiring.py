"""Retiring accounts of Redis: what the drain has seen tells when something was last booked on those that have no end."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

from bursar.accounts import Account
from bursar.commands import Entry
from bursar.stores.redis.scripts import RETIRE
from bursar.stores.redis.server import Server
from bursar.stores.redis.wire import Wire, fields_of, row_of
from bursar.stores.retiring import is_done_with

PAGE = 1_000  # accounts looked at, and taken away, at a time
_START = 4  # where a key has the begin of its window, 0 for one that has no end


def note(server: Server, slot: str, entries: Iterable[Entry], now_us: int) -> None:
    """Before these records leave Redis: until when something was booked on accounts of which no window tells, or may be corrected
    for LATE_US from now on.
    """
    newest: dict[str, int] = {}
    for entry in entries:
        at_us = now_us if entry.kind == "expiry" else entry.settled_us
        for key in entry.amounts:
            if entry.kind == "expiry" or not json.loads(key)[_START]:
                newest[key] = max(newest.get(key, 0), at_us)
    if newest:
        server.ask("ZADD", f"{slot}moved", "GT", *(text for key, at_us in newest.items() for text in (str(at_us), key)))


def retire(server: Server, slot: str, granted: Container[str], before_us: int, now_us: int) -> int:
    """Take away the accounts of a slot that no record in Redis names, and on which nothing was booked since then, but those
    `granted`; how many went.

    One of which the drain has not seen anything is taken for one of today.
    """
    retired, wire, named = 0, Wire(), _Named(server, slot)
    for keys in _pages(server, f"{slot}accounts"):
        rows = server.many(("MGET", f"{slot}r:{key}", f"{slot}a:{key}") for key in keys)
        accounts = {key: wire.stored_account(*row) for key, row in zip(keys, rows, strict=True) if None not in row}
        texts = {key: row[1].decode() for key, row in zip(keys, rows, strict=True) if key in accounts}
        recorded = named.now()  # after they were read: whatever moves them from here on changes their texts
        done = {
            key: account
            for key, account in accounts.items()
            if key not in recorded and key not in granted and is_done_with(account, before_us, now_us)
        }
        resting = _resting(server, slot, done, before_us, now_us)
        told = [text for key in resting for text in (key, texts[key], done[key].rule.budget)]
        if told:
            retired += int(server.run(RETIRE, slot, *told))
    return retired


def forget_alerts(server: Server, slot: str, before_us: int) -> None:
    """Take away the alerts of before that time, out of the outbox first: nobody takes them any more."""
    while found := server.ask("ZRANGEBYSCORE", f"{slot}alerts", "-inf", f"({before_us}", "LIMIT", "0", str(PAGE)):
        ids = [id.decode() for id in found]
        server.ask("ZREM", f"{slot}outbox", *ids)
        server.ask("DEL", *(f"{slot}t:{id}" for id in ids))
        server.ask("ZREM", f"{slot}alerts", *ids)


class _Named:
    """The accounts that the records of a slot's stream name, followed as it grows."""

    def __init__(self, server: Server, slot: str) -> None:
        self._server = server
        self._slot = slot
        self._keys: set[str] = set()
        self._after = "-"

    def now(self) -> set[str]:
        """Those of all records until now."""
        while True:
            page = self._server.ask("XRANGE", f"{self._slot}records", self._after, "+", "COUNT", str(PAGE))
            ids = [fields[b"id"].decode() for _, fields in page]
            rows = self._server.many(("HGETALL", f"{self._slot}i:{id}") for id in ids)
            for id, row in zip(ids, rows, strict=True):
                entry = row_of(id, fields_of(row)) if row else None
                if type(entry) is Entry:
                    self._keys.update(entry.amounts)
            if not page:
                return self._keys
            self._after = f"({page[-1][0].decode()}"


def _pages(server: Server, name: str) -> Iterator[Sequence[str]]:
    cursor = "0"
    while True:
        following, found = server.ask("SSCAN", name, cursor, "COUNT", str(PAGE))
        yield [key.decode() for key in found]
        cursor = str(int(following))
        if cursor == "0":
            return


def _resting(server: Server, slot: str, accounts: Mapping[str, Account], before_us: int, now_us: int) -> Iterator[str]:
    """Those that rest for so long; those of ended windows where nothing of them may be corrected since."""
    endless = [key for key, account in accounts.items() if account.rule.end_us is None]
    server.many(("ZADD", f"{slot}moved", "NX", str(now_us), key) for key in endless)
    moved = server.many(("ZSCORE", f"{slot}moved", key) for key in accounts)
    return (key for key, at_us in zip(accounts, moved, strict=True) if at_us is None or float(at_us) < before_us)
