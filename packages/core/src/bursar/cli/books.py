"""The books as tables: who spent what, and what was stopped; for commands, those of other packages too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from bursar.money import dollar_text
from bursar.records import UsageRecord
from bursar.texts import printable

ROWS = 8
TEXT_WIDTH = 8  # of a column of text at least
NUMBERS = frozenset(
    {"calls", "cost", "of it estimated", "billed calls", "billed", "ledger", "in", "out"}
    | {"limit", "spent", "reserved", "available", "refused", "overrun", "saved", "held", "recomputed"}
)


def money(nanos: int) -> str:
    """Nano-dollars as people read them: `$0.0075`."""
    return f"${dollar_text(nanos)}"


def plain(text: str | None) -> Text:
    """Text for a terminal: no markup, and no control characters from tags or models."""
    return Text(printable(text or "", len(text or "")))


def table(title: str, *columns: str) -> Table:
    """An empty table; columns of numbers stand to the right, and are not wrapped: half of a number is another."""
    made = Table(title=plain(title), title_justify="left", title_style="bold")
    for column in columns:
        if column in NUMBERS:
            made.add_column(column, justify="right", overflow="ellipsis", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made


def fits(columns: Sequence[str], cells: Iterable[Sequence[str]], width: int) -> bool:
    """Whether such a table fits into a terminal with all of its numbers whole: half of a number is another one."""
    needed = [len(column) if column in NUMBERS else TEXT_WIDTH for column in columns]
    for row in cells:
        needed = [
            max(most, len(cell)) if column in NUMBERS else most
            for most, cell, column in zip(needed, row, columns, strict=True)
        ]
    return sum(needed) + 3 * len(columns) + 1 <= width


def spending(records: Iterable[UsageRecord], tag: str) -> Table:
    """What was spent by each value of a tag, the dearest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for record in records:
        if tag in record.tags and record.outcome != "blocked":
            row = sums[record.tags[tag]]
            row[0] += 1
            row[1] += record.cost_nanos
            row[2] += record.cost_nanos if record.estimated else 0
    made = table(f"Spent by {tag}", tag, "calls", "cost", "of it estimated")
    ranked = sorted(sums.items(), key=lambda item: (-item[1][1], item[0]))
    for name, (calls, cost, estimated) in ranked[:ROWS]:
        made.add_row(plain(name), str(calls), money(cost), money(estimated))
    if rest := ranked[ROWS:]:
        calls, cost, estimated = (sum(row[column] for _, row in rest) for column in range(3))
        made.add_row(f"{len(rest)} more", str(calls), money(cost), money(estimated))
    return made


def stops(records: Iterable[UsageRecord]) -> Table:
    """What was refused, when and why."""
    blocked = [record for record in records if record.outcome == "blocked"]
    made = table(f"Stopped: {len(blocked)} calls refused before they were sent", "when (UTC)", "agent", "run", "why")
    for record in blocked[:ROWS]:
        when = record.settled_at.strftime("%H:%M:%S.%f")[:-3]
        made.add_row(when, plain(record.tags.get("agent")), plain(record.tags.get("run")), plain(record.reason))
    if len(blocked) > ROWS:
        made.add_row(f"{len(blocked) - ROWS} more", "", "", "")
    return made
