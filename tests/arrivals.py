"""Callers who arrive as in a recorded trace, through the real guard and store in simulated time; and what they must match.

`Simulation` is a discrete-event loop: every call is the guard's own generator of steps, a pause is an entry in a heap, and the
clock jumps from event to event. `ideal`, `ideal_slots`, `excess` and `used_while_wanted` are written from the definition of a
token bucket and know nothing of `bursar`.
"""

from __future__ import annotations

import csv
import gzip
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.call import Call, Pause, Reload, Steps
from bursar.testing import ManualClock
from bursar.testing.clock import START_US

FOLDER = Path(__file__).parent / "data/arrivals"
TRACES = ("azure_code", "azure_conv", "mooncake_conv")
OUTPUT_TOKENS_PER_S = 50  # how fast the simulated provider answers
TTL_S = 7_200.0  # nothing expires within a trace


class Arrival(NamedTuple):
    """One request of a trace; `at_us` from its begin."""

    at_us: int
    input_tokens: int
    output_tokens: int

    @property
    def busy_us(self) -> int:
        """How long it is in flight once sent."""
        return 200_000 + self.input_tokens + self.output_tokens * 1_000_000 // OUTPUT_TOKENS_PER_S


class Outcome(NamedTuple):
    """What became of one call: when it was sent (None: refused), when that was decided, and what it held from then on."""

    sent_us: int | None
    decided_us: int
    held: int
    error: BudgetExceeded | None = None


class Run(NamedTuple):
    """All outcomes in the order of arrival, what was given back (when and how much), and what it took."""

    outcomes: list[Outcome]
    returns: list[tuple[int, int]]
    overtakings: int
    most_waiting: int
    steps: int


def trace(name: str, folder: Path = FOLDER) -> list[Arrival]:
    """The arrivals of a trace in order."""
    with gzip.open(folder / f"{name}.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    return [
        Arrival(round(float(row["t_seconds"]) * 1e6), int(row["input_tokens"]), int(row["output_tokens"]))
        for row in rows
    ]


class Simulation:
    """Calls on one budget of one guard, in simulated time."""

    def __init__(self, budget: Budget, arrivals: Sequence[Arrival], *, max_output_tokens: int | None = None) -> None:
        self.clock = ManualClock()
        names = count()
        self.bursar = Bursar("memory:", [budget], clock=self.clock, ids=lambda: f"{next(names):08x}")
        self.arrivals = arrivals
        self.max_output_tokens = max_output_tokens
        self.outcomes: list[Outcome | None] = [None] * len(arrivals)
        self.returns: list[tuple[int, int]] = []
        self.overtakings = self.most_waiting = self.steps = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._ready: deque[Callable[[], None]] = deque()
        self._waiting: dict[int, None] = {}

    def run(self) -> Run:
        """Until the last call has ended."""
        for number, arrival in enumerate(self.arrivals):
            self._at(START_US + arrival.at_us, partial(self._arrive, number))
        while self._events:
            at_us, _, event = heapq.heappop(self._events)
            self.clock.set(at_us)
            event()
            while self._ready:
                self._ready.popleft()()
        assert not self.bursar.guard.room, "nobody is left waiting"
        assert self.bursar.store.open_reservations() == 0, "everything ended"
        self.bursar.close()
        outcomes = [outcome for outcome in self.outcomes if outcome is not None]
        assert len(outcomes) == len(self.arrivals), "everybody has an answer"
        return Run(outcomes, self.returns, self.overtakings, self.most_waiting, self.steps)

    def _at(self, at_us: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_us, next(self._order), event))

    def _usage(self, arrival: Arrival, output_tokens: int | None = None) -> Usage:
        output = arrival.output_tokens if output_tokens is None else output_tokens
        return Usage(input_tokens=arrival.input_tokens, output_tokens=output)

    def _arrive(self, number: int) -> None:
        usage = self._usage(self.arrivals[number], self.max_output_tokens)
        call = self.bursar._make.model("openai", "gpt-4o", usage=usage, resize=False, ttl_s=TTL_S)
        self._waiting[number] = None
        self._go(number, call, self.bursar.guard.reserve(call, self.clock.now_us()), None)
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def _go(self, number: int, call: Call, steps: Steps, answer: Any) -> None:
        """Carry out the steps of a call until it pauses or is decided."""
        now_us = self.clock.now_us()
        try:
            while True:
                step = steps.send(answer)
                self.steps += 1
                if isinstance(step, Pause):
                    if step.seconds:
                        return self._pause(number, call, steps, step)
                    answer = now_us
                else:
                    assert not isinstance(step, Reload)
                    answer = self.bursar.store.execute(step)
        except StopIteration:
            self._decided(number, Outcome(now_us - START_US, now_us - START_US, _held(self.bursar, call)))
            self._at(now_us + self.arrivals[number].busy_us, partial(self._end, number, call))
        except BudgetExceeded as refused:
            self._decided(number, Outcome(None, now_us - START_US, 0, refused))

    def _pause(self, number: int, call: Call, steps: Steps, step: Pause) -> None:
        """Go on when woken or when the time is over, whichever comes first."""
        going = False

        def go_on() -> None:
            nonlocal going
            if not going:
                going = True
                self._ready.append(wake)

        def wake() -> None:
            step.ticket.disarm()
            self._go(number, call, steps, self.clock.now_us())

        if step.ticket.arm(go_on):
            self._at(self.clock.now_us() + round(step.seconds * 1e6), go_on)
        else:
            go_on()

    def _decided(self, number: int, outcome: Outcome) -> None:
        del self._waiting[number]
        if outcome.sent_us is not None and next(iter(self._waiting), number) < number:
            self.overtakings += 1
        self.outcomes[number] = outcome

    def _end(self, number: int, call: Call) -> None:
        held = _held(self.bursar, call)
        entry = _finish(
            self.bursar, self.bursar.guard.settle(call, self._usage(self.arrivals[number]), self.clock.now_us())
        )
        self.steps += 1
        self.returns.append((self.clock.now_us() - START_US, held - sum(entry.amounts.values())))


