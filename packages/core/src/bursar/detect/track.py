"""One conversation of a run: its steps seen strictly, loosely and by their calls alone, and when it last got on."""

from __future__ import annotations

import re
from typing import NamedTuple

from bursar.detect.cycles import LONGEST, Cycles
from bursar.detect.likeness import ENDS, Kinds
from bursar.detect.settings import Detectors, Finding, found
from bursar.detect.steps import Calls

LOOSE, EXACT = 3, 10  # how many times the repetitions, where the results were nearly the same, or were others
MOST_STATES = 64
_ARGUMENTS_PERCENT, _RESULTS_PERCENT = 65, 85
_WORDS = re.compile(r"\w+")
_NO_NEWS = frozenset(
    (
        *("ok", "okay", "done", "success", "successful", "successfully", "succeeded", "true", "status", "result"),
        *("message", "null", "none", "accepted", "completed", "created", "updated", "deleted", "removed", "saved"),
        *("sent", "added", "written", "closed"),
    )
)


class Likeness:
    """What the conversations of a run share: the kinds of arguments, also by what they gave, and the kinds of results.

    Among calls that gave the same, likeness is plain; "London" and "Londos" are as alike as a call and its edited copy.
    """

    __slots__ = ("arguments", "arguments_by_result", "results")

    def __init__(self) -> None:
        self.arguments = Kinds(_ARGUMENTS_PERCENT, LONGEST, with_numbers=True)
        self.arguments_by_result = Kinds(_ARGUMENTS_PERCENT, 2 * LONGEST, with_numbers=True)
        self.results = Kinds(_RESULTS_PERCENT, LONGEST, with_numbers=False)


class _Symbols(NamedTuple):
    """One step as three numbers; two steps are the same in a view when its numbers are equal."""

    strict: int
    loose: int
    exact: int


