"""Many processes that work at the same time: forked from one parent that has imported everything, one kind of work a turn."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

WARM_S = 0.3  # each turn begins so long before it counts: leases are taken, plans made, caches filled
MEMORY = "memory"
_FORKS = multiprocessing.get_context("forkserver")


class Work(NamedTuple):
    """One kind of work: `run` is one unit of it, `finish` what a turn ends with; errors of `passes` are counted and passed over."""

    run: Callable[[], object]
    finish: Callable[[], object] = bool
    passes: tuple[type[Exception], ...] = ()


class Turn(NamedTuple):
    """What all processes did in one turn. `failed`: units that ended in an error that the work passes over."""

    per_s: float
    p50_us: float
    p99_us: float
    failed: int


def member(pipe: Connection, make: Callable[..., dict[str, Work]], number: int, given: Sequence[Any]) -> None:
    """One process: it makes its works, then does the one that it is told to, from a time to a time."""
    works = make(number, *given)
    pipe.send("ready")
    for name, from_s, until_s in iter(pipe.recv, None):
        if name == MEMORY:
            pipe.send(pss_bytes())
            continue
        run, finish, passes = works[name]
        taken, failed = array("Q"), 0
        while (begun := time.perf_counter_ns()) < until_s * 1e9:
            counts = begun >= from_s * 1e9
            try:
                run()
            except passes:
                failed += counts
            else:
                if counts:
                    taken.append(time.perf_counter_ns() - begun)
        finish()
        pipe.send((taken.tobytes(), failed, time.perf_counter()))


def pss_bytes() -> int:
    """The memory of this process; pages that processes share are divided among them (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1_024


class Crowd:
    """The processes of one figure, each ready to work."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    def turn(self, name: str, seconds: float) -> Turn:
        """All of them do that work for so many seconds. A turn is over when the last of them has finished."""
        from_s = time.perf_counter() + WARM_S
        all_taken, failed, over_s = array("Q"), 0, from_s
        for taken, missed, ended_s in self._ask((name, from_s, from_s + seconds)):
            all_taken.frombytes(taken)
            failed, over_s = failed + missed, max(over_s, ended_s)
        cuts = statistics.quantiles(all_taken, n=100) if len(all_taken) > 1 else [float("nan")] * 99
        return Turn(len(all_taken) / (over_s - from_s), cuts[49] / 1_000, cuts[98] / 1_000, failed)

    def memory_bytes(self) -> float:
        """What one of them takes, as they stand now."""
        return statistics.median(self._ask((MEMORY, 0.0, 0.0)))

    def _ask(self, question: object) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(question)
        return [pipe.recv() for pipe in self._pipes]


@contextmanager
def crowd(count: int, make: Callable[..., dict[str, Work]], *given: Any) -> Iterator[Crowd]:
    """So many processes with the works of `make(number, *given)`, which has to be in a module of this folder."""
    _FORKS.set_forkserver_preload([make.__module__])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}{os.pathsep}{before}"  # that of the parent of all
    try:
        forkserver.ensure_running()
    finally:
        os.environ["PYTHONPATH"] = before
    pipes, started = [], []
    for number in range(count):
        mine, its = _FORKS.Pipe()
        process = _FORKS.Process(target=member, args=(its, make, number, given), daemon=True)
        process.start()
        its.close()  # a process that fails is heard of
        pipes.append(mine)
        started.append(process)
    try:
        for pipe in pipes:
            pipe.recv()
        yield Crowd(pipes)
        for pipe in pipes:
            pipe.send(None)
        for process in started:
            process.join()
    finally:
        for process in started:
            process.kill()


def turns(members: Crowd, names: Sequence[str], seconds: float, rounds: int) -> dict[str, list[Turn]]:
    """So many turns of each work, A B A B, so that the machine's moods fall on all of them."""
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for _, name in itertools.product(range(rounds), names):
        found[name].append(members.turn(name, seconds))
    return found
