"""Finds rounds: whether the last steps of a run repeat the steps before them, with a period of 1 to 20."""

from __future__ import annotations

from collections import deque

LONGEST = 20


class Cycles:
    """For each period p: how many steps in a row equal the step p before. Constant memory, one pass per step.

    A round of one step counts when it was repeated `repetitions` times. Longer ones are stronger evidence, as more steps
    have to agree, so they count after one repetition fewer (OpenHands' stuck detector draws the same line: four equal
    steps, or three rounds of two).
    """

    __slots__ = ("_equal", "_steps", "repetitions")

    def __init__(self, repetitions: int) -> None:
        self.repetitions = repetitions
        self._steps: deque[int] = deque(maxlen=LONGEST)  # newest first
        self._equal: dict[int, int] = {}

    def add(self, symbol: int) -> tuple[int, int] | None:
        """Take the next step; give (repetitions, period) of the shortest round that was repeated often enough."""
        equal = self._equal
        self._equal = {
            period: equal.get(period, 0) + 1 for period, step in enumerate(self._steps, 1) if step == symbol
        }
        self._steps.appendleft(symbol)
        for period, count in self._equal.items():
            if count >= self._needed(period):
                return -(-count // period), period
        return None

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
