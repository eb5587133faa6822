"""`bursar policy`: check a policy file, explain what it means for a call, compare two, put one in force, print the schema."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bursar.cli.options import check_store, echo, key_text, show, tag_options, tags_argument
from bursar.stores import public_url

if TYPE_CHECKING:
    from bursar.policy_file import PolicyFile
    from bursar.policy_file.changes import Change
    from bursar.stores.base import Store

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def _options(function: F) -> F:
    """`--store` and `--format`."""
    function = click.option(
        "--store", help="The store's URL (default: BURSAR_STORE, else the policy's own, where it exists)."
    )(function)
    return click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")(function)


@click.group()
def command() -> None:
    """Check policy files, explain and compare them, and put them in force."""


@command.command()
@click.argument("file", type=FILE)
@_options
def check(file: Path, store: str | None, form: str) -> None:
    """Check FILE, a policy in TOML or YAML; every fault is shown with its line and key.

    What is valid and still cannot do what one might expect is a warning; the status is 0 then.
    """
    from bursar.files import open_to_all
    from bursar.policy_file import read_policy
    from bursar.policy_file.advice import advice

    policy = read_policy(file)
    with _books(policy, store) as held:
        warnings = advice(policy, has_operator=held is not None and "operator" in held.definitions()[1])
    if "change" in open_to_all(file):
        warnings.append(f"Every user of this machine may change {file}. Take that from them: chmod o-w.")
    budgets, prices = len(policy.budget), len(policy.price)
    if form == "json":
        click.echo(json.dumps({"file": str(file), "budgets": budgets, "prices": prices, "warnings": warnings}))
        return
    click.echo(
        f"{file}: a valid policy with {budgets} budget(s) and {prices} price(s), store {public_url(policy.store)}."
    )
    for warning in warnings:
        echo(f"warning: {warning}")


@command.command()
@click.argument("file", type=FILE)
@tags_argument
@click.option("--provider", help="Who serves the model.")
@tag_options
@_options
def explain(file: Path, tags: dict[str, str], provider: str | None, store: str | None, form: str) -> None:
    """Show what FILE means for a call: explain bursar.toml --provider openai --model gpt-4o --agent planner team=a.

    The accounts that it is held against, in order, how they stand in the store, which thresholds hold now, what it has to
    wait for, and why other budgets are not about it. With --tool it is a call of that tool.
    """
    from bursar.cli.explain import explain as explained
    from bursar.cli.explain import show_explained
    from bursar.clock import SystemClock
    from bursar.policy_file import read_policy
    from bursar.scope import check_tags

    policy = read_policy(file)
    tags = check_tags({**({"provider": provider} if provider else {}), **tags})
    with _books(policy, store) as held:
        now_us = SystemClock().now_us() if held is None else held.now_us()
        found = explained(policy, tags, held, now_us)
    if form == "json":
        click.echo(json.dumps({"call": tags, **found._asdict()}, default=str))
    else:
        show_explained(
            found, tags, "nothing is spent yet: there is no store" if held is None else "balances of the store"
        )


@command.command()
@click.argument("old", type=FILE)
@click.argument("new", type=FILE)
@_options
def diff(old: Path, new: Path, store: str | None, form: str) -> None:
    """Show what becomes of every budget when NEW takes the place of OLD."""
    from bursar.decisions import Decisions
    from bursar.policy import Policy
    from bursar.policy_file import read_policy
    from bursar.policy_file.changes import Books, compare

    before, after = read_policy(old), read_policy(new)
    with _books(after, store) as held:
        books = None
        if held is not None:
            policy = Policy(after.make_budgets(), rates=after.rates, decisions=Decisions(held.definitions()[1]))
            books = Books(list(held.accounts()), policy, held.now_us())
        changes = compare(before, after, books)
    if form == "table" and not changes:
        click.echo("Nothing changes.")
        return
    rows = [change._asdict() if form == "json" else _row(change) for change in changes]
    show(rows, ["budget", "change", "outcome"], form, f"{old} to {new}")


def _row(change: Change) -> dict[str, str]:
    return {"budget": change.budget, "change": change.what, "outcome": change.outcome}


@command.command()
@click.argument("file", type=FILE)
@_options
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The file of the operator's key (else the environment's BURSAR_OPERATOR_KEY).",
)
@click.option("--by", help="Who decides (default: the user of this machine).")
def apply(file: Path, store: str | None, form: str, key: Path | None, by: str | None) -> None:
    """Put the budgets of FILE in force for every process of its store, all or none.

    Changed budgets need the operator's key once the store has an operator. Prices, detectors and alerts are not in the
    store: each program reads them from its own policy file.
    """
    from bursar.operator import Operator
    from bursar.policy_file import read_policy
    from bursar.settings import Settings

    policy = read_policy(file)
    budgets = Settings.of(**policy.options()).policy.budgets
    url = store or os.environ.get("BURSAR_STORE") or policy.store
    with Operator(url, key_text(key), by=by) as operator:
        published = operator.publish_budgets(budgets)
        names = {entry.name for entry in policy.budget}
        left = [name for name in operator.store.definitions()[1].get("budget", {}) if name not in names]
    if form == "json":
        click.echo(json.dumps({"store": public_url(url), "published": published, "only_in_store": left}))
        return
    echo(f"In force in {public_url(url)}: {', '.join(published) or 'nothing new'}.")
    if left:
        echo(f"The store has further budgets, which stay as they are: {', '.join(left)}.")


@command.command()
def schema() -> None:
    """Print the JSON Schema of policy files."""
    from bursar.policy_file import PolicyFile

    click.echo(json.dumps(PolicyFile.model_json_schema(), indent=2))


@contextmanager
def _books(policy: PolicyFile, given: str | None) -> Iterator[Store | None]:
    """The store that is given, which has to exist; else the environment's or the policy's own, or None where there is none."""
    from bursar.stores import open_store

    url = given or os.environ.get("BURSAR_STORE") or policy.store
    if url.startswith("memory:"):
        yield None
        return
    try:
        check_store(url)
    except click.UsageError:
        if given is not None:
            raise
        yield None
        return
    store = open_store(url, with_leases=False)
    try:
        yield store
    finally:
        store.close()
