"""`bursar status`: the budgets as they stand now."""

from __future__ import annotations

import click

from bursar.cli.options import form_option, open_books, show, store_option, tags_argument

COLUMNS = ["name", "scope", "unit", "limit", "spent", "reserved", "available", "overrun", "refused", "from", "until"]


@click.command()
@tags_argument
@store_option
@form_option
def command(tags: dict[str, str], store: str, form: str) -> None:
    """Show the accounts of all budgets in the store, or of those with these tags (run=r-17)."""
    with open_books(store) as bursar:
        rows = []
        for one in bursar.status(**tags):
            since, until = one.window
            rows.append(
                {
                    "name": one.name,
                    "scope": one.scope,
                    "unit": one.unit,
                    "limit": one.limit,
                    "spent": one.spent,
                    "reserved": one.reserved,
                    "available": one.available,
                    "overrun": one.overrun,
                    "refused": one.refused,
                    "from": None if since is None else since.isoformat(),
                    "until": None if until is None else until.isoformat(),
                }
            )
    show(rows, COLUMNS, form, f"Budgets in {store}")
