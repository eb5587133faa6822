"""Asking: a statement is sent prepared, and its one value is read, in a third of the time that a cursor takes."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

CANCEL_S = 5.0


class Asking:
    """Asks over one connection, by one thread at a time."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._server = connection.pgconn
        self._patience_s: float = getattr(connection, "patience_s", 0.0)  # as the connection's own waiting has it
        self._names: dict[str, bytes] = {}
        self._made = 0
        self._has_said = _watch(self._server.socket, writing=False)
        self._takes_more = _watch(self._server.socket, writing=True)

    def value(self, statement: str, *values: str | int | None) -> bytes | None:
        """The first value of the first row. `statement` has its parameters as $1, $2. Raises psycopg.Error."""
        name = self._names.get(statement) or self._prepared(statement)
        texts = [None if value is None else str(value).encode() for value in values]
        try:
            self._server.send_query_prepared(name, texts)
            result = self._answer()
        except psycopg.Error:
            raise
        except BaseException:  # an interrupt: what is under way must not be done after what its caller does about it
            if self._server.transaction_status == TransactionStatus.ACTIVE:
                with contextlib.suppress(psycopg.Error):  # the server is gone as well: the interrupt is what counts
                    self._connection.cancel_safe(timeout=CANCEL_S)
                    self._answer()
            raise
        if result.status == ExecStatus.TUPLES_OK:
            return result.get_value(0, 0)
        error = error_from_result(result, encoding="utf-8")
        if isinstance(error, psycopg.errors.InvalidSqlStatementName) and self._names.pop(statement, b""):
            return self.value(statement, *values)  # psycopg forgets every prepared statement when it rolls back
        raise error

    def _answer(self) -> PGresult:
        server, until = self._server, time.monotonic() + self._patience_s
        while server.flush():  # more than the socket takes at once
            self._wait(until, self._takes_more)
            server.consume_input()
        while server.is_busy():
            self._wait(until, self._has_said)
            server.consume_input()
        result = server.get_result()
        while server.get_result() is not None:  # a connection that is lost says so twice
            pass
        if result is None:
            raise psycopg.OperationalError("the connection is lost")
        return result

    def _prepared(self, statement: str) -> bytes:
        self._made += 1  # a name is never used again, for another statement would be asked under it
        name = f"bursar_{self._made}".encode()
        self._server.send_prepare(name, statement.encode())
        result = self._answer()
        if result.status != ExecStatus.COMMAND_OK:
            raise error_from_result(result, encoding="utf-8")
        self._names[statement] = name
        return name

    def _wait(self, until: float, ready: Callable[[float | None], bool]) -> None:
        """Until the socket is ready. Raises OperationalError when patience is at an end."""
        if not ready(max(0.0, until - time.monotonic()) if self._patience_s else None):
            self._connection.close()
            raise psycopg.OperationalError(f"no answer for {self._patience_s:g} s")


def _watch(socket: int, *, writing: bool) -> Callable[[float | None], bool]:
    """Waits so many seconds, or for ever, until the socket has something to read, or takes more if it is for writing."""
    if not hasattr(select, "poll"):
        return lambda wait_s: any(select.select([socket], [socket] if writing else [], [], wait_s))
    poll = select.poll()
    poll.register(socket, select.POLLIN | (select.POLLOUT if writing else 0))
    return lambda wait_s: bool(poll.poll(None if wait_s is None else wait_s * 1_000))
