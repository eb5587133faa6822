"""The slot: one request of an agent, between the middleware, which can change it, and the handler, which reserves for it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bursar import Reservation


class Slot:
    """What the middleware lets the handler do for one request of an agent: have it changed, and be cleaned up after.

    `changeable`: what of the request the middleware can change, as for `Bursar.reserve`; `model`: the name of the model that
    it can change. Where less is granted than the request asks for, `signal` is raised, and the reservation waits in `parked`
    for the request to come again as `granted`: with that model, and that maximum output under the names in `limits`.
    """

    __slots__ = ("changeable", "granted", "keys", "limits", "model", "parked", "run", "signal")

    def __init__(
        self,
        run: str | None,
        signal: type[Exception] | None = None,
        model: str | None = None,
        changeable: tuple[str, ...] = (),
    ) -> None:
        self.run = run
        self.signal = signal
        self.model = model
        self.changeable = changeable
        self.parked: Reservation | None = None
        self.granted: tuple[str, int | None] = ("", None)
        self.limits: tuple[str, ...] = ()
        self.keys: list[int] = []

    def offers(self, model: str) -> tuple[str, ...]:
        """What can be changed of a call of this model: another one than the request's was chosen further in."""
        return self.changeable if model == self.model else tuple(one for one in self.changeable if one != "model")

    def park(self, reservation: Reservation, model: str, limit: int | None, limits: tuple[str, ...]) -> None:
        """Raise the signal where the call has to be sent in another way than with this model and maximum output."""
        granted = (reservation.model, reservation.max_output_tokens if reservation.capped else limit)
        if self.signal is not None and granted != (model, limit):
            self.parked, self.granted, self.limits, self.changeable = reservation, granted, limits, ()
            raise self.signal(f"no error: the request comes again as it was granted, {granted}")


current_slot: ContextVar[Slot | None] = ContextVar("bursar_langchain_slot", default=None)
