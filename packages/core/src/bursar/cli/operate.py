"""What operators do from the command line: freeze, resume, approvals, approve, deny, raise, release, alerts, operator."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from bursar.alerts.message import is_amount
from bursar.cli.options import check_store, echo, form_option, key_text, show, store_option, tag_options, tags_argument
from bursar.operator import Operator, Question
from bursar.records import instant
from bursar.stores import public_url

F = TypeVar("F", bound=Callable[..., Any])
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest releases of click
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)([smhd])", str(value), re.ASCII)
        if found is None:
            self.fail(f"{value!r} is no duration. Write it like 30m, 1h or 2d.", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


def deciding(function: F) -> F:
    """`--key`, `--by` and `--why`: who decides, and the reason that goes on record."""
    function = click.option(
        "--key",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="The file of the operator's key (else the environment's BURSAR_OPERATOR_KEY).",
    )(function)
    function = click.option("--by", help="Who decides (default: the user of this machine).")(function)
    return click.option("--why", default="", help="The reason, for the record.")(function)


@contextmanager
def opened_operator(store: str, key: Path | None = None, by: str | None = None) -> Iterator[Operator]:
    check_store(store)
    with Operator(store, key_text(key), by=by) as operator:
        yield operator


@click.command()
@tags_argument
@tag_options
@store_option
@deciding
@click.option("--everything", is_flag=True, help="Stop every call of every agent.")
def freeze(tags: dict[str, str], store: str, key: Path | None, by: str | None, why: str, everything: bool) -> None:
    """Stop every call with these tags, in every process, streams in flight included: --agent planner, or team=research."""
    if not tags and not everything:
        raise click.UsageError("Say what to stop, such as --agent planner; or --everything.")
    with opened_operator(store, key, by) as operator:
        name = operator.freeze(tags, why=why)
    echo(f"Stopped: {name}. Go on with: bursar resume {shlex.quote(name)}")


@click.command()
@click.argument("name", required=False)
@store_option
@deciding
def resume(name: str | None, store: str, key: Path | None, by: str | None, why: str) -> None:
    """Let go on what was stopped, by NAME; without one, list what is stopped."""
    with opened_operator(store, key, by) as operator:
        if name is not None:
            operator.resume(name, why=why)
            echo(f"Resumed: {name}")
            return
        found = operator.frozen()
    rows = [
        {"name": name, "cause": one.get("cause"), "by": one.get("by"), "why": one.get("why")}
        for name, one in found.items()
    ]
    show(rows, ["name", "cause", "by", "why"], "table", f"Stopped in {public_url(store)}")


@click.command()
@store_option
@form_option
@click.option("--all", "everything", is_flag=True, help="Those too that are answered, or whose window is over.")
def approvals(store: str, form: str, everything: bool) -> None:
    """Show what thresholds ask."""
    with opened_operator(store) as operator:
        found = [one for one in operator.questions() if everything or one.state == "open"]
    columns = ["id", "state", "budget", "spent", "limit", "owner", "for", "by"]
    show(map(_asked, found), columns, form, f"Questions in {public_url(store)}")


def _asked(question: Question) -> dict[str, Any]:
    scope = " ".join(f"{tag}={value}" for tag, value in question.scope.items())
    return {
        "id": question.id,
        "state": question.state,
        "budget": f"{question.budget} {scope}".rstrip(),
        "spent": f"{question.spent} {question.unit}",
        "limit": f"{question.limit} {question.unit}",
        "owner": question.owner,
        "for": {tag: question.tags[tag] for tag in ("agent", "run") if tag in question.tags},
        "by": question.by,
    }


@click.command()
@click.argument("id")
@store_option
@deciding
@click.option("--raise-by", metavar="AMOUNT", help='Raise the limit by an amount, such as "5 USD".')
@click.option("--for", "for_s", type=Duration(), help="For a time, such as 1h (default: while the window lasts).")
def approve(
    id: str, store: str, key: Path | None, by: str | None, why: str, raise_by: str | None, for_s: float | None
) -> None:
    """Let what asked under ID go on: up to its limit, or with the limit raised. Needs the operator's key."""
    with opened_operator(store, key, by) as operator:
        operator.approve(id, raise_by=raise_by, for_s=for_s, why=why)
    click.echo(f"Approved: {id}{f', raised by {raise_by}' if raise_by else ''}")


