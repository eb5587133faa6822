"""What several commands ask for: the store, tags, and the form of the output."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import click

from bursar.files import open_to_all, read_text
from bursar.texts import printable as one_line

if TYPE_CHECKING:
    from bursar.facade import Bursar

F = TypeVar("F", bound=Callable[..., Any])
_GIVEN = "bursar.tags"  # where a command's context keeps the tags that came as options
MAX_KEY_BYTES = 1_000
PAGE = 1_000  # rows of one table, which is printed once all of them are there
TAG_COLUMNS = ("agent", "run", "team", "user", "customer", "workflow", "project", "org", "tool", "connection", "model")
# A spreadsheet takes a cell that starts with one of these for a formula, wide signs too; and where it is set to, a semicolon
# or a tab begins another cell.
_FORMULA = re.compile(r"(^|[;\t\r\n])(?=[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")


def store_option(function: F) -> F:
    """`--store URL`, else the environment's BURSAR_STORE, else ./bursar.db."""
    return click.option(
        "--store",
        default=lambda: os.environ.get("BURSAR_STORE", "sqlite:///bursar.db"),
        show_default="BURSAR_STORE, else sqlite:///bursar.db",
        help="The store's URL.",
    )(function)


def open_books(url: str) -> Bursar:
    """The Bursar of a store that exists already, with the budgets published there. Raises UsageError for one that does not."""
    from bursar.facade import Bursar
    from bursar.stores import open_store

    check_store(url)
    return Bursar(open_store(url, with_leases=False))


def check_store(url: str) -> None:
    """Raise UsageError for a store's file that does not exist: looking must not make one."""
    if url.startswith("sqlite:///"):
        file = Path(unquote(urlsplit(url).path[1:]))
        if not file.exists():
            raise click.UsageError(f"There is no store {file}. Name it with --store or BURSAR_STORE.")


def key_text(file: Path | None) -> str | None:
    """The operator's key in a file, else the environment's BURSAR_OPERATOR_KEY; a warning where others may read the file."""
    if file is None:
        return os.environ.get("BURSAR_OPERATOR_KEY") or None
    if open_to_all(file):
        click.echo(f"warning: every user of this machine may read or change {file}. Run: chmod 600 {file}", err=True)
    try:
        return read_text(file, MAX_KEY_BYTES)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"The key in {file} cannot be read: {error}.") from error


def form_option(function: F) -> F:
    """`--format table|json|csv`."""
    return click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table")(function)


def tags_argument(function: F) -> F:
    """Any number of TAG=VALUE."""
    return click.argument("tags", nargs=-1, metavar="[TAG=VALUE]...", callback=_tags)(function)


def tag_options(function: F) -> F:
    """`--agent planner` and its like, for every tag that has a column of its own, beside any TAG=VALUE."""
    for name in reversed(TAG_COLUMNS):
        function = click.option(f"--{name}", metavar="VALUE", expose_value=False, callback=_add_tag)(function)
    return function


def _add_tag(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None and parameter.name is not None:
        ctx.meta.setdefault(_GIVEN, {})[parameter.name] = value
        if "tags" in ctx.params:
            ctx.params["tags"][parameter.name] = value


def _tags(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    tags = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name or not text:
            raise click.BadParameter(f"{value!r} is no TAG=VALUE, such as run=r-17.", ctx=ctx, param=parameter)
        tags[name] = text
    return {**ctx.meta.get(_GIVEN, {}), **tags}


def printable(text: str) -> str:
    """Text that a terminal only shows: escape sequences in names would move its cursor, or write what was never said."""
    return "\n".join(one_line(line, len(line)) for line in text.split("\n"))


def echo(text: str) -> None:
    """Print a line that may quote what stands in the store or in a file."""
    click.echo(printable(text))


def show(rows: Iterable[Mapping[str, Any]], columns: list[str], form: str, title: str) -> None:
    """Print rows as a table for people, or as JSON lines or CSV for programs."""
    if form == "json":
        for row in rows:
            click.echo(json.dumps(row, default=str))
    elif form == "csv":
        _show_csv(rows, columns)
    else:
        _show_table(rows, columns, title)


def _show_csv(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> None:
    for row in ({name: name for name in columns}, *rows):
        out = io.StringIO()
        csv.writer(out).writerow([_cell(row.get(name)) for name in columns])
        click.echo(out.getvalue(), nl=False)


def _cell(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        value = json.dumps(value, default=str)
    text = "" if value is None else str(value)
    is_number = isinstance(value, (int, float)) or text.removeprefix("-").replace(".", "", 1).isdigit()
    return text if is_number else _FORMULA.sub(r"\1'", text)


def _show_table(rows: Iterable[Mapping[str, Any]], columns: list[str], title: str) -> None:
    from rich.console import Console

    from bursar.cli.books import fits, plain, table

    console, rest = Console(), iter(rows)
    page = list(islice(rest, PAGE))
    while True:
        made, cells = table(title, *columns), [[_said(row.get(name)) for name in columns] for row in page]
        if fits(columns, cells, console.width):
            for row in cells:
                made.add_row(*map(plain, row))
            console.print(made)
        else:  # where there is no room beside each other, one below the other
            echo(title)
            for row in cells:
                echo("")
                for name, cell in zip(columns, row, strict=True):
                    echo(f"{name}: {cell}")
        page = list(islice(rest, PAGE))
        if not page:
            return


def _said(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key}={item}" for key, item in value.items())
    return "" if value is None else str(value)
