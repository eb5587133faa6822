"""What must hold when all is over: the provider's account against the records, the limits, the audit, and what is still held."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from bursar.audit import audit
from bursar.commands import Entry
from bursar.stores.base import Store
from bursar.testing.provider.account import Served


class Found(NamedTuple):
    """The figures of a run, and everything that is wrong."""

    figures: dict[str, int]
    wrong: list[str]


class _Call:
    """What the books say of one call: its cost, and whether that is exact."""

    def __init__(self) -> None:
        self.cost_nanos = 0
        self.endings = 0
        self.is_exact = False
        self.process = ""  # of a lease: whose it was

    def add(self, entry: Entry) -> None:
        self.cost_nanos += entry.cost_nanos
        self.endings += entry.corrects is None
        self.is_exact |= not entry.estimated
        self.process = str(entry.draft["tags"].get("lease", "")).rpartition(" ")[2]


def check(store: Store, served: Iterable[Served], acknowledged: Iterable[str], limit_nanos: int) -> Found:
    """Of a store in which everything has ended or expired."""
    calls: dict[str, _Call] = defaultdict(_Call)
    figures: Counter[str] = Counter()
    for entry in store.entries():
        figures[f"records: {entry.kind}"] += 1
        if entry.kind != "refusal":
            calls[entry.corrects or entry.id].add(entry)
    leases = {id: call for id, call in calls.items() if call.process}
    wrong: list[str] = []
    billed_by_team: Counter[str] = Counter()
    by_lease: Counter[str] = Counter()  # what the leases of processes that died have to stand for
    sent = set()
    for one in served:
        if "user" not in one.request and not one.billed:  # who was killed had sent half of it
            continue
        process, team, id = str(one.request["user"]).split()
        sent.add(id)
        figures["requests"] += 1
        figures["billed"] += one.billed
        figures["billed_nanos"] += one.cost_nanos
        billed_by_team[team] += one.cost_nanos
        call = calls.get(id)
        if call is None:
            by_lease[process] += one.cost_nanos
            figures["covered by a lease"] += one.billed
        elif call.is_exact:
            figures["exact"] += 1
            if call.cost_nanos != one.cost_nanos:
                wrong.append(f"{id} was billed at {one.cost_nanos}, and is booked at {call.cost_nanos}")
        else:
            figures["estimated"] += 1
            if call.cost_nanos < one.cost_nanos:
                wrong.append(f"{id} was billed at {one.cost_nanos}, and is estimated at {call.cost_nanos}")
    figures["booked_nanos"] = sum(call.cost_nanos for call in calls.values())
    wrong += [f"{id} has {call.endings} ends" for id, call in calls.items() if call.endings != 1]
    wrong += [
        f"{id} is booked at {call.cost_nanos}, and was never billed"
        for id, call in calls.items()
        if call.is_exact and call.cost_nanos and id not in sent and id not in leases
    ]
    estimated = Counter({call.process: 0 for call in leases.values()})
    for call in leases.values():
        estimated[call.process] += call.cost_nanos
    wrong += [
        f"the process {process} has {cost} of calls that are on no record, and its leases {estimated[process]}"
        for process, cost in by_lease.items()
        if cost > estimated[process]
    ]
    for id in acknowledged:
        figures["acknowledged"] += 1
        if id not in calls or not calls[id].is_exact:
            wrong.append(f"the settlement of {id} was acknowledged, and is lost (I7)")
    wrong += [
        f"the team {team} was billed {cost} of {limit_nanos} (I1)"
        for team, cost in billed_by_team.items()
        if cost > limit_nanos
    ]
    for account in store.accounts():
        if account.spent > account.rule.limit:
            wrong.append(f"{account.rule.key} has {account.spent} of {account.rule.limit} on its books (I1)")
        if account.reserved:
            wrong.append(f"{account.rule.key} still holds {account.reserved} (I9)")
    figures["teams"] = len(billed_by_team)
    figures["leases"] = len(leases)
    wrong += [f"{id} is still open (I9)" for id in (one.id for one in store.reservations())]
    wrong += [str(one) for one in audit(store)]
    return Found(dict(figures), wrong)