def _held(bursar: Bursar, call: Call) -> int:
    row = bursar.store._rows[call.id]  # type: ignore[attr-defined]
    return sum(amount for _, _, amount in row.held)


def _finish(bursar: Bursar, steps: Steps) -> Any:
    answer = None
    while True:
        try:
            answer = bursar.store.execute(steps.send(answer))
        except StopIteration as stop:
            return stop.value


def ideal(at_us: Sequence[int], amounts: Sequence[int], limit: int, period_us: int, wait_us: int) -> list[int | None]:
    """When each is sent by a bucket of `limit` that gains `limit` in `period_us`, first come first served; None when it gives up.

    The first of the queue leaves at once when its time would come after its patience; the others when theirs is over.
    """
    full = limit * period_us  # the level is counted in amount x us
    level, level_at, free_us = full, 0, 0
    sent: list[int | None] = []
    for begun, amount in zip(at_us, amounts, strict=True):
        deadline, first = begun + wait_us, max(begun, free_us)
        if amount > limit or first > deadline:
            sent.append(None)
            continue
        level = min(full, level + (first - level_at) * limit)
        level_at = first
        ready = first + max(0, -(-(amount * period_us - level) // limit))
        free_us = first
        if ready > deadline:
            sent.append(None)
            continue
        level += (ready - level_at) * limit - amount * period_us
        level_at = free_us = ready
        sent.append(ready)
    return sent


def ideal_slots(at_us: Sequence[int], busy_us: Sequence[int], slots: int, wait_us: int) -> list[int | None]:
    """When each is sent by `slots` servers, first come first served; None when its patience is over before."""
    ends = [0] * slots
    free_us = 0
    sent: list[int | None] = []
    for begun, busy in zip(at_us, busy_us, strict=True):
        ready = max(begun, free_us, ends[0])
        if ready > begun + wait_us:
            sent.append(None)
            continue
        free_us = ready
        heapq.heapreplace(ends, ready + busy)
        sent.append(ready)
    return sent


def excess(moves: Sequence[tuple[int, int]], limit: int, period_us: int) -> float:
    """The most by which the sum of moves (us, amount) in any interval t was above limit + limit x t / period; 0 when never."""
    worst = running = 0
    before_us = 0
    for at_us, amount in sorted(moves):
        running = max(0, running - (at_us - before_us) * limit) + amount * period_us
        before_us = at_us
        worst = max(worst, running)
    return max(0, worst - limit * period_us) / period_us


def used_while_wanted(
    arrivals: Sequence[Arrival],
    outcomes: Sequence[Outcome],
    moves: Sequence[tuple[int, int]],
    limit: int,
    period_us: int,
) -> tuple[int, float]:
    """What was taken while somebody waited, and what a bucket had to give in that time: its level at the begin and the gain."""
    # At one instant: what was taken, then who stops waiting, then who begins to.
    events: list[tuple[int, int, int]] = [(at_us, 0, amount) for at_us, amount in moves]
    for arrival, outcome in zip(arrivals, outcomes, strict=True):
        if outcome.decided_us > arrival.at_us:
            events += [(outcome.decided_us, 1, -1), (arrival.at_us, 2, 1)]
    full = limit * period_us
    level, level_at, waiting, taken, given = full, 0, 0, 0, 0
    for at_us, kind, amount in sorted(events):
        gained = (at_us - level_at) * limit
        given += gained if waiting else 0
        level, level_at = min(full, level + gained), at_us
        if kind == 0:
            level -= amount * period_us
            taken += amount if waiting else 0
        else:
            given += level if kind == 2 and not waiting else 0
            waiting += amount
    return taken, given / period_us
