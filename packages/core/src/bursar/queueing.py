"""Queueing: one call's place in the waiting room, and the end of its patience."""

from __future__ import annotations

from bursar.accounts import Rule
from bursar.call import Pause
from bursar.commands import Refused
from bursar.policy import Matched
from bursar.refusal import patience_s, pause_s
from bursar.waiting import Ticket, WaitingRoom

LOOK_S = 1.0  # how long the first of a queue sleeps at most: a limit may be raised, or a clock set, meanwhile


class Queueing:
    """One call's place in the waiting room, and since when it waits."""

    def __init__(self, room: WaitingRoom, since_us: int) -> None:
        self._room = room
        self._since_us = since_us
        self._ticket: Ticket | None = None

    def behind(self, matched: tuple[Matched, ...]) -> str:
        """The account for which others wait who came before: the call stands in its queue now. Empty when it may go."""
        if not self._room:
            return ""
        keys = {queue_of(one.rule): one.rule.key for one in matched if one.budget.wait_s and one.rule.enforce}
        queue = self._room.occupied(keys, self._ticket)
        if queue is None:
            return ""
        self._stand(queue)
        return keys[queue]

    def after(self, refused: Refused, matched: tuple[Matched, ...], now_us: int) -> Pause | None:
        """The pause before the next look, in the queue of the account that refused; None when waiting does not help."""
        deadline_us = self._since_us + int(patience_s(refused, matched) * 1e6)
        seconds = pause_s(refused, now_us, deadline_us)
        if seconds is None:
            return None
        ticket = self._stand(queue_of(refused.account.rule))
        # only the first looks by itself; the others sleep until they are first, or out of patience
        first = self._room.is_first(ticket)
        return Pause(ticket, min(seconds, LOOK_S) if first else (deadline_us - now_us) / 1e6)

    def leave(self) -> None:
        if self._ticket is not None:
            try:
                self._room.leave(self._ticket)
            except BaseException:  # an interrupt: whoever comes later would stand behind this place for ever
                self._room.leave(self._ticket)
                raise

    def _stand(self, queue: str) -> Ticket:
        if self._ticket is None:
            self._ticket = self._room.come()
        self._room.move(self._ticket, queue)
        return self._ticket


def queue_of(rule: Rule) -> str:
    """The queue of an account: that of its next window too, so that nobody loses a place where a window ends."""
    return rule.key.rpartition(",")[0]
