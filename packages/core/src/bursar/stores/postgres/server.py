"""The PostgreSQL server: connections to it, its schema and functions, and its errors as faults."""

from __future__ import annotations

import hashlib
import re
import time
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import psycopg
from psycopg import sql
from psycopg.abc import PQGen

from bursar.errors import InvalidInput, StoreError, shown
from bursar.migrations import HEAD, REVISIONS
from bursar.stores.postgres.partitions import announce, make_ahead

T = TypeVar("T")
STOPPED_S = (
    60.0  # a transaction without a limit of its statements ends when its process has done nothing in it for so long
)
PATIENCE = 2.0  # how many times the server's limit of a statement its client waits
MIGRATING = 0x627572736172  # "bursar": the advisory lock of whoever migrates or publishes
NOW = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
# What a URL does not say: find the primary after a fail-over, and notice within seconds that a host is gone.
_DEFAULTS = {
    "application_name": "bursar",
    "connect_timeout": "5",
    "target_session_attrs": "read-write",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_LAW = "\n".join(
    files(__package__).joinpath(f"{name}.sql").read_text("utf-8")
    for name in ("accounts", "fast", "rows", "reserve", "ends", "draw", "law")
)
# The functions carry the digest of their text in their names: processes of several versions work side by side, each by the
# law that it came with.
LAW = f"bursar_{hashlib.blake2b(_LAW.encode(), digest_size=4).hexdigest()}_"

# SQLSTATE, or its class -> (our fault, what the user does next)
_FAULTS = {
    "57014": ("locked", "Another transaction holds the same rows for too long: end it, then try again."),
    "55P03": ("locked", "Another transaction holds the same rows for too long: end it, then try again."),
    "40": ("locked", "Other transactions were in the way: try again."),
    "53100": ("full", "Free disk space on the server, then try again; nothing was lost."),
    "53": ("unreachable", "The server is out of connections or memory: raise its limits, or use fewer processes."),
    "25006": ("readonly", "This server is a replica or read-only: name the primary in the store's URL."),
    "42501": ("readonly", "Give this user the rights to the schema and its tables, then try again."),
    "23": ("damaged", "Stop all writers, and restore the database from a backup."),
    "42": ("damaged", "The schema is not what Bursar made: restore it from a backup."),
    "BU002": ("damaged", "Stop all writers, and restore the database from a backup."),
    "22P02": ("damaged", "Stop all writers, and restore the database from a backup."),
    "XX001": ("damaged", "Stop all writers, and restore the database from a backup."),
    "XX002": ("damaged", "Stop all writers, and reindex the database."),
    "22003": ("overflow", "A sum would pass 2^63: correct the amount, or give the budget a window."),
}


def split(url: str) -> tuple[str, str]:
    """The URL as libpq takes it, and the schema that it names (`?schema=`, by default "bursar")."""
    try:
        parts = urlsplit(url)
        if parts.netloc.count("@") > 1:  # libpq would take what follows the first for the host, and say so
            raise ValueError
        options = dict(parse_qsl(parts.query))
        schema = options.pop("schema", "bursar")
        full = urlunsplit(parts._replace(query=urlencode(_DEFAULTS | options)))
    except ValueError:
        raise _malformed() from None
    if not _SCHEMA.fullmatch(schema):
        raise InvalidInput(
            f"{shown(schema)} is no schema. Use small letters, digits and underscores, such as bursar.",
            argument="store",
        )
    return full, schema


class Bounded(psycopg.Connection[Any]):
    """A connection that fails when no answer has come for `patience_s` (0: waits for ever).

    The server's own limit of a statement helps nobody where the server, or what lies before it, has stopped to answer.
    """

    patience_s = PATIENCE * 10.0

    def wait(self, gen: PQGen[T], interval: float = 0.1, *args: Any, **options: Any) -> T:
        return super().wait(self._patient(gen) if self.patience_s else gen, interval, *args, **options)

    def _patient(self, gen: PQGen[T]) -> PQGen[T]:
        """The same waiting, which is told at every interval that nothing has come."""
        until = time.monotonic() + self.patience_s
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > until:
                    self.close()  # whose transaction it is need not try to undo it
                    raise psycopg.OperationalError(f"no answer for {self.patience_s:g} s")
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def connect(url: str, schema: str, *, timeout_s: float, lawful: bool = False) -> psycopg.Connection[Any]:
    """A connection whose statements commit by themselves, with the schema's tables in its path.

    `lawful`: for the law's functions, whose plans have to be those for many rows from the first one on, and by indices alone.
    """
    try:
        connection = Bounded.connect(url, autocommit=True)
    except psycopg.ProgrammingError:  # it quotes what it cannot read, which may be the password
        raise _malformed() from None
    try:
        connection.execute(
            "SELECT set_config('search_path', %s, false), set_config('statement_timeout', %s, false), "
            "set_config('default_transaction_isolation', 'read committed', false), set_config('jit', 'off', false), "
            "set_config('client_encoding', 'UTF8', false), "
            # a process that stops, or a host that is gone, amid a draw, a prune or an erasure keeps nobody from the accounts
            "set_config('idle_in_transaction_session_timeout', %s, false)",
            (schema, str(round(timeout_s * 1_000)), str(round((timeout_s or STOPPED_S) * 1_000))),
        )
        connection.patience_s = PATIENCE * timeout_s
        if lawful:
            connection.execute(
                "SELECT set_config('plan_cache_mode', 'force_generic_plan', false), set_config('enable_seqscan', 'off', false)"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _malformed() -> InvalidInput:
    return InvalidInput(
        "The store's URL is none that PostgreSQL reads. Write it like postgresql://user@host/database, "
        "and %-encode signs in its password.",
        argument="store",
    )


def prepare(url: str, schema: str, timeout_s: float) -> None:
    """Bring the schema's tables and functions up to date. Raises StoreError (newer)."""
    with connect(url, schema, timeout_s=timeout_s) as connection:
        revision, is_lawful = _standing(connection)
        if revision is not None and revision not in REVISIONS:
            raise StoreError(
                f"The schema {schema} was written by a newer Bursar (schema {revision}). Upgrade Bursar to open it.",
                fault="newer",
            )
        if revision == HEAD and is_lawful:
            make_ahead(connection, server_time_us(connection))
            return
    _upgrade(url, schema, revision)


def _standing(connection: psycopg.Connection[Any]) -> tuple[str | None, bool]:
    """The schema's revision, and whether this version's functions are there."""
    revision = None
    if _value(connection, "SELECT to_regclass('alembic_version')", ()) is not None:
        revision = _value(connection, "SELECT version_num FROM alembic_version", ())
    return revision, bool(_value(connection, "SELECT to_regproc(%s) IS NOT NULL", (LAW + "apply",)))


def server_time_us(connection: psycopg.Connection[Any]) -> int:
    """What the server's clock says, in microseconds since the epoch."""
    return int(_value(connection, NOW, ()))


def _upgrade(url: str, schema: str, revision: str | None) -> None:
    """Under one lock and in one transaction: processes that open at once wait for each other, one does the work."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError

    from bursar.migrations import upgrade as migrate

    connection = connect(url, schema, timeout_s=0)  # waiting for others may take long
    if revision is not None and revision < "0003":
        announce(connection, server_time_us(connection))
    connection.autocommit = False
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection)
    try:
        with engine.begin() as bound:
            bound.exec_driver_sql("SELECT pg_advisory_xact_lock(%s)", (MIGRATING,))
            if _standing(connection) == (HEAD, True):
                return  # of processes that open at once, the others are not held up by work that is done
            if not _value(connection, "SELECT to_regnamespace(%s) IS NOT NULL", (schema,)):
                connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
            migrate(bound)
            if not _value(connection, "SELECT to_regproc(%s) IS NOT NULL", (LAW + "apply",)):
                connection.execute(_LAW.replace("bursar_", LAW).encode())
    except DBAPIError as error:
        raise error.orig or error from error  # the driver's own, which says what the fault is
    finally:
        engine.dispose()
        connection.close()


def _value(connection: psycopg.Connection[Any], query: str, values: tuple[Any, ...]) -> Any:
    row = connection.execute(query.encode(), values).fetchone()
    return row[0] if row else None


def is_lost(error: psycopg.Error) -> bool:
    """Whether the connection is gone, or leads to a server that may not write: another one may serve."""
    state = error.sqlstate or ""
    return not state or state in ("25006", "25P03") or (state[:2] in ("08", "57") and state != "57014")


def is_passing(error: psycopg.Error) -> bool:
    """Whether the same command, made again at once, may well succeed.

    A function that a migration makes again while a command is in the midst of it "cannot be looked up": all of it is undone.
    """
    return (error.sqlstate or "")[:2] == "40" or (error.sqlstate == "XX000" and "cache lookup failed" in str(error))


def concerns_one(error: psycopg.Error) -> bool:
    """Whether a batch failed for what one of its commands is, rather than for the state of the store."""
    return (error.sqlstate or "")[:2] in ("21", "22", "23", "BU")


def fault_of(error: psycopg.Error) -> StoreError:
    """The StoreError that says what to do. It names no address, since a URL may hold a password."""
    state = error.sqlstate or ""
    if state == "BU001":
        return StoreError(
            f"The server's clock is {error.diag.message_primary} s behind the store's. Set the clock (NTP), then try again.",
            fault="clock",
        )
    fault, remedy = (
        _FAULTS.get(state) or _FAULTS.get(state[:2]) or ("unreachable", "Check the server, and the store's URL.")
    )
    says = (error.diag.message_primary or str(error)).strip().splitlines()[0]
    return StoreError(f"The PostgreSQL store failed: {says}. {remedy}", fault=fault, sqlstate=state or None)
