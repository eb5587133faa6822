"""Reckoning: when a policy stops a loop, by arithmetic of its own: neither the law nor a store takes part.

A turn is reckoned step by step; then as many turns are skipped at once as can bring nothing new: until the next limit, mark,
window's end, empty rate or detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bursar.accounts import STOPPING, Rule
from bursar.call import Call
from bursar.detect import Detectors
from bursar.errors import UnknownPrice
from bursar.foresight.balance import FOREVER, Balance, turns_until
from bursar.foresight.loop import End, Loop, Step, call_of, used
from bursar.foresight.rungs import Line, Taken
from bursar.foresight.simulation import Simulation
from bursar.policy import NONE, Matched, limits
from bursar.queueing import LOOK_S
from bursar.scope import process_run
from bursar.usage import Usage

HORIZON_US = 31 * 86_400_000_000
MOST_TURNS = 10_000  # reckoned one by one
_MINUTE_US = 60_000_000
_HALF_HOUR_US = 1_800_000_000
_LOOK_US = int(LOOK_S * 1e6)


class _Stop(NamedTuple):
    """What stops a call, and how long it would wait. `mark`: of which account a mark blocks, and from which amount on."""

    by: str
    patience_s: float = 0.0
    mark: tuple[Rule, int] | None = None


def reckon(loop: Loop, given: Mapping[str, Any], start_us: int) -> End:
    """How far the loop comes under these arguments of `Bursar`, from fresh accounts at `start_us` on, within 31 days."""
    return _Reckoning(loop, given, start_us).run()


class _Reckoning:
    def __init__(self, loop: Loop, given: Mapping[str, Any], start_us: int) -> None:
        self.simulation = Simulation(given, start_us)  # for its policy and its amounts: it carries nothing out
        self.guard = self.simulation.guard
        detectors = given.get("detectors", "report")
        self.detectors = detectors if isinstance(detectors, Detectors) else None
        self.require = tuple(given.get("require", ()))
        self.loop = loop
        self.start_us = self.now_us = start_us
        self.calls = self.tool_calls = self.nanos = self.failures = 0
        self.not_before_us = 0
        self.waited = False
        self.balances: dict[str, Balance] = {}
        self.moves: dict[str, list[tuple[int, int]]] = {}
        self._skipped: tuple[int, int, dict[tuple[str, str, str], int]] = (0, 0, {})
        self._capped: dict[int, bool] = {}
        self._made: dict[tuple[int, str, int], Call] = {}
        self._known: dict[tuple[int, str, int], tuple[tuple[Matched, ...], int, list[Line], int]] = {}

    def run(self) -> End:
        for _ in range(MOST_TURNS):
            over = [key for key, one in self.balances.items() if (one.rule.end_us or FOREVER) <= self.now_us]
            for key in over:
                del self.balances[key]
            reached = {key: one.marks() for key, one in self.balances.items()}
            counts = self.calls, self.tool_calls, self.nanos
            self.moves, self.waited = {}, False
            for step in self.loop.turn:
                try:
                    stop = self._take(step)
                except UnknownPrice:
                    stop = _Stop("no price")
                if stop is not None:
                    return self._end(stop.by)
            if not self._skip(reached, counts):
                self.now_us += self.loop.interval_us
            if self.now_us - self.start_us > HORIZON_US:
                break
        return self._end(None)

    def _end(self, by: str | None) -> End:
        return End(self.calls, self.tool_calls, self.nanos, self.now_us - self.start_us, by)

    # -- one step --------------------------------------------------------------------------------------------------

    def _take(self, step: Step) -> _Stop | None:
        """Reckon one call; what stops it, or None."""
        taken = Taken(step.model, step.usage.output_tokens)
        stop = self._found(step, taken)
        if stop is not None:
            return stop
        begun_us = self.now_us
        while True:
            lines, nanos = self._lines(step, taken)
            stop = self._marked(lines)
            if stop is None and taken.comply(lines, self.balances, bool(step.tool)):
                continue
            stop = stop or self._short(lines)
            if stop is None:
                break
            waits = self._waits_us(lines, stop) if stop.patience_s else None
            if waits is None or self.now_us + max(waits) > begun_us + int(stop.patience_s * 1e6):
                return stop
            # The guard looks once a second: at the first look after anything has room, something else may stop the call.
            self.now_us += min(max(waits), -(-min(waits) // _LOOK_US) * _LOOK_US)
            self.waited = True
        for line in lines:
            self.balances[line.rule.key].book(line.actual, self.now_us)
            self.moves[line.rule.key].append((line.held, line.actual))
        self.nanos += nanos
        self.calls, self.tool_calls = self.calls + (not step.tool), self.tool_calls + bool(step.tool)
        if self.loop.kind == "failing":
            self._failed()
        return None

    def _lines(self, step: Step, taken: Taken) -> tuple[list[Line], int]:
        """What the call asks of its accounts and will spend from them, and what it may be billed."""
        call = self._call(step, taken)
        call.throttles = taken.throttles
        matched = self.guard.matched(call, self.now_us)
        half_hour = self.now_us // _HALF_HOUR_US  # prices may change between two half hours
        key = id(step), taken.model, taken.output_tokens
        known = self._known.get(key)
        if known is None or known[:2] != (matched, half_hour):
            known = self._known[key] = (matched, half_hour, *self._amounts(call, step, matched))
        for line in known[2]:
            balance = self.balances.get(line.rule.key)
            if balance is None:
                balance = self.balances[line.rule.key] = Balance(line.rule, self.now_us)
                balance.spent = self._skipped_into(line.rule)
            balance.age(self.now_us)
            self.moves.setdefault(
                line.rule.key, []
            )  # its marks decide what the call is, whether or not it is spent from
        return known[2:]

    def _amounts(self, call: Call, step: Step, matched: tuple[Matched, ...]) -> tuple[list[Line], int]:
        actuals = {"USD": step.cost_nanos, "failures": 0}
        billed = step.cost_nanos
        if call.request is not None:
            call.price = self.guard.book.find(call.provider, call.model, self.now_us, call.tags())
            call.attempts = self.loop.attempts
            usage = used(call, step)
            price = self.guard.book.cost(call.provider, call.model, usage, at_us=self.now_us, tags=call.tags())
            tokens = usage.input_tokens + usage.output_tokens
            actuals |= {"USD": price.cost_nanos, "tokens": tokens, "requests": usage.requests}
            billed = price.cost_nanos
        held = self.guard.amounts.lines(call, matched)
        if self.loop.kind == "failing":
            actuals, billed = self._unknown(call), billed * self.loop.attempts
        lines = [
            Line(one.budget, rule, amount, actuals.get(rule.unit, amount))
            for one, (rule, amount) in zip(matched, held, strict=True)
            if rule.enforce  # a shadow stops nothing
        ]
        return lines, billed

    def _unknown(self, call: Call) -> dict[str, int]:
        """What is booked where nobody knows what was billed: what was held, or the whole estimate where that is more."""
        assert call.estimate is not None
        assert call.price is not None
        known = Usage(input_tokens=call.estimate.input_tokens, output_tokens=call.estimate.output_tokens)
        nanos = call.draft["cost_nanos"]
        if call.usage is None:
            nanos = max(nanos, call.price.cost_nanos(known))
        return {"failures": 1, "USD": nanos, "tokens": known.input_tokens + known.output_tokens}

    def _call(self, step: Step, taken: Taken) -> Call:
        """The step's call, as thresholds have made it; the same one every time."""
        key = id(step), taken.model, taken.output_tokens
        if key not in self._made:
            self._made[key] = call_of(self.simulation, self.loop, step, taken.model, taken.output_tokens)
        return self._made[key]

    def _marked(self, lines: list[Line]) -> _Stop | None:
        """What marks stop the call: first the switch that a kill has thrown, then the first mark in force."""
        for line in lines:
            if self.balances[line.rule.key].is_killed:
                return _Stop(f"{line.rule.budget}: kill")
        for line in lines:
            for threshold, mark in zip(line.budget.ladder, line.rule.marks, strict=False):
                if mark.action in STOPPING and self.balances[line.rule.key].spent >= mark.at:
                    patience_s = line.budget.wait_s if mark.action == "block" else 0.0
                    by = f"{line.rule.budget}: {mark.action} at {threshold.at}"
                    return _Stop(by, patience_s, (line.rule, mark.at))
        return None

    def _short(self, lines: list[Line]) -> _Stop | None:
        """The first account without room; the least patient of those without decides how long the call waits."""
        short = self._without_room(lines)
        if not short:
            return None
        rule = short[0].rule
        what = "rate" if rule.kind == "refill" else "limit"
        return _Stop(f"{rule.budget}: {what}", min(line.budget.wait_s for line in short))

    def _without_room(self, lines: list[Line]) -> list[Line]:
        return [line for line in lines if not self.balances[line.rule.key].has_room(line.held, line.rule.limit)]

    def _waits_us(self, lines: list[Line], stop: _Stop) -> list[int] | None:
        """How long until time alone makes room on each account that lacks it; None when it never does."""
        lacking = [(line.rule, line.held, line.rule.limit) for line in self._without_room(lines)]
        if stop.mark is not None:
            rule, at = stop.mark
            lacking.append((rule, 1, at))
        waits = [self.balances[rule.key].wait_us(need, limit, self.now_us) for rule, need, limit in lacking]
        known = [wait for wait in waits if wait is not None]
        return known if len(known) == len(waits) else None

    # -- detectors -------------------------------------------------------------------------------------------------

    def _found(self, step: Step, taken: Taken) -> _Stop | None:
        """What a detector stops; waits where one wants a pause."""
        call = self._call(step, taken)
        tags = call.tags()
        if any(tags.get(tag, NONE) == NONE for tag in self.require):
            return _Stop("required tags")
        one = self.detectors
        if one is None:
            return None
        if one.uncapped in STOPPING and not self._is_capped(call):
            return _Stop("detector: uncapped")
        if tags["run"] == process_run():
            return None
        name = self._repeated(one, step) if self.loop.kind == "repeating" else None
        if not step.tool:
            name = name or self._limited(one) or self._retried(one)
        return None if name is None else _Stop(f"detector: {name}")

    def _is_capped(self, call: Call) -> bool:
        """Whether a budget limits the call: which ones are about it does not change."""
        if id(call) not in self._capped:
            self._capped[id(call)] = any(limits(one.rule) for one in self.guard.matched(call, self.now_us))
        return self._capped[id(call)]

    def _repeated(self, one: Detectors, step: Step) -> str | None:
        """A step that came again and again: the calls of the turn under way count, and its tools are stopped too."""
        if one.loops in STOPPING and self.calls > one.repetitions:
            return "loop"
        return "stale" if one.stale in STOPPING and self.calls > one.stale_steps and not step.tool else None

    def _limited(self, one: Detectors) -> str | None:
        if one.limits not in STOPPING:
            return None
        if one.max_steps is not None and self.calls >= one.max_steps:
            return "steps"
        over = one.max_minutes is not None and self.now_us - self.start_us >= one.max_minutes * _MINUTE_US
        return "time" if over else None

    def _retried(self, one: Detectors) -> str | None:
        if self.loop.kind != "failing":
            return None
        if self.failures >= one.max_attempts:
            return "attempts" if one.retries in STOPPING else None
        if one.retries != "off" and self.not_before_us > self.now_us:
            self.now_us, self.waited = self.not_before_us, True
        return None

    def _failed(self) -> None:
        one = self.detectors
        self.failures += 1
        if one is not None:
            wait_ms = min(one.max_backoff_ms, one.backoff_ms << min(self.failures - 1, 40))
            self.not_before_us = self.now_us + wait_ms * 1_000

    # -- many turns at once ----------------------------------------------------------------------------------------

    def _skip(self, reached: Mapping[str, int], counts: tuple[int, int, int]) -> bool:
        """Reckon as many turns at once as are like the last one; False where not even the next one surely is."""
        if self.waited or (self.loop.kind != "varying" and self.detectors is not None):
            return False
        if any(self.balances[key].marks() != reached.get(key, 0) for key in self.moves):
            return False
        interval_us = self.loop.interval_us
        next_us = self.now_us + interval_us
        count = max(1, (self.start_us + HORIZON_US - next_us) // interval_us + 1)
        one = self.detectors
        if one is not None and one.limits in STOPPING:
            if one.max_steps is not None:
                count = min(count, one.max_steps - self.calls)
            if one.max_minutes is not None:
                end_us = self.start_us + one.max_minutes * _MINUTE_US
                count = min(count, -(-(end_us - next_us) // interval_us))
        likewise = (self.balances[key].turns(moves, next_us, interval_us) for key, moves in self.moves.items())
        count = min([count, *likewise])
        if count < 1:
            return False
        each: dict[tuple[str, str, str], int] = {}
        for key, moves in self.moves.items():
            balance = self.balances[key]
            balance.skip(count, moves, next_us, interval_us)
            each[_name(balance.rule)] = sum(actual for _, actual in moves)
        self._skipped = next_us, count, each
        calls, tool_calls, nanos = counts
        self.calls += count * (self.calls - calls)
        self.tool_calls += count * (self.tool_calls - tool_calls)
        self.nanos += count * (self.nanos - nanos)
        self.now_us = next_us + count * interval_us
        return True

    def _skipped_into(self, rule: Rule) -> int:
        """What the turns that were skipped last have spent in a window that began meanwhile."""
        first_us, count, each = self._skipped
        if rule.end_us is None:
            return 0
        return max(0, count - max(0, turns_until(rule.start_us, first_us, self.loop.interval_us))) * each.get(
            _name(rule), 0
        )


def _name(rule: Rule) -> tuple[str, str, str]:
    """What the accounts of one budget and scope have in common, window after window."""
    return rule.budget, rule.scope, rule.unit
