"""Exposure: which causes of runaway spend are open for an agent, and how far a loop of it comes before a control stops it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bursar.accounts import STOPPING
from bursar.budget import Limit
from bursar.commands import Entry
from bursar.detect import Detectors
from bursar.errors import InvalidInput, UnknownPrice
from bursar.foresight.loop import End, Kind, Loop, Step, call_of, drive
from bursar.foresight.options import Options
from bursar.foresight.reckoning import reckon
from bursar.foresight.sightings import Subject, subjects
from bursar.foresight.simulation import Simulation
from bursar.policy import Matched, limits
from bursar.windows import window

NO_CAP, RETRIES, TERMINATION, VIEW, ATTRIBUTION = (
    "no cap",
    "retries",
    "ambiguous termination",
    "no live view",
    "shared budget without attribution",
)
MOST_SIMULATED = 50_000  # calls, over all loops; the dearest subjects come first


@dataclass(frozen=True, slots=True)
class Worst:
    """A loop that begins at the worst moment, as it was reckoned and, unless it is too long, simulated."""

    loop: Loop
    begins_us: int
    reckoned: End
    simulated: End | None

    @property
    def is_confirmed(self) -> bool | None:
        """Whether the simulation agrees to the call, the nano-dollar and the microsecond; None where there is none."""
        return None if self.simulated is None else self.simulated[:4] == self.reckoned[:4]


@dataclass(frozen=True, slots=True)
class Exposure:
    """Of one agent or workflow: why each of the causes is open (None: closed), what a turn costs, and its loops."""

    subject: Subject
    causes: dict[str, str | None]
    turn_nanos: int
    interval_us: int
    loops: tuple[Worst, ...]


def exposures(
    options: Options,
    entries: Iterable[Entry],
    now_us: int,
    *,
    speed: Limit | None = None,
    call: Step | None = None,
    wanted: Mapping[str, str] | None = None,
) -> list[Exposure]:
    """The exposure of everybody seen in the records or named in the policy.

    `speed`: of a loop, in USD, requests or calls per time, instead of the one observed. `call`: what the model call is of those
    who were not seen. `wanted`: only calls with these tags.
    """
    given = {**options.given, "detectors": _sure(options.given.get("detectors", "report"))}
    left = MOST_SIMULATED
    found = []
    for subject in subjects(entries, given["budgets"], wanted or {}):
        if call is not None and not subject.seen:
            subject = replace(subject, turn=(call,))
        simulation = Simulation(given, now_us)
        matched, turn_nanos = _matched(simulation, subject)
        interval_us = subject.interval_us if speed is None else _interval_us(speed, turn_nanos)
        loops = []
        for kind in _kinds(subject, given["detectors"]):
            turn = subject.turn[:1] if kind == "failing" else subject.turn
            worst = _worst(Loop(kind, subject.tags, turn, interval_us, subject.attempts), given, now_us, left)
            left -= sum(worst.simulated[:2]) if worst.simulated else 0
            loops.append(worst)
        causes = _causes(subject, options, matched)
        found.append(Exposure(subject, causes, turn_nanos, interval_us, tuple(loops)))
    return found


def _sure(detectors: Any) -> Any:
    """The detectors without those that learn what is usual, or merely slow a loop down: the worst case does not count on them."""
    if not isinstance(detectors, Detectors):
        return detectors
    return replace(detectors, velocity="notify", burn="notify", storms="notify")


def _matched(simulation: Simulation, subject: Subject) -> tuple[list[Matched], int]:
    """The accounts of a turn, and what it costs."""
    loop = Loop("varying", subject.tags, subject.turn, 1, subject.attempts)
    found: dict[str, Matched] = {}
    nanos = 0
    now_us = simulation.now_us()
    for step in subject.turn:
        call = call_of(simulation, loop, step, step.model, step.usage.output_tokens)
        found |= {one.rule.key: one for one in simulation.guard.matched(call, now_us)}
        nanos += step.cost_nanos
        if not step.tool:
            with contextlib.suppress(UnknownPrice):  # the loop itself ends there
                nanos += simulation.guard.book.cost(
                    step.provider, step.model, step.usage, at_us=now_us, tags=call.tags()
                ).cost_nanos
    return list(found.values()), nanos


def _interval_us(speed: Limit, turn_nanos: int) -> int:
    """Between two turns at a given speed. Raises InvalidInput."""
    if not speed.period_us or speed.unit not in ("USD", "requests", "calls"):
        raise InvalidInput('A speed is dollars or calls per time. Write it like "2 USD/minute".', argument="speed")
    each = turn_nanos if speed.unit == "USD" else 1
    return max(1, each * speed.period_us // speed.amount)


def _kinds(subject: Subject, detectors: Any) -> list[Kind]:
    """The loops to look at: one that repeats itself is like any other where nobody looks for it."""
    found: list[Kind] = ["varying", "failing"]
    if isinstance(detectors, Detectors) and subject.has_run and {detectors.loops, detectors.stale} & STOPPING:
        found.insert(1, "repeating")
    return found


def _worst(loop: Loop, given: Mapping[str, Any], now_us: int, most_calls: int) -> Worst:
    """The loop from the moment at which it costs most: so long before a window ends that it goes on in the next one."""
    best, begins_us = reckon(loop, given, now_us), now_us
    if best.by is not None:
        took_us = best.elapsed_us
        ends = {window(one.window, one.tz).bounds(now_us + took_us)[1] for one in given["budgets"]}
        for end_us in sorted(end for end in ends if end is not None):
            other = reckon(loop, given, end_us - took_us)
            if other.by is None or (best.by is not None and other[2:4] > best[2:4]):
                best, begins_us = other, end_us - took_us
    simulated = None
    if best.by is not None and best.calls + best.tool_calls <= most_calls:
        simulated = drive(loop, given, begins_us, best.calls + best.tool_calls + len(loop.turn))
    return Worst(loop, begins_us, best, simulated)


# -- causes --------------------------------------------------------------------------------------------------------------


def _causes(subject: Subject, options: Options, matched: list[Matched]) -> dict[str, str | None]:
    detectors = options.given.get("detectors", "report")
    acting = detectors if isinstance(detectors, Detectors) and subject.has_run else None
    return {
        NO_CAP: _uncapped(subject, detectors, matched),
        RETRIES: _retries(subject, acting, matched),
        TERMINATION: _termination(subject, acting, matched),
        VIEW: None if options.is_told else "no alert reaches anybody but the log: add an [[alert]]",
        ATTRIBUTION: _attribution(subject, options, matched),
    }


def _uncapped(subject: Subject, detectors: Any, matched: list[Matched]) -> str | None:
    limiting = [one for one in matched if limits(one.rule)]
    if not limiting:
        refused = isinstance(detectors, Detectors) and detectors.uncapped in STOPPING
        return None if refused else "no budget limits what it spends"
    if all("run" in json.loads(one.rule.scope) for one in limiting):
        return f"each run is limited, the {subject.tag} is not: a new run begins from zero"
    return None


def _retries(subject: Subject, acting: Detectors | None, matched: list[Matched]) -> str | None:
    if any(one.rule.unit == "failures" and one.rule.enforce for one in matched):
        return None
    if acting is not None and acting.retries in STOPPING:
        return None
    own = f"its client makes up to {subject.attempts} attempts, and " if subject.attempts > 1 else ""
    return f"{own}nothing bounds how often a failing call is tried again: let the detector `retries` act"


def _termination(subject: Subject, acting: Detectors | None, matched: list[Matched]) -> str | None:
    if any(limits(one.rule) and one.rule.unit in ("requests", "calls") for one in matched):
        return None
    if acting is not None:
        bounded = acting.max_steps is not None or acting.max_minutes is not None
        if acting.loops in STOPPING or (bounded and acting.limits in STOPPING):
            return None
    if not subject.has_run:
        return "its calls belong to no run, so nobody can tell a loop from many users: open a scope with a run"
    return "neither steps nor time are limited, and no detector stops a loop"


def _attribution(subject: Subject, options: Options, matched: list[Matched]) -> str | None:
    shared = [
        one.budget.name
        for one in matched
        if limits(one.rule) and subject.tag not in one.budget.per and subject.tag not in (one.budget.match or {})
    ]
    shared = [name for name in dict.fromkeys(shared) if "run" not in _per(name, matched)]
    if not shared or subject.tag in options.given.get("require", ()):
        return None
    return f"{', '.join(shared)} is shared, and calls without `{subject.tag}` are let through: require it"


def _per(name: str, matched: list[Matched]) -> tuple[str, ...]:
    return next((tuple(one.budget.per) for one in matched if one.budget.name == name), ())
