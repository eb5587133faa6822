"""Errors of Redis as faults: what failed, and what the user does next."""

from __future__ import annotations

import re
from collections.abc import Sequence

from redis import exceptions

from bursar.errors import StoreError

# What the server says first, or the driver's class for it -> (our fault, what the user does next)
_FAULTS = {
    "OOM": ("full", "Give the server more memory (maxmemory), or drain its records; nothing was lost."),
    "MISCONF": ("full", "The server cannot write to its disk: free some space, then try again; nothing was lost."),
    "READONLY": ("readonly", "This server is a replica: name the primary in the store's URL."),
    "LOADING": ("loading", "The server reads its data from disk: try again when it has."),
    "BUSY": ("locked", "Another script has been running for too long: end it with SCRIPT KILL, then try again."),
    "NOAUTH": ("denied", "Give a user and a password in the store's URL."),
    "WRONGPASS": ("denied", "Correct the user and the password in the store's URL."),
    "NOPERM": ("denied", "Give this user the rights to these commands and to keys that begin with bursar."),
    "NOREPLICAS": ("unreachable", "The server has too few replicas to write (min-replicas-to-write): bring them back."),
    "MASTERDOWN": ("unreachable", "This replica has lost its primary: name the primary in the store's URL."),
    "CLUSTERDOWN": ("unreachable", "Part of the cluster is down: bring it back, then try again."),
    "TRYAGAIN": ("locked", "The cluster is moving this slot: try again."),
    "OVERFLOW": ("overflow", "Correct the amount, or give the budget a window."),
    "I2": ("damaged", "Stop all writers, and restore the server's data from a backup."),
    "WRONGTYPE": ("damaged", "Something else writes keys of Bursar's: stop it, and restore the data from a backup."),
}
_CLASSES: Sequence[tuple[type[Exception], str]] = (
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.BusyLoadingError, "LOADING"),
    (exceptions.AuthenticationError, "WRONGPASS"),
    (exceptions.AuthorizationError, "NOAUTH"),
    (exceptions.NoPermissionError, "NOPERM"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.TryAgainError, "TRYAGAIN"),
)
_SAID = re.compile(rf"\b({'|'.join(_FAULTS)})\b")
ERRORS = (exceptions.RedisError, exceptions.RedisClusterException)


def is_lost(error: Exception) -> bool:
    """Whether another connection may serve: this one is gone, or leads to a server that may not write."""
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError)):
        return False
    gone = (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.ReadOnlyError,
        exceptions.RedisClusterException,
    )
    return isinstance(error, gone)


def fault_of(error: Exception | str) -> StoreError:
    """The StoreError that says what to do. It names no URL, which may hold a password."""
    says = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    code = next((code for kind, code in _CLASSES if isinstance(error, kind)), "")
    said = _SAID.search(says)
    if not code and said:
        code = said[1]
    if code:
        fault, remedy = _FAULTS[code]
    elif isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.RedisClusterException)):
        fault, remedy = "unreachable", "Check the server, and the store's URL."
    else:
        fault, remedy = "damaged", "The server does not do what Redis does: check what it is."
    if fault == "overflow":
        says = "a sum would pass 2^63"
    return StoreError(f"The Redis store failed: {says.rstrip('.')}. {remedy}", fault=fault)
