"""Stores: where accounts, reservations and records are held, and how a URL names one."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from bursar.clock import Clock
from bursar.errors import InvalidInput
from bursar.stores.base import Store


def open_store(url: str, clock: Clock | None = None) -> Store:
    """The store behind a URL. Raises InvalidInput for a URL of no known form, StoreError when it cannot be opened."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    if parts.scheme == "memory":
        from bursar.stores.memory import MemoryStore

        return MemoryStore(clock)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1 and not options.keys() - {"durability"}:
        from bursar.stores.sqlite import SqliteStore

        return SqliteStore(unquote(parts.path[1:]), durability=options.get("durability", "full"), clock=clock)
    if parts.scheme in ("postgresql", "postgres"):
        from bursar.stores.postgres import PostgresStore

        return PostgresStore(url, clock=clock)
    raise InvalidInput(
        f'{url!r} names no store. Use "memory:", "sqlite:///file.db", "sqlite:///file.db?durability=process" or '
        '"postgresql://user@host/database".',
        argument="store",
    )
