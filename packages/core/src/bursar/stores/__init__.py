"""Stores: where accounts, reservations and records are held, and how a URL names one."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from bursar.clock import Clock
from bursar.errors import InvalidInput, shown
from bursar.stores.base import Store


def open_store(url: str, clock: Clock | None = None, *, with_leases: bool = True) -> Store:
    """The store behind a URL. Raises InvalidInput for a URL of no known form, StoreError when it cannot be opened.

    `with_leases`: False for who looks or decides and makes no calls: the shared store itself, where the URL asks for leases.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
    except ValueError:
        raise _names_none(url) from None
    if parts.scheme == "memory":
        from bursar.stores.memory import MemoryStore

        return MemoryStore(clock)
    if parts.scheme == "sqlite" and not parts.netloc and len(parts.path) > 1 and not options.keys() - {"durability"}:
        from bursar.stores.sqlite import SqliteStore

        return SqliteStore(unquote(parts.path[1:]), durability=options.get("durability", "full"), clock=clock)
    if parts.scheme in ("postgresql", "postgres"):
        from bursar.stores.postgres import PostgresStore

        url, folder, durability = _leases(url)
        store = PostgresStore(url, clock=clock)
        return _leased(store, folder, durability) if folder is not None and with_leases else store
    if parts.scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster"):
        from bursar.stores.redis import RedisStore

        url, folder, durability = _leases(url)
        shared = RedisStore(url, clock=clock)
        return _leased(shared, folder, durability) if folder is not None and with_leases else shared
    raise _names_none(url)


def public_url(url: str) -> str:
    """The URL as a screen and a log may show it: without the password that may stand in it."""
    if url.startswith("sqlite:"):  # a file's name may hold both signs
        return url
    before, at, host = url.rpartition("@")
    scheme, found, user = before.partition("://")
    name, colon, _ = user.partition(":")
    shown_url = f"{scheme}{found}{name}{colon and ':***'}{at}{host}"
    return _QUERY_PASSWORD.sub(r"\1***", shown_url)


_QUERY_PASSWORD = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)


def _names_none(url: str) -> InvalidInput:
    return InvalidInput(
        f'{shown(public_url(url))} names no store. Use "memory:", "sqlite:///file.db", '
        '"sqlite:///file.db?durability=process", "postgresql://user@host/database", '
        '"postgresql://user@host/database?leases=/var/lib/bursar" or "redis://host:6379/0".',
        argument="store",
    )


def _leases(url: str) -> tuple[str, str | None, str]:
    """The URL without the options of leases, the folder for journals (`?leases=`), and the journals' durability."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    folder, durability = options.pop("leases", None), options.pop("durability", None)
    if folder is None and durability is not None:
        raise InvalidInput(
            "A shared store is as durable as its server. Leave `durability` out, or give `leases=FOLDER` beside it.",
            argument="store",
        )
    return urlunsplit(parts._replace(query=urlencode(options))), folder, durability or "full"


def _leased(shared: Store, folder: str, durability: str) -> Store:
    from bursar.stores.leases import LeasedStore

    try:
        return LeasedStore(shared, folder, durability=durability)
    except BaseException:
        shared.close()
        raise
