"""Outcomes of a replay: what became of each past call, and what each budget would have changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bursar.foresight.past import Past


@dataclass(slots=True)
class Outcome:
    """What became of one past call. Money in nano-dollars, times in microseconds.

    `sent_us`: None when it was refused, `by` the budget or detector, for the reason `why`. `slowed`: how long it waited, by
    budget. `swapped`: the model, or the smaller answer, that it got, by budget.
    """

    past: Past
    sent_us: int | None = None
    by: str = ""
    why: str = ""
    cost_nanos: int = 0
    slowed: dict[str, int] = field(default_factory=dict)
    swapped: dict[str, str] = field(default_factory=dict)

    @property
    def is_refused(self) -> bool:
        return self.sent_us is None

    @property
    def was_refused(self) -> bool:
        return self.past.kind == "refusal"

    @property
    def recorded_nanos(self) -> int:
        """What it cost when it happened."""
        return 0 if self.was_refused else self.past.cost_nanos

    @property
    def is_other(self) -> bool:
        """Whether it fared otherwise than it did."""
        return bool(self.is_refused != self.was_refused or self.slowed or self.swapped)


@dataclass(slots=True)
class Effect:
    """What one budget would have changed. `saved_nanos`: on the calls that it refused or swapped."""

    refused: int = 0
    slowed: int = 0
    slowed_us: int = 0
    swapped: int = 0
    saved_nanos: int = 0


def effects(outcomes: Iterable[Outcome]) -> dict[str, Effect]:
    """The effects by budget, in the order in which they first acted. Calls that had been refused before are nobody's."""
    found: dict[str, Effect] = {}
    for one in outcomes:
        if one.was_refused:
            continue
        saved = one.recorded_nanos - one.cost_nanos
        if one.is_refused:
            effect = found.setdefault(one.by, Effect())
            effect.refused += 1
            effect.saved_nanos += saved
            continue
        for name, waited_us in one.slowed.items():
            effect = found.setdefault(name, Effect())
            effect.slowed += 1
            effect.slowed_us += waited_us
        for name in list(one.swapped)[-1:]:  # who swapped last decided what it cost
            effect = found.setdefault(name, Effect())
            effect.swapped += 1
            effect.saved_nanos += saved
    return found
