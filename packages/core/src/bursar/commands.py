"""Commands to the law, the rows that they leave, and the answers: plain values, equal when their content is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from bursar.accounts import Account, Rule


class Reservation(NamedTuple):
    """Amounts held on several accounts, each as (account key, unit, amount). `draft` is what its entry will tell."""

    id: str
    held: tuple[tuple[str, str, int], ...]
    reserved_us: int
    expires_us: int
    on_expiry: str
    digest: str
    draft: dict[str, Any]


class Entry(NamedTuple):
    """One immutable fact, from which usage records are read. `amounts` by account key; a correction holds differences.

    `kind`: settlement, release, expiry, correction or reversal (of an expiry), charge, refusal.
    `outcome`: completed, failed, cancelled, blocked.
    """

    id: str
    kind: str
    corrects: str | None
    outcome: str
    estimated: bool
    reason: str
    cost_nanos: int
    usage: dict[str, Any]
    amounts: dict[str, int]
    reserved_us: int
    settled_us: int
    digest: str
    draft: dict[str, Any]
    facts: dict[str, Any]


Row = Account | Reservation | Entry | int


class Reserve(NamedTuple):
    """Hold the amounts on every account, all or nothing. `draft` holds `cost_nanos` and `usage` of the estimate.

    `quiet`: a refusal is not recorded, because the caller will try again (waiting, or with a smaller output).
    """

    id: str
    lines: tuple[tuple[Rule, int], ...]
    ttl_us: int
    draft: dict[str, Any]
    digest: str = ""
    on_expiry: str = "charge"
    version: int = 0
    max_accounts: int = 1_000_000
    quiet: bool = False


class Settle(NamedTuple):
    """Replace a reservation by what it really cost, by unit; a unit without an actual settles at its reserved amount."""

    id: str
    actuals: Mapping[str, int]
    cost_nanos: int
    usage: dict[str, Any]
    outcome: str = "completed"
    estimated: bool = False
    reason: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


class Release(NamedTuple):
    """End a reservation whose call was surely not billed; or, by an operator, take an expired one off the books."""

    id: str
    outcome: str = "cancelled"
    reason: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


class Extend(NamedTuple):
    """Move the expiry to at least `ttl_us` from now; it never moves back (I8)."""

    id: str
    ttl_us: int


class Expire(NamedTuple):
    """End a reservation whose time has come; one that still lives is left alone."""

    id: str


class Charge(NamedTuple):
    """Book a cost that has been incurred. It is never refused (I7)."""

    id: str
    lines: tuple[tuple[Rule, int], ...]
    cost_nanos: int
    usage: dict[str, Any]
    draft: dict[str, Any]
    digest: str = ""
    estimated: bool = False
    reason: str = ""
    outcome: str = "completed"
    max_accounts: int = 1_000_000
    facts: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


Command = Reserve | Settle | Release | Extend | Expire | Charge


class Granted(NamedTuple):
    """The reservation holds. `shadowed` names accounts in shadow mode that would have refused."""

    reservation: Reservation
    accounts: tuple[Account, ...]
    shadowed: tuple[str, ...] = ()


class Refused(NamedTuple):
    """`account` could not hold `asked`. `lines` are all accounts of the call with the amounts asked of them.

    `retry_after_us`: when time alone makes room, else None. `may_free`: open reservations stand in the way.
    """

    account: Account
    asked: int
    retry_after_us: int | None
    may_free: bool
    lines: tuple[tuple[Account, int], ...]


class Ended(NamedTuple):
    """The reservation's end is on the books as `entry`. `again` when it had been before, by the same command."""

    entry: Entry
    accounts: tuple[Account, ...]
    again: bool = False


class Extended(NamedTuple):
    """The reservation lives until then."""

    expires_us: int


class Rejected(NamedTuple):
    """The command does not fit the state; nothing was done.

    `why`: conflict (same id, other content), ended (`detail`: how), unknown (no such id), stale (`detail`: the newest policy
    version), moved (a window began meanwhile), accounts (`detail`: the budget that has too many), live (not expired).
    """

    why: str
    detail: str = ""


Answer = Granted | Refused | Ended | Extended | Rejected


class Decision(NamedTuple):
    """The answer, and the rows to put, all together or not at all."""

    answer: Answer
    puts: dict[str, Row]
