"""The leased store: calls on hot accounts are reserved in memory, out of slices that a shared store has granted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bursar.accounts import Account
from bursar.commands import (
    Alert,
    Answer,
    Command,
    Definitions,
    Entry,
    Rejected,
    Reservation,
    Reserve,
)
from bursar.errors import InvalidInput, StoreError
from bursar.stores import forks
from bursar.stores.base import Store
from bursar.stores.group_commit import GroupCommit
from bursar.stores.leases.tender import WAIT_S, Crossed, Tender, new_id


class LeasedStore:
    """A shared store, and this process's leases of its hot accounts. `folder`: where the journals of a host's processes lie.

    A call on accounts that are all leased is reserved and settled here; every settlement is in the journal before it is
    answered, and in the shared store within a second. `durability` is the journal's, as SQLite has it. All other calls, and
    every other command, go to the shared store at once. `background`: False where nobody but the caller of `tend` does the
    housekeeping. `ids`: new ones for leases and journals, for simulations. Raises InvalidInput, and the StoreError of the shared
    store and of the journal.
    """

    def __init__(
        self,
        shared: Store,
        folder: str | Path,
        *,
        durability: str = "full",
        background: bool = True,
        ids: Callable[[], str] | None = None,
    ) -> None:
        if durability not in ("full", "process"):
            raise InvalidInput(f'{durability!r} is no durability. Use "full" or "process".', durability=durability)
        path = Path(folder)
        if not path.is_dir() or not os.access(path, os.W_OK):
            raise StoreError(
                f"Journals cannot be written to {path}. Create the folder, on a local disk, for this user.",
                fault="unreachable",
                path=str(path),
            )
        self.shared = shared
        self.durability = durability
        self.now_us = shared.now_us
        self._tender = Tender(shared, path, full=durability == "full", background=background, ids=ids or new_id)
        self._commits = GroupCommit(self._tender.books.apply)
        self._closed = False
        forks.watch(self)

    def on_crossed(self, crossed: Crossed) -> None:
        """Call `crossed` with the alerts of marks that were crossed by what was sent to the shared store, and the accounts."""
        self._tender.crossed = crossed

    def tend(self) -> None:
        """One round of housekeeping: take and extend leases, send what was booked, give back what is idle. Raises StoreError."""
        self._tender.tend()

    def execute(self, command: Command) -> Answer:
        if self._closed:
            self._check_open()
        books = self._tender.books
        answer = None
        if type(command) is Reserve:
            answer = books.reserve(command)
            if answer is None and (asked := self._tender.coming(command)) is not None:
                # it would wait no less for the shared store, and hold up the lease there
                with suppress(TimeoutError):
                    asked.result(WAIT_S)
                answer = books.reserve(command)
        elif books.ends(command):
            answer = _not_unknown(self._commits.run(command))
        if answer is None:
            with self._waiting(command):
                answer = self.shared.execute(command)
        return answer

    async def aexecute(self, command: Command) -> Answer:
        if self._closed:
            self._check_open()
        books = self._tender.books
        answer = None
        if type(command) is Reserve:
            answer = books.reserve(command)
            if answer is None and (asked := self._tender.coming(command)) is not None:
                from asyncio import wait, wrap_future  # callers without an event loop need not load it

                await wait([wrap_future(asked)], timeout=WAIT_S)
                answer = books.reserve(command)
        elif books.ends(command):
            # without an fsync, the hop to another thread would take longer than the write
            ended = await self._commits.arun(command) if self.durability == "full" else self._commits.run(command)
            answer = _not_unknown(ended)
        if answer is None:
            with self._waiting(command):
                answer = await self.shared.aexecute(command)
        return answer

    @contextmanager
    def _waiting(self, command: Command) -> Iterator[None]:
        """Note how long a call waits for the shared store."""
        begun_us = self.now_us()
        try:
            yield
        finally:
            if type(command) is Reserve:
                self._tender.books.waited(command, self.now_us() - begun_us)

    def post(self, command: Command) -> None:
        self._check_open()
        if self._tender.books.ends(command):
            self._commits.post(command)
        else:
            self.shared.post(command)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")

    def sweep(self) -> int:
        ended = sum(type(self.execute(command)) is not Rejected for command in self._tender.books.due())
        return ended + self.shared.sweep()

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        return self.shared.publish(definitions, kind)

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        return self.shared.definitions(since)

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        return self.shared.history()

    def version(self) -> int:
        return self.shared.version()

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        return self.shared.claim(limit, lease_us)

    def delivered(self, ids: Iterable[str]) -> None:
        self.shared.delivered(ids)

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self.shared.retry(ids, at_us)

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        return self.shared.alerts()

    # Reports see what this process has booked; what it has leased and not yet spent is reserved to them.

    def reservations(self) -> Iterator[Reservation]:
        self._tender.tend()
        return self.shared.reservations()

    def open_reservations(self) -> int:
        self._tender.tend()
        return self.shared.open_reservations()

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        self._tender.tend()
        return self.shared.accounts(keys)

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        self._tender.tend()
        return self.shared.entries(tags)

    def close(self) -> None:
        if not self._closed:
            self._commits.close()
            self._tender.close()
            self._closed = True
            self.shared.close()

    def before_fork(self) -> None:
        self._tender.before_fork()

    def after_fork(self, *, in_child: bool) -> None:
        self._tender.after_fork(in_child=in_child)
        if in_child:
            self._commits = GroupCommit(self._tender.books.apply)


def _not_unknown(answer: Answer) -> Answer | None:
    """None where the call has just been given back: the shared store has it."""
    return None if type(answer) is Rejected and answer.why == "unknown" else answer
