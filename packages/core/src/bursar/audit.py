"""The audit: works every balance out anew, from records and open reservations alone, and repairs nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from bursar.accounts import Account
from bursar.commands import Definition, Definitions, Entry
from bursar.errors import BursarError
from bursar.retention import Kept, kept
from bursar.signing import changes, operator_of, prune_name, verifies
from bursar.stores.base import Store

MAX_LOOKS = 5
SUMS = ("carried", "retired")  # the kinds of records that stand for pruned ones


class Discrepancy(NamedTuple):
    """What the store holds, and what its records say.

    `what`: spent, reserved, window, account, record, correction, definition, signature or operator.
    """

    what: str
    key: str
    held: int | str
    recomputed: int | str

    def __str__(self) -> str:
        return f"{self.what} of {self.key}: the store holds {self.held}, its records say {self.recomputed}"


def audit(store: Store, *, operator: str | None = None) -> list[Discrepancy]:
    """Everything that does not add up (I2, I3, I4, I10), and what nobody was allowed to decide; empty where all is in order.
    Changes nothing.

    Accounts that calls are moving meanwhile are looked at again; what moves all the time is left out. What does not add up is
    looked for again, since records may be pruned meanwhile. A level of a rate cannot be rebuilt from records, so of rates only
    `reserved` is checked. `operator`: the public key that the store has to know. Raises StoreError.
    """
    return audited(store, operator=operator)[0]


def audited(store: Store, *, operator: str | None = None) -> tuple[list[Discrepancy], Kept]:
    """As `audit`, and what stands in the books as sums alone, because it was pruned."""
    found: list[Discrepancy] = []
    pruned = Kept()
    for _ in range(MAX_LOOKS):
        last = found
        before = {account.rule.key: account for account in store.accounts()}
        books = _Books(store)
        pruned = books.kept
        moved = {account.rule.key for account in store.accounts() if before.get(account.rule.key) != account}
        found = [*books.check(before, moved), *_forged(store, books.reversals, books.sums, operator)]
        if not moved and (not found or found == last):
            break
    else:
        found = [one for one in found if one in last]
    return found, pruned


class _Books:
    """The sums over all entries and open reservations, by account."""

    def __init__(self, store: Store) -> None:
        self.spent: dict[str, list[tuple[int, int]]] = defaultdict(list)  # (reserved at, amount)
        self.reserved: dict[str, int] = defaultdict(int)
        self.now_us = store.now_us()
        self.orphans: list[Entry] = []
        self.reversals: list[Entry] = []
        self.unlikely: list[Entry] = []
        self.sums: list[Entry] = []
        expired: set[str] = set()
        corrections: list[Entry] = []
        for entry in store.entries():
            if entry.kind == "expiry":
                expired.add(entry.id)
            if entry.kind in SUMS:
                self.sums.append(entry)
            elif entry.corrects is not None:
                corrections.append(entry)
            elif entry.cost_nanos < 0 or any(one < 0 for one in entry.amounts.values()):
                self.unlikely.append(entry)  # only a correction takes anything back
            if entry.kind == "reversal":
                self.reversals.append(entry)
            for key, amount in entry.amounts.items():
                self.spent[key].append((entry.reserved_us, amount))
        self.kept = kept(self.sums)
        self.orphans = [  # what they correct may have been pruned before them
            one for one in corrections if one.corrects not in expired and one.reserved_us >= self.kept.before_us
        ]
        for reservation in store.reservations():
            for key, _, amount in reservation.held:
                self.reserved[key] += amount

    def check(self, accounts: dict[str, Account], moved: set[str]) -> Iterator[Discrepancy]:
        for key, account in accounts.items():
            if key in moved:
                continue
            if account.reserved != self.reserved[key]:
                yield Discrepancy("reserved", key, account.reserved, self.reserved[key])
            if account.rule.kind == "window":
                spent = sum(amount for _, amount in self.spent[key])
                if account.spent != spent:
                    yield Discrepancy("spent", key, account.spent, spent)
            elif account.rule.kind == "rolling":
                yield from self._rolling(account)
        for key in {*self.spent, *self.reserved} - set(accounts) - moved:
            if sum(amount for _, amount in self.spent[key]) or self.reserved[key]:
                yield Discrepancy("account", key, "nothing", "amounts on it")
        yield from self._below_zero()
        for entry in self.unlikely:
            yield Discrepancy("record", entry.id, f"a {entry.kind} below 0", "nothing can cost less than nothing")
        for entry in self.orphans:
            yield Discrepancy("correction", entry.id, f"a correction of {entry.corrects}", "no such expiry")

    def _below_zero(self) -> Iterator[Discrepancy]:
        """Sums of what was pruned are judged together: a correction may have gone long after what it corrects, or an account."""
        together: Counter[str] = Counter()
        for entry in self.sums:
            together.update(entry.amounts)
            together["all costs"] += entry.cost_nanos
        for what, amount in together.items():
            if amount < 0:
                yield Discrepancy("record", f"sums of {what}", amount, "nothing can cost less than nothing")

    def _rolling(self, account: Account) -> Iterator[Discrepancy]:
        """Bucket by bucket: what has left the window is in the records alone."""
        key, width = account.rule.key, account.rule.period_us // 60
        sums: dict[int, int] = defaultdict(int)
        for at_us, amount in self.spent[key]:
            sums[at_us // width] += amount
        held = dict(account.buckets)
        oldest = (self.now_us - account.rule.period_us) // width
        # buckets that nobody has aged since may be older than the records
        there = (index for index in held if index >= oldest or index * width >= self.kept.before_us)
        for index in sorted({*there, *(index for index in sums if index >= oldest)}):
            if held.get(index, 0) != sums[index]:
                yield Discrepancy("window", f"{key} from {index * width} us on", held.get(index, 0), sums[index])
        total = sum(held.values())
        if account.spent != total:
            yield Discrepancy("spent", key, account.spent, total)


def _forged(store: Store, reversals: list[Entry], sums: list[Entry], pin: str | None) -> Iterator[Discrepancy]:
    """What only an operator may decide, and none has signed: every decision anew, as the store had to take it at its time."""
    held: Definitions = {}
    operators: list[tuple[int, str]] = []  # since when, and the public key
    last = 0
    for version, kind, name, definition in store.history():
        if version != last + 1:
            yield Discrepancy("definition", f"version {last + 1}", "nothing", f"it came before version {version}")
        last = version
        try:
            changes(kind, {name: definition}, held)
        except BursarError:
            yield Discrepancy("signature", f"{kind} {name}", "a decision", "no operator signed it")
        except Exception:  # noqa: BLE001 - rubbish that somebody wrote past the store may break anything
            yield Discrepancy("definition", f"{kind} {name}", "rubbish", "no Bursar has published it")
            continue
        held.setdefault(kind, {})[name] = Definition(version, definition)
        if kind == "operator" and (public := operator_of(held)):
            at_us = definition.get("at_us")
            operators.append((at_us if isinstance(at_us, int) else 0, public))
    if pin is not None and operator_of(held) != pin:
        yield Discrepancy("operator", "operator", operator_of(held) or "nobody", pin)
    for entry in sums:
        if prune_name(entry.settled_us + 1) not in held.get("prune", {}):
            yield Discrepancy("record", entry.id, "sums of what was pruned", "nobody decided to prune")
    for entry in reversals:
        signed = {"signature": entry.facts.get("proof", "")}
        since = operators[0][0] if operators else entry.settled_us + 1
        if entry.settled_us >= since and not any(
            verifies(public, "release", str(entry.corrects), signed) for _, public in operators
        ):
            yield Discrepancy("signature", f"reversal {entry.id}", "a release", "no operator signed it")
