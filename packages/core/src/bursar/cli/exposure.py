"""`bursar exposure`: which causes of runaway spend are open, and how far a loop comes before something stops it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import click

from bursar.cli.options import echo, form_option, open_books, show, tags_argument
from bursar.money import dollar_text
from bursar.records import instant
from bursar.stores import public_url

if TYPE_CHECKING:
    from bursar.budget import Limit
    from bursar.foresight.exposure import Exposure, Worst
    from bursar.foresight.loop import End, Step

CAUSES = ["who", "open cause", "why"]
LOOPS = ["who", "loop", "calls", "cost", "minutes", "stopped by", "simulated"]
_LOOPS = {"varying": "varies", "repeating": "repeats itself", "failing": "fails, is retried"}


@click.command()
@tags_argument
@click.option("--policy", type=click.Path(path_type=Path), help="A policy file (default: the budgets in the store).")
@click.option("--store", help="The store's URL (default: BURSAR_STORE, else the policy's, else sqlite:///bursar.db).")
@click.option("--speed", help='How fast a loop goes, such as "2 USD/minute" (default: as the records show).')
@click.option(
    "--call", help='The model call of those who are not in the records: "PROVIDER/MODEL INPUT OUTPUT", in tokens.'
)
@form_option
def command(
    tags: dict[str, str], policy: Path | None, store: str | None, speed: str | None, call: str | None, form: str
) -> None:
    """Show the open causes of runaway spend, and what a loop costs at worst before something stops it.

    For every agent and workflow, or those with these tags: calls, dollars and minutes until which control stops a loop, reckoned
    from the policy and simulated with the real guard. The store is only read, and need not exist where a policy is given. See
    docs/exposure.md.
    """
    from bursar.foresight.exposure import exposures
    from bursar.foresight.options import options_of_books, options_of_file

    logging.getLogger("bursar").setLevel(logging.CRITICAL)  # what is simulated did not happen
    given = None if policy is None else options_of_file(policy)
    url = store or os.environ.get("BURSAR_STORE") or (given.store if given else "sqlite:///bursar.db")
    with ExitStack() as stack:
        books = None
        if given is None or store or _exists(url):
            books = stack.enter_context(open_books(url))
        if given is None:
            assert books is not None
            given = options_of_books(books, url)
        found = exposures(
            given,
            () if books is None else books.store.entries(),
            time.time_ns() // 1_000,
            speed=_speed(speed),
            call=_call(call),
            wanted=tags,
        )
    if form == "table":
        show(
            (row for one in found for row in _open(one)),
            CAUSES,
            form,
            f"Open causes of runaway spend: {policy or public_url(url)}",
        )
        show((row for one in found for row in _loops(one)), LOOPS, form, "A loop, at worst")
        for note in _notes(found, whole=given.whole):
            echo(note)
    elif form == "csv":
        show(({"who": _who(one), **_worst(worst)} for one in found for worst in one.loops), _COLUMNS, form, "")
    else:
        show(map(_plain, found), [], form, "")


def _exists(url: str) -> bool:
    return not url.startswith("memory:") and (
        not url.startswith("sqlite:///") or Path(unquote(urlsplit(url).path[1:])).exists()
    )


def _speed(text: str | None) -> Limit | None:
    from bursar.budget import Budget, parse_limit

    if text is None:
        return None
    limit = parse_limit(Budget("speed", text))
    if limit.unit not in text:
        raise click.BadParameter(
            f'{text!r} is in a currency whose rate is not known here. Write it like "2 USD/minute".',
            param_hint="--speed",
        )
    return limit


def _call(text: str | None) -> Step | None:
    from bursar.foresight.loop import Step
    from bursar.usage import Usage

    if text is None:
        return None
    provider, _, model = text.partition(" ")[0].partition("/")
    counts = text.split()[1:]
    if not model or len(counts) != 2 or not all(count.isdecimal() for count in counts):
        raise click.BadParameter(f'{text!r} is no call. Write it like "openai/gpt-4o 4000 1000".', param_hint="--call")
    return Step(provider, model, Usage(input_tokens=int(counts[0]), output_tokens=int(counts[1])))


def _who(one: Exposure) -> str:
    return f"{one.subject.tag} {one.subject.value}"


def _open(one: Exposure) -> Iterator[dict[str, Any]]:
    causes = [(cause, why) for cause, why in one.causes.items() if why is not None]
    for cause, why in causes or [("none", "")]:
        yield {"who": _who(one), "open cause": cause, "why": why}


def _loops(one: Exposure) -> Iterator[dict[str, Any]]:
    for worst in one.loops:
        end = worst.reckoned
        yield {
            "who": _who(one),
            "loop": _LOOPS[worst.loop.kind],
            "calls": _calls(end) if end.by else f"over {_calls(end)}",
            "cost": f"${dollar_text(end.nanos)}" if end.by else f"over ${dollar_text(end.nanos)}",
            "minutes": _minutes(end) if end.by else f"over {_minutes(end)}",
            "stopped by": end.by or "nothing",
            "simulated": _verdict(worst),
        }


def _calls(end: End) -> str:
    return f"{end.calls:,}" + (f" + {end.tool_calls:,} of tools" if end.tool_calls else "")


def _minutes(end: End) -> str:
    return f"{end.elapsed_us / 60e6:,.3g}"


def _verdict(worst: Worst) -> str:
    if worst.simulated is None:
        return "too long" if worst.reckoned.by else ""
    return "the same" if worst.is_confirmed else f"{_calls(worst.simulated)}, ${dollar_text(worst.simulated.nanos)}"


def _notes(found: list[Exposure], *, whole: bool) -> Iterator[str]:
    if not found:
        yield "Nobody with these tags is in the records or named in the policy."
    for one in found:
        short = one.subject.overrun_nanos
        if short:
            yield f"{_who(one)}: a call cost ${dollar_text(short)} more than was held for it; budgets may be passed by that."
    if not whole:
        yield "The store holds budgets alone: for detectors, required tags and alerts give the --policy."


_COLUMNS = ["who", "loop", "calls", "tool_calls", "cost_usd", "seconds", "stopped_by", "begins_at", "confirmed"]


def _worst(worst: Worst) -> dict[str, Any]:
    return {
        "loop": worst.loop.kind,
        **_end(worst.reckoned),
        "begins_at": instant(worst.begins_us).isoformat(),
        "simulated": None if worst.simulated is None else _end(worst.simulated),
        "confirmed": worst.is_confirmed,
    }


def _end(end: End) -> dict[str, Any]:
    return {
        "calls": end.calls,
        "tool_calls": end.tool_calls,
        "cost_usd": dollar_text(end.nanos),
        "seconds": end.elapsed_us / 1e6,
        "stopped_by": end.by,
    }


def _plain(one: Exposure) -> dict[str, Any]:
    subject = one.subject
    return {
        subject.tag: subject.value,
        "tags": subject.tags,
        "seen_calls": subject.seen,
        "causes": one.causes,
        "usd_per_turn": dollar_text(one.turn_nanos),
        "turns_per_minute": round(60e6 / one.interval_us, 3),
        "overrun_usd": dollar_text(subject.overrun_nanos),
        "loops": [_worst(worst) for worst in one.loops],
    }
