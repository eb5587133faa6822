"""The memory store: the law over a dict. For one process, and for tests; nothing outlives it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bursar.accounts import Account
from bursar.clock import Clock, StoreClock, SystemClock
from bursar.commands import (
    Alert,
    Answer,
    Command,
    Definition,
    Definitions,
    Drawn,
    Ended,
    Entry,
    Granted,
    Refused,
    Rejected,
    Reservation,
    Row,
    Tell,
)
from bursar.errors import StoreError
from bursar.law import OPERATOR_KEY, POLICY_KEY, decide
from bursar.signing import changes, operator_of
from bursar.stores import forks
from bursar.stores.base import expire_all

RETIRE_US = 60_000_000  # between two looks for accounts that may go


class MemoryStore:
    """Budgets in this process only. Holds the newest `max_entries` entries; older ones are dropped, balances stay, but
    those of ended windows where a budget has as many accounts as it may.
    """

    durability = "memory"

    def __init__(self, clock: Clock | None = None, *, max_entries: int = 100_000) -> None:
        self._clock = StoreClock(clock or SystemClock())
        self._rows: dict[str, Row] = {}
        self._open: dict[str, None] = {}
        self._ended: deque[str] = deque()
        self._max_entries = max_entries
        self._definitions: Definitions = {}
        self._history: list[tuple[int, str, str, dict[str, Any]]] = []
        self._outbox: dict[str, tuple[int, int, bool]] = {}  # by alert: due at, claims, told
        self._lock = threading.RLock()
        self._retired_us = -RETIRE_US
        self._closed = False
        self.now_us = self._clock.now_us
        forks.watch(self)

    def execute(self, command: Command) -> Answer:
        with self._lock:
            if self._closed:
                raise StoreError("The store is closed. Open a new Bursar.", fault="closed")
            answer, puts = decide(self._rows.get, command, self.now_us())
            if type(answer) is Rejected and answer.why == "accounts" and self._retire():
                answer, puts = decide(self._rows.get, command, self.now_us())
            if puts:
                if type(answer) is Granted:
                    self._open[command.id] = None
                self._rows.update(puts)  # one call: an interrupt comes before it or after it
                if type(answer) is Ended:
                    self._forget(answer.entry.id)
                    for alert in answer.alerts:
                        self._put_out(alert.id)
                elif type(command) is Tell:
                    self._put_out(command.id)
                elif type(answer) is Refused or type(answer) is Drawn:
                    for key, row in puts.items():
                        if type(row) is Entry:
                            self._forget(key)
                        elif type(row) is Alert:
                            self._put_out(row.id)
            return answer

    async def aexecute(self, command: Command) -> Answer:
        return self.execute(command)

    def post(self, command: Command) -> None:
        self.execute(command)

    def _forget(self, ended: str) -> None:
        self._open.pop(ended, None)
        self._ended.append(ended)
        while len(self._ended) > self._max_entries:  # the alerts of its marks came with it
            oldest = self._ended.popleft()
            self._rows.pop(oldest, None)
            self._outbox.pop(oldest[1:], None)

    def _retire(self) -> bool:
        """Let the accounts of ended windows go that nothing names any more, once entries have been dropped. Whether any went; one
        look a minute, for it is at all rows.
        """
        now_us = self.now_us()
        if len(self._ended) < self._max_entries or now_us < self._retired_us + RETIRE_US:
            return False
        self._retired_us = now_us
        named: set[str] = set()
        for row in self._rows.values():
            if type(row) is Entry:
                named.update(row.amounts)
            elif type(row) is Reservation:
                named.update(key for key, _, _ in row.held)
        over = [
            row for row in self._rows.values() if type(row) is Account and (row.rule.end_us or now_us + 1) <= now_us
        ]
        gone = [row.rule for row in over if row.rule.key not in named]
        for rule in gone:
            count = self._rows["#" + rule.budget]
            assert type(count) is int
            self._rows["#" + rule.budget] = count - 1
            del self._rows[rule.key]
        return bool(gone)

    def sweep(self) -> int:
        now_us = self.now_us()
        with self._lock:
            due = [
                id for id in self._open if type(row := self._rows.get(id)) is Reservation and row.expires_us <= now_us
            ]
        return expire_all(self, due)

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        with self._lock:
            version = self.version()
            for name, definition in changes(kind, definitions, self._definitions).items():
                version += 1
                self._history.append((version, kind, name, definition))
                self._definitions.setdefault(kind, {})[name] = Definition(version, definition)
            self._rows[POLICY_KEY] = version
            public = operator_of(self._definitions)
            if public is not None:
                self._rows[OPERATOR_KEY] = public
            return version

    def version(self) -> int:
        version = self._rows.get(POLICY_KEY, 0)
        assert type(version) is int
        return version

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        with self._lock:
            newer = {
                kind: {name: one for name, one in held.items() if one.version > since}
                for kind, held in self._definitions.items()
            }
            return self.version(), {kind: held for kind, held in newer.items() if held}

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        with self._lock:
            return iter(list(self._history))

    def _put_out(self, id: str) -> None:
        self._outbox[id] = (0, 0, False)
        self._ended.append("^" + id)

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        now_us = self.now_us()
        with self._lock:
            due = [id for id, (due_us, _, told) in self._outbox.items() if not told and due_us <= now_us][:limit]
            found = []
            for id in due:
                claims = self._outbox[id][1]
                self._outbox[id] = (now_us + lease_us, claims + 1, False)
                alert = self._rows["^" + id]
                assert type(alert) is Alert
                found.append((alert, claims))
            return found

    def delivered(self, ids: Iterable[str]) -> None:
        with self._lock:
            self._outbox.update({id: (0, self._outbox[id][1], True) for id in ids if id in self._outbox})

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        with self._lock:
            self._outbox.update({id: (at_us, self._outbox[id][1], False) for id in ids if id in self._outbox})

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        with self._lock:
            found = [(row, self._outbox[row.id][2]) for row in self._rows.values() if type(row) is Alert]
        return iter(sorted(found, key=lambda one: (one[0].at_us, one[0].id)))

    def reservations(self) -> Iterator[Reservation]:
        with self._lock:
            found = [row for id in self._open if type(row := self._rows.get(id)) is Reservation]
        return iter(sorted(found))

    def open_reservations(self) -> int:
        with self._lock:  # an interrupt may leave an id that is not open, or no longer
            return sum(type(self._rows.get(id)) is Reservation for id in self._open)

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        with self._lock:
            rows = list(self._rows.values()) if keys is None else [self._rows.get(key) for key in keys]
        return iter([row for row in rows if type(row) is Account])

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        wanted = dict(tags or {}).items()
        with self._lock:
            found = [row for row in self._rows.values() if type(row) is Entry and wanted <= row.draft["tags"].items()]
        return iter(sorted(found, key=lambda entry: entry.id))

    def close(self) -> None:
        self._closed = True

    # Another thread may be amid a command: the child would find its rows half put, and its lock held for ever.

    def before_fork(self) -> None:
        self._lock.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        self._lock.release()
