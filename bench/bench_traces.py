"""Recorded arrivals of real services, played fast by 64 processes on PostgreSQL with leases: every record, every balance, memory.

Run: `python bench/bench_traces.py [MINUTES] [FOLDER]` (default: half a minute). FOLDER holds whole traces as `NAME.csv.gz`;
without it, ten minutes of each are taken from the repository. They are played again and again until the time is over. Each
process plays its share of one trace: it reserves when a call arrives, and settles the recorded tokens when it has ended.
"""

from __future__ import annotations

import hashlib
import heapq
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from arrivals import FOLDER, TRACES, Arrival, trace
from crowd import crowd
from measure import at_most, table
from postgres_server import Running

from bursar import Budget, Bursar, PriceBook, StoreError, Usage
from bursar.audit import audit
from bursar.reservation import Reservation
from bursar.stores.postgres import PostgresStore

PROCESSES = 64
SPEED = 40  # times as fast as recorded
MOST_OUTPUT = 2_000  # what a caller sets who does not know what will come: the longest answer of the traces
CALLS_OF_A_RUN = 20
SAMPLE_S = 2.0
TRIES = 100
BUDGETS = [
    Budget("everybody", "1000000000 USD"),
    Budget("team", "100000000 USD", window="year", per="team"),
    Budget("tokens", "1000000000000 tokens", window="year", per="team"),
]


@dataclass
class Played:
    """What one process has done.

    `calls` that were made, what they cost by the price book, a sum over their ids; `turned_away`: those that got no answer within
    the limit of a statement; `kept`: settlements that were kept for another try; memory over time; how late it came at most.
    """

    calls: int = 0
    cost_nanos: int = 0
    ids: int = 0
    turned_away: int = 0
    kept: int = 0
    memory_mb: list[float] = field(default_factory=list)
    late_s: float = 0.0


def sum_of(ids: Iterator[str]) -> tuple[int, int]:
    """How many ids there are, and a sum that no other set of them has."""
    count = total = 0
    for id in ids:
        count += 1
        total += int.from_bytes(hashlib.blake2b(id.encode(), digest_size=16).digest())
    return count, total


def memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096 / 2**20


def again_and_again(arrivals: Sequence[Arrival]) -> Iterator[tuple[float, Arrival]]:
    """Each arrival and its time in seconds of the play, without an end."""
    length_us, begun_us = arrivals[-1].at_us + 1_000_000, 0
    while True:
        for one in arrivals:
            yield (begun_us + one.at_us) / 1e6 / SPEED, one
        begun_us += length_us


def play(pipe: Connection, url: str, folder: str, name: str, number: int, of: int) -> None:
    """One process: every call of the trace whose turn is its own, until the time that it is told."""
    arrivals = trace(name, Path(folder))[number::of]
    with Bursar(url, BUDGETS, detectors="off") as bursar:
        pipe.send(None)
        begun, seconds = pipe.recv()
        played = Player(bursar, name, begun).play(arrivals, seconds)
    pipe.send(played)


class Player:
    """One process's calls, each reserved when it arrives and settled when it has ended."""

    def __init__(self, bursar: Bursar, name: str, begun: float) -> None:
        self.played = Played()
        self._bursar, self._name, self._begun = bursar, name, begun
        self._prices = PriceBook.packaged()
        self._open: list[tuple[float, int, Reservation, Arrival]] = []

    def play(self, arrivals: Sequence[Arrival], seconds: float) -> Played:
        for number, (at_s, arrival) in enumerate(again_and_again(arrivals)):
            now_s = self._wait(min(at_s, seconds))
            if now_s >= seconds:
                break
            self.played.late_s = max(self.played.late_s, now_s - at_s)
            if now_s >= SAMPLE_S * len(self.played.memory_mb):
                self.played.memory_mb.append(memory_mb())
            self._begin(number, arrival, now_s)
        self._end_until(float("inf"))
        for _ in range(TRIES):
            try:
                self._bursar.tend()  # what was kept
                break
            except StoreError:
                continue
        return self.played

    def _wait(self, at_s: float) -> float:
        """Until that time, while calls end; the time then."""
        while (now_s := time.monotonic() - self._begun) < at_s:
            self._end_until(now_s)
            time.sleep(max(0.0, min(at_s, self._open[0][0] if self._open else at_s) - now_s))
        self._end_until(now_s)
        return now_s

    def _begin(self, number: int, arrival: Arrival, now_s: float) -> None:
        try:
            with self._bursar.scope(team=self._name, run=f"r{number // CALLS_OF_A_RUN}"):
                reservation = self._bursar.reserve(
                    "openai", "gpt-4o", input_tokens=arrival.input_tokens, max_output_tokens=MOST_OUTPUT
                )
        except StoreError:
            self.played.turned_away += 1
        else:
            heapq.heappush(self._open, (now_s + arrival.busy_us / 1e6 / SPEED, number, reservation, arrival))

    def _end_until(self, until: float) -> None:
        while self._open and self._open[0][0] <= until:
            _, _, reservation, arrival = heapq.heappop(self._open)
            usage = Usage(input_tokens=arrival.input_tokens, output_tokens=arrival.output_tokens)
            try:
                reservation.settle(usage)
            except StoreError:  # Bursar goes on trying by itself
                self.played.kept += 1
            self.played.calls += 1
            self.played.cost_nanos += self._prices.cost(
                "openai", "gpt-4o", usage, at_us=time.time_ns() // 1_000, tags={}
            ).cost_nanos
            self.played.ids += sum_of(iter((reservation.id,)))[1]


