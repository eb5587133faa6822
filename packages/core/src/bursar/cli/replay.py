"""`bursar replay`: past records under another policy, model or price book."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bursar.cli.options import form_option, open_books, show, store_option
from bursar.money import dollar_text
from bursar.records import instant
from bursar.stores import public_url

if TYPE_CHECKING:
    from bursar.foresight.outcomes import Effect, Outcome

COLUMNS = ["budget", "refused", "slowed", "waited", "swapped", "saved"]
CALLS = ["time (UTC)", "agent", "run", "call", "cost", "then", "by", "waited", "would cost"]
_SECONDS = {"m": 60, "h": 3_600, "d": 86_400}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Instant(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest releases of click
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Microseconds since 1970: of an instant or a day, or so long ago."""
        if isinstance(value, int):
            return value
        ago = re.fullmatch(r"(\d{1,6})([mhd])", value)
        now = datetime.now(UTC)
        try:
            at = now - timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]]) if ago else datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time. Write it like 2026-11-22, 2026-11-22T12:00Z, or 7d for a week ago.")
        return ((at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def _models(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    wrong = next((value for value, (one, _, other) in zip(values, pairs, strict=True) if not (one and other)), None)
    if wrong is not None:
        raise click.BadParameter(f"{wrong!r} is no map. Write it like gpt-4o=gpt-4o-mini.", ctx=ctx, param=parameter)
    return {one: other for one, _, other in pairs}


@click.command()
@click.option(
    "--policy", type=click.Path(path_type=Path), help="The policy file to try (default: the store's budgets)."
)
@click.option(
    "--map",
    "models",
    multiple=True,
    metavar="MODEL=MODEL",
    callback=_models,
    help="Another model instead; * on the left, PROVIDER/MODEL on the right allowed.",
)
@click.option(
    "--since", type=_Instant(), default=0, show_default="the first record", help="A time, or 7d, 12h, 30m ago."
)
@click.option("--until", type=_Instant(), default=2**62, show_default="the last record", help="Up to before this time.")
@click.option("--calls", is_flag=True, help="List every call that fared otherwise, instead of the sums.")
@store_option
@form_option
def command(
    policy: Path | None, models: dict[str, str], since: int, until: int, calls: bool, store: str, form: str
) -> None:
    """Replay the records under another policy: what would have been refused, slowed, swapped, saved.

    The store is only read. What is modelled, and what is not: docs/exposure.md.
    """
    from bursar.foresight.options import options_of_books, options_of_file
    from bursar.foresight.outcomes import effects
    from bursar.foresight.replay import replay

    logging.getLogger("bursar").setLevel(logging.CRITICAL)  # what is simulated did not happen
    with open_books(store) as books:
        options = options_of_books(books, store) if policy is None else options_of_file(policy)
        outcomes = replay(
            books.store.entries(),
            options.given,
            models=models,
            reprice=options.reprices,
            since_us=since,
            until_us=until,
        )
    if calls:
        show(
            map(_call, (one for one in outcomes if one.is_other)),
            CALLS,
            form,
            f"Calls of {public_url(store)} that fared otherwise",
        )
        return
    rows = [_effect(name, one, form) for name, one in effects(outcomes).items()]
    show(
        [*rows, _sum(outcomes, form)], COLUMNS, form, f"{policy or 'The budgets'} on the records of {public_url(store)}"
    )
    if form == "table":
        click.echo(_summary(outcomes))


def _effect(name: str, one: Effect, form: str) -> dict[str, Any]:
    waited = f"{one.slowed_us / 1e6:,.1f} s" if form == "table" else one.slowed_us
    saved = f"${dollar_text(one.saved_nanos)}" if form == "table" else dollar_text(one.saved_nanos)
    return {
        "budget": name,
        "refused": one.refused,
        "slowed": one.slowed,
        "waited": waited,
        "swapped": one.swapped,
        "saved": saved,
    }


def _sum(outcomes: list[Outcome], form: str) -> dict[str, Any]:
    from bursar.foresight.outcomes import Effect

    sent = [one for one in outcomes if not (one.is_refused or one.was_refused)]
    total = Effect(
        refused=sum(one.is_refused and not one.was_refused for one in outcomes),
        slowed=sum(bool(one.slowed) for one in sent),
        slowed_us=sum(sum(one.slowed.values()) for one in sent),
        swapped=sum(bool(one.swapped) for one in sent),
        saved_nanos=sum(one.recorded_nanos - one.cost_nanos for one in outcomes),
    )
    row = _effect("in all", total, form)
    if form == "table":
        return row
    return row | {
        "calls": len(outcomes),
        "recorded_usd": dollar_text(sum(one.recorded_nanos for one in outcomes)),
        "replayed_usd": dollar_text(sum(one.cost_nanos for one in outcomes)),
        "sent_that_was_refused": sum(one.was_refused and not one.is_refused for one in outcomes),
    }


def _summary(outcomes: Iterable[Outcome]) -> str:
    outcomes = list(outcomes)
    then, now = sum(one.recorded_nanos for one in outcomes), sum(one.cost_nanos for one in outcomes)
    freed = sum(one.was_refused and not one.is_refused for one in outcomes)
    more = f" {freed} calls that had been refused would have been sent, at their estimates." if freed else ""
    return f"{len(outcomes)} calls: ${dollar_text(then)} as recorded, ${dollar_text(now)} under this policy.{more}"


def _call(one: Outcome) -> dict[str, Any]:
    tags = one.past.tags
    swaps = ", ".join(one.swapped.values())
    then = "refused" if one.is_refused else "sent" if one.was_refused else swaps or "slowed"
    return {
        "time (UTC)": instant(one.past.reserved_us).strftime("%m-%d %H:%M:%S"),
        "id": one.past.id,
        "agent": tags.get("agent"),
        "run": tags.get("run"),
        "call": tags.get("tool") or tags.get("model"),
        "cost": dollar_text(one.recorded_nanos),
        "then": then,
        "by": one.by or ", ".join(dict.fromkeys([*one.swapped, *one.slowed])),
        "waited": f"{sum(one.slowed.values()) / 1e6:,.1f} s" if one.slowed else "",
        "would cost": dollar_text(one.cost_nanos),
        "why": one.why,
    }
