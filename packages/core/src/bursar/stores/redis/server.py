"""The Redis server or cluster: connections to it, and what it keeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from bursar.errors import InvalidInput, StoreError
from bursar.stores.redis.faults import ERRORS, fault_of, is_lost
from bursar.stores.redis.scripts import Script

log = logging.getLogger("bursar")

PIPELINE = 500  # commands that are read together
_OPTIONS = {"socket_connect_timeout": 5.0, "socket_timeout": 10.0, "socket_keepalive": True, "protocol": 2}


class Server:
    """One server (`redis://`, `rediss://`) or a cluster (`redis+cluster://`, `rediss+cluster://`).

    `org`: what the URL says of it. Commands of the hot path go over a connection that is kept for them; everything else over
    the driver's own pool.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        self.org = options.pop("org", None)
        self.is_cluster = parts.scheme.endswith("+cluster")
        scheme = parts.scheme.removesuffix("+cluster")
        self._url = urlunsplit(parts._replace(scheme=scheme, query=urlencode(options)))
        self.using = threading.RLock()  # held while the connection for scripts is in use
        self._closed = False
        self._client: Any = None
        self._connection: Any = None

    def client(self) -> Any:
        """The driver's client."""
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")
        if self._client is None:
            options: dict[str, Any] = dict(_OPTIONS)
            try:
                if self.is_cluster:
                    self._client = redis.RedisCluster.from_url(self._url, **options)
                else:
                    options |= {"retry": Retry(NoBackoff(), 0), "retry_on_error": []}
                    client = redis.Redis.from_url(self._url, **options)
                    _connection_of(client)  # which connects to nothing yet, but knows its options
                    self._client = client
            except (ValueError, TypeError):  # whose text may hold a password
                raise InvalidInput(
                    'The URL of the Redis store is malformed. Write it like "redis://user:password@host:6379/0", with special '
                    "signs of the password percent-encoded, and with options that redis-py knows.",
                    argument="store",
                ) from None
        return self._client

    def run(self, script: Script, key: str, *arguments: str) -> Any:
        """Run a script; its text is sent where the server has lost it. Raises StoreError, as all of these."""
        return self._twice(partial(self._run, script, key, *arguments))

    def ask(self, *command: str | bytes | int) -> Any:
        """One command beside the scripts."""
        return self._twice(partial(self._whole, lambda client: client.execute_command(*command)))

    def many(self, commands: Iterable[Sequence[str | int]]) -> list[Any]:
        """The answers to many commands, on whatever nodes."""
        wanted, found = list(commands), []
        for start in range(0, len(wanted), PIPELINE):
            found += self._twice(partial(self._whole, partial(_pipelined, wanted[start : start + PIPELINE])))
        return found

    def _twice(self, work: Callable[[], Any]) -> Any:
        """The work, done again on a new connection where the old one was lost: the law gives it the same answer (I6)."""
        for last in (False, True):
            try:
                return work()
            except ERRORS as error:
                if last or not is_lost(error):
                    raise fault_of(error) from error
                self.reconnect()
        raise AssertionError("unreachable")

    def _run(self, script: Script, key: str, *arguments: str) -> Any:
        try:
            return self._send("EVALSHA", script.digest, "1", key, *arguments)
        except exceptions.NoScriptError:
            return self._send("EVAL", script.text, "1", key, *arguments)

    def _send(self, *command: str) -> Any:
        if self.is_cluster:
            return self._whole(lambda client: client.execute_command(*command))
        with self.using:
            connection = self._connection
            if connection is None:
                connection = self._connection = _connection_of(self.client())
            try:
                connection.send_packed_command([_packed(command)])
                return connection.read_response()
            except BaseException as error:
                if not isinstance(error, exceptions.ResponseError):  # half-way: the next answer would be this command's
                    self._connection = None
                    connection.disconnect()
                raise

    def _whole(self, work: Callable[[Any], Any]) -> Any:
        """Work with the driver's client; a connection that is left half-way must not come back from its pool."""
        try:
            return work(self.client())
        except ERRORS:
            raise
        except BaseException:
            self.drop()
            raise

    def reconnect(self) -> None:
        """Leave the server that the connection for scripts leads to."""
        with self.using:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.disconnect()

    def settings(self) -> list[dict[str, str]]:
        """What each node says of its persistence and eviction; empty where it does not tell."""
        found: list[dict[str, str]] = self._twice(partial(self._whole, self._settings))
        return found

    @staticmethod
    def _settings(client: Any) -> list[dict[str, str]]:
        nodes = (
            [{"target_nodes": node} for node in client.get_primaries()] if hasattr(client, "get_primaries") else [{}]
        )
        found = []
        for node in nodes:
            told: dict[str, str] = {}
            for pattern in ("append*", "maxmemory-policy"):
                with suppress(exceptions.ResponseError):  # a hosted server may not tell
                    told |= _plain(client.execute_command("CONFIG GET", pattern, **node))
            found.append(told)
        return found

    def drop(self) -> None:
        """Close every connection; the next command opens new ones."""
        self.reconnect()
        client, self._client = self._client, None
        if client is not None:
            with suppress(*ERRORS):
                client.close()

    def close(self) -> None:
        """Close every connection for good."""
        self._closed = True
        self.drop()

    def leave(self) -> tuple[Any, Any]:
        """In a fork's child: forget the parent's connections, which must not be closed here. They are to be kept for ever."""
        inherited = self._client, self._connection
        self._client = self._connection = None
        return inherited


