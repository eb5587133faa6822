"""Reckoning: when a policy stops a loop, by arithmetic alone; written from the rules, it knows nothing of the law's code.

A turn is reckoned step by step; then as many turns are skipped at once as can bring nothing new: until the next limit, mark,
window's end, empty rate or detector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from bursar.accounts import STOPPING, Rule
from bursar.budget import Budget
from bursar.call import Call
from bursar.detect import Detectors
from bursar.errors import UnknownPrice
from bursar.foresight.loop import End, Loop, Step, call_of, used
from bursar.foresight.simulation import Simulation
from bursar.ladder import THROTTLE_WAIT_S
from bursar.policy import NONE, Matched, limits, throttle_rule
from bursar.scope import process_run
from bursar.usage import Usage

HORIZON_US = 31 * 86_400_000_000
MOST_TURNS = 10_000  # reckoned one by one
FOREVER = 2**62
_MINUTE_US = 60_000_000
_HALF_HOUR_US = 1_800_000_000


class Line(NamedTuple):
    """One account of a call: what is asked of it, and what will be spent from it."""

    budget: Budget
    rule: Rule
    held: int
    actual: int


class _Stop(NamedTuple):
    """What stops a call. Time alone may make room for `need` below `limit`, if the call has `patience_s`."""

    by: str
    rule: Rule | None = None
    need: int = 0
    limit: int = 0
    patience_s: float = 0.0


class _Balance:
    """What one account has spent. A rate's `level` is counted in amount x microseconds of its period, so that it is exact."""

    __slots__ = ("at_us", "buckets", "level", "rule", "spent")

    def __init__(self, rule: Rule, now_us: int) -> None:
        self.rule = rule
        self.spent = 0
        self.buckets: deque[list[int]] = deque()  # of a rolling window: [index, amount], oldest first
        self.level, self.at_us = rule.limit * rule.period_us, now_us

    def age(self, now_us: int) -> None:
        rule = self.rule
        if rule.kind == "rolling":
            oldest = (now_us - rule.period_us) // (rule.period_us // 60)
            while self.buckets and self.buckets[0][0] < oldest:
                self.spent -= self.buckets.popleft()[1]
        elif rule.kind == "refill":
            gained = (now_us - self.at_us) * rule.limit
            self.level, self.at_us = min(rule.limit * rule.period_us, self.level + gained), now_us

    def has_room(self, amount: int, limit: int) -> bool:
        if self.rule.kind == "refill":
            return self.level >= amount * self.rule.period_us
        return self.rule.kind == "slots" or self.spent + amount <= limit

    def book(self, amount: int, now_us: int) -> None:
        if self.rule.kind == "refill":
            self.level -= amount * self.rule.period_us
        elif self.rule.kind != "slots":
            self.spent += amount
        if self.rule.kind == "rolling":
            index = now_us // (self.rule.period_us // 60)
            if not self.buckets or self.buckets[-1][0] != index:
                self.buckets.append([index, 0])
            self.buckets[-1][1] += amount

    def wait_us(self, need: int, limit: int, now_us: int) -> int | None:
        """How long until time alone makes room for `need`; None when it never does."""
        rule = self.rule
        if need > limit:
            return None
        if rule.kind == "refill":
            return -(-(need * rule.period_us - self.level) // rule.limit)
        if rule.kind == "rolling":
            left = self.spent
            for index, amount in self.buckets:
                left -= amount
                if left + need <= limit:
                    return (index + 1) * (rule.period_us // 60) + rule.period_us - now_us
            return None
        return None if rule.end_us is None else rule.end_us - now_us

    def marks(self) -> int:
        """How many marks the spending has reached."""
        return sum(self.spent >= mark.at for mark in self.rule.marks)

    def turns(self, moves: list[tuple[int, int]], next_us: int, interval_us: int) -> int:
        """How many more turns of these (held, actual) bring nothing new, the first of them at `next_us`."""
        rule = self.rule
        each = sum(actual for _, actual in moves)
        before = peak = 0
        for held, actual in moves:
            peak = max(peak, before + held)
            before += actual
        if rule.kind == "slots":
            return FOREVER
        self.age(next_us)
        if rule.kind == "refill":
            loss, spare = each * rule.period_us - interval_us * rule.limit, self.level - peak * rule.period_us
            return 0 if spare < 0 else FOREVER if loss <= 0 else spare // loss + 1
        ends = [FOREVER if rule.end_us is None else rule.end_us]
        if rule.kind == "rolling":
            width = rule.period_us // 60
            ends += [
                (next_us // width + 1) * width,
                *((b[0] + 1) * width + rule.period_us for b in [*self.buckets][:1]),
            ]
        found = [-(-(min(ends) - next_us) // interval_us)]
        if rule.enforce:
            found.append((rule.limit - self.spent - peak) // each + 1 if each else FOREVER)
            next_mark = min((mark.at for mark in rule.marks if mark.at > self.spent), default=None)
            if next_mark is not None and each:
                found.append((next_mark - self.spent - 1) // each)
        return max(0, min(found))

    def skip(self, count: int, moves: list[tuple[int, int]], next_us: int, interval_us: int) -> None:
        """Book `count` turns, the first of them at `next_us`."""
        self.age(next_us)
        each, rule = sum(actual for _, actual in moves), self.rule
        if rule.kind == "refill":
            gained = (count - 1) * (interval_us * rule.limit - each * rule.period_us)
            self.level = min(rule.limit * rule.period_us, self.level + gained) - each * rule.period_us
            self.at_us = next_us + (count - 1) * interval_us
        else:
            self.book(count * each, next_us)


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
        self.balances: dict[str, _Balance] = {}
        self.moves: dict[str, list[tuple[int, int]]] = {}
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
        taken = _Taken(step.model, step.usage.output_tokens)
        stop = self._found(step, taken)
        if stop is not None:
            return stop
        deadline_us: int | None = None
        while True:
            lines, nanos = self._lines(step, taken)
            stop = self._marked(lines)
            if stop is None and taken.comply(lines, self.balances, bool(step.tool)):
                continue
            stop = stop or self._short(lines)
            if stop is None:
                break
            if not stop.patience_s or stop.rule is None:
                return stop
            if deadline_us is None:
                deadline_us = self.now_us + int(stop.patience_s * 1e6)
            wait_us = self.balances[stop.rule.key].wait_us(stop.need, stop.limit, self.now_us)
            if wait_us is None or self.now_us + wait_us > deadline_us:
                return stop
            self.now_us += wait_us
            self.waited = True
        for line in lines:
            self.balances[line.rule.key].book(line.actual, self.now_us)
            self.moves.setdefault(line.rule.key, []).append((line.held, line.actual))
        self.nanos += nanos
        self.calls, self.tool_calls = self.calls + (not step.tool), self.tool_calls + bool(step.tool)
        if self.loop.kind == "failing":
            self._failed()
        return None

    def _lines(self, step: Step, taken: _Taken) -> tuple[list[Line], int]:
        """What the call asks of its accounts and will spend from them, and what it may be billed."""
        call = self._call(step, taken)
        call.throttles = tuple(taken.throttles)
        matched = self.guard.matched(call, self.now_us)
        half_hour = self.now_us // _HALF_HOUR_US  # prices may change between two half hours
        key = id(step), taken.model, taken.output_tokens
        known = self._known.get(key)
        if known is None or known[:2] != (matched, half_hour):
            known = self._known[key] = (matched, half_hour, *self._amounts(call, step, matched))
        for line in known[2]:
            balance = self.balances.get(line.rule.key)
            if balance is None:
                balance = self.balances[line.rule.key] = _Balance(line.rule, self.now_us)
            balance.age(self.now_us)
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
        ]
        return lines, billed

    def _unknown(self, call: Call) -> dict[str, int]:
        """What is booked where nobody knows what was billed: what was held, or the whole estimate where that is more."""
        assert call.estimate is not None
        assert call.price is not None
        known = Usage(input_tokens=call.estimate.input_tokens, output_tokens=call.estimate.output_tokens)
        nanos = call.price.cost_nanos(known)
        if call.usage is not None or nanos <= call.draft["cost_nanos"]:
            return {"failures": 1}
        return {"failures": 1, "USD": nanos, "tokens": known.input_tokens + known.output_tokens}

    def _call(self, step: Step, taken: _Taken) -> Call:
        """The step's call, as thresholds have made it; the same one every time."""
        key = id(step), taken.model, taken.output_tokens
        if key not in self._made:
            self._made[key] = call_of(self.simulation, self.loop, step, taken.model, taken.output_tokens)
        return self._made[key]

    def _marked(self, lines: list[Line]) -> _Stop | None:
        """The first mark in force that stops the call."""
        for line in lines:
            for threshold, mark in zip(line.budget.ladder, line.rule.marks, strict=False):
                reached = self.balances[line.rule.key].spent >= mark.at
                if reached and line.rule.enforce and mark.action in STOPPING:
                    patience_s = line.budget.wait_s if mark.action == "block" else 0.0
                    return _Stop(
                        f"{line.rule.budget}: {mark.action} at {threshold.at}", line.rule, 1, mark.at, patience_s
                    )
        return None

    def _short(self, lines: list[Line]) -> _Stop | None:
        """The first account without room; the least patient of those without decides how long the call waits."""
        short = [
            line for line in lines
            if line.rule.enforce and not self.balances[line.rule.key].has_room(line.held, line.rule.limit)
        ]  # fmt: skip
        if not short:
            return None
        first = short[0]
        what = "rate" if first.rule.kind == "refill" else "limit"
        patience_s = min(line.budget.wait_s for line in short)
        return _Stop(f"{first.rule.budget}: {what}", first.rule, first.held, first.rule.limit, patience_s)

    # -- detectors -------------------------------------------------------------------------------------------------

    def _found(self, step: Step, taken: _Taken) -> _Stop | None:
        """What a detector stops; waits where one wants a pause."""
        call = self._call(step, taken)
        tags = call.tags()
        if any(tags.get(tag, NONE) == NONE for tag in self.require):
            return _Stop("required tags")
        one = self.detectors
        if one is None:
            return None
        if one.uncapped in STOPPING and not any(limits(m.rule) for m in self.guard.matched(call, self.now_us)):
            return _Stop("detector: uncapped")
        if tags["run"] == process_run():
            return None
        name = self._repeated(one, step) if self.loop.kind == "repeating" else None
        if not step.tool:
            name = name or self._limited(one) or self._retried(one)
        return None if name is None else _Stop(f"detector: {name}")

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
        for key, moves in self.moves.items():
            self.balances[key].skip(count, moves, next_us, interval_us)
        calls, tool_calls, nanos = counts
        self.calls += count * (self.calls - calls)
        self.tool_calls += count * (self.tool_calls - tool_calls)
        self.nanos += count * (self.nanos - nanos)
        self.now_us = next_us + count * interval_us
        return True


class _Taken:
    """What thresholds have made of one call: its model, its maximum output, its rates; and up to which mark of each account."""

    def __init__(self, model: str, output_tokens: int) -> None:
        self.model = model
        self.output_tokens = output_tokens
        self.throttles: list[Matched] = []
        self.complied: dict[str, int] = {}

    def comply(self, lines: list[Line], balances: Mapping[str, _Balance], is_tool: bool) -> bool:
        """Do what the reached marks of the accounts ask for; whether anything was left to do."""
        due = [
            (line, count) for line in lines
            if line.rule.enforce and (count := balances[line.rule.key].marks()) > self.complied.get(line.rule.key, 0)
        ]  # fmt: skip
        for line, count in due:
            for threshold in line.budget.ladder[self.complied.get(line.rule.key, 0) : count]:
                if threshold.action == "downgrade" and not is_tool:
                    models = (threshold.models or {}).items()
                    self.model = next((to for name, to in models if fnmatchcase(self.model, name)), self.model)
                elif threshold.action == "clamp" and not is_tool:
                    self.output_tokens = min(self.output_tokens, threshold.max_output_tokens or self.output_tokens)
                elif threshold.action == "throttle" and threshold.rate is not None:
                    beside = throttle_rule(line.rule, threshold.rate)
                    waiting = Budget(line.rule.budget, threshold.rate, on_exceed=f"wait {THROTTLE_WAIT_S}s")
                    units = ("USD", "calls") if is_tool else ("USD", "tokens", "requests")
                    if beside.unit in units and all(one.rule.key != beside.key for one in self.throttles):
                        self.throttles.append(Matched(waiting, beside))
            self.complied[line.rule.key] = count
        return bool(due)
