"""`bursar records`: the usage records, one line each."""

from __future__ import annotations

from itertools import islice
from typing import Any

import click

from bursar.cli.options import form_option, open_books, show, store_option, tags_argument
from bursar.records import UsageRecord
from bursar.stores import public_url

SHORT = ["time (UTC)", "outcome", "agent", "run", "call", "in", "out", "cost"]
TAGS = "org team project user customer workflow agent run tool connection provider model".split()  # noqa: SIM905 - a row of words
LONG = [
    *(
        "id",
        "kind",
        "corrects",
        "outcome",
        "estimated",
        "reason",
        "reserved_at",
        "settled_at",
        "latency_ms",
        "attempts",
    ),
    *TAGS,
    *("model_asked", "actions", "shadowed"),
    *("model_answered", "usage", "cost_usd", "cost_nanos", "price_version", "amounts", "path", "headers"),
]


@click.command()
@tags_argument
@store_option
@form_option
@click.option("--limit", type=click.IntRange(1), help="At most so many records.")
def command(tags: dict[str, str], store: str, form: str, limit: int | None) -> None:
    """Show the usage records with these tags (agent=planner), oldest first."""
    with open_books(store) as bursar:
        found = islice(bursar.records(**tags), limit)
        if form == "table":
            show(map(_short, found), SHORT, form, f"Usage records in {public_url(store)}")
        elif form == "csv":
            show(({**record.tags, **record.as_dict()} for record in found), LONG, form, "")
        else:
            show((record.as_dict() for record in found), [], form, "")


def _short(record: UsageRecord) -> dict[str, Any]:
    outcome = (
        record.outcome if record.kind in ("settlement", "charge", "refusal") else f"{record.kind} {record.outcome}"
    )
    return {
        "time (UTC)": record.settled_at.strftime("%m-%d %H:%M:%S"),
        "outcome": f"{outcome} (estimated)" if record.estimated else outcome,
        "agent": record.tags.get("agent"),
        "run": record.tags.get("run"),
        "call": record.tags.get("tool") or record.tags.get("model"),
        "in": record.usage.get("input_tokens"),
        "out": record.usage.get("output_tokens"),
        "cost": record.cost_usd,
    }
