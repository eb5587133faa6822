"""Alerts, and the outbox in the store that holds each until it is delivered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

KINDS = ("threshold", "refused", "frozen", "approval", "detector", "shadow", "policy", "resolved")


class Alert(NamedTuple):
    """One immutable row of the outbox.

    `id` is the same for the same event, in whatever process it was noticed. `at_us`: when it happened, microseconds since the
    epoch. `facts` is plain JSON: budget, scope, unit, limit, spent, reserved, mark, action, owner, run, agent, why, as far as
    they apply; amounts are integers in the unit (USD in nano-dollars). A `resolved` alert has `was`: the kind that is over.
    """

    id: str
    kind: str
    at_us: int
    facts: dict[str, Any]

    @property
    def budget(self) -> str:
        """The budget it is about, or nothing."""
        return str(self.facts.get("budget") or "")

    @property
    def owner(self) -> str:
        """Who is responsible for that budget, or nothing."""
        return str(self.facts.get("owner") or "")

    @property
    def topic(self) -> str:
        """The kind that it begins or ends: whoever was told of the one is told of the other."""
        return str(self.facts.get("was") or self.kind) if self.kind == "resolved" else self.kind


class Outbox(Protocol):
    """What delivery asks of the store. Raises StoreError, with nothing done, when the store is out of reach."""

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        """At most `limit` alerts that are due, oldest first, each with the number of earlier attempts.

        They are hidden from every process, this one included, for `lease_us`.
        """
        ...

    def delivered(self, ids: Iterable[str]) -> None:
        """These need no further delivery."""
        ...

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        """These are due again at that time and hidden until then, whatever their lease says."""
        ...
