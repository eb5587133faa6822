"""`bursar prices show MODEL`: the rates of a model, as they hold at a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import click

from bursar.errors import UnknownPrice
from bursar.prices import ModelPrice, PriceBook
from bursar.prices.rates import UNITS

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNIT_NAMES = {"mtok": "1M tokens", "mchars": "1M characters", "hour": "hour of audio"}


@click.group()
def command() -> None:
    """Prices of models."""


@command.command()
@click.argument("model")
@click.option("--provider", "-p", help="Who bills it, in any spelling; without it, every provider that has the model.")
@click.option("--at", default="now", show_default=True, help="The time: now, or an instant like 2026-11-22T12:00Z.")
def show(model: str, provider: str | None, at: str) -> None:
    """Show the rates of MODEL: standard and tiers, fees of tools, limits, since when, and from which source."""
    from rich.console import Console

    book, at_us = PriceBook.packaged(), _instant_us(at)
    console = Console()
    found = _found(book, model, provider, at_us)
    for price in found:
        console.print(_table(price))
        fees = [f"{tool} {_plain(fee / 10**9)}" for tool, fee in sorted(price.rates().fees.items())]
        if fees:
            console.print(f"Tools, each: {', '.join(fees)}.", highlight=False)
    console.print(f"Prices {book.version}, in US dollars.", style="dim", highlight=False)


def _found(book: PriceBook, model: str, provider: str | None, at_us: int) -> list[ModelPrice]:
    first, _, rest = model.partition("/")
    if provider is not None:
        return [book.find(provider, model, at_us)]
    hosts = [host for host in book.table.providers if book.table.row(host, model.lower())]
    if not hosts and rest:
        return [book.find(first, rest, at_us)]
    if not hosts:
        for host in ("openai", "anthropic", "google", "bedrock", "mistral", "xai", "openrouter", "groq"):
            try:
                return [book.find(host, model, at_us)]
            except UnknownPrice:
                continue  # the next may have it; when none has, the error below names the nearest
        return [book.find(provider or "openai", model, at_us)]
    return [book.find(host, model, at_us) for host in hosts]


def _table(price: ModelPrice) -> Any:
    from rich.table import Table

    since = f"since {price.effective_from}" if price.effective_from else "first known price"
    limits = [
        f"{count:,} tokens {name}"
        for name, count in (("context", price.context_window), ("output", price.max_output_tokens))
        if count
    ]
    table = Table(
        title=f"{price.provider}/{price.model}",
        caption=", ".join([price.mode, since, f"source: {price.source}", *limits]),
    )
    tiers = ("standard", *price.tiers)
    table.add_column("per", no_wrap=True)
    for tier in tiers:
        table.add_column(tier, justify="right")
    columns = [price.rates(tier, batch=tier == "batch") for tier in tiers]
    for unit in UNITS:
        if any(unit in column.text for column in columns):
            table.add_row(_label(unit), *(_amount(column.text.get(unit)) for column in columns))
    return table


def _label(unit: str) -> str:
    if unit.startswith("per_"):
        return unit.removeprefix("per_").replace("_", " ")
    what, _, per = unit.rpartition("_")
    return f"{what.replace('_', ' ')}, {_UNIT_NAMES[per]}"


def _amount(amount: Any) -> str:
    if amount is None:
        return "-"
    if isinstance(amount, str):
        return _plain(Fraction(amount))
    return "\n".join(
        [_plain(Fraction(amount[0])), *(f"over {start:,}: {_plain(Fraction(price))}" for start, price in amount[1:])]
    )


def _plain(value: Fraction) -> str:
    text = f"{float(value):.6f}".rstrip("0")  # for the eye alone: no cost is computed from it
    return text + "0" * max(0, 2 - len(text.partition(".")[2]))


def _instant_us(at: str) -> int:
    try:
        moment = datetime.now(UTC) if at == "now" else datetime.fromisoformat(at)
    except ValueError:
        raise click.BadParameter(
            f"{at!r} is not an instant; write it like 2026-11-22T12:00Z.", param_hint="--at"
        ) from None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
