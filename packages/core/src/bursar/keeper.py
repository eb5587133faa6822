"""The keeper: extends live calls, books what the store could not take, and expires what is overdue, in the background."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bursar.call import Call
from bursar.commands import Charge, Command, Extend, Rejected, Release, Settle, settling
from bursar.errors import BursarError, StoreError
from bursar.guard import log
from bursar.money import dollar_text
from bursar.stores.base import Store

TEND_S = 5.0
LOOK_S = 0.5  # how often calls in flight are looked at: a switch that is thrown stops them within a second
MAX_LIVE_S = 6 * 3_600.0  # a block that lasts longer is no longer extended
MAX_KEPT = 10_000  # ends that wait for the store, 25 MB; beyond it their reservations expire, booked as estimated
MAX_UNGUARDED = 100_000  # as many and more in all, where nothing else would book the cost
ITS_OWN = ("overflow", "damaged")  # faults that one end may have, whatever becomes of others


@dataclass(slots=True)
class _Live:
    """A call in flight, and when it was last extended; None once its reservation has ended, as after a long outage."""

    call: Call
    extended_us: int | None


class Keeper:
    """Housekeeping of one Bursar: `tend` is one round; a daemon thread does one every few seconds once calls are made.

    While calls are in flight, each round ends with `kill`, and more often it calls `look` with them.
    """

    def __init__(self, store: Store, look: Callable[[list[Call]], None], kill: Callable[[list[Call]], None]) -> None:
        self._store = store
        self._look = look
        self._kill = kill
        self._live: dict[str, _Live] = {}
        self._kept: dict[str, Command] = {}
        self._stop = threading.Event()
        self._pid = 0
        self._look_too: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin in the background, in a fork's child too."""
        pid = os.getpid()
        if self._pid != pid:
            self._pid = pid
            self._stop = threading.Event()
            thread = threading.Thread(
                target=_keep, args=(weakref.ref(self), self._stop), daemon=True, name="bursar-keeper"
            )
            try:
                thread.start()
            except BaseException:
                self._pid = 0  # there may be room for a thread at the next call
                raise

    def forget_all(self) -> None:
        """In a fork's child: its parent's calls are its parent's to tend."""
        self._live.clear()
        self._kept.clear()

    def look_too(self, look: Callable[[], None]) -> None:
        """From now on do this as often as calls in flight are looked at, whether or not there are any."""
        self._look_too = look
        self.start()

    def watch(self, call: Call) -> None:
        """Extend this call until it is forgotten."""
        self._live[call.id] = _Live(call, call.reserved_us)

    def unwatch(self, call: Call) -> None:
        """Extend this call no more. What is kept under its id may be the end of an earlier one."""
        live = self._live.get(call.id)
        if live is not None and live.call is call:
            del self._live[call.id]

    def forget(self, call: Call) -> None:
        """This call has ended."""
        self._live.pop(call.id, None)
        self._kept.pop(call.id, None)

    def keeps(self, call: Call) -> bool:
        """Whether the end of this call waits for the store."""
        return call.id in self._kept

    def keep(self, command: object) -> None:
        """Try an end that the store could not take again, until it can."""
        waiting = len(self._kept)
        if isinstance(command, (Settle, Release)) and waiting >= MAX_KEPT:
            log.error("%d ends wait for the store already: %s is left to its expiry", waiting, command.id)
        elif isinstance(command, Charge) and waiting >= MAX_UNGUARDED:
            cost, tags = dollar_text(command.cost_nanos), command.draft["tags"]
            log.error("%d ends wait for the store already: book %s USD of %s by hand", waiting, cost, tags)
        elif isinstance(command, (Settle, Release, Charge)):
            self._kept[command.id] = command

    def look(self) -> None:
        """Extend calls in flight, find out whether one has to stop, and see to what is looked at as often. Raises StoreError."""
        if self._live:
            self._extend()  # a time to live of seconds is over before the next round
            self._look(self._in_flight())
        if self._look_too is not None:
            self._look_too()

    def _in_flight(self) -> list[Call]:
        return [live.call for live in list(self._live.values())]

    def tend(self) -> None:
        """One round. Raises StoreError when the store is out of reach, or cannot hold an end, a kept or an overdue one, which is
        tried again.
        """
        self._extend()
        failed: StoreError | None = None
        works: list[Callable[[], object]] = [partial(self._book, *kept) for kept in list(self._kept.items())]
        for work in (*works, self._store.sweep):
            try:
                work()
            except StoreError as error:
                if error.fault not in ITS_OWN:
                    raise
                failed = error  # nothing else waits for it: the other ends, what is overdue, what is to be stopped
        self._kill(self._in_flight())
        if failed is not None:
            raise failed

    def _extend(self) -> None:
        """Extend calls in flight, each at a third of its time. One that cannot be extended is still in flight: see `look`."""
        now_us = self._store.now_us()
        for live in list(self._live.values()):
            call, extended_us = live.call, live.extended_us
            if now_us - call.reserved_us >= MAX_LIVE_S * 1e6:
                if extended_us is None:
                    self.unwatch(call)
            elif extended_us is not None and now_us - extended_us >= call.ttl_us // 3:
                answer = self._store.execute(Extend(call.id, call.ttl_us))
                live.extended_us = None if isinstance(answer, Rejected) else now_us

    def _book(self, id: str, command: Command) -> None:
        answer = self._store.execute(command)
        if type(command) is Charge and isinstance(answer, Rejected) and answer.why == "conflict":
            answer = self._store.execute(settling(command))  # the store had the reservation: see Guard
        self._kept.pop(id, None)
        self._live.pop(id, None)
        if isinstance(answer, Rejected):
            log.error("the kept end of %s was rejected (%s %s)", id, answer.why, answer.detail)

    def stop(self) -> None:
        """End the thread, after a last round."""
        self._stop.set()
        try:
            self.tend()
        except StoreError as error:
            log.error("while closing: %s", error)


def _keep(held: weakref.ref[Keeper], stop: threading.Event) -> None:
    rounds = 0
    while not stop.wait(LOOK_S):
        keeper = held()
        if keeper is None:
            return
        rounds += 1
        works = (keeper.look, keeper.tend) if rounds % int(TEND_S / LOOK_S) == 0 else (keeper.look,)
        for work in works:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - see below
                # Another round may go well; without this the thread would end, and with it every extension.
                log.warning("housekeeping: %s", error, exc_info=not isinstance(error, BursarError))
        del keeper, works, work
