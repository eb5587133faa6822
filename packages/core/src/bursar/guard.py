"""The guard: the life of one call as steps without I/O. A driver carries out each step and hands back what came of it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from typing import Any

from bursar.accounts import Account, Rule
from bursar.booking import Booking
from bursar.call import Call, Pause, Reload, Step, Steps
from bursar.commands import Answer, Granted, Refused, Rejected, Reserve, Stepped
from bursar.errors import Stopped, StoreError
from bursar.ladder import comply
from bursar.policy import Matched, Policy
from bursar.queueing import Queueing
from bursar.refusal import exceeded, rejection, stopped
from bursar.waiting import Ticket

MAX_RELOADS = 8
MAX_LOOKS = 100_000
MAX_STEPS = 20

log = logging.getLogger("bursar")


class Guard(Booking):
    """Turns calls into commands: estimate, price, match, reserve, wait or clamp, settle. It does no I/O itself."""

    def reserve(self, call: Call, now_us: int) -> Steps:
        """Until the call may be sent. Raises BudgetExceeded, UnknownPrice, UnboundedEstimate, StoreError, ..."""
        if call.request is not None:
            call.price = call.book.find(call.provider, call.model, now_us, call.tags())
            call.attempts = call.request.retries + 1
        now_us = yield from self.notices.watch(call, self.matched(call, now_us), self._policy, now_us)
        queue = Queueing(self.room, now_us)
        try:
            for _ in range(MAX_LOOKS):
                final = not call.resize and all(one.budget.on_exceed == "refuse" for one in self.matched(call, now_us))
                answer, now_us = yield from self._try(call, queue, now_us, quiet=not final)
                if type(answer) is Refused:
                    pause = queue.after(answer, self.matched(call, now_us), now_us)
                    if pause is not None:
                        now_us = yield pause
                        continue
                    fit = self.amounts.fit(call, answer)
                    if call.resize and fit is not None:
                        call.resize, call.capped = False, True
                        assert call.request is not None
                        call.request.max_output_tokens = fit
                        continue
                    if not final:  # the last attempt, on record
                        answer, now_us = yield from self._try(call, queue, now_us, quiet=False)
                if isinstance(answer, Refused):
                    yield from self._refuse(call, answer, now_us)
                    continue
                assert type(answer) is Granted
                if call.given_id:
                    _as_granted(call, answer.reservation.draft, now_us)
                call.state, call.reserved_us = "open", answer.reservation.reserved_us
                return call
            raise StoreError("No answer after very many looks. Reduce the contention on this budget.", fault="locked")
        finally:
            queue.leave()

    def _policy(self) -> Policy:
        return self.policy

    def stop_of(self, call: Call, now_us: int) -> Stopped | None:
        """The error of the switch that stops this call, if one is thrown."""
        if not self.policy.decisions.any_stopped:
            return None
        freeze = self.policy.stop(call.scope, call.own_tags(), self.matched(call, now_us))
        return None if freeze is None else stopped(freeze)

    def killers(self, call: Call) -> list[Rule]:
        """The accounts of the call that kill what is in flight when they reach a mark."""
        rules = (one.rule for one in self.matched(call, call.reserved_us))
        return [rule for rule in rules if rule.enforce and any(mark.action == "kill" for mark in rule.marks)]

    def _try(
        self, call: Call, queue: Queueing, now_us: int, *, quiet: bool
    ) -> Generator[Step, Any, tuple[Granted | Refused, int]]:
        """One attempt to reserve, made again after a newer policy, a new window, or a step that a threshold asks for."""
        for _ in range(MAX_RELOADS + MAX_STEPS):
            if self.stop_of(call, now_us) is not None:
                now_us = yield Reload()  # it may have been put back since
                stop = self.stop_of(call, now_us)
                if stop is not None:
                    raise stop
            version = self.policy.version  # before it is matched by: another thread may put a newer one in force
            matched = self.matched(call, now_us)
            lines = self.amounts.lines(call, matched)
            command = Reserve(
                call.id,
                lines,
                call.ttl_us,
                call.draft,
                call.digest(),
                self.on_expiry,
                version,
                self.max_accounts,
                quiet,
                call.complied,
                queue.behind(matched),
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
            if type(answer) is Stepped:
                yield from self._step(call, answer, matched, now_us)
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

    def _step(
        self, call: Call, answer: Stepped, matched: tuple[Matched, ...], now_us: int
    ) -> Generator[Step, Any, None]:
        """Comply with the marks in force. Raises ApprovalRequired where only an operator can let the call go on."""
        for one in matched:
            rung = answer.marks.get(one.rule.key)
            if rung is None:
                continue
            unmet = comply(call, one, rung, now_us)
            if unmet is None:
                continue
            index = one.budget.ladder.index(unmet)
            if self.policy.decisions.granted(one.rule.key, now_us)[1]:  # an operator let it go on as it is
                call.complied[one.rule.key] = rung
                continue
            least = Account(one.rule, one.rule.marks[index].at)  # the balance is at the mark, or above it
            yield from self.notices.ask(call, least, 0, one.budget, index, self.policy, now_us)

    def _refuse(self, call: Call, refused: Refused, now_us: int) -> Generator[Step, Any, None]:
        """Raise the error of a refusal; a mark that asks or kills is published first, for every process.

        Returns, for another look, where a policy without that account has come into force meanwhile.
        """
        account = refused.account
        rule = account.rule
        budget = next((one.budget for one in self.matched(call, now_us) if one.rule.key == rule.key), None)
        if budget is None:
            return
        action = None if refused.mark is None else rule.marks[refused.mark].action
        if action == "ask":
            assert refused.mark is not None
            yield from self.notices.ask(call, account, refused.asked, budget, refused.mark, self.policy, now_us)
        if action == "kill":
            yield from self.notices.kill(rule, budget.name, self.policy)
            raise exceeded(refused, budget, None)
        raise exceeded(refused, budget, self.amounts.fit(call, refused))

    def goes_unguarded(self, call: Call, now_us: int) -> bool:
        """Whether every budget of this call says that calls go on while the store is out of reach (I12)."""
        matched = self.matched(call, now_us)
        return bool(matched) and all(one.budget.on_unreachable == "open" for one in matched)


def _as_granted(call: Call, granted: Mapping[str, Any], now_us: int) -> None:
    """Make the call what it was when its reservation was granted: an id that comes again gets the same answer (I6)."""
    request, model = call.request, granted["tags"].get("model", call.model)
    if request is None:
        return
    if model != call.model:
        call.model_asked = call.model_asked or call.model
        call.request = request = request.for_model(model)
        call.model, call.price = model, call.book.find(call.provider, model, now_us, {**call.tags(), "model": model})
    call.draft = dict(granted)
    most = granted.get("max_output_tokens")
    if most is not None:
        request.max_output_tokens, call.capped = most, True
