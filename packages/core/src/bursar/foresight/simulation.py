"""Simulated time: the real guard, law and memory store, where waiting is an entry in a heap and the clock jumps."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Mapping
from itertools import count
from typing import Any, TypeVar

from bursar.call import Call, Pause, Publish, Reload, Step
from bursar.errors import BursarError
from bursar.facade import Bursar
from bursar.stores.memory import MemoryStore
from bursar.testing.clock import ManualClock

T = TypeVar("T")
Ended = Callable[[BursarError | None], None]
KEPT_ENTRIES = 1_000  # of the simulated books; who simulates counts for himself
TTL_S = 86_400.0  # nothing expires by itself: nobody sweeps


class Simulation:
    """One Bursar with these options (arguments of `Bursar`), from `start_us` on. Nothing sleeps, and no thread is started."""

    def __init__(self, options: Mapping[str, Any], start_us: int) -> None:
        self.clock = ManualClock(start_us)
        names = count()
        store = MemoryStore(self.clock, max_entries=KEPT_ENTRIES)
        self.bursar = Bursar(store, **options, ids=lambda: f"{next(names):012x}")
        self.guard = self.bursar.guard
        self.now_us = store.now_us
        self._events: list[tuple[int, int, int, Callable[[], None]]] = []
        self._order = count()

    def model_call(self, provider: str, model: str, **said: Any) -> Call:
        """A model call as `Bursar.reserve` would make it; nothing is asked for yet."""
        return self.bursar._make.model(provider, model, resize=False, ttl_s=TTL_S, **said)

    def tool_call(self, name: str, cost_nanos: int, **said: Any) -> Call:
        """The same for a tool call at this price."""
        call = self.bursar._make.tool(name, ttl_s=TTL_S, **said)
        call.amounts = {"USD": cost_nanos}
        return call

    def at(self, at_us: int, event: Callable[[], None], rank: int = 0) -> None:
        """Have something done at a time, which is now at the earliest. At one time: by rank, then in the order of asking."""
        heapq.heappush(self._events, (max(at_us, self.now_us()), rank, next(self._order), event))

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._events:
            at_us, _, _, event = heapq.heappop(self._events)
            self.clock.set(at_us)
            event()

    def start(self, steps: Generator[Step, Any, Any], ended: Ended, rank: int = 0) -> None:
        """Carry out steps beside others; `ended` is told of their end, or of the error that they ended in."""
        self._go(steps, None, ended, rank)

    def carry_out(self, steps: Generator[Step, Any, T]) -> T:
        """Carry out steps with nobody beside them: time passes while they wait."""
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Pause):
                    self.clock.advance(us=_us(step))
                answer = self._do(step)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _do(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return self.now_us()
        if isinstance(step, Reload):
            return self.bursar._load_policy()
        if isinstance(step, Publish):
            return self.bursar.store.publish(step.definitions, step.kind)
        return self.bursar.store.execute(step)

    def _go(self, steps: Generator[Step, Any, Any], answer: Any, ended: Ended, rank: int) -> None:
        try:
            while True:
                step = steps.send(answer)
                if isinstance(step, Pause) and step.seconds:
                    return self._pause(steps, step, ended, rank)
                answer = self._do(step)
        except StopIteration:
            ended(None)
        except BursarError as error:
            ended(error)

    def _pause(self, steps: Generator[Step, Any, Any], step: Pause, ended: Ended, rank: int) -> None:
        """Go on when woken or when the time is over, whichever comes first."""
        gone = False

        def go_on() -> None:
            nonlocal gone
            if not gone:
                gone = True
                step.ticket.disarm()
                self._go(steps, self.now_us(), ended, rank)

        woken = not step.ticket.arm(lambda: self.at(self.now_us(), go_on, rank))
        self.at(self.now_us() + (0 if woken else _us(step)), go_on, rank)


def _us(step: Pause) -> int:
    return round(step.seconds * 1e6)
