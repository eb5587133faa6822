"""`bursar audit`: whether the books add up."""

from __future__ import annotations

from typing import Any

import click

from bursar.audit import audit
from bursar.cli.options import check_store, form_option, show, store_option
from bursar.stores import open_store, public_url


@click.command()
@store_option
@form_option
@click.pass_context
def command(ctx: click.Context, store: str, form: str) -> None:
    """Work every balance out anew from records and open reservations; exits with 1 where something differs. Repairs nothing."""
    check_store(store)
    opened = open_store(store)
    try:
        found = audit(opened)
    finally:
        opened.close()
    rows: list[dict[str, Any]] = [one._asdict() for one in found]
    if rows or form != "table":
        show(rows, ["what", "key", "held", "recomputed"], form, f"What does not add up in {public_url(store)}")
    else:
        click.echo("Every balance is what its records say.")
    if rows:
        ctx.exit(1)
