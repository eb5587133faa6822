"""The command `bursar demo`: plays the scenes, and shows the books beside the provider's account."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import click


@click.command()
@click.option("--live", is_flag=True, help="Call OpenAI with your OPENAI_API_KEY; spends a few cents at most.")
@click.option("--model", help="The model to ask for (default: gpt-4o; live: gpt-4o-mini).")
@click.option("--store", help="The store's URL (default: a new SQLite file in the temporary folder).")
def command(live: bool, model: str | None, store: str | None) -> None:
    """Run real LangChain agents, and watch their budgets stop them."""
    try:
        import langchain.agents  # noqa: F401 - only whether it is there
        import langchain_openai  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise click.ClickException(f"{error}. Install it: pip install 'bursar-langchain[demo]'") from error
    if live and not os.environ.get("OPENAI_API_KEY"):
        raise click.ClickException("--live needs your key: set OPENAI_API_KEY.")
    file = Path(tempfile.mkdtemp(prefix="bursar-demo-")) / "demo.db"
    if not play(store or f"sqlite:///{file}?durability=process", model or ("gpt-4o-mini" if live else "gpt-4o"), live):
        raise SystemExit(1)


def play(url: str, model: str, live: bool) -> bool:
    """Play all scenes; whether the books agree with the provider's account, and nothing is left open."""
    from rich.console import Console

    from bursar import Bursar, PriceBook, UsageRecord
    from bursar.cli.books import spending, stops
    from bursar_langchain.demo.books import accounts
    from bursar_langchain.demo.scenes import BUDGETS, LIVE_SCENES, SCENES, TOOLS, Played, Stage

    # LangChain logs every refusal before it raises it; the table of stops says it once.
    logging.getLogger("langchain_core.callbacks.manager").setLevel(logging.ERROR)
    console = Console(highlight=False)
    played: list[tuple[str, Played, list[UsageRecord]]] = []
    known: set[str] = set()
    with Bursar(url, BUDGETS, prices=PriceBook.packaged().with_overrides(tools=TOOLS)) as bursar:
        for name in LIVE_SCENES if live else SCENES:
            with console.status(f"playing: {name}"):
                end = SCENES[name](Stage(bursar, model, live))
            new = [record for record in bursar.records() if record.id not in known]
            known |= {record.id for record in new}
            played.append((name, end, new))
            console.print(f"[bold]{name}[/bold]")
            console.print(f"  {end.said}", markup=False)
        records = [record for _, _, new in played for record in new]
        for tag in ("agent", "run", "tool", "model"):
            console.print(spending(records, tag))
        console.print(stops(records))
        table, agrees = accounts(played)
        console.print(table)
        left = bursar.store.open_reservations()
    if not live:
        console.print(
            "The ledger equals the provider's account to the nano-dollar; where an outcome is unknown, an entry marked "
            "estimated covers it."
            if agrees
            else "[bold red]The ledger does not cover the provider's account.[/bold red]"
        )
    console.print(
        f"Open reservations: {left}. Look at the books yourself: bursar records --store '{url}'", markup=False
    )
    return agrees and left == 0
