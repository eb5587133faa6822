"""The books of a process: its leases, the calls that are made out of them, and what it wants to lease. Safe for threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from bursar.commands import Answer, Command, Ended, Expire, Extend, Rejected, Release, Reserve, Settle
from bursar.errors import StoreError
from bursar.stores.entry_text import entry_text
from bursar.stores.leases.journal import Journal
from bursar.stores.leases.lease import Lease
from bursar.stores.leases.sizing import Demand, leasable

Bundle = tuple[str, ...]  # the keys of the accounts that a call matches
_ENDS = frozenset({Settle, Release, Extend, Expire})
MAX_BUNDLES = 1_024  # whose demand is known, those of the last calls


class Wanted(NamedTuple):
    """A lease that is to be asked for: a call that it is for, and what is done when it is there or cannot be had."""

    command: Reserve
    asked: Future[None]


class Books:
    """Which lease serves which calls. `wake` is called when a lease is wanted; `version` is the newest of the policy that is known.

    Each bundle of accounts has one lease that is used, and at most one that follows it; older ones wait for their last calls.
    """

    def __init__(self, now_us: Callable[[], int], wake: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self.journal: Journal | None = None  # there is one as soon as there is a lease
        self.leases: dict[str, Lease] = {}
        self.version = 0
        self.wanted: dict[Bundle, Wanted] = {}
        self._now_us = now_us
        self._wake = wake
        self._queues: dict[Bundle, list[Lease]] = {}
        self._holders: dict[str, Lease] = {}
        self._demand: OrderedDict[Bundle, Demand] = OrderedDict()
        self._writing = threading.Lock()

    def ends(self, command: Command) -> bool:
        """Whether the command is the end, or the extension, of a call that was made out of a lease."""
        return type(command) in _ENDS and command.id in self._holders

    def reserve(self, command: Reserve) -> Answer | None:
        """Reserve out of a lease; None where that is not to be had now, and the shared store has to be asked."""
        if not command.lines or command.digest or command.behind or command.complied:  # see `leasable`
            return None
        rules, amounts = zip(*command.lines, strict=True)
        bundle = _bundle(command)
        with self.lock:
            if command.version != self.version:
                if command.version < self.version:
                    return Rejected("stale", str(self.version))
                self.renew(command.version)
            now_us = self._now_us()
            demand = self._demand.get(bundle)
            if demand is None:
                demand = self._demand[bundle] = Demand(now_us)
                if len(self._demand) > MAX_BUNDLES:
                    self._demand.popitem(last=False)
            self._demand.move_to_end(bundle)
            demand.note(now_us)
            queue = self._queues.get(bundle, ())
            while queue:
                lease = queue[0]
                if not lease.retired and lease.rules == rules:
                    self._holders[command.id] = lease
                    answer = lease.reserve(command, amounts, now_us)
                    if answer is not None:
                        if len(queue) == 1 and lease.low():
                            self._want(bundle, command, demand, now_us)
                        return answer
                    del self._holders[command.id]
                    demand.used_up(lease.made, now_us - lease.first_us)
                lease.retired = True
                queue.pop(0)
            self._want(bundle, command, demand, now_us)
        return None

    def _want(self, bundle: Bundle, command: Reserve, demand: Demand, now_us: int) -> None:
        if now_us < demand.not_before_us or bundle in self.wanted:
            return
        if demand.calls() and leasable(command):
            self.wanted[bundle] = Wanted(command, Future())
            self._wake()

    def coming(self, command: Reserve) -> Future[None] | None:
        """Done when the lease that is asked for these accounts is there or cannot be had; None where none is asked for."""
        wanted = self.wanted.get(_bundle(command)) if self.wanted else None
        return None if wanted is None else wanted.asked

    def unwant(self) -> None:
        """Ask for no more leases; who waits for one waits no longer."""
        with self.lock:
            while self.wanted:
                self.wanted.popitem()[1].asked.set_result(None)

    def calls(self, bundle: Bundle) -> int:
        """How many calls a lease of these accounts is to last for."""
        demand = self._demand.get(bundle)
        return 0 if demand is None else demand.calls()

    def waited(self, command: Reserve, us: int) -> None:
        """So long this call has waited for the shared store."""
        demand = self._demand.get(_bundle(command))
        if demand is not None:
            demand.waited(us)

    def put_off(self, bundle: Bundle, until_us: int) -> None:
        """Want no lease of these accounts before that time."""
        demand = self._demand.get(bundle)
        if demand is not None:
            demand.not_before_us = until_us

    def add(self, bundle: Bundle, lease: Lease) -> None:
        """Use this lease once those before it are used up."""
        with self.lock:
            if bundle in self._demand:
                self._demand[bundle].slow = 0  # they wait no longer: how fast they come now will tell
            if lease.version < self.version:
                lease.retired = True
            else:
                self._queues.setdefault(bundle, []).append(lease)

    def renew(self, version: int) -> None:
        """A newer policy is in force: what was leased by an older one is given back."""
        with self.lock:
            if version > self.version:
                self.version = version
                self.retire(lambda lease: lease.version < version)

    def retire(self, wanted: Callable[[Lease], bool]) -> None:
        """Make no more calls out of these leases."""
        with self.lock:
            for lease in self.leases.values():
                lease.retired = lease.retired or wanted(lease)
            for bundle, queue in list(self._queues.items()):
                queue[:] = [lease for lease in queue if not lease.retired]
                if not queue:
                    del self._queues[bundle]

    def drop(self, lease: Lease) -> None:
        """The shared store has all of it: forget it, and its calls."""
        with self.lock:
            self.leases.pop(lease.id, None)
            self.forget(lease.rows)

    def forget(self, calls: Iterable[str]) -> None:
        """The shared store has all of these calls, and answers whoever asks for them again."""
        for id in calls:
            self._holders.pop(id, None)

    def due(self) -> list[Expire]:
        """The ends of calls whose time has come."""
        with self.lock:
            now_us = self._now_us()
            return [Expire(id) for lease in self.leases.values() for id in lease.due(now_us)]

    def apply(self, commands: Sequence[Command], _first_time: bool = True) -> list[Answer | BaseException]:
        """End calls: decided in memory, and answered when the journal has what that books. `Rejected` unknown: not of a lease."""
        answers: list[Answer | BaseException] = []
        touched: dict[Lease, None] = {}
        with self.lock:
            now_us = self._now_us()
            for command in commands:
                lease = self._holders.get(command.id)
                if lease is None:
                    answers.append(Rejected("unknown", command.id))
                    continue
                answer = lease.end(command, now_us)
                if lease.unwritten:
                    touched[lease] = None
                answers.append(answer)
        try:
            self.write(touched)
        except StoreError as error:  # they stay unwritten, and are written by whoever comes next
            lacking = {id for lease in touched for id in lease.unwritten}
            return [error if type(one) is Ended and one.entry.id in lacking else one for one in answers]
        return answers

    def write(self, leases: Iterable[Lease]) -> None:
        """Keep in the journal what it lacks of these leases, in the order in which it came; from then on it may be sent."""
        with self._writing:  # what two threads are about to write is written once: nobody would delete the other row
            booked = [(lease, entry) for lease in leases for entry in list(lease.unwritten.values())]
            if not booked:
                return
            assert self.journal is not None, "there is no lease without a journal"
            rows = [(lease.id, entry_text(entry)) for lease, entry in booked]
            number = self.journal.write(rows)
            with self.lock:
                for (lease, entry), (_, text) in zip(booked, rows, strict=True):
                    lease.texts[entry.id] = text
                    lease.unsent[number] = entry
                    del lease.unwritten[entry.id]
                    number += 1


def _bundle(command: Reserve) -> Bundle:
    """The accounts of its lines."""
    return tuple([rule.key for rule, _ in command.lines])
