"""The deliverer: takes alerts from the outbox to every sink, at least once each, in the background."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from random import Random

from bursar.alerts.alert import budget_of
from bursar.alerts.lane import Lane
from bursar.alerts.message import Message
from bursar.alerts.routes import Alerts, Route
from bursar.alerts.sinks import Undelivered, log, place
from bursar.alerts.storms import Storms
from bursar.commands import Alert
from bursar.errors import BursarError, StoreError
from bursar.stores.base import Store

TEND_S = 5.0
CLOSE_S = 5.0
CLAIM = 500
LEASE_US = 120_000_000
MAX_HELD = 10_000
HAND_BACK = 1_000
HAND_BACK_US = 300_000_000
MAX_ACCEPTED = 100_000
LOG = "log"  # the lane of what reaches nobody else


@dataclass(slots=True)
class _Held:
    """An alert that this process has claimed, and the lanes that still owe it."""

    alert: Alert
    owed: set[str]
    until_us: int


class Deliverer:
    """Delivery for one Bursar. `tend` is one round; `start` has a daemon thread do one every few seconds.

    An alert leaves the outbox when every sink that it goes to has taken it. If this process dies before, its lease ends and
    another process delivers it to all of them again, with the same id.
    """

    def __init__(self, store: Store, alerts: Alerts, random: Random | None = None) -> None:
        self._store = store
        self._alerts = alerts
        self._random = random or Random()
        self._pid = 0
        self._at_exit = partial(_close, weakref.ref(self))
        self._begin(_inline)
        _deliverers.add(self)

    def _begin(self, spawn: Callable[[Callable[[], None]], None]) -> None:
        self._spawn = spawn
        self._lock = threading.Lock()  # of everything below
        self._idle = threading.Condition(self._lock)
        self._held: dict[str, _Held] = {}
        self._lanes: dict[str, Lane] = {}
        self._accepted: OrderedDict[str, set[str]] = OrderedDict()  # who has had what was handed back
        self._storms = Storms()
        self._wake, self._stop, self._ended = (threading.Event() for _ in range(3))

    def start(self) -> None:
        """Begin in the background, once. A fork's child begins anew: what its parent had claimed is its parent's."""
        before, pid = self._pid, os.getpid()
        if before == pid:
            return
        self._pid = pid
        self._begin(_in_thread)
        signs = (self._wake, self._stop, self._ended)
        thread = threading.Thread(target=_run, args=(weakref.ref(self), *signs), daemon=True, name="bursar-alerts")
        try:
            thread.start()
        except BaseException:
            self._pid = before  # there may be room for a thread later
            raise
        atexit.register(self._at_exit)

    def wake(self) -> None:
        """There is something to deliver: do not wait for the next round. The caller waits for nothing.

        A fork's child begins with the first that it has: its parent, which delivers too, may end before it.
        """
        if not self._pid:
            return
        # where there is no room for a thread, a call must not fail for that; the next tries again
        with contextlib.suppress(RuntimeError):
            self.start()
        self._wake.set()

    def tend(self) -> None:
        """One round: claim, send what is due, and tell the outbox. Raises StoreError; nothing is forgotten then."""
        now_us = self._store.now_us()
        self._report(now_us)
        room = min(MAX_HELD - len(self._held), CLAIM)
        if room <= 0:
            self._hand_back(now_us)
        claimed = self._store.claim(room, LEASE_US) if room > 0 else []
        owners = self._owners() if claimed else {}
        with self._lock:
            for alert, _ in claimed:
                facts: object = alert.facts
                if not isinstance(facts, dict):  # somebody else's, put there to keep the others from being told
                    self._held[alert.id] = _Held(alert, set(), now_us + LEASE_US)
                    continue
                owner = alert.facts.get("owner") or owners.get(budget_of(alert))
                self._admit(alert._replace(facts={**alert.facts, "owner": owner}) if owner else alert, now_us)
            for over in self._storms.over(now_us):
                self._enqueue(over, dict(self._alerts.of(over)))
            ready = [(name, lane) for name, lane in self._lanes.items() if not lane.busy and lane.due(now_us)]
            for _, lane in ready:
                lane.busy = True
        for name, lane in ready:
            self._spawn(partial(self._work, name, lane))
        self._report(now_us)
        if len(claimed) == CLAIM:
            self._wake.set()  # there may be more

    def close(self) -> None:
        """Send what can be sent within a few seconds, and end; what is left is due for other processes at once."""
        atexit.unregister(self._at_exit)
        if self._pid not in (0, os.getpid()):
            return
        self._stop.set()
        self._wake.set()
        if self._pid and self._ended.wait(CLOSE_S):
            with self._idle:
                self._idle.wait_for(lambda: not any(lane.busy for lane in self._lanes.values()), CLOSE_S)
        try:
            now_us = self._store.now_us()
            self._report(now_us)
            with self._lock:
                left = list(self._held)
                self._held.clear()
            if left:
                self._store.retry(left, now_us)
        except StoreError as error:
            # The store may be closed already; the leases end by themselves, so nothing is lost.
            log.debug("while closing: %s", error)

    def _owners(self) -> dict[str, str | None]:
        """Each budget's owner, as the newest policy has it."""
        budgets = self._store.definitions()[1].get("budget", {})
        return {name: one.definition.get("owner") for name, one in budgets.items()}

    def _admit(self, alert: Alert, now_us: int) -> None:
        """Put a claimed alert into its lanes, save those that have had it."""
        known = self._held.get(alert.id)
        if known is not None:
            known.until_us = now_us + LEASE_US
            return
        had = self._accepted.pop(alert.id, None)
        routes = {name: route for name, route in self._alerts.of(alert) if name not in (had or ())}
        self._held[alert.id] = _Held(alert, self._enqueue(alert, routes), now_us + LEASE_US)
        if had is None:
            self._storms.see(alert)

    def _enqueue(self, alert: Alert, routes: dict[str, Route]) -> set[str]:
        """Put an alert into the lanes of these routes; the names of the lanes that it is in then."""
        names = set()
        for name, route in routes.items():
            if self._lane(name, route).gone:
                name, route = LOG, self._alerts.fallback
            if name not in names:
                self._lane(name, route).add(alert)
                names.add(name)
        return names

    def _lane(self, name: str, route: Route) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(route.sink, route.per_minute, self._random)
        return lane

    def _work(self, name: str, lane: Lane) -> None:
        """Send what is due in one lane, until it fails or has to wait. Its rate bounds the loop."""
        try:
            while True:
                now_us = self._store.now_us()
                with self._lock:
                    message = lane.take(now_us)
                if message is None or not self._deliver(name, lane, message, now_us):
                    break
        except StoreError as error:
            # The time is the store's. The message stays as it is, and is taken again at a later round.
            log.warning("delivery waits: %s", error)
        finally:
            with self._idle:
                lane.busy = False
                self._idle.notify_all()
            self._wake.set()

    def _deliver(self, name: str, lane: Lane, message: Message, now_us: int) -> bool:
        try:
            lane.sink.send(message, now_us)
        except Exception as error:  # noqa: BLE001 - a sink may raise anything; uncaught, nothing would ever be tried again
            self._failed(name, lane, message, error)
            return False
        now_us = self._store.now_us()
        with self._lock:
            lane.taken(message, now_us)
            self._no_longer_owed(name, message.alerts)
        return True

    def _failed(self, name: str, lane: Lane, message: Message, error: Exception) -> None:
        why = str(error) if isinstance(error, Undelivered) else f"{lane.sink.name}: {place(error)}"
        now_us = self._store.now_us()
        with self._lock:
            if isinstance(error, Undelivered) and error.gone:
                lane.gone = True
                log.error("%s: nothing more goes there, but to the log. Correct the address.", why)
                self._to_log(name, lane.drain())
            elif lane.failed(message, error, now_us):
                log.error("%s, for days: %d alerts are given up. Correct the address.", why, len(message.alerts))
                self._to_log(name, message.alerts)
            elif lane.failures in (1, 10, 100, 1_000):
                log.warning("alerts wait, and will be sent again: %s (failure %d)", why, lane.failures)

    def _to_log(self, name: str, alerts: Iterable[Alert]) -> None:
        alerts = tuple(alerts)
        self._no_longer_owed(name, alerts)
        for alert in alerts:
            names = self._enqueue(alert, {LOG: self._alerts.fallback})
            if alert.id in self._held:
                self._held[alert.id].owed |= names

    def _no_longer_owed(self, name: str, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            if alert.id in self._held:  # the word that a storm is over is in no outbox
                self._held[alert.id].owed.discard(name)

    def _report(self, now_us: int) -> None:
        """Tell the outbox what every sink has, and go on holding what they have not."""
        with self._lock:
            done = [id for id, held in self._held.items() if not held.owed]
            ending = [id for id, held in self._held.items() if held.owed and held.until_us < now_us + LEASE_US // 2]
        if done:
            self._store.delivered(done)
        if ending:
            self._store.retry(ending, now_us + LEASE_US)
        with self._lock:
            for id in done:
                self._held.pop(id, None)
            for id in ending:
                if id in self._held:
                    self._held[id].until_us = now_us + LEASE_US

    def _hand_back(self, now_us: int) -> None:
        """Make room: give the newest alerts that only failing sinks lack back to the outbox for a while."""
        with self._lock:
            waiting = {name: lane.waiting() for name, lane in self._lanes.items() if lane.failures}
            back: dict[str, _Held] = {}
            for id, held in reversed(self._held.items()):
                if len(back) < HAND_BACK and held.owed and all(id in waiting.get(name, ()) for name in held.owed):
                    back[id] = held
            for name in waiting:
                self._lanes[name].drop(back)
            for id, held in back.items():
                del self._held[id]
                self._accepted[id] = {name for name, _ in self._alerts.of(held.alert)} - held.owed
            while len(self._accepted) > MAX_ACCEPTED:
                self._accepted.popitem(last=False)
        if back:
            self._store.retry(back, now_us + HAND_BACK_US)


def _inline(work: Callable[[], None]) -> None:
    work()


def _in_thread(work: Callable[[], None]) -> None:
    try:
        threading.Thread(target=work, daemon=True, name="bursar-alert").start()
    except RuntimeError:  # at the end of the interpreter no thread can start any more
        work()


def _run(held: weakref.ref[Deliverer], wake: threading.Event, stop: threading.Event, ended: threading.Event) -> None:
    while not ended.is_set():
        wake.wait(TEND_S)
        wake.clear()
        last = stop.is_set()
        deliverer = held()
        if deliverer is None:
            return
        try:
            deliverer.tend()
        except Exception as error:  # noqa: BLE001 - see below
            # Another round may go well; without this the thread would end, and with it all delivery.
            log.warning("alerts wait: %s", error, exc_info=not isinstance(error, BursarError))
        if last:
            ended.set()
        del deliverer


def _close(held: weakref.ref[Deliverer]) -> None:
    deliverer = held()
    if deliverer is not None:
        deliverer.close()


_deliverers: weakref.WeakSet[Deliverer] = weakref.WeakSet()


def _forked() -> None:
    """In a fork's child: what its parent's threads held is held for ever."""
    for deliverer in list(_deliverers):
        deliverer._begin(deliverer._spawn)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
