"""`bursar erase`: a tag's value gives way to a marker."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from bursar.cli.operate import deciding, opened_operator
from bursar.cli.options import printable, store_option, tag_options, tags_argument


@click.command()
@tags_argument
@tag_options
@store_option
@deciding
@click.pass_context
def command(ctx: click.Context, tags: dict[str, str], store: str, key: Path | None, by: str | None, why: str) -> None:
    """Erase a person: put a marker in the place of a tag's value, wherever the store names it: --user alice, or user=alice.

    No amount changes, and `bursar audit` adds up as before. Needs the operator's key, if there is one. The marker is random.
    """
    if len(tags) != 1:
        raise click.UsageError("Name one tag and its value, such as --user alice.")
    ((tag, value),) = tags.items()
    marker = f"erased-{secrets.token_hex(4)}"
    with opened_operator(store, key, by) as operator:
        erased = operator.erase(tag, value, marker=marker, why=why)
    if not any(erased):
        raise click.ClickException(
            printable(f"Nothing in the store names {tag}={value}. Write it as `bursar records` shows it.")
        )
    click.echo(
        f"Erased in {erased.records} records, {erased.accounts} accounts, {erased.reservations} open reservations, "
        f"{erased.alerts} alerts and {erased.definitions} decisions: {tag} is {marker} there now."
    )
    if erased.left:
        click.echo(f"{erased.left} decisions still name it: a former operator has signed them.", err=True)
        ctx.exit(1)
