"""How a call ends: what becomes of its reservation, carried out where nothing of it may reach the user's code."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import FrameType, TracebackType

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


# -- calls whose end nobody tells ----------------------------------------------------------------------------------

_ends: SimpleQueue[Callable[[], object]] = SimpleQueue()
_thread: threading.Thread | None = None
_starting = threading.Lock()
_LOCKING = ("bursar.alerts", "bursar.driver", "bursar.keeper", "bursar.stores", "bursar.waiting")


def expect_orphans() -> None:
    """Start the thread that `end_soon` needs; here, because where a finaliser runs a thread cannot safely be started."""
    global _thread
    if _thread is None:
        with _starting:
            if _thread is None:
                thread = threading.Thread(target=_end_orphans, args=(_ends,), daemon=True, name="bursar-ending")
                thread.start()  # where there is no room for one, the next call tries again
                _thread = thread


def end_soon(end: Callable[[], object]) -> None:
    """End a call in the background: for finalisers, which may run anywhere, under any lock. See `expect_orphans`."""
    _ends.put(end)


def amid_bursar() -> bool:
    """Whether a garbage collection in the midst of Bursar's own work brought us here: its locks are held then."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_LOCKING):
            return True
        frame = frame.f_back
    return False


def drain(timeout_s: float) -> bool:
    """Wait until the ends that were put off so far are booked; False when that takes longer, or nobody would book them."""
    if _thread is None and _ends.empty():
        return True
    if _thread is threading.current_thread() or sys.is_finalizing():  # it is stopped by then
        return False
    reached = threading.Event()
    expect_orphans()
    _ends.put(reached.set)
    return reached.wait(timeout_s)


def _end_orphans(ends: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        end = ends.get()
        with told_only():
            end()
        del end  # it may hold all that there is of a guard


def _forked() -> None:
    """In the child of a fork there is no thread, and what waits for it is the parent's."""
    global _ends, _thread, _starting
    _ends, _thread, _starting = SimpleQueue(), None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
