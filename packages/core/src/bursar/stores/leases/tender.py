"""The tender: takes leases from the shared store, sends it what was booked on them, and gives back what is not needed."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bursar.accounts import Account, under
from bursar.commands import Alert, Drawn, Extend, Extended, Granted, Rejected, Release, Reserve
from bursar.errors import BursarError, StoreError
from bursar.stores.base import Store
from bursar.stores.leases.books import Books, Bundle
from bursar.stores.leases.journal import SUFFIX, Journal
from bursar.stores.leases.lease import Lease, draw, sums
from bursar.stores.leases.recovery import MAX_DRAW, recover, settle
from bursar.stores.leases.sizing import amounts

TEND_S = 0.25  # how often booked entries are sent, and a newer policy is looked for
TTL_US = 120_000_000  # of a lease; a live process extends it at a third
IDLE_US = 3_000_000  # a lease that nobody uses for so long is given back
PUT_OFF_US = 1_000_000  # until a lease is asked for again that was not to be had, or was not worth it
WAIT_S = 1.0  # how long a call waits at most for a lease that is being asked for, before it is made without one
RECOVER_US = 60_000_000  # how often journals of dead processes are looked for

Crossed = Callable[[tuple[Alert, ...], tuple[Account, ...]], None]
log = logging.getLogger("bursar")


class Tender:
    """All that a process's leases need of the shared store. `tend` is one round; a thread does one four times a second.

    `crossed`: called with the alerts of marks that were crossed by what was sent.
    """

    def __init__(self, shared: Store, folder: Path, *, full: bool, background: bool, ids: Callable[[], str]) -> None:
        self.crossed: Crossed = nobody
        self.books = Books(shared.now_us, self._wanted)
        self._shared = shared
        self._folder = folder
        self._full = full
        self._background = background
        self._ids = ids
        self._wake = threading.Event()
        self._stop = False
        self._started = threading.Lock()
        self._thread: threading.Thread | None = None
        self._tending = threading.RLock()  # one round at a time
        self._recovered_us = 0
        if any(folder.glob(f"*{SUFFIX}")):  # somebody has left something behind
            self._start()

    def _start(self) -> None:
        if self._background and self._thread is None:
            with self._started:
                if self._thread is None:
                    thread = threading.Thread(
                        target=_work, args=(weakref.ref(self), self._wake), daemon=True, name="bursar-leases"
                    )
                    thread.start()  # where there is no room for one, who wants it next tries again
                    self._thread = thread

    def _wanted(self) -> None:
        self._start()
        self._wake.set()

    def tend(self) -> None:
        """One round. Raises StoreError after it, when part of it could not be done; nothing is forgotten then."""
        failed: list[StoreError] = []
        with self._tending:
            books = self.books
            if books.leases or books.wanted:
                with _noted(failed):
                    books.renew(self._shared.version())
            self._take(failed)
            with _noted(failed):
                for command in books.due():
                    books.apply((command,))
            now_us = self._shared.now_us()
            books.retire(lambda lease: now_us - lease.used_us >= IDLE_US)
            for lease in list(books.leases.values()):
                self._take(failed)  # callers wait for these
                with _noted(failed):
                    self._tend(lease, now_us)
            if now_us - self._recovered_us >= RECOVER_US:
                left: list[StoreError] = []
                with _noted(left):
                    recover(self._shared, self._folder, but=self.books.journal.path if self.books.journal else None)
                if not left or left[0].fault == "damaged":  # a journal that is rejected now will be the next time
                    self._recovered_us = now_us
                failed += left
        if failed:
            raise failed[0]

    # -- taking

    def coming(self, command: Reserve) -> Future[None] | None:
        """Done when the lease is there, or cannot be had, that is being asked for calls like this one. None where none is."""
        return self.books.coming(command) if self._background else None

    def _take(self, failed: list[StoreError]) -> None:
        books = self.books
        with books.lock:
            wanted = list(books.wanted.items())
        for bundle, (command, asked) in wanted:
            taken = False
            try:
                with _noted(failed):
                    taken = self._ask(bundle, command)
            finally:
                if not taken:
                    books.put_off(bundle, self._shared.now_us() + PUT_OFF_US)
                books.wanted.pop(bundle, None)
                asked.set_result(None)

    def _ask(self, bundle: Bundle, command: Reserve) -> bool:
        """Ask for a lease for calls like this one."""
        calls = self.books.calls(bundle)
        known = {account.rule.key: account for account in self._shared.accounts(bundle)}
        rules = [rule for rule, _ in command.lines]
        accounts = [under(known.get(rule.key) or Account(rule), rule) for rule in rules]
        size = amounts(command, accounts, calls)
        if size is None:
            return False
        now_us = self._shared.now_us()
        id = f"{now_us:014x}-{self._ids()}"
        lease = Lease(id, rules, size, calls, command.version, now_us)
        self._journal().begin(id, rules, dict(zip(bundle, size, strict=True)))
        lease.retired = True  # until it is granted: else, whatever happens, it is given back
        with self.books.lock:  # others go through them
            self.books.leases[id] = lease
        answer = self._shared.execute(
            Reserve(
                id,
                tuple(zip(rules, size, strict=True)),
                TTL_US,
                _draft(command, size),
                version=command.version,
                max_accounts=command.max_accounts,
                quiet=True,
            )
        )
        if type(answer) is not Granted:
            return False
        lease.retired = False
        self.books.add(bundle, lease)
        return True

    def _journal(self) -> Journal:
        if self.books.journal is None:
            name = f"{socket.gethostname()}-{os.getpid()}-{self._ids()}{SUFFIX}"
            self.books.journal = Journal(self._folder / name, full=self._full)
        return self.books.journal

    # -- keeping and giving back

    def _tend(self, lease: Lease, now_us: int) -> None:
        self.books.write((lease,))
        with self.books.lock:
            numbers = list(lease.unsent)  # calls go on meanwhile: theirs are for the next round
        for start in range(0, len(numbers), MAX_DRAW):
            self._send(lease, numbers[start : start + MAX_DRAW])
        if lease.over():
            self._give_back(lease)
        elif not lease.ended and now_us - lease.extended_us >= TTL_US // 3:
            answer = self._shared.execute(Extend(lease.id, TTL_US))
            if type(answer) is Extended:
                lease.extended_us = now_us
            else:
                self._end(lease)

    def _send(self, lease: Lease, numbers: list[int]) -> None:
        with self.books.lock:
            entries = [lease.unsent[number] for number in numbers]
            texts = {entry.id: text for entry in entries if (text := lease.texts.get(entry.id)) is not None}
            overruns = lease.overruns()
        untold = {key: over - lease.told.get(key, 0) for key, over in overruns.items()}
        answer = self._shared.execute(draw(lease.id, lease.rules, entries, untold, lease.version, texts))
        if type(answer) is not Drawn:
            raise StoreError(
                f"The store rejects records of the lease {lease.id}: {answer}. They stay in the journal: report this as a defect.",
                fault="damaged",
            )
        drawn = sums(lease.rules, entries, lease.drawn)
        assert self.books.journal is not None
        self.books.journal.sent(lease.id, numbers, drawn)
        with self.books.lock:
            lease.drawn, lease.told = drawn, overruns
            self.books.forget(lease.sent(numbers))
        if answer.left is None:
            self._end(lease)
        if answer.alerts:
            self.crossed(answer.alerts, answer.accounts)

    def _end(self, lease: Lease) -> None:
        """The reservation behind it is over, while this process was held up or the store out of reach."""
        if not lease.ended:
            log.warning(
                "the lease %s has expired before it was extended; what it held is corrected when it is over", lease.id
            )
            lease.ended = True
            self.books.retire(lambda other: other is lease)

    def _give_back(self, lease: Lease) -> None:
        if lease.ended:  # its expiry has booked what it held then; since, all of that was booked by itself
            settle(
                self._shared,
                lease.id,
                dict.fromkeys({rule.unit for rule in lease.rules}, 0),
                0,
                "a lease, given back late",
            )
        else:
            answer = self._shared.execute(Release(lease.id, "cancelled", "a lease, given back"))
            if type(answer) is Rejected and answer.why == "ended":
                self._end(lease)
                return
        assert self.books.journal is not None
        self.books.journal.ended(lease.id)
        self.books.drop(lease)

    def close(self) -> None:
        """Send everything and give everything back. What cannot be sent now stays in the journal, for whoever recovers it."""
        self._stop = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._tending:
            self.books.retire(lambda lease: True)
            self.books.unwant()
            try:
                self.tend()
            except StoreError as error:
                log.error("while closing: %s", error)
            if self.books.journal is not None:
                self.books.journal.close(delete=not self.books.leases)

    # A fork's child begins anew: the parent's leases are the parent's.

    def before_fork(self) -> None:
        self._tending.acquire()
        self.books.lock.acquire()
        if self.books.journal is not None:
            self.books.journal.before_fork()

    def after_fork(self, *, in_child: bool) -> None:
        if self.books.journal is not None:
            self.books.journal.after_fork(in_child=in_child)
        self.books.lock.release()
        self._tending.release()
        if in_child:
            self.books = Books(self._shared.now_us, self._wanted)
            self._wake, self._started, self._thread = threading.Event(), threading.Lock(), None


def _draft(command: Reserve, size: tuple[int, ...]) -> dict[str, Any]:
    """A lease's record is about its accounts: their scopes, and whose process it is."""
    tags: dict[str, str] = {}
    for rule, _ in command.lines:
        tags |= json.loads(rule.scope)
    dollars = [amount for (rule, _), amount in zip(command.lines, size, strict=True) if rule.unit == "USD"]
    return {
        "path": [],
        "tags": {**tags, "lease": f"{socket.gethostname()} {os.getpid()}"},
        "cost_nanos": max(dollars, default=0),
        "usage": {},
    }


@contextmanager
def _noted(failed: list[StoreError]) -> Iterator[None]:
    """What the store could not do now is tried again by the next round; the rest of this one goes on."""
    try:
        yield
    except StoreError as error:
        failed.append(error)


def _work(held: weakref.ref[Tender], wake: threading.Event) -> None:
    while True:
        wake.wait(TEND_S)
        tender = held()
        if tender is None or tender._stop:
            return
        wake.clear()
        try:
            tender.tend()
        except Exception as error:
            # Another round may go well; without this the thread would end, and no lease would be drawn or given back.
            log.warning("leases: %s", error, exc_info=not isinstance(error, BursarError))
        del tender


def new_id() -> str:
    """Nobody else has this one."""
    return os.urandom(8).hex()


def nobody(_alerts: tuple[Alert, ...], _accounts: tuple[Account, ...]) -> None:
    """Nobody asked to be told."""
