"""`bursar drain`: usage records move out of Redis into a SQL store."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import click

from bursar.stores import open_store


@click.command()
@click.option(
    "--from",
    "source",
    default=lambda: os.environ.get("BURSAR_STORE"),
    show_default="BURSAR_STORE",
    required=True,
    help="The URL of the Redis store.",
)
@click.option(
    "--to", "target", required=True, help="The URL of a store on SQLite or PostgreSQL, which is made if need be."
)
def command(source: str, target: str) -> None:
    """Move every usage record that has ended so far; they are read from there afterwards. Run it again and again."""
    if not urlsplit(source).scheme.startswith("redis"):
        raise click.UsageError("Only Redis is drained: give --from a URL such as redis://host:6379/0.")
    if urlsplit(target).scheme not in ("sqlite", "postgresql", "postgres"):
        raise click.UsageError("Records are kept in SQL: give --to a URL such as sqlite:///records.db.")
    from bursar.stores.redis import RedisStore
    from bursar.stores.redis.drain import drain

    opened = open_store(source, with_leases=False)
    assert isinstance(opened, RedisStore)
    try:
        into = open_store(target, with_leases=False)
        try:
            moved = drain(opened, into)
        finally:
            into.close()
    finally:
        opened.close()
    click.echo(f"{moved} records moved.")
