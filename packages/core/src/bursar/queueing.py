"""Queueing: one call's place in the waiting room, and the end of its patience."""

from __future__ import annotations

from bursar.call import Pause
from bursar.commands import Refused
from bursar.policy import Matched
from bursar.refusal import patience_s, pause_s
from bursar.waiting import Ticket, WaitingRoom

LOOK_S = 1.0  # how long a waiting call sleeps at most: a limit may be raised, or a clock set, meanwhile


class Queueing:
    """One call's place in the waiting room, and the end of its patience."""

    def __init__(self, room: WaitingRoom) -> None:
        self._room = room
        self._ticket: Ticket | None = None
        self._deadline_us: int | None = None

    @property
    def is_first(self) -> bool:
        return self._ticket is None or self._room.is_first(self._ticket)

    def until(self, now_us: int, wait_s: float) -> int:
        if self._deadline_us is None:
            self._deadline_us = now_us + int(wait_s * 1e6)
        return self._deadline_us

    def join_behind(self, keys: list[str]) -> None:
        if self._ticket is None and (key := self._room.occupied(keys)) is not None:
            self._ticket = self._room.join(key)

    def pause(self, seconds: float) -> Pause:
        assert self._ticket is not None
        return Pause(self._ticket, min(seconds, LOOK_S))

    def after(self, refused: Refused, matched: tuple[Matched, ...], now_us: int) -> Pause | None:
        """The pause before the next look, in the queue of the account that refused; None when waiting does not help."""
        wait_s = patience_s(refused, matched)
        if not wait_s:
            return None
        seconds = pause_s(refused, now_us, self.until(now_us, wait_s))
        if seconds is None:
            return None
        key = refused.account.rule.key
        if self._ticket is None or self._ticket.key != key:
            self.leave()
            self._ticket = self._room.join(key)
        return self.pause(seconds)

    def leave(self) -> None:
        if self._ticket is not None:
            self._room.leave(self._ticket)
            self._ticket = None
