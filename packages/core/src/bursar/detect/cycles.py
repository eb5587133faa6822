"""Finds rounds: whether the last steps of a run repeat the steps before them, with a period of 1 to 20."""

from __future__ import annotations

from collections import deque

LONGEST = 20


class Cycles:
    """For each period p: how many steps equal the step p before, one after the other. Constant memory, one pass per step.

    A round of one step counts when it was repeated `repetitions` times. Longer ones are stronger evidence, as more steps
    have to agree, so they count after one repetition fewer (OpenHands' stuck detector draws the same line: four equal
    steps, or three rounds of two). In a round of two or more, a step that differs takes back two of those that agreed, or
    half a round of them; so a round that gets on in every third step, or oftener, never counts.
    """

    __slots__ = ("_equal", "_steps", "repetitions")

    def __init__(self, repetitions: int) -> None:
        self.repetitions = repetitions
        self._steps: deque[int] = deque(maxlen=LONGEST)  # newest first
        self._equal: dict[int, int] = {}

    def add(self, symbol: int) -> tuple[int, int] | None:
        """Take the next step; give (repetitions, period) of the shortest round that was repeated often enough."""
        equal = self._equal
        if not equal and symbol not in self._steps:  # most steps of most runs
            self._steps.appendleft(symbol)
            return None
        found = None
        self._equal = {}
        for period, step in enumerate(self._steps, 1):
            count = equal.get(period, 0)
            if step == symbol:
                count += 1
                if found is None and count >= self._needed(period):
                    found = -(-count // period), period
            elif count:
                count -= max(2, period // 2) if period > 1 else count
            if count > 0:
                self._equal[period] = count
        self._steps.appendleft(symbol)
        return found

    def next_would_repeat(self, symbol: int, calls: deque[int]) -> tuple[int, int] | None:
        """As `add`, for a step whose calls are known and whose results are not: taken to be those of a round ago.

        `calls` holds the symbols of the calls of the last steps, newest first.
        """
        for period, count in self._equal.items():
            if count + 1 >= self._needed(period) and len(calls) >= period and calls[period - 1] == symbol:
                return -(-(count + 1) // period), period
        return None

    def _needed(self, period: int) -> int:
        return max(self.repetitions, (self.repetitions - 1) * period) if period > 1 else self.repetitions
