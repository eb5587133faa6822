"""Faults: what may go wrong in a world. Each seed picks a subset of them and how often each strikes (swarm testing)."""

from __future__ import annotations

from random import Random

# What may go wrong -> how often at most, of the occasions that it has.
KINDS = {
    # on the way to the store, at every command
    "request_lost": 0.05,
    "reply_lost": 0.05,
    "duplicate": 0.05,
    "late_copy": 0.04,
    "slow": 0.05,
    # to a process, at every step of it
    "kill": 0.004,
    "interrupt": 0.02,
    "stall": 0.02,
    # to the store, once in a while
    "outage": 0.3,
    "tail_lost": 0.3,
    "clock_back": 0.3,
    "clock_forward": 0.2,
    # at the provider, at every call
    "refused": 0.1,
    "timeout": 0.1,
    "cut": 0.1,
    "no_usage": 0.1,
    "above": 0.2,
    "renamed": 0.1,
    "uncounted": 0.1,
    "overdue": 0.1,
    # by operators and users
    "prices": 0.3,
    "limits": 0.4,
    "reversal": 0.3,
    "again": 0.2,
    "end_again": 0.2,
    "extension": 0.3,
    "unpriced": 0.05,
    # to the journals of processes with leases
    "journal_lost": 0.3,
    "disk_full": 0.05,
}
# Books that lose their tail cannot be held against what was acknowledged, so they have worlds of their own.
RARE = {"tail_lost": 0.1}


class Faults:
    """The faults of one world. `none`: a world in which everything goes well."""

    def __init__(self, random: Random, *, none: bool = False) -> None:
        self._random = random
        share = 0.0 if none else random.choice((0.1, 0.3, 0.5))
        on = [kind for kind in KINDS if random.random() < min(share, RARE.get(kind, 1.0))]
        self.rates = {kind: KINDS[kind] * random.uniform(0.3, 1.0) for kind in on}
        self.on = True

    def hits(self, kind: str) -> bool:
        """Whether this fault strikes now."""
        rate = self.rates.get(kind)
        return rate is not None and self.on and self._random.random() < rate

    def end(self) -> None:
        """From now on nothing goes wrong any more (the liveness phase)."""
        self.on = False
