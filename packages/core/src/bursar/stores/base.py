"""What a store is: it applies the law's commands, one after another, all of a command or nothing of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from bursar.accounts import Account
from bursar.commands import Alert, Answer, Command, Definitions, Ended, Entry, Expire, Reservation
from bursar.errors import StoreError


class Store(Protocol):
    """The strategy behind every budget. Raises StoreError, with nothing done, when a command could not be applied.

    Stores are synchronous; `aexecute` takes one hop onto the store's own executor where a command may block.
    """

    durability: str

    def now_us(self) -> int:
        """The store's time in microseconds since the epoch: it decides, and never runs back."""
        ...

    def execute(self, command: Command) -> Answer:
        """Apply one command."""
        ...

    async def aexecute(self, command: Command) -> Answer:
        """Apply one command without blocking the event loop."""
        ...

    def post(self, command: Command) -> None:
        """Apply a command soon, without waiting for its answer: for callers that are being cancelled."""
        ...

    def sweep(self) -> int:
        """Expire every reservation whose time has come; the number of them."""
        ...

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """Make these definitions the newest where they differ; the policy's version afterwards.

        Raises OperatorRequired for what needs an operator's signature and has none that holds; nothing is published then.
        """
        ...

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        """The policy's version, and the newest definition of everything that was defined after version `since`."""
        ...

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        """Every version of every definition, oldest first: version, kind, name and what was decided."""
        ...

    def version(self) -> int:
        """The policy's version alone: a cheap look whether anything was published."""
        ...

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        """Due alerts of the outbox, oldest first, each with the number of earlier claims; nobody else gets them for `lease_us`."""
        ...

    def delivered(self, ids: Iterable[str]) -> None:
        """These alerts have been told."""
        ...

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        """Make these alerts due again at that time."""
        ...

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        """Every alert, oldest first, and whether it has been told."""
        ...

    def reservations(self) -> Iterator[Reservation]:
        """The open reservations, by id."""
        ...

    def open_reservations(self) -> int:
        """How many reservations are open."""
        ...

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        """The accounts of these keys that exist, or all of them."""
        ...

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        """The entries whose draft carries these tags, oldest id first."""
        ...

    def close(self) -> None:
        """Finish what was posted and free everything; further commands raise StoreError."""
        ...


def expire_all(store: Store, ids: Iterable[str]) -> int:
    """Expire these reservations; the number that ended. One whose rows are damaged keeps no other: its error comes at the end."""
    ended, failure = 0, None
    for id in ids:
        try:
            ended += type(store.execute(Expire(id))) is Ended
        except StoreError as error:
            if error.fault not in ("damaged", "overflow"):
                raise
            failure = failure or error
    if failure is not None:
        raise failure
    return ended
