"""A lease: a slice of several accounts, and the calls that are made out of it, by the law over a few rows in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bursar.accounts import Account, Rule
from bursar.commands import Answer, Command, Draw, Ended, Entry, Granted, Reservation, Reserve, Row
from bursar.law import decide

_new = tuple.__new__  # see bursar.law
_NOTHING: dict[str, int] = {}
_NO_TEXTS: dict[str, str] = {}


class Lease:
    """What one process holds of the accounts of `rules`. Not safe for threads: its owner has the lock.

    `rows`: its accounts, and the calls of which the shared store lacks something; `open`: the ids of those in flight.
    `unwritten`: entries that the journal lacks. `unsent`: those that the shared store lacks, by their numbers in the journal;
    `texts`: as it has them, by id. `drawn`: what the shared store has of the lease, and `told`: the overruns that it knows of, by
    account key. `retired`: nothing more is reserved out of it. `ended`: the reservation behind it is over (its time had come
    while the store was out of reach).
    """

    __slots__ = (
        "_lines",
        "calls",
        "drawn",
        "ended",
        "extended_us",
        "first_us",
        "id",
        "made",
        "open",
        "retired",
        "rows",
        "rules",
        "texts",
        "told",
        "unsent",
        "unwritten",
        "used_us",
        "version",
    )  # fmt: skip

    def __init__(
        self, id: str, rules: Sequence[Rule], amounts: Sequence[int], calls: int, version: int, now_us: int
    ) -> None:
        self.id = id
        self.calls = calls
        self.made = 0
        self.rules = tuple(rules)
        self.version = version
        self._lines = tuple(rule._replace(limit=amount, marks=()) for rule, amount in zip(rules, amounts, strict=True))
        self.rows: dict[str, Row] = {rule.key: Account(rule) for rule in self._lines}
        self.open: dict[str, None] = {}
        self.unwritten: dict[str, Entry] = {}
        self.unsent: dict[int, Entry] = {}
        self.texts: dict[str, str] = {}
        self.drawn: dict[str, int] = {}
        self.told: dict[str, int] = {}
        self.used_us = self.extended_us = self.first_us = now_us
        self.retired = self.ended = False

    def reserve(self, command: Reserve, amounts: Iterable[int], now_us: int) -> Answer | None:
        """Reserve these amounts, those of the call's lines, out of the lease; None where it has too little left."""
        id, _, ttl_us, draft, digest, on_expiry = command[:6]
        lines = tuple(zip(self._lines, amounts, strict=True))
        own_command = _new(Reserve, (id, lines, ttl_us, draft, digest, on_expiry, 0, 1, True, _NOTHING, ""))
        answer, puts = decide(self.rows.get, own_command, now_us)
        if type(answer) is not Granted:
            return None
        self.open[command.id] = None
        self.rows.update(puts)
        self.used_us = now_us
        if not self.made:
            self.first_us = now_us
        self.made += 1
        return answer

    def end(self, command: Command, now_us: int) -> Answer:
        """Settle, release, extend or expire one of its calls."""
        answer, puts = decide(self.rows.get, command, now_us)
        if type(answer) is Ended and not answer.again:
            self.unwritten[answer.entry.id] = answer.entry  # first, so that no interrupt leaves it out
        self.rows.update(puts)
        if type(answer) is Ended:
            self.open.pop(_call(answer.entry), None)
            self.used_us = now_us
        return answer

    def sent(self, numbers: Iterable[int]) -> list[str]:
        """The shared store has these entries: it decides from now on about the calls that have ended; the ids of these."""
        done = []
        for number in numbers:
            entry = self.unsent.pop(number)
            self.texts.pop(entry.id, None)
            done.append(_call(entry))
        busy = {_call(entry) for entry in (*self.unsent.values(), *self.unwritten.values())}
        over = [id for id in done if id not in busy and self.rows.pop(id, None) is not None]
        for id in over:
            self.rows.pop(f"{id}~", None)
            self.open.pop(id, None)  # an interrupt may have kept it there
        return over

    def low(self) -> bool:
        """Whether half of the calls that it was asked for have been made."""
        return 2 * self.made > self.calls

    def overruns(self) -> dict[str, int]:
        """By how much its entries exceed what was held for them, all in all."""
        return {account.rule.key: account.overrun for account in self._accounts() if account.overrun}

    def over(self) -> bool:
        """Whether nothing is left to be done with it, but to give it back."""
        return self.retired and not (self.open or self.unwritten or self.unsent)

    def due(self, now_us: int) -> list[str]:
        """The calls whose time has come."""
        return [id for id in self.open if type(row := self.rows.get(id)) is Reservation and row.expires_us <= now_us]

    def _accounts(self) -> list[Account]:
        return [account for rule in self._lines if type(account := self.rows[rule.key]) is Account]


def _call(entry: Entry) -> str:
    """The id of the call that it is about."""
    return entry.corrects or entry.id


def sums(rules: Sequence[Rule], entries: Sequence[Entry], before: dict[str, int]) -> dict[str, int]:
    """What these entries spend on each account, on top of what was before."""
    return {
        rule.key: before.get(rule.key, 0) + sum(entry.amounts.get(rule.key, 0) for entry in entries) for rule in rules
    }


def draw(
    id: str,
    rules: Sequence[Rule],
    entries: Sequence[Entry],
    overruns: dict[str, int],
    version: int = 0,
    texts: Mapping[str, str] = _NO_TEXTS,
) -> Draw:
    """The command that books these entries on the shared store, the last of each id."""
    last = tuple({entry.id: entry for entry in entries}.values())
    return Draw(id, tuple(rules), last, overruns, version, texts=texts)
