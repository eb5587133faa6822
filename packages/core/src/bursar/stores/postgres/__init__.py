"""The PostgreSQL store: the law as functions on the server, one call of them per command or batch."""

from __future__ import annotations

from bursar.errors import StoreError

try:
    import psycopg as _psycopg  # noqa: F401 - before anything else needs it
except ImportError as error:
    raise StoreError(
        f"The PostgreSQL store needs psycopg ({error}). Run: pip install 'bursar[postgres]'.", fault="unreachable"
    ) from error

from bursar.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
