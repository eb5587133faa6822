"""The wire: the store as a process sees it through a network, and the store itself, which tells the world of all that it does."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bursar.accounts import Account
from bursar.commands import Alert, Answer, Command, Definitions, Entry, Reservation
from bursar.errors import StoreError
from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore
from sim.world import Host, Killed, World, unreachable

T = TypeVar("T")


class Memory(MemoryStore):
    """The memory store as a server."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock)
        self._world = world

    def execute(self, command: Command) -> Answer:
        answer = super().execute(command)
        self._world.noted(command, answer, self.now_us())
        return answer

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        version = super().publish(definitions, kind)
        self._world.published(kind, definitions, version)
        return version

    def copied(self) -> Any:
        """All that it holds, as a replica would."""
        held = {kind: dict(named) for kind, named in self._definitions.items()}
        return dict(self._rows), dict(self._open), list(self._ended), held, list(self._history), dict(self._outbox)

    def put_back(self, copied: Any) -> None:
        """Hold that from now on."""
        rows, opened, ended, held, history, outbox = copied
        self._rows, self._open, self._ended = dict(rows), dict(opened), deque(ended)
        self._definitions = {kind: dict(named) for kind, named in held.items()}
        self._history, self._outbox = list(history), dict(outbox)


class Sqlite(SqliteStore):
    """SQLite as a server."""

    def __init__(self, world: World, path: Path) -> None:
        super().__init__(path, durability="process", clock=world.clock)
        self._world = world

    def execute(self, command: Command) -> Answer:
        answer = super().execute(command)
        self._world.noted(command, answer, self.now_us())
        return answer

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        version = super().publish(definitions, kind)
        self._world.published(kind, definitions, version)
        return version


class Wire:
    """The store as one process reaches it: calls that wait for their answer, any of which may fail or be the process's last.

    The process's time is the store's as it was last told, and what has passed since: it lags, and never leads (ServerClock).
    """

    durability = "process"

    def __init__(self, world: World, host: Host) -> None:
        self._world = world
        self._host = host
        self._said_us = self._at_us = self._seen_us = 0
        self.reliable = True  # while the process starts
        self.learn()

    def learn(self) -> None:
        """The server has just said what time it is."""
        self._said_us, self._at_us = self._world.clock.now_us(), self._world.now_us

    def now_us(self) -> int:
        self._seen_us = max(self._seen_us, self._said_us + self._world.now_us - self._at_us)
        return self._seen_us

    def _through(self, act: Callable[[], T], *, twice: bool = True) -> T:
        world, faults = self._world, self._world.faults
        if self.reliable:
            return act()
        if faults.hits("kill"):
            raise Killed
        if world.is_away() or faults.hits("request_lost"):
            raise unreachable()
        answer = act()
        if twice and faults.hits("duplicate"):
            answer = act()
        if faults.hits("kill"):
            raise Killed
        if faults.hits("reply_lost"):
            raise unreachable()
        self.learn()
        return answer

    def execute(self, command: Command) -> Answer:
        may = self._world.may_come_twice(command)
        return self._through(lambda: self._world.server.execute(command), twice=may)

    async def aexecute(self, command: Command) -> Answer:
        return self.execute(command)

    def post(self, command: Command) -> None:
        """On its way; nobody waits for it."""
        world = self._world

        def arrive() -> None:
            with contextlib.suppress(StoreError):
                world.apply(command)

        if not world.faults.hits("request_lost"):
            world.at(world.latency_us(), arrive)

    def sweep(self) -> int:
        return self._through(self._world.server.sweep)

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        return self._through(lambda: self._world.server.publish(definitions, kind))

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        return self._through(lambda: self._world.server.definitions(since))

    def version(self) -> int:
        return self._through(self._world.server.version)

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        return self._through(self._world.server.history)

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        return self._through(lambda: self._world.server.claim(limit, lease_us))

    def delivered(self, ids: Iterable[str]) -> None:
        self._through(lambda: self._world.server.delivered(ids))

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self._through(lambda: self._world.server.retry(ids, at_us))

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        return self._through(self._world.server.alerts)

    def reservations(self) -> Iterator[Reservation]:
        return self._through(self._world.server.reservations)

    def open_reservations(self) -> int:
        return self._through(self._world.server.open_reservations)

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        return self._through(lambda: self._world.server.accounts(keys))

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        return self._through(lambda: self._world.server.entries(tags))

    def close(self) -> None:
        """A process that ends closes its connection; the server goes on."""
