"""`bursar prune`: old records give way to their sums."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from bursar.cli.operate import Duration, deciding, opened_operator
from bursar.cli.options import store_option
from bursar.money import dollar_text
from bursar.records import instant


@click.command()
@store_option
@deciding
@click.option(
    "--before", type=click.DateTime(), help="Prune what was settled before this time, in UTC, such as 2026-01-01."
)
@click.option("--keep", "keep_s", type=Duration(), help="Prune what was settled longer ago than this, such as 400d.")
def command(
    store: str, key: Path | None, by: str | None, why: str, before: datetime | None, keep_s: float | None
) -> None:
    """Delete old usage records and keep their sums, so that `bursar audit` adds up. Needs the key of the operator, if there is one.

    What belongs to a window that is open stays, and what was reserved, has expired, and may still be settled: for 93 days. Accounts
    go with the last of their records: those of windows that ended, and of runs, which begin anew if they come back after that.
    """
    if (before is None) == (keep_s is None):
        raise click.UsageError("Say what to prune: --before 2026-01-01, or --keep 400d.")
    with opened_operator(store, key, by) as operator:
        if before is not None:
            wanted_us = int(before.replace(tzinfo=UTC).timestamp()) * 1_000_000
        else:
            wanted_us = operator.store.now_us() - int((keep_s or 0) * 1e6)
        pruned, until = operator.prune(wanted_us, why=why)
    if until.why:
        click.echo(f"Not up to {instant(wanted_us):%Y-%m-%d %H:%M}: {until.why}.")
    click.echo(
        f"{pruned.records} records of before {instant(until.before_us):%Y-%m-%d %H:%M} UTC, {dollar_text(pruned.cost_nanos)} USD, "
        "were pruned; their sums are kept."
    )
    if pruned.accounts:
        click.echo(f"{pruned.accounts} accounts, on which nothing was booked since, were retired.")
