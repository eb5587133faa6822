"""How a call ends: what becomes of its reservation, carried out where nothing of it may reach the user's code."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import TracebackType

    from bursar.call import Step
    from bursar.reservation import Reservation
    from bursar.usage import Usage

log = logging.getLogger("bursar")


class Ending(NamedTuple):
    """A method of Reservation (its async twin has an `a` in front), with its arguments."""

    verb: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    def end(self, reservation: Reservation) -> None:
        """End the reservation so. Raises nothing; see `told_only`."""
        with told_only():
            reservation._driver.run(self._steps(reservation))

    async def aend(self, reservation: Reservation) -> None:
        """As `end`, for async callers."""
        with told_only():
            await reservation._driver.arun(self._steps(reservation))

    def _steps(self, reservation: Reservation) -> Generator[Step, Any, Any]:
        """Without the record that the method would return, which takes as long to make as to book."""
        return getattr(reservation, f"_{self.verb}")(*self.args, **self.options)  # type: ignore[no-any-return]


def settled(answer: Any, **options: Any) -> Ending:
    """Booked at its real cost. `answer` and `options` are those of `Reservation.settle`."""
    return Ending("settle", (answer,), options)


def released(reason: str) -> Ending:
    """Given back: it was not sent, or clearly refused before generation."""
    return Ending("release", (reason,), {})


def unknown(reason: str, known: Usage | None = None) -> Ending:
    """Booked as estimated: it may have been billed. `known` is what is known of its usage all the same."""
    return Ending("settle_unknown", (reason,), {"known": known})


def failed(error: BaseException, known: Usage | None = None) -> Ending:
    """As the error says: released when the call was surely not billed, else booked as estimated."""
    return Ending("settle_error", (error,), {"known": known})


class told_only:
    """What goes wrong while a call is ended is logged: raised, it would cost the caller the answer that was paid for.

    After a store's failure the guard goes on trying by itself.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error("while ending a call: %s", error, exc_info=None if hasattr(error, "fields") else error)
        return True
