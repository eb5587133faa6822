"""The watch over one run: fed with its model calls, answers, failures and tool calls, it says when they run away."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from bursar.detect.retries import Retries
from bursar.detect.settings import Detectors, Finding, found
from bursar.detect.steps import MOST_ITEMS, asked_for, conversation, last_step, text_of
from bursar.detect.track import Likeness, Track

MOST_TRACKS = 8  # conversations at a time: sub-agents, branches
MOST_OPEN = 64
_DEFAULTS = Detectors()
_SEVERITY = ("notify", "downgrade", "clamp", "throttle", "ask", "block", "kill")


class RunWatch:
    """Watches one run. Safe for threads. Some 30 kB, however long the run; half a MB at most, with 64 conversations at once.

    The guard tells of each model call before it is sent (`model_called`) and of its end (`model_answered` or
    `model_failed`), all by the id of its reservation. That is enough: a request holds what the model asked for before,
    and what the tools gave. `tool_called` sees a tool call before it is made; a tool that is not guarded needs none.

    A finding is a value, nothing is stopped here. It comes again at each further step of a runaway. After one that
    stopped the call ("ask", "block", "kill"), the same request gets the same finding, until another one comes or
    `forgive` is called, as for an approval.
    """

    def __init__(self, settings: Detectors | None = None) -> None:
        self._settings = settings or _DEFAULTS
        self._lock = threading.Lock()
        self._likeness = Likeness()
        self._retries = Retries(self._settings)
        self._tracks: list[Track] = []  # newest last
        self._open: OrderedDict[str, tuple[int, Track]] = OrderedDict()  # calls under way, by id
        self._stopped: tuple[int, Finding] | None = None
        self._begun_us = 0
        self._steps = 0

    def model_called(
        self, call_id: str, request: Any, now_us: int, *, model: str = "", input_tokens: int = 0
    ) -> Finding | None:
        """A model call is about to be sent. `request`: the wire body, the messages, or a text; None where unknown."""
        with self._lock:
            items = conversation(request)
            step, end = last_step(items)
            content = hash((len(items), end)) if items else hash(call_id)
            key = hash((model, content))
            if self._stopped is not None and self._stopped[0] == key:
                return self._stopped[1]
            findings = [self._retries.check(key, now_us), *self._limits(now_us)]
            track = self._track(step.before if step else None, end)
            a_sample = content == track.content and track.open
            a_further_attempt = content == track.content and track.failed
            if not a_sample and not a_further_attempt:
                calls = (step.calls if step else ()) or tuple(track.asked)
                if step or calls:
                    findings += track.took(calls, step.results if step else (), input_tokens)
                track.asked = []
            track.content = content
            finding = _worst(findings)
            if finding is not None and finding.action in ("ask", "block", "kill"):
                self._stopped = key, finding
                return finding
            if finding is not None and finding.wait_us:
                return finding
            self._stopped = None
            self._steps += 1
            self._close(call_id)
            track.open += 1
            self._open[call_id] = key, track
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1][1].open -= 1
            return finding

    def model_answered(self, call_id: str, answer: Any = None) -> Finding | None:
        """The call has ended well. With the whole answer, a loop is seen before its tools are called once more."""
        with self._lock:
            key, track = self._close(call_id)
            if track is None:
                return None
            self._retries.succeeded(key)
            track.failed = False
            calls = asked_for(answer) if answer is not None else ()
            track.asked = list(calls)
            return track.asks(calls) if calls else None

    def model_failed(self, call_id: str, now_us: int, retry_after_us: int = 0) -> int:
        """The call has failed; the provider asked to wait `retry_after_us`. Gives how long the next attempt has to wait."""
        with self._lock:
            key, track = self._close(call_id)
            if track is None:
                return 0
            track.failed = True
            return self._retries.failed(key, now_us, retry_after_us)

    def tool_called(self, name: str, arguments: Any) -> Finding | None:
        """A tool is about to be called. Where no model call is told of, each tool call is a step of its own."""
        with self._lock:
            call = name, text_of(arguments)
            alone = not self._steps
            if not alone:
                for track in reversed(self._tracks):
                    if track.has_asked_for(call):
                        return track.asks(tuple(track.asked))
            track = self._tracks[-1] if self._tracks else self._track(None, 0)
            findings: list[Finding | None] = []
            if alone and track.asked:
                findings = track.took(tuple(track.asked), (), 0)
                track.asked = []
            if len(track.asked) < MOST_ITEMS:
                track.asked.append(call)
            return _worst([*findings, track.asks(tuple(track.asked))])

    def forgive(self) -> None:
        """Begin anew, as after an approval: what was seen so far counts no more; the limits of the run stay."""
        with self._lock:
            self._tracks.clear()
            self._open.clear()
            self._retries = Retries(self._settings)
            self._stopped = None

    def _track(self, before: int | None, end: int) -> Track:
        """The conversation that goes on: the one that ended with `before`, else the newest. A first request begins one.

        A request that was first before begins the same one again, unless that is under way: many agents at once may
        have the same task, but a task that is given again and again is a loop.
        """
        idle = [one for one in reversed(self._tracks) if not one.open]
        if before is None:
            track = next((one for one in idle if one.start == end), None)
        else:
            track = next((one for one in [*idle, *reversed(self._tracks)] if one.end == before), None)
            # The end of the earlier request is gone where a framework changes the last message: the newest goes on.
            track = track or next(iter(idle), None)
        if track is None:
            track = Track(self._settings, self._likeness, end)
        else:
            self._tracks.remove(track)
        track.end = end
        self._tracks.append(track)
        if len(self._tracks) > MOST_TRACKS:
            del self._tracks[0]
        return track

    def _close(self, call_id: str) -> tuple[int, Track | None]:
        key, track = self._open.pop(call_id, (0, None))
        if track is not None:
            track.open -= 1
        return key, track

    def _limits(self, now_us: int) -> list[Finding | None]:
        settings = self._settings
        self._begun_us = self._begun_us or now_us
        findings = []
        if settings.max_steps is not None and self._steps >= settings.max_steps:
            why = f"The run made {self._steps} model calls; its limit is {settings.max_steps}. Raise max_steps, or end it."
            findings.append(found("steps", settings.limits, why, repetitions=self._steps))
        minutes = (now_us - self._begun_us) // 60_000_000
        if settings.max_minutes is not None and minutes >= settings.max_minutes:
            why = f"The run has gone on for {minutes} minutes; its limit is {settings.max_minutes}. Raise max_minutes, or end it."
            findings.append(found("time", settings.limits, why))
        return findings


def _worst(findings: list[Finding | None]) -> Finding | None:
    """The finding with the strictest action; the first of equals."""
    if not any(findings):
        return None
    return max(filter(None, findings), key=lambda finding: _SEVERITY.index(finding.action), default=None)
