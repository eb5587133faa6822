"""Run worlds: `python -m sim.run --seed N`, `--worlds N [--from N]`, or `--hours H`; each failure says how to see it again."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
import traceback
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from bursar.accounts import Account
from bursar.stores.sqlite import SqliteStore
from sim.faults import Faults
from sim.leased import LeasedScenario, small_leases
from sim.programs import Scenario
from sim.reckoning import reckon
from sim.replay import compare
from sim.wire import Memory, Sqlite
from sim.world import World

CALLS = 60
CANARY = -2  # the world that must fail


class Told(NamedTuple):
    """What came of one world. `failure`: empty where every invariant held."""

    seed: int
    ops: int
    trace: int
    failure: str
    line: str


def play(seed: int) -> Scenario:
    """One world, from its seed to its reckoning. Raises Broken, and whatever the product must not raise."""
    kind = kind_of(seed)
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(small_leases()) if kind != "lean" else Path()
            if kind in ("sqlite", "compared"):
                (folder / "books.db").write_bytes(blank())
            scenario = made(seed, kind, folder)
            scenario.world.trusting = kind in ("sqlite", "compared")
            scenario.run()
            if seed == CANARY:
                tamper(scenario.world)
            reckon(scenario)
            if kind == "compared" and "tail_lost" not in scenario.world.faults.rates:
                compare(
                    scenario.world, SqliteStore(folder / "books.db", durability="process", clock=scenario.world.clock)
                )
            scenario.world.server.close()
            return scenario
    except BaseException as error:
        error.add_note(f"reproduce: python -m sim.run --seed {seed}")
        raise


@cache
def blank() -> bytes:
    """A database in which nothing has happened yet: to make its tables anew for each world would take longer than the world."""
    with tempfile.TemporaryDirectory() as folder:
        SqliteStore(Path(folder) / "books.db").close()
        return (Path(folder) / "books.db").read_bytes()


def kind_of(seed: int) -> str:
    """Most worlds are lean; some have leases, some stand on SQLite, some are played again on it."""
    if seed % 20 == 19:
        return "leased"
    return {50: "sqlite", 0: "compared"}.get(seed % 100, "lean")


def made(seed: int, kind: str, folder: Path) -> Scenario:
    random = Random(seed)
    faults = Faults(random)
    if kind != "lean" and kind != "compared":  # what they are made of does not forget
        faults.rates.pop("tail_lost", None)
    if kind == "sqlite":
        return Scenario(World(seed, partial(Sqlite, path=folder / "books.db"), faults, random), random, calls=CALLS)
    world = World(seed, Memory, faults, random)
    if kind == "leased":
        return LeasedScenario(world, folder, calls=2 * CALLS, scale=60)
    return Scenario(world, random, calls=CALLS)


def tamper(world: World) -> None:
    """Take a nano-dollar off the books of one account, past the law."""
    rows = world.server._rows
    key = next(key for key, row in rows.items() if type(row) is Account and row.spent)
    rows[key] = rows[key]._replace(spent=rows[key].spent - 1)


def told(seed: int) -> Told:
    """The same, as plain values."""
    logging.disable(logging.CRITICAL)
    try:
        scenario = play(seed)
        return Told(seed, scenario.world.auditor.ops, scenario.world.trace, "", "")
    except Exception as error:  # noqa: BLE001 - whatever it is, the next world is played
        return Told(seed, 0, 0, f"{type(error).__name__}: {error}"[:1_000], traceback.format_exc())
    finally:
        logging.disable(logging.NOTSET)


def for_hours(hours: float, *, first: int, worlds: int | None = None) -> list[str]:
    """Play world after world, for so long or so many of them; how each that failed can be seen again."""
    until, used, ops, failed, seed = time.time() + 3600 * hours, time.process_time(), 0, [], first
    while time.time() < until and (worlds is None or seed < first + worlds):
        one = told(seed)
        ops += one.ops
        if one.failure:
            failed.append(f"python -m sim.run --seed {seed}")
            print(f"{one.failure[:300]}\n    reproduce: {failed[-1]}", flush=True)
        seed += 1
    number, used = seed - first, time.process_time() - used
    print(f"{number} worlds, {ops} operations audited, {len(failed)} failed; {number / used:.0f} worlds/s of one core")
    return failed


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, help="play this world alone")
    options.add_argument("--worlds", type=int, help="play so many worlds")
    options.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    options.add_argument("--hours", type=float, help="play for so long")
    given = options.parse_args()
    if given.seed is None:
        worlds = given.worlds or (None if given.hours else 100)
        return 1 if for_hours(given.hours or 1e6, first=given.first, worlds=worlds) else 0
    one = told(given.seed)
    print(f"seed {one.seed}: {one.ops} operations audited, trace {one.trace:08x}\n{one.line}")
    return 1 if one.failure else 0


if __name__ == "__main__":
    if "PYTHONHASHSEED" not in os.environ:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "sim.run", *sys.argv[1:]])
    sys.exit(main())
