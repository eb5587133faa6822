"""Worlds with leases: processes that reserve in memory out of slices of the shared accounts, with journals that outlive them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bursar.commands import Command, Entry
from bursar.errors import StoreError
from bursar.stores.leases import LeasedStore, recover, sizing, tender
from bursar.stores.leases.journal import Journal
from sim.planting import replaced
from sim.programs import Scenario
from sim.wire import Wire
from sim.world import Host, Steps, World

SHARE, MIN_CALLS, HOT_PER_S, HORIZON_S = 4, 4, 0.3, 10.0  # so that little worlds have leases, and run out of them
TTL_US = 20_000_000  # of a lease: many of the dead expire before anybody recovers their journals
MEMORY = Path("/dev/shm")


class Leased(LeasedStore):
    """A process's leases. What is posted is done at once: a thread would have a time of its own."""

    def post(self, command: Command) -> None:
        with contextlib.suppress(StoreError):
            self.execute(command)


class Fragile(Journal):
    """A journal whose disk may be full, and whose process may die before or after anything is written."""

    host: Host
    world: World

    def _strikes(self) -> None:
        if self.world.faults.hits("kill"):
            self.host.doomed = True
        if self.host.doomed or self.world.faults.hits("disk_full"):
            raise StoreError("The journal's disk is full. Free some space, then try again.", fault="full")

    def write(self, booked: Sequence[tuple[str, Entry]]) -> list[int]:
        self._strikes()
        numbers = super().write(booked)
        self.host.doomed = self.host.doomed or self.world.faults.hits("kill")
        return numbers

    def begin(self, id: str, rules: Any, granted: Mapping[str, int]) -> None:
        self._strikes()
        super().begin(id, rules, granted)

    def sent(self, lease: str, numbers: Any, drawn: Mapping[str, int]) -> None:
        self._strikes()
        super().sent(lease, numbers, drawn)

    def ended(self, lease: str) -> None:
        self._strikes()
        super().ended(lease)


class LeasedScenario(Scenario):
    """As any, of processes with leases."""

    leased = True

    def __init__(self, world: World, folder: Path, **options: Any) -> None:
        super().__init__(world, world.random, **options)
        self.folder = folder
        self.given_ids, self.variety = False, 1

    def open_store(self, host: Host) -> Any:
        """The store of a process with leases, and what becomes of its journal when the process dies."""
        world = self.world
        host.inline = True
        wire = Wire(world, host)
        journal = type("Own", (Fragile,), {"host": host, "world": world})

        def ids() -> str:
            return f"{host.name}.{next(self.ids):05}"

        store = Leased(wire, self.folder, durability="process", background=False, ids=ids)
        store._tender._journal = lambda: self._journal(store, journal)  # type: ignore[method-assign]
        host.end = lambda: self._dies(store)
        return store

    @staticmethod
    def _journal(store: Leased, journal: type[Journal]) -> Journal:
        with replaced((tender, "Journal", journal)):
            return tender.Tender._journal(store._tender)

    def _dies(self, store: Leased) -> None:
        """The journal's lock is free; where the host is lost with its process, the journal is lost too."""
        journal = store._tender.books.journal
        if journal is None:
            return
        journal.close(delete=False)
        if self.world.faults.hits("journal_lost"):
            for lease in store._tender.books.leases.values():
                self.world.lost.update(entry.corrects or entry.id for entry in lease.unsent.values())
            for path in self.folder.glob(f"{journal.path.name}*"):
                path.unlink()

    def start(self, calls: int, *, first: bool = False) -> None:
        super().start(calls, first=first)
        host = self.hosts[-1]
        self.world.spawn(host, self.tender(host), self.random.randrange(10**6))

    def tender(self, host: Host) -> Steps:
        """The rounds of the leases' housekeeping; now and then there is none for long."""
        while not self.over:
            yield self.random.choice((250_000, 1_000_000, 4_000_000)) if self.world.faults.on else 60_000_000
            with contextlib.suppress(StoreError):
                host.store.tend()

    def run(self) -> None:
        """After all, processes end as they should, what the dead left behind is recovered, and what was held expires."""
        super().run()
        for host in self.hosts:
            if host.alive:
                host.store.close()
        recover(self.world.server, self.folder)
        assert not list(self.folder.glob("*.journal"))
        self.world.run(self.world.now_us + 1_000_000_000)
        self.world.server.sweep()


@contextlib.contextmanager
def small_leases() -> Iterator[Path]:
    """Leases that are worth it for little, and a folder for their journals."""
    places = (("SHARE", SHARE), ("MIN_CALLS", MIN_CALLS), ("HOT_PER_S", HOT_PER_S), ("HORIZON_S", HORIZON_S))
    folder = Path(tempfile.mkdtemp(prefix="bursar-sim-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        with replaced((tender, "TTL_US", TTL_US), *((sizing, name, value) for name, value in places)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
