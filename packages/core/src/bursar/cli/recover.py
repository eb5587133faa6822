"""`bursar recover`: what processes that died had booked on their leases gets to the store."""

from __future__ import annotations

from pathlib import Path

import click

from bursar.cli.options import form_option, show, store_option
from bursar.records import amount
from bursar.stores import open_store
from bursar.stores.leases import recover


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@store_option
@form_option
def command(folder: Path, store: str, form: str) -> None:
    """Book the records in the journals of FOLDER whose processes live no more.

    The next process with leases in that folder does the same by itself. What a process held when it died, and its journal
    cannot account for, stays booked as estimated.
    """
    opened = open_store(store, with_leases=False)
    try:
        found = recover(opened, folder)
    finally:
        opened.close()
    rows = [
        {
            "lease": one.lease,
            "journal": one.journal.name,
            "records": one.records,
            "estimated": ", ".join(f"{amount(held, unit):f} {unit}" for unit, held in one.estimated.items() if held),
        }
        for one in found
    ]
    if rows or form != "table":
        show(rows, ["lease", "journal", "records", "estimated"], form, f"Recovered from {folder}")
    else:
        click.echo("Nothing is left to recover.")