def play_all(url: str, folder: Path, seconds: float) -> list[Played]:
    """All processes at once, each trace by as many as its share of the calls is."""
    sizes = {name: len(trace(name, folder)) for name in TRACES}
    counts = {name: max(1, round(PROCESSES * size / sum(sizes.values()))) for name, size in sizes.items()}
    counts[TRACES[0]] += PROCESSES - sum(counts.values())
    with ExitStack() as stack:
        members = [
            stack.enter_context(crowd(play, 1, url, str(folder), name, number, count))[0]
            for name, count in counts.items()
            for number in range(count)
        ]
        for member in members:
            member.pipe.recv()
        for member in members:
            member.pipe.send((time.monotonic() + 1.0, seconds))
        return [member.pipe.recv() for member in members]


def thirds(played: Sequence[Played]) -> tuple[float, float]:
    """The memory of a process in MB, in the first and in the last third of the time: the median of all."""
    first, last = [], []
    for one in played:
        third = len(one.memory_mb) // 3
        first += one.memory_mb[:third]
        last += one.memory_mb[-third:]
    return statistics.median(first), statistics.median(last)


def main(minutes: float, folder: Path) -> None:
    server = Running(Path(tempfile.gettempdir()), max_connections="300", max_wal_size="1GB")
    with tempfile.TemporaryDirectory(prefix="bursar-journals-") as journals:
        url = f"{server.url}?leases={journals}&durability=process"
        Bursar(url, BUDGETS).close()  # the schema and the budgets are there
        begun = time.monotonic()
        played = play_all(url, folder, 60 * minutes)
        took_s = time.monotonic() - begun
        left = len(list(Path(journals).iterdir()))
    store = PostgresStore(server.url)
    calls, cost_nanos = sum(one.calls for one in played), sum(one.cost_nanos for one in played)
    leases = 0

    def settled() -> Iterator[str]:
        nonlocal leases
        for entry in store.entries():
            leases += "lease" in entry.draft["tags"]
            if entry.kind == "settlement":
                yield entry.id

    records, ids = sum_of(settled())
    (spent,) = (account.spent for account in store.accounts() if account.rule.budget == "everybody")
    held = store.open_reservations() + sum(account.reserved for account in store.accounts())
    wrong = audit(store)
    store.close()
    server.stop()
    first, last = thirds(played)
    is_same = records == calls and ids == sum(one.ids for one in played)
    table(
        f"{PROCESSES} processes on PostgreSQL with leases, {minutes:g} min of recorded arrivals at {SPEED} times their speed",
        ("what", "found", "figure"),
        [
            ("calls", calls, ""),
            ("calls/s, to the last record sent", f"{calls / took_s:.0f}", ""),
            ("the most that a call was begun late, s", f"{max(one.late_s for one in played):.1f}", ""),
            ("turned away, since the store was too busy", sum(one.turned_away for one in played), ""),
            ("settlements that were tried again", sum(one.kept for one in played), ""),
            ("leases", leases, ""),
            ("calls that are not the records", abs(records - calls), "met" if is_same else "MISSED"),
            ("nano-dollars that were cost and not spent", cost_nanos - spent, at_most(abs(cost_nanos - spent), 0)),
            ("still held, and journals left behind", held + left, at_most(held + left, 0)),
            ("balances that the audit rebuilds otherwise", len(wrong), at_most(len(wrong), 0)),
            ("memory of a process, first third, MB", f"{first:.1f}", ""),
            ("memory of a process, last third, MB", f"{last:.1f}", at_most(last / first, 1.05, " of the first third")),
        ],
    )
    print("\n".join(map(str, wrong[:20])))
    sys.exit(bool(wrong) or not is_same or bool(held + left))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.5, Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER)
