"""`bursar price FILE`: prices recorded answers of providers, one JSON line for each."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, BinaryIO, cast

import click

from bursar.errors import UnknownPrice, UnreadableAnswer
from bursar.money import dollar_text
from bursar.prices import PriceBook

MAX_LINE = 64 * 2**20  # bytes: an answer with images is tens of megabytes at most
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PARTNERS = ("huggingface",)  # gateways whose path names who serves the model: /together/v1/chat/completions


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--at",
    default="now",
    show_default=True,
    help="Which day's prices: now, recorded, or an instant like 2026-11-22T12:00Z.",
)
@click.option("--ignore-stated", is_flag=True, help="Compute the price even where the provider states its bill.")
def command(file: str, at: str, ignore_stated: bool) -> None:
    """Price the recorded answers in FILE (JSON lines, plain or .gz), one JSON line each.

    Every line holds `id`, `provider`, `model` and `response`, and, where known, `status`, `endpoint`, `response_headers`,
    `recorded`. The lines printed hold `id`, `status`, `usage`, `cost_usd`, `cost_nanos`, `price` and `reason`.
    """
    when = _clock(at)
    book = PriceBook.packaged()
    for number, line in enumerate(_lines(file), start=1):
        sys.stdout.write(
            json.dumps(priced(line, number, book, when, ignore_stated=ignore_stated), ensure_ascii=False) + "\n"
        )


def priced(
    line: bytes, number: int, book: PriceBook, when: Callable[[dict[str, Any]], int], *, ignore_stated: bool
) -> dict[str, Any]:
    """One recorded exchange priced, as the JSON object to print. Never raises: what is wrong stands in `status` and `reason`."""
    result: dict[str, Any] = dict.fromkeys(("id", "status", "usage", "cost_usd", "cost_nanos", "price", "reason"))
    try:
        # Counts and bills stay exact: a bill of 0.00019325 is no float.
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        return result | {
            "id": f"line {number}",
            "status": "unreadable",
            "reason": f"The line is not a JSON object: {error}.",
        }
    result["id"] = record.get("id", f"line {number}")
    provider = _provider(record)
    try:
        usage = _usage(record)
        if ignore_stated:
            usage = replace(usage, stated_cost_nanos=None)
        result["usage"] = usage.as_dict()
        asked = record.get("model") or _object(record, "request").get("model") or record.get("response_model")
        price = book.cost(provider, asked if isinstance(asked, str) else None, usage, at_us=when(record))
    except UnreadableAnswer as error:
        return result | {"status": error.fields.get("reason", "unreadable"), "reason": str(error)}
    except UnknownPrice as error:
        return result | {"status": "unknown_price", "reason": str(error)}
    return result | {
        "status": "priced",
        "cost_usd": dollar_text(price.cost_nanos),
        "cost_nanos": price.cost_nanos,
        "price": {
            "provider": price.provider,
            "model": price.model,
            "effective_from": price.effective_from,
            "source": "stated" if usage.stated_cost_nanos is not None else price.source,
        },
    }


def _usage(record: dict[str, Any]) -> Any:
    from bursar.answers import read_usage  # the readers load when an answer is read

    return read_usage(
        str(record.get("provider") or ""),
        record.get("response"),
        headers=_object(record, "response_headers"),
        status=record["status"] if isinstance(record.get("status"), int) else 200,
    )


def _object(record: dict[str, Any], name: str) -> dict[str, Any]:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _provider(record: dict[str, Any]) -> str:
    provider = str(record.get("provider") or "")
    partner = str(record.get("endpoint") or "").strip("/").partition("/")[0]
    if provider in _PARTNERS and partner and partner not in ("v1", "models"):
        return f"{provider}-{partner}"
    return provider


def _clock(at: str) -> Callable[[dict[str, Any]], int]:
    now_us = _microseconds(datetime.now(UTC))
    if at == "now":
        return lambda record: now_us
    if at == "recorded":
        return lambda record: _recorded_us(record, now_us)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise click.BadParameter(
            f"{at!r} is not an instant; write it like 2026-11-22T12:00Z.", param_hint="--at"
        ) from None
    fixed = _microseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    return lambda record: fixed


def _recorded_us(record: dict[str, Any], now_us: int) -> int:
    """When the exchange took place: its Date header, else what the answer says of itself, else now."""
    recorded = record.get("recorded")
    if isinstance(recorded, str):
        for read in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                moment = read(recorded)
                return _microseconds(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
            except ValueError:
                continue
    for body in _bodies(record.get("response")):
        created = body.get("created") or body.get("created_at")
        if isinstance(created, int) and 10**9 < created < 10**10:
            return created * 1_000_000
        if isinstance(created, str) and "T" in created:
            try:
                return _microseconds(datetime.fromisoformat(created[:19]).replace(tzinfo=UTC))
            except ValueError:
                continue
    return now_us


def _bodies(response: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(response, dict):
        return
    yield response
    events = response.get("events")
    for event in events[:5] if isinstance(events, list) else ():
        data = event.get("data") if isinstance(event, dict) else None
        if isinstance(data, dict):
            yield data
            if isinstance(data.get("response"), dict):
                yield data["response"]


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _lines(file: str) -> Iterator[bytes]:
    if file == "-":
        yield from _bounded(sys.stdin.buffer)
        return
    with cast(BinaryIO, gzip.open(file) if file.endswith(".gz") else open(file, "rb")) as stream:
        yield from (line for line in _bounded(stream) if line.strip())


def _bounded(stream: BinaryIO) -> Iterator[bytes]:
    """The lines; one that is too long comes in pieces, none of which is JSON: a small file may unpack to more than memory."""
    return iter(partial(stream.readline, MAX_LINE), b"")
