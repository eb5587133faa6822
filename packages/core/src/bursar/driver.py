"""The driver: carries out the guard's steps on the store, in the caller's thread or without blocking its event loop."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from bursar.accounts import killed, under
from bursar.call import Call, Pause, Publish, Reload, Step
from bursar.commands import Release, Reserve, Settle
from bursar.errors import StoreError
from bursar.guard import Guard, log
from bursar.keeper import Keeper
from bursar.stores.base import Store
from bursar.waiting import WaitingRoom

T = TypeVar("T")


class Driver:
    """One guard over one store. `reload` brings the newest policy into the guard and returns the store's time."""

    def __init__(self, guard: Guard, store: Store, reload: Callable[[], int]) -> None:
        self.guard = guard
        self.store = store
        self.keeper = Keeper(store, self._look, self._kill)
        self._reload = reload
        _drivers.add(self)

    def run(self, steps: Generator[Step, Any, T]) -> T:
        """Carry out steps in this thread."""
        try:
            step = next(steps)
            while True:
                try:
                    answer = self._do(step)
                except BaseException as error:  # noqa: BLE001 - every failure goes into the steps, which decide
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    async def arun(self, steps: Generator[Step, Any, T]) -> T:
        """Carry out steps without blocking the event loop."""
        try:
            step = next(steps)
            while True:
                try:
                    if isinstance(step, (Reload, Publish)):
                        answer = self._do(step)
                    elif not isinstance(step, Pause):
                        answer = await self.store.aexecute(step)
                    else:
                        if step.seconds:
                            await step.ticket.await_wake(step.seconds)
                        answer = self.store.now_us()
                except BaseException as error:  # noqa: BLE001 - every failure goes into the steps, which decide
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _do(self, step: Step) -> Any:
        if type(step) is Reserve or type(step) is Settle:
            return self.store.execute(step)
        if isinstance(step, Pause):
            if step.seconds:
                step.ticket.wait(step.seconds)
            return self.store.now_us()
        if isinstance(step, Reload):
            return self._reload()
        if isinstance(step, Publish):
            return self.store.publish(step.definitions, step.kind)
        return self.store.execute(step)

    def _look(self, live: Iterable[Call]) -> None:
        """Take a newer policy from the store, and tell the calls in flight that a switch of it stops."""
        if self.store.version() != self.guard.policy.version:
            self._reload()
        version = self.guard.policy.version
        for call in live:
            if call.looked != version:  # each for itself: another call may have had the policy read
                call.stopped = call.stopped or self.guard.stop_of(call, call.reserved_us)
                call.looked = version

    def _kill(self, live: Iterable[Call]) -> None:
        """Throw the switches of accounts that have killed the calls in flight where who crossed the mark could not: it may
        have died, or lost the store, or have been an expiry.
        """
        rules = {rule.key: rule for call in live for rule in self.guard.killers(call)}
        for account in self.store.accounts(rules) if rules else ():
            if killed(under(account, rules[account.rule.key])):
                self.run(self.guard.notices.kill(account.rule, account.rule.budget, self.guard.policy))

    def reserve(self, call: Call, *, live: bool = False) -> None:
        """Until the call may be sent. Whatever interrupts it before, nothing stays held."""
        try:
            self.run(self._reserving(call, live))
        except BaseException:
            self._undo(call)
            raise

    async def areserve(self, call: Call, *, live: bool = False) -> None:
        """As `reserve`, for async callers."""
        try:
            await self.arun(self._reserving(call, live))
        except BaseException:
            self._undo(call)
            raise

    def _undo(self, call: Call) -> None:
        """Interrupted or cancelled: the command on its way may hold amounts, and nothing was sent.

        Under an id that was given, what is held may be an earlier attempt's, which was sent: that is left to its settlement,
        or to its expiry.
        """
        self.keeper.unwatch(call)
        if call.state in ("asking", "open"):
            call.state = "released"
            if call.given_id:
                return
            # The interrupt is what its caller must see; where the store is out of reach, expiry ends what is held.
            with contextlib.suppress(StoreError):
                self.store.post(Release(call.id, "cancelled", "interrupted before dispatch"))

    def _reserving(self, call: Call, live: bool) -> Generator[Step, Any, Call]:
        """The guard's steps until the call may be sent; with `live`, it is extended from then on until it ends.

        While the store is out of reach the call goes out unguarded where every budget of it says so (I12).
        """
        self.keeper.start()
        now_us = self.store.now_us()
        try:
            yield from self.guard.reserve(call, now_us)
        except StoreError as error:
            if error.fault in ("accounts", "closed") or not self.guard.goes_unguarded(call, now_us):
                raise
            log.error('%s Every budget of this call has on_unreachable="open": it goes out unguarded.', error)
            if not call.draft:  # what it may cost has not been worked out yet
                self.guard.amounts.lines(call, self.guard.matched(call, now_us))
            call.state, call.reserved_us = "unguarded", now_us
        if live:
            self.keeper.watch(call)
        return call

    def _begin_anew(self) -> None:
        """After a fork, in the child: no thread of the parent is here, and the locks that they held are held for ever."""
        self.keeper.forget_all()
        self.guard.room = WaitingRoom()  # who waited in the parent does not wait here
        self.guard.notices.sentry = self.guard.notices.sentry.anew()
        self.guard.learner.renew_lock()


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


def _forked() -> None:
    for driver in list(_drivers):
        driver._begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
