"""What one family of answers has reported so far: a few counts and facts, never the text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

from bursar.answers.counts import Json, Keywords


class Tally(ABC):
    """The running account of one answer. A whole answer is fed as one event, a stream event by event."""

    def __init__(self) -> None:
        self.final = False  # the provider has said its last word on the counts
        self.facts: Keywords = {}  # model, service_tier, region, batch
        self.used: Counter[str] = Counter()  # server-side tools

    @staticmethod
    @abstractmethod
    def claims(data: Json) -> bool:
        """Whether this event, or whole answer, has the shape of the family."""

    @abstractmethod
    def feed(self, data: Json) -> None:
        """Take what an event says. Raises UnreadableAnswer for counts that are not counts."""

    @abstractmethod
    def counts(self) -> Keywords | None:
        """The keywords of Usage as known so far; None when nothing was reported."""

    def note(self, **facts: str | None) -> None:
        """Keep the facts that are there."""
        self.facts.update({name: value for name, value in facts.items() if value})