@click.command()
@click.argument("id")
@store_option
@deciding
def deny(id: str, store: str, key: Path | None, by: str | None, why: str) -> None:
    """Refuse what asked under ID."""
    with opened_operator(store, key, by) as operator:
        operator.deny(id, why=why)
    click.echo(f"Denied: {id}")


@click.command(name="raise")
@click.argument("budget")
@click.argument("amount")
@tags_argument
@store_option
@deciding
@click.option("--for", "for_s", type=Duration(), help="For a time, such as 1h (default: while the window lasts).")
def raise_limit(
    budget: str,
    amount: str,
    tags: dict[str, str],
    store: str,
    key: Path | None,
    by: str | None,
    why: str,
    for_s: float | None,
) -> None:
    """Raise the limit of BUDGET's account with these tags by AMOUNT: bursar raise per-run "5 USD" run=r-17."""
    with opened_operator(store, key, by) as operator:
        operator.raise_limit(budget, amount, tags, for_s=for_s, why=why)
    click.echo(f"Raised: {budget} by {amount}")


@click.command()
@click.argument("id")
@store_option
@deciding
def release(id: str, store: str, key: Path | None, by: str | None, why: str) -> None:
    """Take the expired reservation ID off the books: the provider did not bill it. Needs the operator's key."""
    with opened_operator(store, key, by) as operator:
        record = operator.release(id, why=why or "released by an operator")
    click.echo(f"Released: {id}, {-record.cost_usd} USD given back")


@click.command()
@store_option
@form_option
def alerts(store: str, form: str) -> None:
    """Show the alerts: crossed thresholds, findings of detectors, switches, questions."""
    with opened_operator(store) as operator:
        found = [
            {"time (UTC)": f"{instant(one.at_us):%m-%d %H:%M:%S}", "kind": one.kind, "told": told, **_gist(one.facts)}
            for one, told in operator.store.alerts()
        ]
    show(found, ["time (UTC)", "kind", "what", "who", "told"], form, f"Alerts in {public_url(store)}")


def _gist(facts: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(facts, dict) or not isinstance(facts.get("tags", {}), dict):
        return {"what": "cannot be read: Bursar has not put it", "who": {}}
    tags = facts.get("tags") or {}
    action = facts.get("action") or facts.get("cause") or facts.get("why", "")
    at, limit = facts.get("at"), facts.get("limit")
    share = f" at {100 * at / limit:.4g}%" if is_amount(at) and is_amount(limit) and limit > 0 else ""
    what = " ".join(str(one) for one in (facts.get("budget") or facts.get("name") or "", action) if one)
    return {"what": what + share, "who": {tag: tags[tag] for tag in ("agent", "run", "team") if tag in tags}}


@click.group()
def operator() -> None:
    """Appoint the operator of a store: whose key alone can approve, raise, resume and release."""


@operator.command()
@store_option
@deciding
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default="bursar-operator.key",
    show_default=True,
    help="Where to write the key.",
)
def init(store: str, key: Path | None, by: str | None, why: str, out: Path) -> None:
    """Make a key, write it to a file that only you can read, and have the store know its public half."""
    if out.exists():
        raise click.UsageError(f"{out} exists already: an operator's key is not overwritten. Name another with --out.")
    with opened_operator(store, key, by) as held:
        file = os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as made:
            try:
                appointed = held.appoint()
                made.write(appointed.text + "\n")
            except BaseException:
                out.unlink()
                raise
    click.echo(f"The key is in {out}. Keep it where no agent can read it: it approves, raises, resumes and releases.")
    click.echo(f"Have your programs trust no other operator: BURSAR_OPERATOR={appointed.public}")
