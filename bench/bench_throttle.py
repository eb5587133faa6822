"""Throttles against the arithmetic ideal, on the arrivals of real services. Run: `python bench/bench_throttle.py [FOLDER]`.

FOLDER holds whole traces as `NAME.csv.gz`; without it, ten minutes of each are taken from the repository. Every call goes
through the real guard, law and memory store; only time is simulated.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from arrivals import FOLDER, TRACES, Arrival, Simulation, excess, ideal, ideal_slots, trace, used_while_wanted
from measure import table

from bursar import Budget

SECOND_US = 1_000_000
WAIT_S = 30
MOST_OUTPUT = 2_000  # what a caller sets who does not know what will come: the longest answer of the traces


class Throttle(NamedTuple):
    """A limit below what is asked for; `amounts` are what each call takes of it."""

    limit: str
    amount: int
    period_us: int
    amounts: list[int]
    max_output_tokens: int | None = None


def throttles(arrivals: list[Arrival]) -> list[Throttle]:
    """One of each unit."""
    minutes = arrivals[-1].at_us / (60 * SECOND_US)
    tokens = [one.input_tokens + one.output_tokens for one in arrivals]
    nanos = [one.input_tokens * 2_500 + one.output_tokens * 10_000 for one in arrivals]  # gpt-4o
    ones = [1] * len(arrivals)
    per_minute, per_second = (max(1, int(len(arrivals) / minutes / share)) for share in (2, 120))
    token_rate, cents = int(sum(tokens) / minutes / 2), int(sum(nanos) / minutes * 3 / 1e7)
    token_limit = f"{token_rate} tokens/minute"
    return [
        Throttle(f"{per_minute} requests/minute", per_minute, 60 * SECOND_US, ones),
        Throttle(f"{per_second} requests/second", per_second, SECOND_US, ones),
        Throttle(token_limit, token_rate, 60 * SECOND_US, tokens),
        # a twentieth: an hour's worth of burst must be gone early in the trace
        Throttle(f"{cents / 100:.2f} USD/hour", cents * 10**7, 3_600 * SECOND_US, nanos),
        Throttle(f"{max(2, per_second * 2)} slots", max(2, per_second * 2), 0, ones),
        Throttle(token_limit, token_rate, 60 * SECOND_US, tokens, MOST_OUTPUT),
    ]


def row(name: str, arrivals: list[Arrival], throttle: Throttle) -> list[object]:
    """One line of the table: the simulation beside the arithmetic."""
    _, amount, period_us, amounts, most_output = throttle
    begun = time.perf_counter()
    budget = Budget("throttle", throttle.limit, on_exceed=f"wait {WAIT_S}s")
    run = Simulation(budget, arrivals, max_output_tokens=most_output).run()
    took_s = time.perf_counter() - begun
    at_us = [one.at_us for one in arrivals]
    sent = [(one.sent_us, one.held) for one in run.outcomes if one.sent_us is not None]
    if period_us:
        moves = sent + [(at, -back) for at, back in run.returns]
        taken, given = used_while_wanted(arrivals, run.outcomes, moves, amount, period_us)
        want = ideal(at_us, amounts, amount, period_us, WAIT_S * SECOND_US)
        used = [(one.sent_us, n) for one, n in zip(run.outcomes, amounts, strict=True) if one.sent_us is not None]
        figures: list[object] = [
            f"{100 * taken / given:.2f}",
            f"{excess(moves, amount, period_us):g}",
            f"{excess(used, amount, period_us):.0f}",
        ]
    else:
        want = ideal_slots(at_us, [one.busy_us for one in arrivals], amount, WAIT_S * SECOND_US)
        above = max(0, most_at_once(run.returns, sent) - amount)
        figures = ["", above, above]
    other = sum(one.sent_us != at for one, at in zip(run.outcomes, want, strict=True))
    limit = throttle.limit + (f", {MOST_OUTPUT:,} output reserved" if most_output else "")
    ideal_sent = "" if most_output else sum(at is not None for at in want)
    return [
        name, limit, len(arrivals), ideal_sent, len(sent), "" if most_output else other, *figures,
        run.overtakings, run.most_waiting, f"{run.steps / took_s:,.0f}",
    ]  # fmt: skip


def most_at_once(ends: list[tuple[int, int]], begins: list[tuple[int, int]]) -> int:
    """The most calls that were in flight at one time; at one instant, who ends makes room first."""
    most = now = 0
    for _, change in sorted([(at, -1) for at, _ in ends] + [(at, 1) for at, _ in begins]):
        now += change
        most = max(most, now)
    return most


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    rows = []
    for name in TRACES:
        arrivals = trace(name, folder)
        rows += [row(name, arrivals, throttle) for throttle in throttles(arrivals)]
    columns = (
        "trace", "throttle", "asked", "ideal sends", "sent", "sent at another µs", "% used while wanted", "most above",
        "by real use", "overtakings", "most waiting", "steps/s",
    )  # fmt: skip
    table(f"Throttles below what is asked for, waiting {WAIT_S} s at most", columns, rows)
    print("\nUsed while wanted should be at least 98, most above (burst + rate x t, any interval t) and overtakings 0.")
    print("By real use: the same of what calls turned out to use, at the time when they were sent.")


if __name__ == "__main__":
    main()
