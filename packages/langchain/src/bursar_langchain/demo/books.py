"""The books of the demo as tables: who spent what, what was stopped, and the provider's account beside the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from bursar import UsageRecord
from bursar.money import dollar_text

if TYPE_CHECKING:
    from bursar_langchain.demo.scenes import Played

ROWS = 8
_NUMBERS = {"calls", "cost", "of it estimated", "billed calls", "billed", "ledger"}


def _money(nanos: int) -> str:
    return f"${dollar_text(nanos)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", overflow="fold")
    return table


def spending(records: Iterable[UsageRecord], tag: str) -> Table:
    """What was spent by each value of a tag, the dearest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for record in records:
        if tag in record.tags and record.outcome != "blocked":
            row = sums[record.tags[tag]]
            row[0] += 1
            row[1] += record.cost_nanos
            row[2] += record.cost_nanos if record.estimated else 0
    table = _table(f"Spent by {tag}", tag, "calls", "cost", "of it estimated")
    ranked = sorted(sums.items(), key=lambda item: (-item[1][1], item[0]))
    for name, (calls, cost, estimated) in ranked[:ROWS]:
        table.add_row(name, str(calls), _money(cost), _money(estimated))
    if rest := ranked[ROWS:]:
        calls, cost, estimated = (sum(row[column] for _, row in rest) for column in range(3))
        table.add_row(f"{len(rest)} more", str(calls), _money(cost), _money(estimated))
    return table


def stops(records: Iterable[UsageRecord]) -> Table:
    """What was refused, when and why."""
    blocked = [record for record in records if record.outcome == "blocked"]
    table = _table(f"Stopped: {len(blocked)} calls refused before they were sent", "when (UTC)", "agent", "run", "why")
    for record in blocked[:ROWS]:
        when = record.settled_at.strftime("%H:%M:%S.%f")[:-3]
        table.add_row(when, record.tags.get("agent"), record.tags.get("run"), record.reason)
    if len(blocked) > ROWS:
        table.add_row(f"{len(blocked) - ROWS} more", "", "", "")
    return table


def accounts(played: Sequence[tuple[str, Played, list[UsageRecord]]]) -> tuple[Table, bool]:
    """The ledger of each scene beside what the provider billed, and whether it agrees everywhere."""
    table = _table(
        "The provider's account beside the ledger", "scene", "billed calls", "billed", "ledger", "of it estimated", ""
    )
    agrees = True
    for name, end, records in played:
        calls = [record for record in records if "model" in record.tags]
        ledger = sum(record.cost_nanos for record in calls)
        estimated = sum(record.cost_nanos for record in calls if record.estimated)
        if end.billed_nanos is None:
            table.add_row(name, "-", "-", _money(ledger), _money(estimated), "")
            continue
        good = ledger == end.billed_nanos or (estimated > 0 and ledger - estimated <= end.billed_nanos <= ledger)
        agrees = agrees and good
        verdict = "equal" if ledger == end.billed_nanos else "covered" if good else "WRONG"
        table.add_row(name, str(end.calls), _money(end.billed_nanos), _money(ledger), _money(estimated), verdict)
    return table, agrees
