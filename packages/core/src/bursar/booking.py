"""Booking: how calls end on the books, at their real cost, at their worst case or at nothing; and costs outside of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

from bursar.amounts import Amounts
from bursar.call import Call, Step, Steps
from bursar.commands import Answer, Charge, Ended, Entry, Rejected, Release, Settle
from bursar.errors import IdempotencyConflict, StoreError, UnknownPrice
from bursar.estimate import Learner
from bursar.notices import Notices
from bursar.policy import Matched, Policy
from bursar.prices import PriceBook
from bursar.queueing import queue_of
from bursar.records import facts_of
from bursar.refusal import rejection
from bursar.sentry import Sentry
from bursar.texts import printable
from bursar.usage import Usage
from bursar.waiting import WaitingRoom

_LOST = "an attempt of the client's own was lost, and is booked at its worst case"


class Booking:
    """Turns ends into commands, by the policy and the prices in force. It does no I/O itself."""

    def __init__(
        self,
        policy: Policy,
        book: PriceBook,
        *,
        on_expiry: str = "charge",
        max_accounts: int = 1_000_000,
        notices: Notices | None = None,
    ) -> None:
        self.policy = policy
        self.book = book
        self.learner = Learner()
        self.amounts = Amounts(self.learner)
        self.room = WaitingRoom()
        self.notices = notices or Notices(Sentry())
        self.on_expiry = on_expiry
        self.max_accounts = max_accounts

    def matched(self, call: Call, now_us: int) -> tuple[Matched, ...]:
        """The accounts of the call at this time."""
        policy, held = self.policy, call.matched
        if held is None or held[0] is not policy or held[1] != call.model or not held[2] <= now_us < held[3]:
            match = policy.matching(
                call.scope, call.units, now_us, call.provider, call.model, call.tool, call.connection
            )
            held = call.matched = policy, call.model, *match
        return (*held[4], *call.throttles) if call.throttles else held[4]

    def settle(
        self,
        call: Call,
        usage: Usage,
        now_us: int,
        *,
        outcome: str = "completed",
        reason: str = "",
        headers: Mapping[str, str] | None = None,
        answer: Any = None,
    ) -> Steps:
        """Book the real cost, at the prices of the reserve time. `answer`: for the detectors. Raises UnknownPrice."""
        at_us = call.reserved_us or now_us
        usage = _served(call, usage)
        price = call.book.cost(call.provider, call.model, usage, at_us=at_us, tags=call.tags())
        tokens = usage.input_tokens + usage.output_tokens
        facts = facts_of(model_answered=usage.model, latency_us=now_us - at_us, headers=headers)
        lost_nanos, lost_tokens = _lost(call, usage) if call.lost else (0, 0)
        cost_nanos = price.cost_nanos + lost_nanos
        actuals = {"USD": cost_nanos, "tokens": tokens + lost_tokens, "requests": usage.requests + call.lost}
        reason = printable(reason or (_LOST if call.lost else ""))
        command = Settle(call.id, actuals, cost_nanos, usage.as_dict(), outcome, call.lost > 0, reason, facts)
        entry = yield from self._end(call, command)
        if call.request is not None:
            self.learner.observe(call.request, usage, run=call.run)
        yield from self.notices.answered(call, answer, price.cost_nanos, self.matched(call, at_us), now_us)
        call.content = None
        return entry

    def settle_tool(self, call: Call, cost_nanos: int | None, outcome: str, now_us: int) -> Steps:
        """Book a tool call at its real cost, or at its price when that is not given."""
        cost = call.amounts["USD"] if cost_nanos is None else cost_nanos
        facts = facts_of(latency_us=now_us - call.reserved_us)
        actuals = {"USD": cost, "failures": int(outcome == "failed")}
        return self._end(call, Settle(call.id, actuals, cost, {}, outcome, facts=facts))

    def settle_unknown(self, call: Call, reason: str, now_us: int, *, known: Usage | None = None) -> Steps:
        """Book the worst case, as estimated: what is `known` so far, else what was reserved, and the whole maximum output."""
        cost, usage, actuals = call.draft["cost_nanos"], call.draft["usage"], {"failures": 1}
        # Where a tool that was used has no known fee, its tokens still have a price; the call must end all the same.
        for told in (known, known and known.replace(server_tools={}), None):
            worst = _worst(call, told)
            if worst is None or call.price is None:
                break
            try:
                least = call.price.cost_nanos(worst)
            except UnknownPrice:
                continue
            if (told is not None and told is known) or least > cost:
                cost, usage = least, worst.as_dict()
            break
        if call.estimate is not None:
            tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
            if call.lost:
                lost_nanos, lost_tokens = _lost(call, known)
                if call.estimate.strict:  # what was reserved is for all attempts
                    lost_nanos = min(lost_nanos, max(0, call.draft["cost_nanos"] - cost))
                    lost_tokens = min(
                        lost_tokens, max(0, call.estimate.input_tokens + call.estimate.output_tokens - tokens)
                    )
                cost, tokens = cost + lost_nanos, tokens + lost_tokens
                actuals["requests"] = 1 + call.lost
            actuals |= {"USD": cost, "tokens": tokens}
        facts = facts_of(latency_us=now_us - call.reserved_us)
        self.notices.sentry.failed(call, now_us)
        return self._end(call, Settle(call.id, actuals, cost, usage, "failed", True, printable(reason), facts))

    def release(self, call: Call, reason: str, now_us: int, *, outcome: str = "cancelled") -> Steps:
        """Give everything back: the call was surely not billed, unless an attempt before its last one was lost."""
        if call.lost and outcome == "failed":
            call.lost -= 1  # that one is the call's end, and not the one that was refused
            return self.settle_unknown(call, f"{reason}; {_LOST}", now_us)
        if outcome == "failed":
            self.notices.sentry.failed(call, now_us)
        failures = {"failures": 1} if outcome == "failed" else {}
        return self._end(call, Release(call.id, outcome, printable(reason), actuals=failures))

    def _end(self, call: Call, command: Settle | Release) -> Generator[Step, Any, Entry | None]:
        if call.state == "unguarded":
            return (yield from self._end_unguarded(call, command))
        answer: Answer = yield command
        if type(answer) is Rejected:
            raise rejection(call.id, answer)
        assert type(answer) is Ended
        call.state = "settled" if type(command) is Settle else "released"
        if self.room:
            self.room.freed(queue_of(account.rule) for account in answer.accounts)
        if answer.alerts:
            yield from self.notices.crossed(answer.alerts, answer.accounts, self.policy)
        return answer.entry

    def _end_unguarded(self, call: Call, command: Settle | Release) -> Generator[Step, Any, Entry | None]:
        """The store was away when the call went out (policy "open"): what it cost is booked all the same.

        Where only the answer was lost, the store has the reservation: then that is ended.
        """
        if type(command) is not Settle:
            with contextlib.suppress(StoreError):  # what it may hold will expire
                yield command
            call.state = "released"
            return None
        tokens = command.usage.get("input_tokens", 0) + command.usage.get("output_tokens", 0)
        amounts = {"USD": command.cost_nanos, "requests": 1, "calls": 1, "tokens": tokens, **command.actuals}
        try:
            return (
                yield from self.charge(
                    call,
                    amounts,
                    call.reserved_us,
                    usage=command.usage,
                    estimated=command.estimated,
                    outcome=command.outcome,
                    reason="the store was out of reach at dispatch",
                )
            )
        except IdempotencyConflict:
            call.state = "open"
            return (yield from self._end(call, command))

    def charge(
        self,
        call: Call,
        amounts: Mapping[str, int],
        now_us: int,
        *,
        usage: dict[str, Any] | None = None,
        estimated: bool = False,
        outcome: str = "completed",
        reason: str = "",
    ) -> Generator[Step, Any, Entry]:
        """Book a cost that has been incurred outside of a reservation. Never refused."""
        cost_nanos = amounts["USD"]
        if not call.draft:
            self.amounts.write_draft(call, cost_nanos, {})
        version = self.policy.version  # before it is matched by: another thread may put a newer one in force
        matched = self.matched(call, now_us)
        answer: Answer = yield Charge(
            call.id,
            tuple((one.rule, amounts[one.rule.unit]) for one in matched if one.rule.unit in amounts),
            cost_nanos,
            usage or {},
            call.draft,
            call.digest(cost_nanos),
            estimated,
            reason,
            outcome,
            self.max_accounts,
            version=version,
        )
        if type(answer) is Rejected:
            raise rejection(call.id, answer)
        assert type(answer) is Ended
        call.state = "settled"
        if answer.alerts:
            yield from self.notices.crossed(answer.alerts, answer.accounts, self.policy)
        return answer.entry


def _worst(call: Call, known: Usage | None) -> Usage | None:
    """The usage of a call whose end nobody saw: a learned estimate of the output may lie below the maximum it had."""
    request, estimate = call.request, call.estimate
    if request is None or estimate is None or call.usage is not None:
        return None
    output = max(estimate.output_tokens, (request.max_output_tokens or 0) * request.n)
    if known is None or not known.input_tokens:
        return Usage(
            input_tokens=estimate.input_tokens,
            output_tokens=output,
            service_tier=call.service_tier,
            region=call.region,
        )
    return _served(call, known).replace(output_tokens=max(output, known.output_tokens))


def _lost(call: Call, answered: Usage | None = None) -> tuple[int, int]:
    """What the attempts that were lost have cost at most, in nano-dollars and in tokens; `answered`: what the last one used."""
    estimate = call.estimate
    if estimate is None or call.price is None:
        return 0, 0
    if estimate.strict:  # it is for all attempts
        nanos, tokens = call.draft["cost_nanos"], estimate.input_tokens + estimate.output_tokens
        return call.lost * -(-nanos // call.attempts), call.lost * -(-tokens // call.attempts)
    known = answered and answered.replace(server_tools={}, other_models=(), stated_cost_nanos=None)
    worst = call.usage or _worst(call, known)
    assert worst is not None
    try:
        nanos = call.price.cost_nanos(worst)
    except UnknownPrice:  # the answer counts what has no rate; what was reserved for has one
        worst = _worst(call, None)
        assert worst is not None
        nanos = call.price.cost_nanos(worst)
    return call.lost * nanos, call.lost * (worst.input_tokens + worst.output_tokens)


def _served(call: Call, usage: Usage) -> Usage:
    """The usage with the region that the call asked for, where the answer names none."""
    if call.region is None or usage.region is not None:
        return usage
    return usage.replace(region=call.region)
