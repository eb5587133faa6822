"""Alerts as they are configured: which sink is told of what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bursar.alerts.alert import KINDS, Alert
from bursar.alerts.message import Message, public
from bursar.alerts.sinks import Apprise, Function, Log, Sink, log
from bursar.errors import PolicyError

PER_MINUTE = 10
MAX_OWNERS = 1_000


@dataclass(frozen=True)
class Route:
    """A sink, and what it is told of. Empty `kinds` and `budgets` mean all; `budgets` and `owner` may hold `*`.

    With an `owner` only the alerts of budgets with such an owner come here, and `{owner}` in the sink's address stands for
    it. `per_minute`: the most messages a minute. Raises PolicyError.
    """

    sink: Sink
    kinds: Sequence[str] = ()
    budgets: Sequence[str] = ()
    owner: str | None = None
    per_minute: int = PER_MINUTE

    def __post_init__(self) -> None:
        unknown = next((kind for kind in self.kinds if kind not in KINDS), None)
        if isinstance(self.kinds, str) or unknown is not None:
            raise PolicyError(
                f"There are no alerts of the kind {unknown or self.kinds!r}. Use a list of {', '.join(KINDS)}.",
                key="kinds",
            )
        if isinstance(self.budgets, str):
            raise PolicyError(f"{self.budgets!r} is not a list. Write it like [{self.budgets!r}].", key="budgets")
        if not 1 <= self.per_minute <= 1_000:
            raise PolicyError(f"{self.per_minute} messages a minute cannot be. Use 1 to 1000.", key="per_minute")

    def takes(self, alert: Alert) -> bool:
        """Whether the sink is told of it. What is over is told to whoever was told that it began."""
        return (
            (not self.kinds or alert.kind in self.kinds or alert.topic in self.kinds)
            and (not self.budgets or any(fnmatchcase(alert.budget, pattern) for pattern in self.budgets))
            and (self.owner is None or fnmatchcase(alert.owner, self.owner))
        )


class Alerts:
    """Who is told. `sinks`: sinks, functions that take a `Message`, or routes; without any, the log.

    Every alert reaches someone: what no route takes goes to the log. A budget's owner is told by the routes with such an
    `owner`, or, where there is none and the owner is an address that Apprise knows, there.
    """

    def __init__(self, sinks: Sequence[Sink | Callable[[Message], object] | Route] = ()) -> None:
        self.configured = bool(sinks)
        self.fallback = Route(Log())
        self.routes = tuple(_route(one) for one in sinks) or (self.fallback,)
        self._owners: dict[str, Route | None] = {}

    def of(self, alert: Alert) -> Iterator[tuple[str, Route]]:
        """The routes of an alert, each with the name of its lane: an owner has a lane of its own."""
        found = False
        owned = False
        for place, route in enumerate(self.routes):
            if route.takes(alert):
                found = True
                owned = owned or route.owner is not None
                yield (f"{place} {alert.owner}" if route.owner else str(place)), route
        if alert.owner and not owned:
            own = self._own(alert.owner)
            if own is not None:
                found = True
                yield f"owner {alert.owner}", own
        if not found:
            yield "log", self.fallback

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


def _route(given: Sink | Callable[[Message], object] | Route) -> Route:
    if isinstance(given, Route):
        return given
    if isinstance(given, Sink):
        return Route(given)
    if callable(given):
        return Route(Function(given))
    raise PolicyError(f"A {type(given).__name__} is no sink. Hand over a sink, a route or a function.", key="sinks")
