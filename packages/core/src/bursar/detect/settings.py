"""The settings of the detectors, and what a detector that fires hands back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

from bursar.errors import InvalidInput
from bursar.texts import printable

Action = Literal["off", "notify", "downgrade", "clamp", "throttle", "ask", "block", "kill"]
Detector = Literal[
    "uncapped", "loop", "stale", "context", "steps", "time", "backoff", "attempts", "storm", "velocity", "burn"
]
# The cause of runaway spend that a detector stands for; "velocity" sees the spending itself, whatever causes it.
CAUSES: dict[Detector, str] = {
    "uncapped": "no cap",
    "loop": "ambiguous termination",
    "stale": "ambiguous termination",
    "context": "ambiguous termination",
    "steps": "ambiguous termination",
    "time": "ambiguous termination",
    "backoff": "retries",
    "attempts": "retries",
    "storm": "retries",
    "velocity": "velocity",
    "burn": "velocity",
}
_ACTIONS = get_args(Action)


class Finding(NamedTuple):
    """A detector has fired.

    `detector` is one of CAUSES, `cause` what it stands for, `action` what the settings want done. `why` is a sentence for
    people, with the evidence. `repetitions` counts what was repeated (rounds of a loop, stale steps, failed attempts; 0
    where nothing was) and `period` the steps of one round. `wait_us`: how long the next attempt has to wait at least.
    """

    detector: Detector
    cause: str
    action: Action
    why: str
    repetitions: int = 0
    period: int = 0
    wait_us: int = 0


@dataclass(frozen=True, slots=True)
class Detectors:
    """What each detector does when it fires ("off" to "kill", as on a budget's ladder), and from where on it fires.

    `uncapped`: no budget limits the call. `loops`: a round of 1 to 20 steps is asked for again after as many repetitions as
    `repetitions` allows. `stale`: so many steps in a row (`stale_steps`) brought nothing that the run did not have.
    `context`: half as many did, while the input grew by `context_growth_percent`. `limits`: `max_steps` and `max_minutes`
    of one run, where set. `retries`: the same call failed `max_attempts` times in a row; before that, each next attempt
    waits `backoff_ms`, doubled each time up to `max_backoff_ms`. `storms`: within a minute, `storm_failures` calls failed,
    and they are half of all or more. `velocity`: a minute cost `velocity_factor` times the learned baseline, and at least
    `velocity_floor_nanos`. `burn`: a budget is used up too fast, by two windows. Raises InvalidInput for a value that
    cannot be meant.
    """

    uncapped: Action = "notify"
    loops: Action = "block"
    repetitions: int = 3
    stale: Action = "ask"
    stale_steps: int = 16
    context: Action = "notify"
    context_growth_percent: int = 50
    limits: Action = "ask"
    max_steps: int | None = None
    max_minutes: int | None = None
    retries: Action = "block"
    max_attempts: int = 5
    backoff_ms: int = 1_000
    max_backoff_ms: int = 60_000
    storms: Action = "throttle"
    storm_failures: int = 20
    velocity: Action = "notify"
    velocity_factor: int = 10
    velocity_floor_nanos: int = 1_000_000_000
    burn: Action = "notify"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "Action":
                if value not in _ACTIONS:
                    raise _unusable(field.name, value, f"one of {', '.join(_ACTIONS)}")
            elif value is None and "None" in str(field.type):
                continue
            elif type(value) is not int or value < (2 if field.name in _AT_LEAST_2 else 1):
                raise _unusable(field.name, value, f"a whole number from {2 if field.name in _AT_LEAST_2 else 1}")


# One repetition is how any work looks; a factor of one is the baseline itself.
_AT_LEAST_2 = frozenset(("repetitions", "stale_steps", "velocity_factor"))


def _unusable(name: str, value: object, use: str) -> InvalidInput:
    return InvalidInput(f"The detector setting {name} = {value!r} cannot be used. Set it to {use}.", argument=name)


def found(
    detector: Detector, action: Action, why: str, *, repetitions: int = 0, period: int = 0, wait_us: int = 0
) -> Finding | None:
    """A finding, or None where its detector is off."""
    return (
        None
        if action == "off"
        else Finding(detector, CAUSES[detector], action, printable(why), repetitions, period, wait_us)
    )
