"""Alerts as they are configured: which sink is told of what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from bursar.alerts.alert import KINDS, budget_of, owner_of, topic_of
from bursar.alerts.message import Message, public
from bursar.alerts.sinks import Apprise, Function, Log, Sink, log
from bursar.commands import Alert
from bursar.errors import PolicyError

PER_MINUTE = 10
MAX_PER_MINUTE = 1_000
MAX_OWNERS = 1_000


class Route:
    """A sink, or a function that takes a `Message`, and what it is told of.

    Empty `kinds` and `budgets` mean all; `budgets` and `owner` may hold `*`. With an `owner` only the alerts of budgets with
    such an owner come here, and `{owner}` in the sink's address stands for it. `per_minute`: the most messages a minute.
    Raises PolicyError.
    """

    def __init__(
        self,
        sink: Sink | Callable[[Message], object],
        *,
        kinds: Sequence[str] = (),
        budgets: Sequence[str] = (),
        owner: str | None = None,
        per_minute: int = PER_MINUTE,
    ) -> None:
        for key, given in (("kinds", kinds), ("budgets", budgets)):
            if isinstance(given, str):
                raise PolicyError(f"{key} = {given!r} is not a list. Write it like [{given!r}].", key=key)
        unknown = next((kind for kind in kinds if kind not in KINDS), None)
        if unknown is not None:
            raise PolicyError(f"There are no alerts of the kind {unknown!r}. Use {', '.join(KINDS)}.", key="kinds")
        if not 1 <= per_minute <= MAX_PER_MINUTE:
            raise PolicyError(f"{per_minute} messages a minute cannot be. Use 1 to {MAX_PER_MINUTE}.", key="per_minute")
        if not isinstance(sink, Sink) and not callable(sink):
            raise PolicyError(f"A {type(sink).__name__} is no sink. Hand over a sink or a function.", key="sinks")
        self.sink: Sink = sink if isinstance(sink, Sink) else Function(sink)
        self.kinds = tuple(kinds)
        self.budgets = tuple(budgets)
        self.owner = owner
        self.per_minute = per_minute

    def is_for(self, owner: str) -> bool:
        """Whether it is the route to this owner."""
        return self.owner is not None and fnmatchcase(owner, self.owner)

    def takes(self, alert: Alert) -> bool:
        """Whether the sink is told of it. What is over is told to whoever was told that it began."""
        topic = topic_of(alert)
        return (
            (not self.kinds or not topic or topic in self.kinds or alert.kind in self.kinds)
            and (not self.budgets or any(fnmatchcase(budget_of(alert), pattern) for pattern in self.budgets))
            and (self.owner is None or self.is_for(owner_of(alert)))
        )


class Alerts:
    """Who is told. `sinks`: sinks, functions that take a `Message`, or routes; without any, the log.

    Every alert reaches someone: what no route takes goes to the log. A budget's owner is told by the routes with such an
    `owner`, or, where there is none and the owner is an address that Apprise knows, there.
    """

    def __init__(self, sinks: Sequence[Sink | Callable[[Message], object] | Route] = ()) -> None:
        self.configured = bool(sinks)
        self.fallback = Route(Log())
        self.routes = tuple(one if isinstance(one, Route) else Route(one) for one in sinks) or (self.fallback,)
        self._owners: dict[str, Route | None] = {}

    def of(self, alert: Alert) -> Iterator[tuple[str, Route]]:
        """The routes of an alert, each with the name of its lane: an owner has a lane of its own."""
        owner = owner_of(alert)
        found = [
            (str(place) if route.owner is None else f"{place} {owner}", route)
            for place, route in enumerate(self.routes)
            if route.takes(alert)
        ]
        if owner and not any(route.is_for(owner) for route in self.routes):
            own = self._own(owner)
            found += [] if own is None else [(f"owner {owner}", own)]
        yield from found or [("log", self.fallback)]

    def _own(self, owner: str) -> Route | None:
        """The route to an owner that is an address itself."""
        if owner not in self._owners and len(self._owners) < MAX_OWNERS:
            self._owners[owner] = None
            try:
                if "://" in owner:
                    self._owners[owner] = Route(Apprise(owner))
                elif self.configured:
                    log.warning("no alert route reaches the owner %s. Add one with that owner.", public(owner))
            except PolicyError as error:
                log.warning("the owner %s is not reached: %s", public(owner), error)
        return self._owners.get(owner)
