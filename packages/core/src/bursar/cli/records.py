"""`bursar records`: the usage records, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

from bursar.cli.options import form_option, open_books, show, store_option, tags_argument
from bursar.records import UsageRecord

SHORT = [
    "settled_at",
    "outcome",
    "kind",
    "estimated",
    "agent",
    "run",
    "tool",
    "model",
    "input_tokens",
    "output_tokens",
    "cost_usd",
]
TAGS = [
    "org",
    "team",
    "project",
    "user",
    "customer",
    "workflow",
    "agent",
    "run",
    "tool",
    "connection",
    "provider",
    "model",
]
LONG = [
    "id", "kind", "corrects", "outcome", "estimated", "reason", "reserved_at", "settled_at", "latency_ms", "attempts", *TAGS,
    "model_answered", "usage", "cost_usd", "cost_nanos", "price_version", "amounts", "path", "headers",
]  # fmt: skip


@click.command()
@tags_argument
@store_option
@form_option
@click.option("--limit", type=click.IntRange(1), help="At most so many records.")
def command(tags: dict[str, str], store: str, form: str, limit: int | None) -> None:
    """Show the usage records with these tags (agent=planner), oldest first."""
    with open_books(store) as bursar:
        rows = _rows(islice(bursar.records(**tags), limit), flat=form != "json")
        show(rows, SHORT if form == "table" else LONG, form, f"Usage records in {store}")


def _rows(records: Iterator[UsageRecord], *, flat: bool) -> Iterator[dict[str, Any]]:
    for record in records:
        row = record.as_dict()
        yield {**record.tags, **record.usage, **row} if flat else row
