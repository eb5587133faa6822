"""The Redis store: the law as a script on the server, one call of it per command or batch."""

from __future__ import annotations

from bursar.errors import StoreError

try:
    import redis as _redis  # noqa: F401 - before anything else needs it
except ImportError as error:
    raise StoreError(
        f"The Redis store needs redis-py ({error}). Run: pip install 'bursar[redis]'.", fault="unreachable"
    ) from error

from bursar.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
