"""`bursar status`: the budgets as they stand now."""

from __future__ import annotations

from typing import Any

import click

from bursar.cli.options import form_option, open_books, show, store_option, tags_argument
from bursar.records import BudgetStatus
from bursar.stores import public_url

SHORT = ["budget", "limit", "spent", "reserved", "available", "refused", "until (UTC)"]
LONG = ["name", "scope", "unit", "limit", "spent", "reserved", "available", "overrun", "refused", "from", "until"]


@click.command()
@tags_argument
@store_option
@form_option
def command(tags: dict[str, str], store: str, form: str) -> None:
    """Show the accounts of all budgets in the store, or of those with these tags (run=r-17)."""
    with open_books(store) as bursar:
        found = bursar.status(**tags)
    if form == "table":
        show(map(_short, found), SHORT, form, f"Budgets in {public_url(store)}")
    else:
        show(map(_long, found), LONG, form, "")


def _short(status: BudgetStatus) -> dict[str, Any]:
    scope = " ".join(f"{tag}={value}" for tag, value in status.scope.items())
    until = status.window[1]
    return {
        "budget": f"{status.name} {scope}".rstrip(),
        "limit": f"{status.limit} {status.unit}",
        "spent": status.spent,
        "reserved": status.reserved,
        "available": status.available,
        "refused": status.refused,
        "until (UTC)": "" if until is None else until.strftime("%Y-%m-%d %H:%M"),
    }


def _long(status: BudgetStatus) -> dict[str, Any]:
    since, until = status.window
    plain = {name: getattr(status, name) for name in LONG if name not in ("from", "until")}
    return plain | {"from": since and since.isoformat(), "until": until and until.isoformat()}
