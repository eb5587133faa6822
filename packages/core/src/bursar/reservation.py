"""A reservation as its user holds it: settle it to the real cost, release it, or let its block decide."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal

from bursar.call import Call, Step, Steps
from bursar.commands import Entry
from bursar.driver import Driver
from bursar.ending import amid_bursar, end_soon, expect_orphans
from bursar.errors import BursarError, InvalidInput, Stopped, StoreError, UnknownPrice, UnreadableAnswer, shown
from bursar.guard import log
from bursar.money import nanos
from bursar.outcome import surely_not_billed
from bursar.records import UsageRecord
from bursar.usage import Usage

Ending = Generator[Step, Any, Entry | None]  # what the books say of it, which few ask to see as a record


class Reservation:
    """Amounts held for one call. End it once: `settle`, `release`, or `settle_unknown` when nobody knows what was billed.

    `model` is the one to call, `max_output_tokens` the maximum output to enforce (None: the provider's own), `capped` says
    that it is smaller than what was asked for.
    """

    def __init__(self, driver: Driver, call: Call) -> None:
        self._driver = driver
        self._call = call

    @property
    def id(self) -> str:
        return self._call.id

    @property
    def model(self) -> str:
        return self._call.model

    @property
    def max_output_tokens(self) -> int | None:
        request, price = self._call.request, self._call.price
        limit = None if request is None else request.max_output_tokens
        return limit or (None if price is None else price.max_output_tokens)

    @property
    def covered_output_tokens(self) -> int | None:
        """How much output of one answer the amounts are for: less than the maximum where it is estimated; None for tools."""
        estimate = self._call.estimate
        return None if estimate is None else estimate.max_output_tokens

    @property
    def capped(self) -> bool:
        return self._call.capped

    @property
    def stopped(self) -> Stopped | None:
        """The error to raise in mid-stream, once a switch or a budget's kill stops this call (within a second); else None."""
        return self._call.stopped

    @property
    def state(self) -> str:
        """`open`, `settled` or `released`; `unguarded` when the store was away and the policy is "open"."""
        return self._call.state

    @property
    def is_open(self) -> bool:
        return self._call.state in ("open", "unguarded")

    def settle(
        self, answer: Any, *, outcome: str = "completed", reason: str = "", headers: Mapping[str, str] | None = None
    ) -> UsageRecord | None:
        """Book the real cost of `answer`: a Usage, or the provider's answer as it is (dict, SDK object, list of stream events).

        An answer whose usage or price cannot be read is booked at the reserved amount, as estimated. Returns the usage record.
        Raises IdempotencyConflict, ReservationEnded or StoreError; after a StoreError Bursar goes on trying by itself.
        """
        return _record(self._driver.run(self._settle(answer, outcome=outcome, reason=reason, headers=headers)))

    async def asettle(
        self, answer: Any, *, outcome: str = "completed", reason: str = "", headers: Mapping[str, str] | None = None
    ) -> UsageRecord | None:
        """As `settle`, for async callers."""
        return _record(await self._driver.arun(self._settle(answer, outcome=outcome, reason=reason, headers=headers)))

    def release(self, reason: str = "") -> UsageRecord | None:
        """Give everything back: the call was not sent, or clearly refused before generation."""
        return _record(self._driver.run(self._release(reason)))

    async def arelease(self, reason: str = "") -> UsageRecord | None:
        """As `release`, for async callers."""
        return _record(await self._driver.arun(self._release(reason)))

    def settle_unknown(self, reason: str, *, known: Usage | None = None) -> UsageRecord | None:
        """Book the reserved amount, as estimated: the call may have been billed (a time-out, a cut stream, a lost answer)."""
        return _record(self._driver.run(self._settle_unknown(reason, known=known)))

    async def asettle_unknown(self, reason: str, *, known: Usage | None = None) -> UsageRecord | None:
        """As `settle_unknown`, for async callers."""
        return _record(await self._driver.arun(self._settle_unknown(reason, known=known)))

    def settle_error(self, error: BaseException, *, known: Usage | None = None) -> UsageRecord | None:
        """End by an error of the call: released when it was surely not billed (4xx, never connected), else booked as estimated."""
        return _record(self._driver.run(self._settle_error(error, known=known)))

    async def asettle_error(self, error: BaseException, *, known: Usage | None = None) -> UsageRecord | None:
        """As `settle_error`, for async callers."""
        return _record(await self._driver.arun(self._settle_error(error, known=known)))

    # The steps of each of these, by its name: those who end calls for others carry them out, see bursar.ending.

    def _settle(
        self, answer: Any, *, outcome: str = "completed", reason: str = "", headers: Mapping[str, str] | None = None
    ) -> Ending:
        call, driver = self._call, self._driver
        if call.request is None:
            cost = tool_cost(answer)
            return (yield from self._ending(driver.guard.settle_tool(call, cost, outcome, driver.store.now_us())))
        usage = None
        try:
            usage = answer if isinstance(answer, Usage) else Usage.from_response(call.provider, answer)
            steps = driver.guard.settle(
                call, usage, driver.store.now_us(), outcome=outcome, reason=reason, headers=headers, answer=answer
            )
            return (yield from self._ending(steps))
        except UnreadableAnswer as error:
            if error.fields.get("reason") == "not_billable":
                return (yield from self._release(str(error)[:200], "failed"))
            log.warning("%s It is booked at the reserved amount, as estimated.", error)
            return (yield from self._settle_unknown(str(error), known=error.fields.get("partial")))
        except UnknownPrice as error:
            log.warning("%s It is booked at the reserved amount, or at what its tokens cost, as estimated.", error)
            return (yield from self._settle_unknown(str(error), known=usage))

    def _release(self, reason: str = "", outcome: str = "cancelled") -> Ending:
        return (
            yield from self._ending(
                self._driver.guard.release(self._call, reason, self._driver.store.now_us(), outcome=outcome)
            )
        )

    def _settle_unknown(self, reason: str, *, known: Usage | None = None) -> Ending:
        now_us = self._driver.store.now_us()
        return (
            yield from self._ending(self._driver.guard.settle_unknown(self._call, reason[:200], now_us, known=known))
        )

    def _settle_error(self, error: BaseException, *, known: Usage | None = None) -> Ending:
        reason = type(error).__name__
        if surely_not_billed(error):
            return (yield from self._release(reason, "failed"))
        return (yield from self._settle_unknown(reason, known=known))

    def _ending(self, steps: Steps) -> Ending:
        """Run an end's steps; what the store cannot take now is kept, and tried again in the background.

        So is what was interrupted: nobody knows whether the store has it, and to be told twice does no harm (I6). A
        RuntimeError interrupts too: of a coroutine that is closed when its event loop is gone, or of too deep a recursion.
        """
        command = None
        try:
            step = next(steps)
            while True:
                command = step
                try:
                    answer = yield step
                except BaseException as error:  # noqa: BLE001 - goes into the steps, which decide
                    if isinstance(error, (StoreError, RuntimeError)) or not isinstance(error, Exception):
                        self._driver.keeper.keep(command)
                    step = steps.throw(error)
                else:
                    step = steps.send(answer)
        except StopIteration as stop:
            self._driver.keeper.forget(self._call)
            return stop.value  # type: ignore[no-any-return]
        except BursarError as error:
            if not isinstance(error, StoreError):  # nobody tries again
                self._driver.keeper.unwatch(self._call)
            raise


class Block:
    """`with` and `async with` around one call. Leaving it unsettled books the reserved amount, as estimated.

    An error that says that nothing was generated (4xx, never connected) releases instead.
    """

    def __init__(self, driver: Driver, call: Call) -> None:
        self._driver = driver
        self._call = call
        self._reservation = Reservation(driver, call)

    def __enter__(self) -> Reservation:
        expect_orphans()
        self._driver.reserve(self._call, live=True)
        return self._reservation

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        steps = self._leaving(error)
        if steps is not None:
            with self._reported(error):
                self._driver.run(steps)
        return False

    async def __aenter__(self) -> Reservation:
        expect_orphans()
        await self._driver.areserve(self._call, live=True)
        return self._reservation

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        # A generator that is closed, or a task that nobody goes on with, which cannot wait any more.
        is_closed = isinstance(error, GeneratorExit) or isinstance(getattr(error, "__context__", None), GeneratorExit)
        steps = self._leaving(error)
        if steps is not None:
            with self._reported(error):
                if is_closed:
                    self._driver.run(steps)
                else:
                    await self._driver.arun(steps)
        return False

    def _leaving(self, error: BaseException | None) -> Ending | None:
        """What is left to do, in steps; None where that is nothing, or is done in the background."""
        if not self._reservation.is_open or self._driver.keeper.keeps(self._call):
            return None
        if self._call.request is None:
            steps = self._reservation._settle(None, outcome="completed" if error is None else "failed")
        elif error is None:
            steps = self._reservation._settle_unknown("left without settling")
        else:
            steps = self._reservation._settle_error(error)
        if error is not None and amid_bursar():
            end_soon(partial(self._driver.run, steps))
            return None
        return steps

    @contextlib.contextmanager
    def _reported(self, error: BaseException | None) -> Generator[None]:
        try:
            yield
        except BursarError as failure:
            if error is None:
                raise
            # The call's own error is the one to see; the settlement is kept and tried again by the guard.
            log.error("while ending %s: %s", self._call.id, failure)


def _record(entry: Entry | None) -> UsageRecord | None:
    return None if entry is None else UsageRecord.of(entry)


def tool_cost(cost: str | None) -> int | None:
    """A tool's cost such as "0.002 USD" in nano-dollars. Raises InvalidInput."""
    if cost is None:
        return None
    text = cost.strip() if isinstance(cost, str) else ""
    if not text.endswith("USD"):
        raise InvalidInput(f'{shown(cost)} is no cost. Write it like "0.002 USD".', argument="cost", value=cost)
    found = nanos(text.removesuffix("USD").strip())
    if found < 0:
        raise InvalidInput(f"{shown(cost)} is negative. Costs are 0 or more.", argument="cost", value=cost)
    return found
