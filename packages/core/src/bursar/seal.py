"""The seal: one line that stands for all records and decisions up to a moment, so that a later change of any of them shows."""

from __future__ import annotations

import hashlib
import json
import re

from bursar.errors import InvalidInput
from bursar.stores.base import Store

LEFT_OUT_US = 60_000_000  # what is settled now may be committed a little later
_SEAL = re.compile(r"(\d{1,19})-\d{1,19}-(\d{1,19})-[0-9a-f]{64}")


def seal(store: Store) -> str:
    """The seal of everything that is older than a minute. Keep it where nobody who writes to the store can. Raises StoreError."""
    until_us = max(0, store.now_us() - LEFT_OUT_US)
    return _sealed(store, until_us, max((one[0] for one in store.history()), default=0))


def is_broken(store: Store, given: str) -> bool:
    """Whether anything that a seal covers was changed, added or taken away since. Raises InvalidInput for no seal, StoreError."""
    found = _SEAL.fullmatch(given.strip())
    if found is None:
        raise InvalidInput("This is no seal. Give the line that `bursar audit --seal` printed.", argument="seal")
    return _sealed(store, int(found[1]), int(found[2])) != given.strip()


def _sealed(store: Store, until_us: int, version: int) -> str:
    digest, count = hashlib.sha256(), 0
    for entry in store.entries():
        if entry.settled_us <= until_us:
            count += 1
            digest.update(json.dumps(entry, sort_keys=True).encode())
    for one in store.history():
        if one[0] <= version:
            digest.update(json.dumps(one, sort_keys=True).encode())
    return f"{until_us}-{count}-{version}-{digest.hexdigest()}"
