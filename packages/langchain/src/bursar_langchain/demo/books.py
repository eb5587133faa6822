"""The provider's account beside the ledger, scene by scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bursar import UsageRecord
from bursar.cli.books import money, table

if TYPE_CHECKING:
    from rich.table import Table

    from bursar_langchain.demo.scenes import Played


def accounts(played: Sequence[tuple[str, Played, list[UsageRecord]]]) -> tuple[Table, bool]:
    """The ledger of each scene beside what the provider billed, and whether it agrees everywhere."""
    columns = ("scene", "billed calls", "billed", "ledger", "of it estimated", "")
    made = table("The provider's account beside the ledger", *columns)
    agrees = True
    for name, end, records in played:
        calls = [record for record in records if "tool" not in record.tags]
        ledger = sum(record.cost_nanos for record in calls)
        estimated = sum(record.cost_nanos for record in calls if record.estimated)
        if end.billed_nanos is None:
            made.add_row(name, "-", "-", money(ledger), money(estimated), "")
            continue
        good = ledger == end.billed_nanos or (estimated > 0 and ledger - estimated <= end.billed_nanos <= ledger)
        agrees = agrees and good
        verdict = "equal" if ledger == end.billed_nanos else "covered" if good else "WRONG"
        made.add_row(name, str(end.calls), money(end.billed_nanos), money(ledger), money(estimated), verdict)
    return made, agrees
