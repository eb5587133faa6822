"""Replay: past calls under another policy, by the real guard and law on fresh books, in the time of the records."""

from __future__ import annotations

import json
from bisect import bisect_right, insort
from collections.abc import Generator, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from bursar.call import CHARGE_UNITS, MODEL_UNITS, TOOL_UNITS, Call, Pause, Step
from bursar.commands import Entry, Settle
from bursar.errors import BudgetExceeded, BursarError, UnknownPrice
from bursar.estimate import Request
from bursar.foresight.outcomes import Outcome
from bursar.foresight.past import Past, read_past
from bursar.foresight.recorded import RecordedAmounts, cut
from bursar.foresight.simulation import Simulation
from bursar.windows import window

MAPPED = "(map)"  # what stands in the place of a budget's name where the caller's map swapped the model
NO_PRICE, DETECTORS = "(no price)", "(detectors)"
_PROCESS = "process-"  # a run that stands for a whole process: its calls do not wait for one another


def replay(
    entries: Iterable[Entry],
    options: Mapping[str, Any],
    *,
    models: Mapping[str, str] | None = None,
    reprice: bool = False,
    since_us: int = 0,
    until_us: int = 2**62,
) -> list[Outcome]:
    """Every call that the entries tell of, reserved from `since_us` until before `until_us`, under these options of `Bursar`.

    `models`: which to ask for instead; `*` allowed on the left, PROVIDER/MODEL on the right. `reprice`: all at the prices of
    the options, else at what was billed. What was spent before `since_us` is on the books as it happened, as far as windows
    reach back.
    """
    pasts = read_past(entry for entry in entries if entry.reserved_us < until_us)
    begin_us = min((_reaches_back_to(one.window, one.tz, since_us) for one in options.get("budgets") or ()), default=0)
    pasts = [one for one in pasts if one.reserved_us >= begin_us]
    if not pasts:
        return []
    return _Replaying(pasts, options, models or {}, reprice, since_us).run()


def _reaches_back_to(name: str, tz: str, at_us: int) -> int:
    one = window(name, tz)
    if one.rolling_us is not None:
        return at_us - 2 * one.rolling_us
    return one.bounds(at_us)[0]


