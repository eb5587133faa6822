"""The guard: the life of one call as steps without I/O. A driver carries out each step and hands back what came of it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from typing import Any

from bursar.accounts import Rule
from bursar.call import Call, Pause, Reload, Step, Steps
from bursar.commands import Answer, Charge, Ended, Entry, Granted, Refused, Rejected, Release, Reserve, Settle
from bursar.errors import StoreError, UnboundedEstimate
from bursar.estimate import Estimate, Learner, strict
from bursar.policy import Matched, Policy
from bursar.prices import PriceBook
from bursar.records import facts_of
from bursar.refusal import exceeded, patience_s, pause_s, rejection
from bursar.usage import Usage
from bursar.waiting import Ticket, WaitingRoom

MIN_OUTPUT_TOKENS = 16  # a smaller answer than this is refused rather than cut
MAX_RELOADS = 8
MAX_LOOKS = 100_000
LOOK_S = 1.0  # how long a waiting call sleeps at most: a limit may be raised, or a clock set, meanwhile

Lines = tuple[tuple[Rule, int], ...]

log = logging.getLogger("bursar")


class Guard:
    """Turns calls into commands: estimate, price, match, reserve, wait or clamp, settle. It does no I/O itself."""

    def __init__(
        self, policy: Policy, book: PriceBook, *, on_expiry: str = "charge", max_accounts: int = 1_000_000
    ) -> None:
        self.policy = policy
        self.book = book
        self.learner = Learner()
        self.room = WaitingRoom()
        self.on_expiry = on_expiry
        self.max_accounts = max_accounts

    def reserve(self, call: Call, now_us: int) -> Steps:
        """Until the call may be sent. Raises BudgetExceeded, UnknownPrice, UnboundedEstimate, StoreError, ..."""
        if call.request is not None:
            call.price = self.book.find(call.provider, call.model, now_us, call.tags())
            call.attempts = call.request.retries + 1
        queue = _Queueing(self.room)
        try:
            for _ in range(MAX_LOOKS):
                now_us = yield from self._queue_up(call, queue, now_us)
                final = not call.resize and not any(one.budget.wait_s for one in self.matched(call, now_us))
                answer, now_us = yield from self._try(call, now_us, quiet=not final)
                if type(answer) is Refused:
                    pause = queue.after(answer, self.matched(call, now_us), now_us)
                    if pause is not None:
                        now_us = yield pause
                        continue
                    fit = self._fit(call, answer)
                    if call.resize and fit is not None:
                        call.resize, call.capped = False, True
                        assert call.request is not None
                        call.request.max_output_tokens = fit
                        continue
                    if not final:  # the last attempt, on record
                        answer, now_us = yield from self._try(call, now_us, quiet=False)
                if isinstance(answer, Refused):
                    rule = answer.account.rule
                    budget = next(one.budget for one in self.matched(call, now_us) if one.rule.key == rule.key)
                    raise exceeded(answer, budget, self._fit(call, answer))
                call.state, call.reserved_us = "open", answer.reservation.reserved_us
                if answer.shadowed:
                    log.info("shadow: %s would have refused %s", ", ".join(answer.shadowed), call.draft["tags"])
                return call
            raise StoreError("No answer after very many looks. Reduce the contention on this budget.", fault="locked")
        finally:
            queue.leave()

    def matched(self, call: Call, now_us: int) -> tuple[Matched, ...]:
        """The accounts of the call at this time."""
        return self.policy.match(call.scope, call.units, now_us, call.provider, call.model, call.tool, call.connection)

    def _queue_up(self, call: Call, queue: _Queueing, now_us: int) -> Generator[Step, Any, int]:
        """Behind those who wait for an account of this call already; nobody is overtaken before the patience is over."""
        if not self.room:
            return now_us
        waits = [one for one in self.matched(call, now_us) if one.budget.wait_s]
        queue.join_behind([one.rule.key for one in waits])
        while not queue.is_first:
            deadline_us = queue.until(now_us, max((one.budget.wait_s for one in waits), default=0.0))
            if now_us >= deadline_us:
                return now_us
            now_us = yield queue.pause((deadline_us - now_us) / 1e6)
        return now_us

    def _try(self, call: Call, now_us: int, *, quiet: bool) -> Generator[Step, Any, tuple[Granted | Refused, int]]:
        """One attempt to reserve, made again after a newer policy or a new window."""
        for _ in range(MAX_RELOADS):
            lines = self._lines(call, self.matched(call, now_us))
            command = Reserve(
                call.id,
                lines,
                call.ttl_us,
                call.draft,
                call.digest(),
                self.on_expiry,
                self.policy.version,
                self.max_accounts,
                quiet,
            )
            call.state = "asking"
            try:
                answer: Answer = yield command
            except StoreError:
                call.state = "new"
                raise
            if type(answer) is not Granted:
                call.state = "new"
            if type(answer) is Rejected:
                now_us = yield from self._recover(call, answer)
                continue
            assert type(answer) is Granted or type(answer) is Refused
            return answer, now_us
        raise StoreError("The policy changes faster than it can be read. Publish it less often.", fault="locked")

    def _recover(self, call: Call, answer: Rejected) -> Generator[Step, Any, int]:
        """The store's time, after a newer policy was read or a window has begun. Raises what cannot be recovered."""
        if answer.why == "stale":
            return int((yield Reload()))
        if answer.why == "moved":
            return int((yield Pause(Ticket(""), 0.0)))
        raise rejection(call.id, answer)

    # -- amounts -------------------------------------------------------------------------------------------------

    def _lines(self, call: Call, matched: tuple[Matched, ...]) -> Lines:
        """The amount that the call may cost, for every account it matches."""
        if call.request is None:
            self._write_draft(call, call.amounts["USD"], {})
            return tuple((one.rule, call.amounts.get(one.rule.unit, 1)) for one in matched)
        learned = self._learned(call)
        bound: dict[str, int] = {}
        lines = []
        for one in matched:
            if one.budget.estimate == "strict":
                bound = bound or self._bound(call)
            amounts = bound if one.budget.estimate == "strict" else learned
            lines.append((one.rule, amounts[one.rule.unit]))
        assert call.estimate is not None
        held = max((count for rule, count in lines if rule.unit == "USD"), default=learned["USD"])
        usage = {"input_tokens": call.estimate.input_tokens, "output_tokens": call.estimate.output_tokens}
        self._write_draft(call, held, {name: count for name, count in usage.items() if count})
        return tuple(lines)

    def _learned(self, call: Call) -> dict[str, int]:
        assert call.request is not None
        assert call.price is not None
        if call.usage is not None:
            return _said(call, call.usage, call.price.cost_nanos(call.usage))
        estimate = call.estimate = self.learner.estimate(
            call.request,
            run=call.run,
            context_window=call.price.context_window,
            max_output_tokens=call.price.max_output_tokens,
        )
        usage = Usage(
            input_tokens=estimate.input_tokens,
            output_tokens=estimate.output_tokens,
            service_tier=call.service_tier,
        )
        return _amounts(estimate, call.price.cost_nanos(usage), requests=1)

    def _bound(self, call: Call) -> dict[str, int]:
        """The upper bound, per attempt and round of the provider's own tools, because context tiers count per request."""
        assert call.request is not None
        assert call.price is not None
        if call.usage is not None:
            return _said(call, call.usage, call.price.cost_nanos(call.usage) * call.attempts)
        estimate = call.estimate = strict(
            call.request,
            context_window=call.price.context_window,
            max_output_tokens=call.price.max_output_tokens,
        )
        rounds = max(1, estimate.answers // max(1, call.request.n))
        cost_nanos = rounds * call.price.bound_nanos(
            -(-estimate.input_tokens // rounds),
            -(-estimate.output_tokens // rounds),
            media=bool(call.request.media),
            service_tier=call.service_tier,
        )
        return _amounts(estimate, cost_nanos + self._fees_bound(call), requests=call.attempts)

    def _fees_bound(self, call: Call) -> int:
        """What the provider's own tools may cost beside their tokens."""
        assert call.request is not None
        assert call.price is not None
        additions = call.request.additions
        fee_nanos = call.price.dearest_tool_nanos(additions.server)
        if not fee_nanos:
            return 0
        if additions.uses is None:
            raise UnboundedEstimate(
                f"A strict budget cannot bound this call of {call.model}: {', '.join(additions.server[:3])} may be used any "
                "number of times, each at a fee. Set max_uses or max_tool_calls, or use the learned estimate for this budget.",
                reason="nothing limits how often the provider's tools are used",
                provider=call.provider,
                model=call.model,
            )
        return fee_nanos * additions.uses * call.attempts

    def _write_draft(self, call: Call, cost_nanos: int, usage: dict[str, int]) -> None:
        """What the call's record will tell, whatever becomes of this process."""
        call.draft = {
            "path": list(call.scope.runs),
            "tags": call.tags(),
            "cost_nanos": cost_nanos,
            "usage": usage,
            "price_version": self.book.version,
        }
        if call.attempts > 1:
            call.draft["attempts"] = call.attempts

    def _fit(self, call: Call, refused: Refused) -> int | None:
        """The largest maximum output with which the call would fit on every account, or None when none does."""
        request, price, estimate = call.request, call.price, call.estimate
        if request is None or price is None or estimate is None or call.usage is not None:
            return None
        most = request.max_output_tokens or price.max_output_tokens or estimate.max_output_tokens
        for account, asked in refused.lines:
            unit, free = account.rule.unit, account.available
            if asked <= free or not account.rule.enforce:
                continue
            if unit == "USD":
                input_nanos = price.bound_nanos(estimate.input_tokens, 0, service_tier=call.service_tier)
                fit = price.fit_output_tokens(free, input_nanos, input_tokens=estimate.input_tokens)
            elif unit == "tokens":
                fit = free - estimate.input_tokens
            else:
                return None
            most = min(most, fit // max(1, estimate.answers))
        return most if most >= MIN_OUTPUT_TOKENS else None

    # -- the end -------------------------------------------------------------------------------------------------

    def settle(
        self,
        call: Call,
        usage: Usage,
        now_us: int,
        *,
        outcome: str = "completed",
        reason: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Steps:
        """Book the real cost, at the prices of the reserve time. Raises UnknownPrice."""
        at_us = call.reserved_us or now_us
        price = self.book.cost(call.provider, call.model, usage, at_us=at_us, tags=call.tags())
        tokens = usage.input_tokens + usage.output_tokens
        actuals = {"USD": price.cost_nanos, "tokens": tokens, "requests": usage.requests}
        facts = facts_of(model_answered=usage.model, latency_us=now_us - at_us, headers=headers)
        command = Settle(call.id, actuals, price.cost_nanos, usage.as_dict(), outcome, False, reason, facts)
        entry = yield from self._end(call, command)
        if call.request is not None:
            self.learner.observe(call.request, usage, run=call.run)
        return entry

    def settle_tool(self, call: Call, cost_nanos: int | None, outcome: str, now_us: int) -> Steps:
        """Book a tool call at its real cost, or at its price when that is not given."""
        cost = call.amounts["USD"] if cost_nanos is None else cost_nanos
        facts = facts_of(latency_us=now_us - call.reserved_us)
        return self._end(call, Settle(call.id, {"USD": cost}, cost, {}, outcome, facts=facts))

    def settle_unknown(self, call: Call, reason: str, now_us: int, *, known: Usage | None = None) -> Steps:
        """Book the worst case, as estimated: what is `known` so far, else what was reserved, and the whole maximum output."""
        cost, usage, actuals = call.draft["cost_nanos"], call.draft["usage"], {}
        worst = self._worst(call, known)
        if worst is not None and call.price is not None:
            least = call.price.cost_nanos(worst)
            if known is not None or least > cost:
                cost, usage = least, worst.as_dict()
                actuals = {"USD": cost, "tokens": worst.input_tokens + worst.output_tokens}
        facts = facts_of(latency_us=now_us - call.reserved_us)
        return self._end(call, Settle(call.id, actuals, cost, usage, "failed", True, reason, facts))

    def _worst(self, call: Call, known: Usage | None) -> Usage | None:
        """The usage of a call whose end nobody saw: a learned estimate of the output may lie below the maximum it had."""
        request, estimate = call.request, call.estimate
        if request is None or estimate is None or call.usage is not None:
            return None
        output = max(estimate.output_tokens, (request.max_output_tokens or 0) * request.n)
        if known is None or not known.input_tokens:
            return Usage(input_tokens=estimate.input_tokens, output_tokens=output, service_tier=call.service_tier)
        return known.replace(output_tokens=max(output, known.output_tokens))

    def release(self, call: Call, reason: str, *, outcome: str = "cancelled") -> Steps:
        """Give everything back: the call was surely not billed."""
        return self._end(call, Release(call.id, outcome, reason))

    def _end(self, call: Call, command: Settle | Release) -> Generator[Step, Any, Entry | None]:
        if call.state == "unguarded":
            return (yield from self._end_unguarded(call, command))
        answer: Answer = yield command
        if type(answer) is Rejected:
            raise rejection(call.id, answer)
        assert type(answer) is Ended
        call.state = "settled" if type(command) is Settle else "released"
        self.room.freed(account.rule.key for account in answer.accounts)
        return answer.entry

    def _end_unguarded(self, call: Call, command: Settle | Release) -> Generator[Step, Any, Entry | None]:
        """The store was away when the call went out (policy "open"): what it cost is booked all the same."""
        if type(command) is not Settle:
            call.state = "released"
            return None
        tokens = command.usage.get("input_tokens", 0) + command.usage.get("output_tokens", 0)
        amounts = {"USD": command.cost_nanos, "requests": 1, "calls": 1, "tokens": tokens, **command.actuals}
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
            self._write_draft(call, cost_nanos, {})
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
        )
        if type(answer) is Rejected:
            raise rejection(call.id, answer)
        assert type(answer) is Ended
        call.state = "settled"
        return answer.entry

    def goes_unguarded(self, call: Call, now_us: int) -> bool:
        """Whether every budget of this call says that calls go on while the store is out of reach (I12)."""
        matched = self.matched(call, now_us)
        return bool(matched) and all(one.budget.on_unreachable == "open" for one in matched)


def _said(call: Call, usage: Usage, cost_nanos: int) -> dict[str, int]:
    """The amounts of what the caller said that the call will be billed."""
    call.estimate = Estimate(
        usage.input_tokens, usage.output_tokens, usage.output_tokens, 1, True, "the caller's count"
    )
    return _amounts(call.estimate, cost_nanos, requests=1)


def _amounts(estimate: Estimate, cost_nanos: int, *, requests: int) -> dict[str, int]:
    tokens = estimate.input_tokens + estimate.output_tokens
    return {"USD": cost_nanos, "tokens": tokens, "requests": requests, "slots": 1}


class _Queueing:
    """One call's place in the waiting room, and the end of its patience."""

    def __init__(self, room: WaitingRoom) -> None:
        self._room = room
        self._ticket: Ticket | None = None
        self._deadline_us: int | None = None

    @property
    def is_first(self) -> bool:
        return self._ticket is None or self._room.is_first(self._ticket)

    def until(self, now_us: int, wait_s: float) -> int:
        if self._deadline_us is None:
            self._deadline_us = now_us + int(wait_s * 1e6)
        return self._deadline_us

    def join_behind(self, keys: list[str]) -> None:
        if self._ticket is None and (key := self._room.occupied(keys)) is not None:
            self._ticket = self._room.join(key)

    def pause(self, seconds: float) -> Pause:
        assert self._ticket is not None
        return Pause(self._ticket, min(seconds, LOOK_S))

    def after(self, refused: Refused, matched: tuple[Matched, ...], now_us: int) -> Pause | None:
        """The pause before the next look, in the queue of the account that refused; None when waiting does not help."""
        wait_s = patience_s(refused, matched)
        if not wait_s:
            return None
        seconds = pause_s(refused, now_us, self.until(now_us, wait_s))
        if seconds is None:
            return None
        key = refused.account.rule.key
        if self._ticket is None or self._ticket.key != key:
            self.leave()
            self._ticket = self._room.join(key)
        return self.pause(seconds)

    def leave(self) -> None:
        if self._ticket is not None:
            self._room.leave(self._ticket)
            self._ticket = None