class Track:
    """The steps of one conversation, in constant memory.

    Two steps are compared in three views. *Strict*: the same calls, but for small edits, and the very same results; where
    the results are unknown, or a mere "ok", the calls must be equal to the letter. *Loose*: the results may be nearly the
    same, or unknown; three times the repetitions. *Exact*: equal calls, whatever they gave; ten times.
    """

    __slots__ = ("_calls", "_labels", "_likeness", "_settings", "_stale", "_stale_input", "_states", "_unknown",
                 "_views", "asked", "content", "end", "failed", "open", "start")  # fmt: skip

    def __init__(self, settings: Detectors, likeness: Likeness, start: int) -> None:
        self.start = self.end = start  # hashes of what its first and its last request ended with
        self.asked: list[tuple[str, str]] = []
        self.open = 0  # calls under way
        self.content = 0  # a hash of its last request
        self.failed = False  # the last call that ended did
        self._settings = settings
        self._likeness = likeness
        self._views = tuple(Cycles(settings.repetitions * times) for times in (1, LOOSE, EXACT))
        self._calls: list[int] = []  # of the last steps, as the labels are
        self._labels: list[str] = []
        self._states: dict[int, None] = {}  # newest last
        self._stale = 0
        self._stale_input = 0
        self._unknown = 0

    def took(self, calls: Calls, results: tuple[str, ...], input_tokens: int) -> list[Finding | None]:
        """A step is over: what it shows. `input_tokens`: of the request that comes after it, 0 where unknown."""
        symbols = self._symbols(calls, results)
        rounds = [view.add(symbol) for view, symbol in zip(self._views, symbols, strict=True)]
        self._calls.append(self._of_calls(calls))
        self._labels.append(", ".join(dict.fromkeys(name[:100] or "a text" for name, _ in calls[:4])) or "unknown")
        if len(self._calls) > LONGEST:
            del self._calls[0], self._labels[0]
        findings = [self._loop(*each, view) for view, each in enumerate(rounds) if each is not None]
        return [*findings[:1], *self._progress(symbols.loose, input_tokens)]

    def asks(self, calls: Calls) -> Finding | None:
        """The model asks for these calls: whether this begins, or goes on with, one repetition too many."""
        each = self._views[0].next_would_repeat(self._of_calls(calls), self._calls)
        return None if each is None else self._loop(*each, 0)

    def has_asked_for(self, call: tuple[str, str]) -> bool:
        """Whether the last answer asked for this call, in whatever form its arguments came."""
        if call in self.asked:
            return True
        kind = self._likeness.arguments.of(*call)
        return any(kind == self._likeness.arguments.of(*one) for one in self.asked if one[0] == call[0])

    def _of_calls(self, calls: Calls) -> int:
        return hash(tuple(sorted(self._likeness.arguments.of(*call) for call in calls)))

    def _symbols(self, calls: Calls, results: tuple[str, ...]) -> _Symbols:
        known = bool(calls)
        if not known:  # the provider keeps the conversation, and nobody told of the answer
            calls = (("", ""),) * len(results)
        if len(results) != len(calls):
            results = ("\n".join(results),) * len(calls) if results else ()
        strict, loose, exact = [], [], []
        for at, (name, arguments) in enumerate(calls):
            like = self._likeness
            kind = like.arguments.of(name, arguments)
            letters = hash((name, arguments))
            exact.append(letters)
            if not results:
                strict.append((letters, 0))
                loose.append((kind, 0))
                continue
            result = results[at]
            same = hash(result)
            alike = letters if _says_nothing(result) else like.arguments_by_result.of((name, same), arguments)
            strict.append((alike, same))
            loose.append((kind, like.results.of(name, result) if len(result) <= 2 * ENDS else same))
        if not known:  # like no other step
            self._unknown += 1
            return _Symbols(-self._unknown, hash(tuple(loose)), -self._unknown)
        return _Symbols(*(hash(tuple(sorted(view))) for view in (strict, loose, exact)))

    def _loop(self, repetitions: int, period: int, view: int) -> Finding | None:
        steps = ", ".join(self._labels[-period:])
        what = f"the step ({steps})" if period == 1 else f"a round of {period} steps ({steps})"
        how = (
            "with the same arguments, but for small edits, and the same results",
            "with arguments and results that hardly differed or are not known",
            "with the very same arguments, whatever it gave",
        )[view]
        why = (
            f"The run repeats itself: {what} came again {repetitions} times, {how}. "
            "Stop the run, or give it what it lacks to get on."
        )
        return found("loop", self._settings.loops, why, repetitions=repetitions, period=period)

    def _progress(self, state: int, input_tokens: int) -> list[Finding | None]:
        settings = self._settings
        if state not in self._states:
            self._states[state] = None
            if len(self._states) > MOST_STATES:
                del self._states[next(iter(self._states))]
            self._stale, self._stale_input = 0, input_tokens
            return []
        self._states[state] = self._states.pop(state)
        self._stale += 1
        findings = []
        if self._stale >= settings.stale_steps:
            why = (
                f"{self._stale} steps in a row brought nothing new: each was a call with a result that the run had already. "
                "Stop the run, or give it what it lacks to get on."
            )
            findings.append(found("stale", settings.stale, why, repetitions=self._stale))
        grown = (input_tokens - self._stale_input) * 100 >= settings.context_growth_percent * self._stale_input
        if 2 * self._stale >= settings.stale_steps and self._stale_input and grown:
            why = (
                f"The input grew from {self._stale_input} to {input_tokens} tokens over {self._stale} steps that brought "
                "nothing new. Shorten the context, or stop the run."
            )
            findings.append(found("context", settings.context, why, repetitions=self._stale))
        return findings


def _says_nothing(result: str) -> bool:
    """Whether a result is a mere acknowledgement: that it is the same again does not say that nothing was done."""
    return len(result) <= 64 and all(word in _NO_NEWS for word in _WORDS.findall(result.lower()))
