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

    `kind`: settlement, release, expiry, correction or reversal (of an expiry), charge, refusal; carried (the sums of entries that
    were pruned), retired (what of these sums stood on accounts that went, with the sign turned).
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


class Alert(NamedTuple):
    """Something that somebody is to be told of, once: a row of the outbox. `facts` are plain JSON, never prompts or keys.

    `kind`: threshold, detector, approval, frozen, policy or resolved.
    """

    id: str
    kind: str
    at_us: int
    facts: dict[str, Any]


Row = Account | Reservation | Entry | Alert | int | str


class Reserve(NamedTuple):
    """Hold the amounts on every account, all or nothing. `draft` holds `cost_nanos` and `usage` of the estimate.

    `quiet`: a refusal is not recorded, because the caller will try again (waiting, or with a smaller output). `complied`: by
    account key, up to which of its marks the call does what they ask for. `behind`: the key of an account for which others
    wait who came before; it refuses, whatever room it has.
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
    complied: Mapping[str, int] = {}
    behind: str = ""


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
    """End a reservation whose call was surely not billed; or, by an operator, take an expired one off the books.

    `proof`: the operator's signature, for an expired one in a store that has an operator. `actuals`: what it counts for all the
    same, by unit (a failure).
    """

    id: str
    outcome: str = "cancelled"
    reason: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    proof: str = ""
    actuals: Mapping[str, int] = {}


class Extend(NamedTuple):
    """Move the expiry to at least `ttl_us` from now; it never moves back (I8)."""

    id: str
    ttl_us: int


class Expire(NamedTuple):
    """End a reservation whose time has come; one that still lives is left alone."""

    id: str


class Charge(NamedTuple):
    """Book a cost that has been incurred. It is never refused (I7). `version`: of the policy that the lines come from."""

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
    version: int = 0


def settling(charge: Charge) -> Settle:
    """The same cost, for a reservation that stands under the charge's id."""
    actuals = {rule.unit: amount for rule, amount in charge.lines}
    return Settle(
        charge.id,
        actuals,
        charge.cost_nanos,
        charge.usage,
        charge.outcome,
        charge.estimated,
        charge.reason,
        charge.facts,
    )


class Draw(NamedTuple):
    """Book entries that a lease's holder has decided by the same law; what they spend comes out of what the lease holds.

    `id`: of the lease, a reservation; once it has ended the amounts are booked all the same, for they were spent (I7). `rules`:
    of the accounts that the entries name, all of kind `window`. `overruns`: by account key, by how much the entries exceed what
    was held for them. Entries, each with an id of its own, that are on the books already are left alone. `texts`: by id, those
    entries of which the text has been made already (`stores.entry_text`).
    """

    id: str
    rules: tuple[Rule, ...]
    entries: tuple[Entry, ...]
    overruns: Mapping[str, int] = {}
    version: int = 0
    max_accounts: int = 1_000_000
    texts: Mapping[str, str] = {}


class Tell(NamedTuple):
    """Put an alert into the outbox, unless one with its id is there already."""

    id: str
    kind: str
    facts: dict[str, Any]


Command = Reserve | Settle | Release | Extend | Expire | Charge | Draw | Tell


class Granted(NamedTuple):
    """The reservation holds. `shadowed` names accounts in shadow mode that would have refused."""

    reservation: Reservation
    accounts: tuple[Account, ...]
    shadowed: tuple[str, ...] = ()


class Refused(NamedTuple):
    """`account` could not hold `asked`. `lines` are all accounts of the call with the amounts asked of them.

    `retry_after_us`: when time alone makes room on all of them, else None. `may_free`: open reservations stand in the way, and
    time in what they do not. `mark`: the index of the account's mark that stops the call (ask, block, kill), None when it is
    for want of room, or because others came before.
    """

    account: Account
    asked: int
    retry_after_us: int | None
    may_free: bool
    lines: tuple[tuple[Account, int], ...]
    mark: int | None = None


class Stepped(NamedTuple):
    """Marks are in force with which the call does not comply yet; nothing was done. By account key, the number of them."""

    marks: dict[str, int]


class Ended(NamedTuple):
    """The reservation's end is on the books as `entry`. `again` when it had been before, by the same command.

    `alerts`: of the marks that this end crossed.
    """

    entry: Entry
    accounts: tuple[Account, ...]
    again: bool = False
    alerts: tuple[Alert, ...] = ()


class Drawn(NamedTuple):
    """The entries are on the books, `new` of them since now. `left`: what the lease still holds, by account key; None once ended.

    `alerts`: of the marks that these entries crossed.
    """

    new: int
    left: dict[str, int] | None
    accounts: tuple[Account, ...]
    alerts: tuple[Alert, ...] = ()


class Told(NamedTuple):
    """The alert is in the outbox; `again` when it had been there before."""

    again: bool


class Extended(NamedTuple):
    """The reservation lives until then."""

    expires_us: int


class Rejected(NamedTuple):
    """The command does not fit the state; nothing was done.

    `why`: conflict (same id, other content), ended (`detail`: how), unknown (no such id), stale (`detail`: the newest policy
    version), operator (the store's operator has not signed it), moved (a window began meanwhile), accounts (`detail`: the
    budget that has too many), live (not expired).
    """

    why: str
    detail: str = ""


Answer = Granted | Refused | Stepped | Ended | Drawn | Extended | Told | Rejected


class Decision(NamedTuple):
    """The answer, and the rows to put, all together or not at all."""

    answer: Answer
    puts: dict[str, Row]


class Definition(NamedTuple):
    """What somebody decided, as the store holds it; the newest version of a name is the one in force.

    Kinds: `budget`, `freeze`, `approval`, `raise`, `prune`, `erase`, and `operator` (the key that signs what only an operator may
    decide).
    """

    version: int
    definition: dict[str, Any]


Definitions = dict[str, dict[str, Definition]]  # by kind, by name