class _Replaying:
    """One replay under way. A call of a run whose earlier call was slowed comes that much later."""

    def __init__(
        self, pasts: list[Past], options: Mapping[str, Any], models: Mapping[str, str], reprice: bool, since_us: int
    ) -> None:
        self.simulation = Simulation(options, pasts[0].reserved_us)
        self.guard = self.simulation.guard
        self.amounts = self.guard.amounts = RecordedAmounts(self.simulation, reprice)
        self.pasts = pasts
        self.models = models
        self.since_us = since_us
        self.outcomes = [Outcome(past) for past in pasts]
        self._after: dict[int, list[int]] = {}

    def run(self) -> list[Outcome]:
        for rank, before in enumerate(_predecessors(self.pasts)):
            if before is None:
                self.simulation.at(self.pasts[rank].reserved_us, partial(self._begin, rank), rank)
            else:
                self._after.setdefault(before, []).append(rank)
        self.simulation.run()
        self.simulation.bursar.close()
        return [one for one in self.outcomes if one.past.reserved_us >= self.since_us]

    def _begin(self, rank: int) -> None:
        past, outcome = self.pasts[rank], self.outcomes[rank]
        call = self._call(past)
        self.amounts.pasts[call.id] = past
        if past.reserved_us < self.since_us or past.kind == "charge":
            steps: Generator[Step, Any, Any] = self._booking(call, past, outcome)
        else:
            if past.model:
                self._map(call, past, outcome)
            steps = self._noted(self.guard.reserve(call, self.simulation.now_us()), outcome)
        self.simulation.start(steps, partial(self._begun, rank, call), rank)

    def _map(self, call: Call, past: Past, outcome: Outcome) -> None:
        """Ask for what was asked for, or for what the caller's map puts in its place."""
        asked = past.model_asked or past.model
        wanted = next((to for name, to in self.models.items() if fnmatchcase(asked, name)), None)
        if wanted is not None:
            outcome.swapped[MAPPED] = wanted
            provider, slash, model = wanted.partition("/")
            if slash:
                call.connection = provider if call.connection == call.provider else call.connection
                call.provider, wanted = provider, model
        call.model = wanted or asked
        held = past.held_usage
        call.request = Request(call.provider, call.model, None, held.input_tokens, held.output_tokens)
        call.request.retries = past.attempts - 1

    def _call(self, past: Past) -> Call:
        """The call as it was made."""
        if past.model:
            held = past.held_usage
            call = self.simulation.model_call(
                past.tags.get("provider", ""),
                past.model,
                input_tokens=held.input_tokens,
                max_output_tokens=held.output_tokens,
                retries=past.attempts - 1,
                connection=past.tags.get("connection"),
            )
        else:
            call = self.simulation.tool_call(
                past.tool or "charge", past.held_nanos, connection=past.tags.get("connection")
            )
            call.tool = past.tool
        call.scope = past.scope
        return call

    def _booking(self, call: Call, past: Past, outcome: Outcome) -> Generator[Step, Any, None]:
        """What nobody can refuse: a cost that had been incurred, and all that was spent before."""
        call.units = MODEL_UNITS if past.model else TOOL_UNITS if past.kind == "settlement" else CHARGE_UNITS
        outcome.cost_nanos = past.cost_nanos
        if past.kind in ("refusal", "release"):
            return
        tokens = past.usage.input_tokens + past.usage.output_tokens
        amounts = {"USD": past.cost_nanos, "tokens": tokens, "requests": past.usage.requests, "calls": 1}
        yield from self.guard.charge(call, amounts, self.simulation.now_us(), usage=past.usage.as_dict())

    def _noted(self, steps: Generator[Step, Any, Any], outcome: Outcome) -> Generator[Step, Any, None]:
        """The steps, with every wait on the outcome."""
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                begun_us = self.simulation.now_us()
                answer = yield step
                waited_us = self.simulation.now_us() - begun_us
                if isinstance(step, Pause) and waited_us:
                    by = _budget_of(step.ticket.key) if step.ticket.key else DETECTORS
                    outcome.slowed[by] = outcome.slowed.get(by, 0) + waited_us
        except StopIteration:
            return

    def _begun(self, rank: int, call: Call, error: BursarError | None) -> None:
        """The call is on its way, or refused; what came after it in its run can begin."""
        past, outcome, now_us = self.pasts[rank], self.outcomes[rank], self.simulation.now_us()
        if error is None:
            outcome.sent_us = now_us
            self._changed(call, outcome)
            if call.state == "open":
                busy_us = past.settled_us - past.reserved_us
                self.simulation.at(now_us + busy_us, partial(self._end, rank, call), rank)
        elif isinstance(error, BudgetExceeded):
            outcome.by = error.budget or error.fields.get("cause") or DETECTORS
            outcome.why = str(error)
        elif isinstance(error, UnknownPrice):
            outcome.by, outcome.why = NO_PRICE, str(error)
        else:
            raise error
        late_us = now_us - past.reserved_us
        for next_rank in self._after.pop(rank, ()):
            at_us = self.pasts[next_rank].reserved_us + late_us
            self.simulation.at(at_us, partial(self._begin, next_rank), next_rank)

    def _changed(self, call: Call, outcome: Outcome) -> None:
        """Which budget's thresholds gave the call another model, or a smaller answer."""
        for key, rung in call.complied.items():
            budget = json.loads(key)[0]
            ladder = next(one.ladder for one in self.guard.policy.budgets if one.name == budget)
            acted = {one.action for one in ladder[:rung]}
            asked = call.model_asked or call.model
            if call.model != asked and "downgrade" in acted:
                outcome.swapped[budget] = call.model
            elif call.capped and "clamp" in acted:
                assert call.request is not None
                outcome.swapped[budget] = f"at most {call.request.max_output_tokens} tokens"

    def _end(self, rank: int, call: Call) -> None:
        steps = self._ending(call, self.pasts[rank], self.outcomes[rank])
        self.simulation.start(steps, _raise, rank)

    def _ending(self, call: Call, past: Past, outcome: Outcome) -> Generator[Step, Any, None]:
        now_us = self.simulation.now_us()
        if past.kind == "release":
            yield from self.guard.release(call, "as it was", now_us, outcome=past.outcome)
            return
        usage = cut(past.usage, call)
        outcome.cost_nanos = past.cost_nanos
        if past.model:
            outcome.cost_nanos = self.amounts.cost(call, past.cost_nanos, past.usage)
        actuals = {"USD": outcome.cost_nanos, "failures": int(past.outcome == "failed")}
        if past.model and not past.estimated:
            actuals |= {"tokens": usage.input_tokens + usage.output_tokens, "requests": usage.requests}
        yield from self.guard._end(
            call, Settle(call.id, actuals, outcome.cost_nanos, usage.as_dict(), past.outcome, past.estimated)
        )
        self.guard.notices.sentry.answered(call, None, 0, (), now_us)


def _predecessors(pasts: list[Past]) -> list[int | None]:
    """For each call the one of its run that had ended last when it began, so that it may have waited for it."""
    ended: dict[str, list[tuple[int, int]]] = {}
    found: list[int | None] = []
    for rank, past in enumerate(pasts):
        if not past.run or past.run.startswith(_PROCESS):
            found.append(None)
            continue
        run = ended.setdefault(past.run, [])
        at = bisect_right(run, (past.reserved_us, rank))
        found.append(run[at - 1][1] if at else None)
        insort(run, (past.settled_us, rank))
    return found


def _budget_of(queue: str) -> str:
    """The budget whose queue it is: its name stands first."""
    return str(json.JSONDecoder().raw_decode(queue, 1)[0])


def _raise(error: BursarError | None) -> None:
    """A simulated end cannot fail: what it raises is a fault of the simulation."""
    if error is not None:
        raise error
