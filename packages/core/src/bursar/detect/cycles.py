"""Finds rounds: whether the last steps of a run repeat the steps before them, with a period of 1 to 20."""

from __future__ import annotations

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
        self._steps: list[int] = []  # the last ones; a deque would take four times the memory
        self._equal: dict[int, int] = {}

    def add(self, symbol: int) -> tuple[int, int] | None:
        """Take the next step; give (repetitions, period) of the shortest round that was repeated often enough."""
        steps = self._steps
        found = None
        if self._equal or symbol in steps:  # else as with most steps of most runs
            found = self._repeated(symbol)
        steps.append(symbol)
        if len(steps) > LONGEST:
            del steps[0]
        return found

    def _repeated(self, symbol: int) -> tuple[int, int] | None:
        equal, found = self._equal, None
        self._equal = {}
        for period, step in enumerate(reversed(self._steps), 1):
            count = equal.get(period, 0)
            if step == symbol:
                count += 1
                if found is None and count >= self._needed(period):
                    found = -(-count // period), period
            elif count:
                count -= max(2, period // 2) if period > 1 else count
            if count > 0:
                self._equal[period] = count
        return found

    def next_would_repeat(self, symbol: int, calls: list[int]) -> tuple[int, int] | None:
        """As `add`, for a step whose calls are known and whose results are not: taken to be those of a round ago.

        `calls` holds the symbols of the calls of the last steps.
        """
        for period, count in self._equal.items():
            if count + 1 >= self._needed(period) and len(calls) >= period and calls[-period] == symbol:
                return -(-(count + 1) // period), period
        return None

    def _needed(self, period: int) -> int:
        return max(self.repetitions, (self.repetitions - 1) * period) if period > 1 else self.repetitions
