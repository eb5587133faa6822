"""The schema of a SQLite file: which one it has, and how it is brought up to date."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from bursar.migrations import HEAD


def revision(connection: sqlite3.Connection) -> str | None:
    """Of the schema; None where there is none yet."""
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # that one says: no such table
            raise
        return None
    return found[0] if found else None


def upgrade(path: Path, timeout_s: float) -> None:
    """Run the migrations under the write lock; processes that open at once wait for each other, one does the work."""
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import DBAPIError

    from bursar.migrations import upgrade as migrate

    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    engine = create_engine("sqlite://", creator=lambda: connection)
    event.listen(engine, "begin", lambda bound: bound.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as bound:
            # where another did it while this one waited, the lock is held for a moment only
            if revision(connection) != HEAD:
                migrate(bound)
    except DBAPIError as error:
        raise error.orig or error from error  # the driver's own, which says what the fault is
    finally:
        engine.dispose()
        connection.close()
