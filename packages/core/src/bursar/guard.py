"""The guard: the life of one call as steps without I/O. A driver carries out each step and hands back what came of it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from bursar.commands import Answer, Charge, Command, Ended, Granted, Refused, Rejected, Release, Reserve, Settle
from bursar.errors import (
    BudgetExceeded,
    BursarError,
    IdempotencyConflict,
    InvalidInput,
    ReservationEnded,
    StoreError,
)
from bursar.estimate import Estimate, Learner, Request, strict
from bursar.money import dollar_text
from bursar.policy import Budget, Matched, Policy
from bursar.prices import ModelPrice, PriceBook
from bursar.records import amount, facts_of
from bursar.scope import Scope
from bursar.usage import Usage
from bursar.waiting import Ticket, WaitingRoom

MODEL_UNITS = ("USD", "tokens", "requests", "slots")
TOOL_UNITS = ("USD", "calls", "slots")
CHARGE_UNITS = ("USD",)
MIN_OUTPUT_TOKENS = 16  # a smaller answer than this is refused rather than cut
POLL_S = 0.05  # how often the first of a queue looks, because other processes cannot wake it
MAX_RELOADS = 8

log = logging.getLogger("bursar")


class Pause(NamedTuple):
    """Wait until the ticket is woken, `seconds` at most."""

    ticket: Ticket
    seconds: float


class Reload(NamedTuple):
    """Read the policy from the store again: another process has published a newer version."""


class Post(NamedTuple):
    """Have the command applied without waiting: the caller is being interrupted or cancelled."""

    command: Command


Step = Command | Pause | Reload | Post
Steps = Generator[Step, Any, Any]


class Call:
    """One call and all that the guard knows of it. `state`: new, open, settled, released, or unguarded (store away, policy open)."""

    __slots__ = (
        "amounts",
        "attempts",
        "capped",
        "connection",
        "draft",
        "estimate",
        "given_id",
        "id",
        "model",
        "price",
        "provider",
        "request",
        "reserved_us",
        "resize",
        "scope",
        "service_tier",
        "state",
        "tool",
        "ttl_us",
        "units",
        "waited",
    )

    def __init__(self, id: str, scope: Scope, units: tuple[str, ...], ttl_us: int, *, given_id: bool = False) -> None:
        self.id = id
        self.given_id = given_id
        self.scope = scope
        self.units = units
        self.ttl_us = ttl_us
        self.provider = self.model = self.tool = self.connection = ""
        self.request: Request | None = None
        self.resize = False
        self.service_tier: str | None = None
        self.price: ModelPrice | None = None
        self.estimate: Estimate | None = None
        self.amounts: dict[str, int] = {}
        self.attempts = 1
        self.draft: dict[str, Any] = {}
        self.reserved_us = 0
        self.capped = False
        self.waited = False
        self.state = "new"

    @property
    def run(self) -> str:
        return self.scope.tags["run"]

    def tags(self) -> dict[str, str]:
        own = {"provider": self.provider, "model": self.model, "tool": self.tool, "connection": self.connection}
        return {**self.scope.tags, **{tag: value for tag, value in own.items() if value}}


class Guard:
    """Turns calls into commands: estimate, price, match, reserve, wait or clamp, settle. It does no I/O itself."""

    def __init__(
        self,
        policy: Policy,
        book: PriceBook,
        *,
        on_expiry: str = "charge",
        max_accounts: int = 1_000_000,
    ) -> None:
        self.policy = policy
        self.book = book
        self.learner = Learner()
        self.room = WaitingRoom()
        self.on_expiry = on_expiry
        self.max_accounts = max_accounts

    # -- reserve -------------------------------------------------------------------------------------------------

    def reserve(self, call: Call, now_us: int) -> Steps:
        """Steps until the call may be sent. Raises BudgetExceeded, UnknownPrice, UnboundedEstimate, StoreError, ..."""
        self._price(call, now_us)
        clock = [now_us]
        deadline_us: int | None = None
        ticket: Ticket | None = None
        tried_clamp = False
        try:
            for _ in range(100_000):
                matched = self._matched(call, clock[0])
                if ticket is None and self.room and (occupied := self._occupied(matched)):
                    ticket = self.room.join(occupied)
                if ticket is not None and not self.room.is_first(ticket):
                    deadline_us = deadline_us or clock[0] + int(max(m.budget.wait_s for m in matched) * 1e6)
                    clock[0] = yield Pause(ticket, max(0.0, (deadline_us - clock[0]) / 1e6))
                    if clock[0] < deadline_us:
                        continue
                resize = call.resize and not tried_clamp
                quiet = resize or any(one.budget.wait_s for one in matched)
                answer = yield from self._try(call, matched, clock, quiet=quiet)
                if type(answer) is Granted:
                    self._granted(call, answer)
                    return call
                matched = self._matched(call, clock[0])
                wait_s = _patience(answer, matched)
                if wait_s:
                    deadline_us = deadline_us or clock[0] + int(wait_s * 1e6)
                    pause_s = _pause(answer, clock[0], deadline_us)
                    if pause_s is not None:
                        key = answer.account.rule.key
                        if ticket is None or ticket.key != key:
                            if ticket is not None:
                                self.room.leave(ticket)
                            ticket = self.room.join(key)
                        call.waited = True
                        clock[0] = yield Pause(ticket, pause_s)
                        continue
                fit = self._fit(call, answer)
                if resize and fit is not None:
                    tried_clamp = True
                    self._clamp(call, fit)
                    continue
                if quiet:  # the last attempt, on record
                    answer = yield from self._try(call, matched, clock, quiet=False)
                if type(answer) is Granted:
                    self._granted(call, answer)
                    return call
                raise self._exceeded(call, answer, matched, fit)
            raise StoreError("The reservation did not come to an answer. Reduce the contention on this budget.", fault="locked")
        finally:
            if ticket is not None:
                self.room.leave(ticket)

    def _price(self, call: Call, now_us: int) -> None:
        if call.request is not None:
            call.price = self.book.find(call.provider, call.model, now_us, call.tags())
            call.attempts = call.request.retries + 1

    def _matched(self, call: Call, now_us: int) -> tuple[Matched, ...]:
        return self.policy.match(
            call.scope, call.units, now_us, call.provider, call.model, call.tool, call.connection
        )

    def _occupied(self, matched: tuple[Matched, ...]) -> str | None:
        return self.room.occupied(one.rule.key for one in matched if one.budget.wait_s)

    def _try(self, call: Call, matched: tuple[Matched, ...], clock: list[int], *, quiet: bool) -> Steps:
        """One attempt to reserve, again after a newer policy or a new window. Ends with Granted or Refused."""
        for _ in range(MAX_RELOADS):
            lines = self._lines(call, matched)
            command = Reserve(
                call.id,
                lines,
                call.ttl_us,
                call.draft,
                _digest(call) if call.given_id else "",
                self.on_expiry,
                self.policy.version,
                self.max_accounts,
                quiet,
            )
            try:
                answer: Answer = yield command
            except StoreError:
                raise
            except BaseException:
                # Interrupted or cancelled while the command was on its way: it may hold amounts, and nothing was sent.
                yield Post(Release(call.id, "cancelled", "interrupted before dispatch"))
                raise
            if type(answer) is not Rejected:
                return answer
            clock[0] = yield from self._recover(call, answer, clock[0])
            matched = self._matched(call, clock[0])
        raise StoreError("The policy changes faster than it can be read. Publish it less often.", fault="locked")

    def _recover(self, call: Call, answer: Rejected, now_us: int) -> Steps:
        if answer.why == "stale":
            return (yield Reload())
        if answer.why == "moved":
            return max((yield Pause(Ticket(""), 0.0)), now_us)
        raise _rejection(call.id, answer)

    def _lines(self, call: Call, matched: tuple[Matched, ...]) -> tuple[tuple[Any, int], ...]:
        """The amount that the call may cost, for every account it matches."""
        if call.request is None:
            amounts = call.amounts
            call.draft = self._draft(call, amounts.get("USD", 0), {})
            return tuple((one.rule, amounts.get(one.rule.unit, 1)) for one in matched)
        learned = self._learned(call)
        bound: dict[str, int] | None = None
        lines = []
        for one in matched:
            if one.budget.estimate == "strict":
                bound = bound or self._bound(call)
                lines.append((one.rule, bound[one.rule.unit]))
            else:
                lines.append((one.rule, learned[one.rule.unit]))
        assert call.estimate is not None
        held = max((count for rule, count in lines if rule.unit == "USD"), default=learned["USD"])
        usage = {"input_tokens": call.estimate.input_tokens, "output_tokens": call.estimate.output_tokens}
        call.draft = self._draft(call, held, usage)
        return tuple(lines)

    def _learned(self, call: Call) -> dict[str, int]:
        assert call.request is not None
        assert call.price is not None
        estimate = call.estimate = self.learner.estimate(
            call.request,
            run=call.run,
            context_window=call.price.context_window,
            max_output_tokens=call.price.max_output_tokens,
        )
        usage = Usage(
            input_tokens=estimate.input_tokens, output_tokens=estimate.output_tokens, service_tier=call.service_tier
        )
        return self._units(call, estimate, call.price.cost_nanos(usage))

    def _bound(self, call: Call) -> dict[str, int]:
        assert call.request is not None
        assert call.price is not None
        price, request = call.price, call.request
        estimate = call.estimate = strict(
            request, context_window=price.context_window, max_output_tokens=price.max_output_tokens
        )
        rounds = max(1, estimate.answers // max(1, request.n))
        cost = rounds * price.bound_nanos(
            -(-estimate.input_tokens // rounds),
            -(-estimate.output_tokens // rounds),
            media=bool(request.media),
            service_tier=call.service_tier,
        )
        return self._units(call, estimate, cost)

    def _units(self, call: Call, estimate: Estimate, cost_nanos: int) -> dict[str, int]:
        tokens = estimate.input_tokens + estimate.output_tokens
        return {"USD": cost_nanos, "tokens": tokens, "requests": call.attempts, "slots": 1}

    def _draft(self, call: Call, cost_nanos: int, usage: dict[str, int]) -> dict[str, Any]:
        draft = {
            "path": list(call.scope.runs),
            "tags": call.tags(),
            "cost_nanos": cost_nanos,
            "usage": {name: count for name, count in usage.items() if count},
            "price_version": self.book.version,
        }
        if call.attempts > 1:
            draft["attempts"] = call.attempts
        return draft

    def _granted(self, call: Call, answer: Granted) -> None:
        call.state = "open"
        call.reserved_us = answer.reservation.reserved_us
        if answer.shadowed:
            log.info("shadow: %s would have refused a call of %s", ", ".join(answer.shadowed), call.draft["tags"])

    # -- room for a smaller answer -------------------------------------------------------------------------------

    def _fit(self, call: Call, refused: Refused) -> int | None:
        """The largest maximum output with which the call would fit on every account, or None when none does."""
        request, price = call.request, call.price
        if request is None or price is None or call.estimate is None:
            return None
        estimate = call.estimate
        answers = max(1, estimate.answers)
        most = request.max_output_tokens or price.max_output_tokens or estimate.max_output_tokens
        for account, asked in refused.lines:
            unit, free = account.rule.unit, account.available
            if asked <= free or not account.rule.enforce:
                continue
            if unit == "USD":
                input_cost = price.bound_nanos(estimate.input_tokens, 0, service_tier=call.service_tier)
                fit = price.fit_output_tokens(free, input_cost, input_tokens=estimate.input_tokens)
            elif unit == "tokens":
                fit = free - estimate.input_tokens
            else:
                return None
            most = min(most, fit // answers)
        return most if most >= MIN_OUTPUT_TOKENS else None

    def _clamp(self, call: Call, max_output_tokens: int) -> None:
        assert call.request is not None
        call.request.max_output_tokens = max_output_tokens
        call.capped = True

    def _exceeded(
        self, call: Call, refused: Refused, matched: tuple[Matched, ...], fit: int | None
    ) -> BudgetExceeded:
        rule = refused.account.rule
        budget = next(one.budget for one in matched if one.rule.key == rule.key)
        scope = json.loads(rule.scope)
        show = _money if rule.unit == "USD" else str
        account, unit = refused.account, "" if rule.unit == "USD" else f" {rule.unit}"
        where = ", ".join(f"{tag}={value}" for tag, value in scope.items())
        spent = account.spent if rule.kind != "refill" else max(0, rule.limit - account.level - account.reserved)
        retry_s = None if refused.retry_after_us is None else refused.retry_after_us / 1e6
        remedy = f"Raise the budget's limit{f' (ask {budget.owner})' if budget.owner else ''}"
        if retry_s is not None:
            remedy += f", or try again in {retry_s:.3g} s"
        elif refused.may_free:
            remedy += ", or try again when calls in flight have ended"
        if fit is not None:
            remedy += f", or set the maximum output to at most {fit} tokens"
        return BudgetExceeded(
            f"The budget {rule.budget!r}{f' ({where})' if where else ''} refused the call: it needs {show(refused.asked)}{unit}, "
            f"available are {show(account.available)}{unit} of {show(rule.limit)}{unit} ({show(spent)} spent, "
            f"{show(account.reserved)} reserved). Nothing was sent. {remedy}.",
            budget=rule.budget,
            scope=scope,
            unit=rule.unit,
            limit=amount(rule.limit, rule.unit),
            spent=amount(spent, rule.unit),
            reserved=amount(account.reserved, rule.unit),
            available=amount(account.available, rule.unit),
            asked=amount(refused.asked, rule.unit),
            retry_after=retry_s,
            max_output_tokens=fit,
        )

    # -- settle --------------------------------------------------------------------------------------------------

    def settle(self, call: Call, usage: Usage, now_us: int, *, outcome: str = "completed", reason: str = "",
               headers: Mapping[str, str] | None = None) -> Steps:
        """Book the real cost. The model that answered decides the price where it has one."""
        assert call.price is not None
        price = self.book.cost(call.provider, call.model, usage, at_us=call.reserved_us or now_us, tags=call.tags())
        actuals = {"USD": price.cost_nanos, "tokens": usage.input_tokens + usage.output_tokens, "requests": usage.requests}
        facts = facts_of(model_answered=usage.model, latency_us=now_us - call.reserved_us, headers=headers)
        command = Settle(call.id, actuals, price.cost_nanos, usage.as_dict(), outcome, False, reason, facts)
        entry = yield from self._end(call, command, "settled")
        if call.request is not None:
            self.learner.observe(call.request, usage, run=call.run)
        return entry

    def settle_tool(self, call: Call, cost_nanos: int | None, outcome: str, now_us: int) -> Steps:
        """Book a tool call at its real cost, or at its price when that is not given."""
        cost = call.amounts["USD"] if cost_nanos is None else cost_nanos
        facts = facts_of(latency_us=now_us - call.reserved_us)
        return self._end(call, Settle(call.id, {"USD": cost}, cost, {}, outcome, facts=facts), "settled")

    def settle_unknown(self, call: Call, reason: str, now_us: int, *, known: Usage | None = None) -> Steps:
        """Book the worst case, as estimated: the call may have been billed, and nobody says how much."""
        cost, usage, actuals = call.draft["cost_nanos"], call.draft["usage"], {}
        if known is not None and call.price is not None and call.estimate is not None:
            least = call.price.cost_nanos(known)
            if least > cost:  # what is known already exceeds what was reserved
                cost, usage = least, known.as_dict()
                actuals = {"USD": cost, "tokens": known.input_tokens + known.output_tokens}
        facts = facts_of(latency_us=now_us - call.reserved_us)
        return self._end(call, Settle(call.id, actuals, cost, usage, "failed", True, reason, facts), "settled")

    def release(self, call: Call, reason: str, *, outcome: str = "cancelled") -> Steps:
        """Give everything back: the call was surely not billed."""
        return self._end(call, Release(call.id, outcome, reason), "released")

    def _end(self, call: Call, command: Settle | Release, state: str) -> Steps:
        if call.state == "unguarded":
            return (yield from self._book_unguarded(call, command))
        answer: Answer = yield command
        if type(answer) is Rejected:
            raise _rejection(call.id, answer)
        assert type(answer) is Ended
        call.state = state
        self.room.freed(account.rule.key for account in answer.accounts)
        return answer.entry

    def _book_unguarded(self, call: Call, command: Settle | Release) -> Steps:
        """The store was away when the call went out (policy "open"): what it cost is booked all the same."""
        if type(command) is Release:
            call.state = "released"
            return None
        told = command
        matched = self._matched(call, call.reserved_us)
        lines = tuple((one.rule, told.actuals.get(one.rule.unit, call.amounts.get(one.rule.unit, 1))) for one in matched
                      if one.rule.unit != "slots")
        return (yield from self.charge(call, lines, told.cost_nanos, told.usage, estimated=told.estimated,
                                       reason="the store was out of reach at dispatch", outcome=told.outcome))

    def charge(
        self, call: Call, lines: tuple[tuple[Any, int], ...], cost_nanos: int, usage: dict[str, Any], *,
        estimated: bool = False, reason: str = "", outcome: str = "completed",
    ) -> Steps:
        """Book a cost that has been incurred outside of a reservation. Never refused."""
        for _ in range(MAX_RELOADS):
            call.draft = call.draft or self._draft(call, cost_nanos, {})
            digest = _digest(call, cost_nanos) if call.given_id else ""
            answer: Answer = yield Charge(
                call.id, lines, cost_nanos, usage, call.draft, digest, estimated, reason, outcome, self.max_accounts
            )
            if type(answer) is Ended:
                call.state = "settled"
                return answer.entry
            assert type(answer) is Rejected
            now_us = yield from self._recover(call, answer, 0)
            counts = {rule.unit: count for rule, count in lines}
            lines = tuple((one.rule, counts[one.rule.unit]) for one in self._matched(call, now_us) if one.rule.unit in counts)
        raise StoreError("A charge could not be booked between windows. Try again.", fault="locked")

    def goes_unguarded(self, call: Call, now_us: int) -> bool:
        """Whether every budget of this call says that calls go on while the store is out of reach."""
        matched = self._matched(call, now_us)
        return bool(matched) and all(one.budget.on_unreachable == "open" for one in matched)

    def budget(self, name: str) -> Budget | None:
        return next((budget for budget in self.policy.budgets if budget.name == name), None)


def _patience(refused: Refused, matched: tuple[Matched, ...]) -> float:
    """How long the call may wait, in seconds: the shortest patience among the budgets that are short; 0 refuses at once."""
    budgets = {one.rule.key: one.budget for one in matched}
    short = [account for account, asked in refused.lines if asked > account.available and account.rule.enforce]
    return min((budgets[a.rule.key].wait_s if a.rule.key in budgets else 0.0) for a in short) if short else 0.0


def _pause(refused: Refused, now_us: int, deadline_us: int) -> float | None:
    """How long to wait before the next look, in seconds; None when waiting cannot help before the deadline."""
    left_us = deadline_us - now_us
    if left_us <= 0:
        return None
    retry = refused.retry_after_us
    if retry is not None and retry <= left_us:
        return min(retry / 1e6, POLL_S) if refused.may_free else retry / 1e6
    return min(POLL_S, left_us / 1e6) if refused.may_free else None


def _money(count: int) -> str:
    return f"${dollar_text(count)}"


def _digest(call: Call, *more: object) -> str:
    """What must be the same when an id is used again."""
    request = call.request
    facts: tuple[object, ...] = (call.tags(), call.scope.runs, call.amounts, *more)
    if request is not None:
        facts += (request.size, request.input_tokens, request.n, request.retries)
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _rejection(id: str, answer: Rejected) -> BursarError:
    if answer.why == "conflict":
        return IdempotencyConflict(
            f"The id {id!r} was used before with other content (I6). Use a new id for a new call.", id=id
        )
    if answer.why == "ended":
        return ReservationEnded(
            f"The reservation {id!r} has ended already ({answer.detail}, I5). Book a further cost with charge().",
            id=id,
            ended=answer.detail,
        )
    if answer.why == "unknown":
        return InvalidInput(f"There is no reservation {id!r}. Reserve before you settle or release.", argument="id", value=id)
    if answer.why == "accounts":
        return StoreError(
            f"The budget {answer.detail!r} has as many accounts as it may. Raise max_accounts, or use a `per` with fewer values.",
            fault="accounts",
            budget=answer.detail,
        )
    return StoreError(f"The store rejected the command ({answer.why} {answer.detail}). Try again.", fault="locked")