def _connection_of(client: Any) -> Any:
    """A connection of our own. The pool would count it for ever, and after a hundred of them make no more."""
    pool = client.connection_pool
    return pool.connection_class(**pool.connection_kwargs)


def _pipelined(commands: Iterable[Sequence[str | int]], client: Any) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        found: list[Any] = pipeline.execute()
        return found


def _packed(words: Sequence[str]) -> bytes:
    """A command as RESP (the protocol's array of bulk strings); the driver's own way takes a third of a call's time."""
    text = "\r\n".join([f"${len(word)}\r\n{word}" for word in words])
    if text.isascii():
        return f"*{len(words)}\r\n{text}\r\n".encode()
    texts = [word.encode() for word in words]  # whose lengths are others
    return b"*%d\r\n" % len(texts) + b"".join([b"$%d\r\n%b\r\n" % (len(text), text) for text in texts])


def _plain(told: Any) -> dict[str, str]:
    """CONFIG GET's answer, whose form depends on the driver and its protocol."""
    pairs = told.items() if isinstance(told, dict) else zip(told[::2], told[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def durability_of(settings: Sequence[Mapping[str, str]]) -> str:
    """What survives by these settings: `full`, `everysec`, `memory`, or `unknown`. Raises StoreError where keys may be evicted."""
    policies = {told.get("maxmemory-policy", "noeviction") for told in settings} - {"noeviction"}
    if policies:
        raise StoreError(
            f"The server evicts keys when it is full (maxmemory-policy {sorted(policies)[0]}), and with them what was spent. "
            "Set maxmemory-policy to noeviction.",
            fault="evicts",
        )
    found = {_durability(told) for told in settings}
    durability = next((one for one in ("unknown", "memory", "everysec") if one in found), "full")
    if durability != "full":
        log.warning("The Redis store %s", _WARNINGS[durability])
    return durability


def _durability(told: Mapping[str, str]) -> str:
    if "appendonly" not in told or "maxmemory-policy" not in told:
        return "unknown"
    if told["appendonly"] != "yes":
        return "memory"
    return "full" if told.get("appendfsync") == "always" else "everysec"


_WARNINGS = {
    "everysec": "may lose the last second of its books when its server or machine fails. For money, set appendfsync to always.",
    "memory": "keeps no books beyond its server's memory: a restart loses them, or what came after the last snapshot. For money, "
    "set appendonly to yes and appendfsync to always.",
    "unknown": "does not tell what it keeps (CONFIG GET is denied). Make sure that appendonly is yes, appendfsync is always and "
    "maxmemory-policy is noeviction.",
}
