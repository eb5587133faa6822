"""Notices: what thresholds and detectors put before everybody: alerts, questions to operators, switches."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

from bursar.accounts import STOPPING, Account, Rule
from bursar.budget import Budget
from bursar.call import Call, Pause, Publish, Reload, Step
from bursar.commands import Alert, Tell
from bursar.errors import StoreError
from bursar.policy import Matched, Policy
from bursar.refusal import asking, denied, found, reaching, run_account
from bursar.sentry import Sentry, Sign
from bursar.signing import short_id, switch_name
from bursar.waiting import Ticket

MAX_PAUSES = 100
PACE = ("velocity", "burn")  # detectors of what was spent, rather than of what is asked for

log = logging.getLogger("bursar")


class Notices:
    """Steps without I/O, as the guard's. `told` is called when the outbox has something new."""

    def __init__(self, sentry: Sentry) -> None:
        self.sentry = sentry
        self.told: Callable[[], None] = nobody

    def watch(
        self, call: Call, matched: Sequence[Matched], policy: Callable[[], Policy], now_us: int
    ) -> Generator[Step, Any, int]:
        """Show the call to the detectors; wait where they want a pause. Raises Stopped, ApprovalRequired."""
        rules = [one.rule for one in matched]
        begun_us = now_us
        for _ in range(MAX_PAUSES):
            signs = self.sentry.before(call, rules, now_us)
            if not signs:
                break
            for sign in signs:
                yield from self._tell(call, sign, now_us)
            for sign in signs:
                if sign.action in STOPPING:
                    yield from self._hold_up(call, sign, policy)
            go_us = begun_us + max((sign.wait_us for sign in signs if sign.action == "throttle"), default=0)
            if now_us >= go_us:
                break
            now_us = yield Pause(Ticket(""), (go_us - now_us) / 1e6)
        return now_us

    def _hold_up(self, call: Call, sign: Sign, policy: Callable[[], Policy]) -> Generator[Step, Any, None]:
        """Raise what a detector asks for, unless an operator has approved it."""
        now_us = yield Reload()  # an answer may have come since
        id = short_id("ask", call.run, sign.name)
        answered = policy().decisions.approval(id, now_us)
        if sign.action == "ask" and answered.state == "approved":
            self.sentry.forgive(call)
            return
        if sign.name not in ("unattributed", "uncapped"):
            self.sentry.stop(call, sign)
        if sign.action == "ask" and answered.state == "open":
            error = found(sign, call.run, id=id)
            yield from self._put_question(id, run_account(call.run, sign.name), call, str(error), policy(), now_us)
            raise error
        if sign.action == "kill":
            yield from self._switch({"tags": {"run": call.run}}, sign.name, sign.why, call.run)
        raise found(sign, call.run)

    def answered(
        self, call: Call, answer: Any, cost_nanos: int, matched: Sequence[Matched], now_us: int
    ) -> Generator[Step, Any, None]:
        """Show the detectors how a call ended. Its settlement is on the books: nothing here may fail it."""
        if self.sentry.settings is None:
            return
        try:
            for sign in self.sentry.answered(call, answer, cost_nanos, [one.rule for one in matched], now_us):
                yield from self._tell(call, sign, now_us)
                if sign.name in PACE and sign.action in STOPPING:
                    self.sentry.stop(call, sign)  # no request shows it again: the run's next call meets it
                if sign.action == "kill":
                    yield from self._switch({"tags": {"run": call.run}}, sign.name, sign.why, call.run)
        except StoreError as error:  # the call is settled all the same
            log.error("what a detector found could not be told: %s", error)

    def _tell(self, call: Call, sign: Sign, now_us: int) -> Generator[Step, Any, None]:
        """Put a finding into the outbox, once for each run."""
        if not self.sentry.is_news(sign, call):
            return
        log.warning("%s (%s): %s", sign.name, call.run, sign.why)
        facts = {
            "detector": sign.name,
            "cause": sign.cause,
            "action": sign.action,
            "why": sign.why,
            "tags": call.tags(),
        }
        try:
            yield Tell(f"{sign.name} {call.run} {now_us}", "detector", facts)
        except BaseException:
            self.sentry.untold(sign, call)
            raise
        self.told()

    def crossed(
        self, alerts: tuple[Alert, ...], accounts: tuple[Account, ...], policy: Policy
    ) -> Generator[Step, Any, None]:
        """What newly crossed marks cause beside an alert: `kill` stops what is in flight."""
        self.told()
        rules = {account.rule.key: account.rule for account in accounts}
        for alert in alerts:
            facts = alert.facts
            log.warning("%s", reaching(facts))
            if facts["action"] == "kill" and facts["enforce"]:
                yield from self.kill(rules[facts["account"]], facts["budget"], policy)

    def ask(
        self, call: Call, account: Account, asked: int, budget: Budget, mark: int, policy: Policy, now_us: int
    ) -> Generator[Step, Any, None]:
        """Put the question of a threshold before an operator. Raises ApprovalRequired, or BudgetExceeded where it was denied."""
        rule = account.rule
        id = short_id("ask", rule.key, rule.limit, mark)
        answered = policy.decisions.approval(id, now_us)
        if answered.state == "denied":
            raise denied(account, asked, budget, answered)
        error = asking(account, asked, budget, mark, id)
        yield from self._put_question(
            id, rule.key, call, str(error), policy, now_us, owner=budget.owner, limit=rule.limit, spent=account.spent
        )
        raise error

    def _put_question(
        self, id: str, account: str, call: Call, why: str, policy: Policy, now_us: int, **facts: Any
    ) -> Generator[Step, Any, None]:
        """Ask an operator, once."""
        if policy.decisions.is_open(id):
            return
        question = {
            "state": "open",
            "account": account,
            "budget": json.loads(account)[0],
            "at_us": now_us,
            "tags": call.tags(),
            "why": why,
            **facts,
        }
        # told first: of a question that stands nobody is told again, though whoever asked it got no further
        yield Tell(f"approval {id} {now_us}", "approval", {**question, "id": id})
        yield Publish("approval", {id: question})
        self.told()

    def kill(self, rule: Rule, budget: str, policy: Policy) -> Generator[Step, Any, None]:
        """Throw the switch of an account, so that every process stops what is in flight on it."""
        if policy.decisions.is_stopped(rule.key):
            return
        why = f"the budget {budget!r} reached its kill threshold"
        yield from self._switch({"account": rule.key}, "killed", why, budget)

    def _switch(self, what: dict[str, Any], cause: str, why: str, by: str) -> Generator[Step, Any, None]:
        switch = {"frozen": True, **what, "cause": cause, "why": why, "by": by}
        try:
            yield Publish("freeze", {switch_name(what): switch})
        except StoreError as error:  # what led here stops every further call; only streams in flight go on
            log.error("the switch of %s could not be thrown: %s", what, error)


def nobody() -> None:
    """Nobody waits for alerts."""
