"""The market: models at dated prices, a provider that answers, fails and bills, and what it has billed for each call.

Its arithmetic is its own: nano-dollars per token, times tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from random import Random
from typing import Any

from bursar import PriceBook, Usage
from bursar.prices import Override
from sim.faults import Faults
from sim.world import START_US

CHANGE_US = START_US + 60_000_000  # from when on the first table's "fine" costs more
MAX_OUTPUT = 64
# table -> model -> nano-dollars per input and output token, before CHANGE_US and from then on
RATES = (
    {"fine": ((1, 3), (2, 5)), "coarse": ((7, 21), (7, 21))},
    {"fine": ((3, 4), (3, 4)), "coarse": ((5, 9), (5, 9))},
)


@cache
def book(table: int) -> PriceBook:
    """A price book with the rates of that table."""
    change = datetime.fromtimestamp(CHANGE_US / 1e6, tz=UTC)
    found = []
    for model, (before, after) in RATES[table].items():
        for (dear, dearer), span in ((before, {"effective_to": change}), (after, {"effective_from": change})):
            prices = {"input_mtok": f"{dear / 1000}", "output_mtok": f"{dearer / 1000}"}
            found.append(
                Override(
                    model=model, provider="openai", **prices, **span, max_output_tokens=MAX_OUTPUT, context_window=4_000
                )
            )
    return PriceBook.packaged().with_overrides(found)


def cost_nanos(table: int, model: str, at_us: int, input_tokens: int, output_tokens: int) -> int:
    dear, dearer = RATES[table][model][at_us >= CHANGE_US]
    return dear * input_tokens + dearer * output_tokens


class Refusal(Exception):
    """The provider says 429: nothing was generated."""

    status_code = 429


@dataclass
class Fact:
    """One call as its maker and its provider know it. `bill_nanos`: None where it was never sent.

    `known`: what an acknowledged settlement said that it cost; `ended`: how it was acknowledged. `exact`: the maker knows its
    usage. `kept`: the process that goes on trying to settle it. `lease`: out of which it was made.
    """

    id: str
    model: str
    table: int
    input_tokens: int
    strict: bool
    bill_nanos: int | None = None
    outcome: str = ""
    usage: Usage | None = None
    ended: str = ""
    kept: Any = None
    rejected: bool = False
    given: bool = False
    lease: str = ""


def answer(fact: Fact, call: Any, most: int, random: Random, faults: Faults) -> None:
    """The provider answers a call, or not, and bills it. A call that is made again gets the same answer."""
    if fact.outcome:
        return
    kinds = ("refused", "timeout", "cut", "no_usage", "renamed", "uncounted")
    fact.outcome = next((kind for kind in kinds if faults.hits(kind)), "answered")
    if fact.outcome == "refused":
        fact.bill_nanos = 0
        return
    input_tokens = fact.input_tokens
    if not fact.strict and faults.hits("above"):
        input_tokens += random.randrange(1, 60)
    output = random.choice((most, random.randrange(most + 1)))
    fact.bill_nanos = cost_nanos(fact.table, call.model, call.reserved_us, input_tokens, output)
    more: dict[str, Any] = {}
    if fact.outcome == "renamed":
        more = {"model": f"{call.model}-20990101"}
    elif fact.outcome == "uncounted":  # it has counted what no rate covers
        more = {"server_tools": {"levitation": 1}}
    elif fact.outcome == "cut":
        output = random.randrange(output + 1)
    fact.usage = Usage(input_tokens=input_tokens, output_tokens=output, **more)
