"""`bursar run`: a program that says nothing of budgets runs under one, and its account is shown at the end."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

from bursar.run.order import Order
from bursar.stores import public_url

STOPPED = 3  # the exit status when calls were refused and the program itself ended with 0


@click.command(context_settings={"allow_interspersed_args": False})  # what stands behind the program's name is its own
@click.option("--budget", help='The limit of this run, such as "5 USD" or "200 requests".')
@click.option("--policy", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A policy file instead.")
@click.option(
    "--store", help="The store's URL (default: the policy's, else a new SQLite file in the temporary folder)."
)
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
def command(budget: str | None, policy: Path | None, store: str | None, program: tuple[str, ...]) -> None:
    """Run PROGRAM (`-- python my_agent.py`) with every call guarded that it makes by LangChain, LlamaIndex, CrewAI or LiteLLM

    (where their adapters are installed) or by the plain openai and anthropic clients. Ends with the program's status, or
    with 3 when calls were refused.
    """
    if (budget is None) == (policy is None):
        raise click.UsageError('Say what holds: --budget "5 USD", or --policy bursar.toml.')
    order = _order(budget, policy, store)
    status = _run(program, order)
    stopped = _show(order)
    raise SystemExit(status or (STOPPED if stopped else 0))


def _order(budget: str | None, policy: Path | None, store: str | None) -> Order:
    """What the program's processes are told. Raises PolicyError for what is no budget or policy, before anything runs."""
    folder = Path(tempfile.mkdtemp(prefix="bursar-run-"))
    if policy is not None:
        from bursar.policy_file import read_policy

        store = store or os.environ.get("BURSAR_STORE") or read_policy(policy).store
    else:
        from bursar.budget import Budget
        from bursar.policy import Policy

        Policy([Budget("run", budget or "")], rates={})
    url = store or f"sqlite:///{folder / 'run.db'}"
    if url.startswith("memory:"):
        raise click.UsageError("A store in memory ends with the program. Name a SQLite file with --store.")
    name = f"{secrets.token_hex(4)}"
    return Order(name, url, None if policy is None else str(policy.resolve()), budget, str(folder / "guarded"))


def _run(program: tuple[str, ...], order: Order) -> int:
    hook = Path(__file__).resolve().parents[1] / "run" / "hook"
    path = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
    environment: Mapping[str, str] = {
        **os.environ,
        **order.to_environment(),
        "BURSAR_STORE": order.store,
        "PYTHONPATH": path,
    }
    try:
        with subprocess.Popen(program, env=environment) as process:
            # An interrupt from the terminal reaches the program too, a request to end only this process. The program decides
            # what it makes of them, and the account is shown afterwards.
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            end = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
            try:
                status = process.wait()
            finally:
                signal.signal(signal.SIGINT, interrupt)
                signal.signal(signal.SIGTERM, end)
    except OSError as error:
        raise click.ClickException(f"{program[0]} cannot be started: {error.strerror}. Check its path.") from error
    return 128 - status if status < 0 else status


def _show(order: Order) -> bool:
    """Print the account; whether calls were refused."""
    guarded = list(order.all_guarded())
    if not guarded:
        click.echo(
            "bursar: nothing was guarded. The program imported none of openai, anthropic and the frameworks whose adapters "
            "are installed, or it is no Python program of this environment.",
            err=True,
        )
        return False
    from rich.console import Console

    from bursar.cli.books import money, spending, stops
    from bursar.facade import Bursar

    console = Console(stderr=True, highlight=False)
    with Bursar(order.store) as bursar:
        records = [record for record in bursar.records() if record.tags.get("bursar_run") == order.run]
    blocked = [record for record in records if record.outcome == "blocked"]
    total = sum(record.cost_nanos for record in records)
    estimated = sum(record.cost_nanos for record in records if record.estimated)
    for tag in ("agent", "model", "tool"):
        if any(tag in record.tags and record.outcome != "blocked" for record in records):
            console.print(spending(records, tag))
    if blocked:
        console.print(stops(records))
    console.print(
        f"bursar: guarded {', '.join(guarded)}; {len(records) - len(blocked)} calls, {money(total)}"
        f"{f', of it {money(estimated)} estimated' if estimated else ''}, {len(blocked)} refused. "
        f"The books: bursar records --store {shlex.quote(public_url(order.store))}",
        markup=False,
    )
    return bool(blocked)
