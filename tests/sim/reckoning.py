"""The reckoning: when a world is over, its rows, records and alerts, what its clients were told, and what the provider billed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from bursar.audit import audit
from bursar.commands import Entry
from sim.books import Broken
from sim.market import Fact
from sim.programs import Scenario


def reckon(scenario: Scenario) -> None:
    """Raise Broken for whatever does not add up."""
    server, books = scenario.world.server, scenario.world.auditor.books
    entries = list(server.entries())
    if server.open_reservations() or any(call.state == "open" for call in books.calls.values()):
        raise Broken(f"I9: {[one.id for one in server.reservations()]} are open, and nobody is left to end them")
    told = {entry.id: entry for entry in entries if entry.kind != "refusal"}
    for id in {**books.entries, **told}:
        if told.get(id) != books.entries.get(id):
            raise Broken(f"I4, I10: the record {id} was {books.entries.get(id)}, it is {told.get(id)}")
    _refusals(scenario, entries)
    _rows(scenario, entries)
    alerts = [alert.id for alert, _ in server.alerts()]
    if sorted(alerts) != sorted(books.alerts):
        raise Broken(f"I10: the outbox tells {alerts}, what happened is {books.alerts}")
    found = audit(server)
    if found:
        raise Broken(f"I4: {'; '.join(map(str, found))}")
    _calls(scenario, entries)
    _leases(scenario, entries)
    if _is_strict(scenario):
        _caps(scenario, entries)


def _refusals(scenario: Scenario, entries: list[Entry]) -> None:
    told: dict[str, int] = defaultdict(int)
    for entry in entries:
        if entry.kind == "refusal":
            told[entry.facts["account"]] += 1
            if entry.amounts or entry.cost_nanos:
                raise Broken(f"I6: a refusal holds nothing, {entry} does")
    for key, stand in scenario.world.auditor.books.stands.items():
        due = sum(min(60, times) for times in stand.refused.values())
        if told[key] != due:
            raise Broken(f"I6: {told[key]} refusals by {key} are on record, there were {due}")


def _rows(scenario: Scenario, entries: list[Entry]) -> None:
    """I2, I3, I4: every row, and every balance from the records alone."""
    books = scenario.world.auditor.books
    sums: dict[str, int] = defaultdict(int)
    for entry in entries:
        for key, amount in entry.amounts.items():
            sums[key] += amount
    rows = {row.rule.key: row for row in scenario.world.server.accounts()}
    if set(rows) != set(books.stands):
        raise Broken(f"I2: there are the accounts {sorted(rows)}, there must be {sorted(books.stands)}")
    for key, row in rows.items():
        stand = books.stands[key]
        difference = stand.differs(row)
        if difference:
            raise Broken(difference)
        if not stand.rolling_us and stand.spec.unit != "slots" and row.spent != sums[key]:
            raise Broken(f"I4: the records of {key} add up to {sums[key]}, it has {row.spent} spent")
    for budget, number in books.counts.items():
        if number > scenario.max_accounts and not _has_charges(scenario):
            raise Broken(f"{budget} has {number} accounts, and may have {scenario.max_accounts}")


def _has_charges(scenario: Scenario) -> bool:
    return any(fact.outcome == "charge" for fact in scenario.facts.values())


def _calls(scenario: Scenario, entries: list[Entry]) -> None:
    """I7, I10, I11: what each client was told, and what each call was billed, is what the records say."""
    paid: dict[str, int] = defaultdict(int)
    known: set[str] = set()
    reversed_ones: set[str] = set()
    booked: set[str] = set()
    for entry in entries:
        if entry.kind == "refusal":
            continue
        id = entry.corrects or entry.id
        paid[id] += entry.cost_nanos
        booked.add(id)
        if not entry.estimated:
            known.add(id)
        if entry.kind == "reversal":
            reversed_ones.add(id)
    excused = scenario.world.lost | scenario.world.auditor.full | reversed_ones
    for fact in scenario.facts.values():
        if fact.id not in excused:
            _call(scenario, fact, paid[fact.id], known=fact.id in known, booked=fact.id in booked)


def _call(scenario: Scenario, fact: Fact, paid: int, *, known: bool, booked: bool) -> None:
    bill = fact.bill_nanos
    told = f"{fact}: its records say {paid}"
    lives = fact.kept is not None and fact.kept.alive
    if bill is None:
        if paid and known:
            raise Broken(f"I10: it was never sent. {told}")
    elif fact.ended == "settled" or (lives and not fact.rejected and _is_exact(fact)):
        if paid != bill or not known:
            raise Broken(f"I7, I11: it was settled. {told}")
    elif fact.ended == "released":
        if paid and (known or not scenario.open):  # one that went out unguarded may have been late on its way
            raise Broken(f"I5: it was given back. {told}")
    elif fact.ended == "estimated" or lives:
        if not booked or (fact.strict and paid < bill):
            raise Broken(f"I7: it may have been billed. {told}")
    elif not bill or not scenario.charge_on_expiry or scenario.open or scenario.leased or fact.outcome == "charge":
        return
    elif not booked or (fact.strict and paid < bill and not fact.rejected):
        raise Broken(f"I5: it was sent, and nobody came back. {told}")


def _leases(scenario: Scenario, entries: list[Entry]) -> None:
    """What stays booked on a lease: nothing of a process that ended as it should, else at most what nobody spent of it."""
    books, faults = scenario.world.auditor.books, scenario.world.faults.rates
    if not books.granted or "journal_lost" in faults:
        return
    own: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    booked = {entry.corrects or entry.id for entry in entries}
    for entry in entries:
        for key, amount in entry.amounts.items():
            own[entry.corrects or entry.id][key] += amount
    orphans: dict[str, int] = defaultdict(int)
    for fact in scenario.facts.values():
        if fact.strict and fact.lease and fact.id not in booked:
            orphans[fact.lease] += fact.bill_nanos or 0
    hosts = {host.name: host for host in scenario.hosts}
    for id, granted in books.granted.items():
        if books.calls[id].state == "reversal":
            continue
        lives = hosts[id.split("-")[1].split(".")[0]].alive
        for key, amount in granted.items():
            left = max(0, amount - books.drawn.get(id, {}).get(key, 0))
            if (
                not (orphans[id] if books.stands[key].spec.unit == "USD" else 0)
                <= own[id][key]
                <= (0 if lives else left)
            ):
                told = f"{own[id][key]} stay booked, {left} of {amount} were not spent, {orphans[id]} were billed"
                raise Broken(f"I5, I7: the lease {id} on {key}: {told}")


def _is_exact(fact: Fact) -> bool:
    return fact.outcome in ("answered", "renamed", "tool")


def _is_strict(scenario: Scenario) -> bool:
    """Whether nothing that no estimate can bound has happened here."""
    world: Any = scenario.world
    return (
        scenario.strict
        and scenario.charge_on_expiry
        and not scenario.open
        and not scenario.lowered
        and not {"tail_lost", "reversal", "journal_lost"} & set(world.faults.rates)
        and not _has_charges(scenario)
    )


def _caps(scenario: Scenario, entries: list[Entry]) -> None:
    """The promise itself, without a look at the store's balances: what was billed is within the limit, on every account."""
    books = scenario.world.auditor.books
    billed: dict[str, int] = defaultdict(int)
    for entry in entries:
        fact = scenario.facts.get(entry.id)
        for key in entry.amounts if fact is not None else ():
            billed[key] += fact.bill_nanos or 0  # type: ignore[union-attr]
    # a lease that expired is booked, and so is for a while what was spent of it
    expired = any(entry.kind == "expiry" and entry.id in books.granted for entry in entries)
    for key, stand in books.stands.items():
        spec = stand.spec
        if spec.unit != "USD" or not spec.enforce:
            continue
        if stand.overrun and not expired:
            raise Broken(f"I1: {key} is strict, and tells of an overrun of {stand.overrun}")
        if not stand.rolling_us and not spec.rate_us and billed[key] > spec.limit:
            raise Broken(f"I1: {billed[key]} were billed on {key}, which has a limit of {spec.limit}")
