"""`bursar audit`: whether the books add up."""

from __future__ import annotations

import os
from typing import Any

import click

from bursar.audit import Discrepancy, audited
from bursar.cli.options import check_store, form_option, show, store_option
from bursar.money import dollar_text
from bursar.records import instant
from bursar.seal import is_broken
from bursar.seal import seal as made_seal
from bursar.stores import open_store, public_url


@click.command()
@store_option
@form_option
@click.option(
    "--seal", is_flag=True, help="Print the seal of the books too: one line, to keep where no agent can write."
)
@click.option("--against", metavar="SEAL", help="A seal of before: whether what it covers is still what it was.")
@click.pass_context
def command(ctx: click.Context, store: str, form: str, seal: bool, against: str | None) -> None:
    """Work every balance out anew from records and open reservations, and verify every decision that only an operator may take.

    Exits with 1 where something differs. Repairs nothing. With the environment's BURSAR_OPERATOR the operator has to be that one.
    """
    check_store(store)
    opened = open_store(store, with_leases=False)
    try:
        found, kept = audited(opened, operator=os.environ.get("BURSAR_OPERATOR"))
        if against is not None and is_broken(opened, against):
            found.append(Discrepancy("seal", "records and decisions", "others", against))
        line = made_seal(opened) if seal else ""
    finally:
        opened.close()
    rows: list[dict[str, Any]] = [one._asdict() for one in found]
    if rows or form != "table":
        show(rows, ["what", "key", "held", "recomputed"], form, f"What does not add up in {public_url(store)}")
    else:
        click.echo("Every balance is what its records say.")
    if kept.records and form == "table":
        click.echo(
            f"{kept.records} records of before {instant(kept.before_us):%Y-%m-%d %H:%M} UTC, "
            f"{dollar_text(kept.cost_nanos)} USD, were pruned: their sums alone are there."
        )
    if line:
        click.echo(line)
    if rows:
        ctx.exit(1)
