"""The keys of a Redis store: everything beside commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic_core import from_json

from bursar.accounts import Account
from bursar.commands import Alert, Definition, Definitions, Entry, Reservation
from bursar.errors import StoreError
from bursar.signing import changes, operator_of
from bursar.stores.pruning import LATE_US, Pruned
from bursar.stores.redis.retiring import forget_alerts, retire
from bursar.stores.redis.scripts import CLAIM, PUBLISH
from bursar.stores.redis.server import Server
from bursar.stores.redis.slots import Slots, check_budgets
from bursar.stores.redis.wire import Wire, alert_of, fields_of, row_of
from bursar.stores.retiring import granted
from bursar.stores.sqlite_rows import PAGE, dumps

MAX_TURNS = 100  # of somebody whom others are always ahead of

_T = TypeVar("_T")


class RedisKeys:
    """Definitions, the outbox, which accounts are kept, and reports; safe for threads. Raises StoreError."""

    now_us: Callable[[], int]

    def __init__(self, url: str) -> None:
        self._wire = Wire()
        self.server = Server(url)
        self.slots = Slots(self.server)

    # -- definitions

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """By one process at a time: who finds that another was faster looks again. What is the newest already is left alone."""
        if kind == "budget" and self.slots.by_org:
            check_budgets(definitions)
        fields = [_field(kind, name) for name in definitions]
        for _ in range(MAX_TURNS):
            version = self.version()
            held = self._held([*fields, _field("operator", "operator")])
            found = changes(kind, definitions, held)
            if not found:
                return version
            new = {name: Definition(version + 1 + number, one) for number, (name, one) in enumerate(found.items())}
            last = version + len(new)
            operator = operator_of({**held, kind: {**held.get(kind, {}), **new}}) or ""
            texts = [text for name, one in new.items() for text in (_field(kind, name), dumps(one))]
            arguments = (str(version), str(last), operator, *texts)
            if self.server.run(PUBLISH, self.slots.policy, *arguments):
                return self.version()
        raise StoreError("Others publish all the time. Try again.", fault="locked")

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        """The policy's version, and the newest definition of everything that was defined after version `since`."""
        version = self.version()
        newer = self.server.ask("ZRANGEBYSCORE", f"{self.slots.policy}versions", f"({since}", "+inf")
        held = self._held([field.decode() for field in newer])
        newest = max((one.version for named in held.values() for one in named.values()), default=0)
        return max(version, newest), held

    def _held(self, fields: Sequence[str]) -> Definitions:
        held: Definitions = {}
        told = self.server.ask("HMGET", f"{self.slots.policy}definitions", *fields) if fields else []
        for field, text in zip(fields, told, strict=True):
            if text is not None:
                kind, name = from_json(field)
                held.setdefault(kind, {})[name] = Definition(*from_json(text))
        return held

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        told = self.server.ask("LRANGE", f"{self.slots.policy}history", "0", "-1")
        for field, text in zip(told[::2], told[1::2], strict=True):
            (kind, name), (version, definition) = from_json(field), from_json(text)
            yield version, kind, name, definition

    def version(self) -> int:
        return self.slots.version()

    # -- the outbox

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        now_us, slots = self.now_us(), self.slots.all()
        due = self.server.many(f"ZRANGEBYSCORE {slot}outbox -inf {now_us} LIMIT 0 1".split() for slot in slots)
        found: list[tuple[Alert, int]] = []
        for slot in (slot for slot, ids in zip(slots, due, strict=True) if ids):
            arguments = (str(now_us), str(now_us + lease_us), str(limit - len(found)))
            for id, claims, flat in self.server.run(CLAIM, slot, *arguments):
                self.slots.remember(f"t:{id.decode()}", slot)
                found.append((alert_of(id.decode(), fields_of(dict(zip(flat[::2], flat[1::2], strict=True)))), claims))
        return sorted(found, key=lambda one: (one[0].at_us, one[0].id))

    def delivered(self, ids: Iterable[str]) -> None:
        self._outbox(("ZREM", id) for id in ids)

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self._outbox(("ZADD", "XX", str(at_us), id) for id in ids)

    def _outbox(self, commands: Iterable[Sequence[str]]) -> None:
        for name, *arguments in commands:
            slot = self.slots.home(f"t:{arguments[-1]}")
            self.server.ask(name, f"{slot}outbox", *arguments)

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        found = []
        for slot in self.slots.all():
            waiting = {id.decode() for id in self.server.ask("ZRANGE", f"{slot}outbox", "0", "-1")}
            for alert in self._rows(slot, "t:", self.server.ask("ZRANGE", f"{slot}alerts", "0", "-1"), alert_of):
                found.append((alert, alert.id not in waiting))
        return iter(sorted(found, key=lambda one: (one[0].at_us, one[0].id)))

    # -- reading

    def reservations(self) -> Iterator[Reservation]:
        slots = self.slots.all()
        found = [
            row
            for slot in slots
            for row in self._rows(slot, "i:", self.server.ask("ZRANGE", f"{slot}due", "0", "-1"), row_of)
        ]
        return iter(sorted(row for row in found if type(row) is Reservation))

    def open_reservations(self) -> int:
        return sum(self.server.many(("ZCARD", f"{slot}due") for slot in self.slots.all()))

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        if keys is None:
            wanted = [
                (slot, key)
                for slot in self.slots.all()
                for key in sorted(key.decode() for key in self.server.ask("SMEMBERS", f"{slot}accounts"))
            ]
        else:
            wanted = [(self.slots.of_account(key), key) for key in keys]
        rows = self.server.many(("MGET", f"{slot}r:{key}", f"{slot}a:{key}") for slot, key in wanted)
        return iter([self._wire.stored_account(*row) for row in rows if None not in row])

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        """Those that have not been drained. All ids are read first, since they come in the order of time."""
        wanted = dict(tags or {}).items()
        ids = sorted((id, slot) for slot in self.slots.all() for id in self._ended(slot))
        for start in range(0, len(ids), PAGE):
            page = ids[start : start + PAGE]
            rows = self.server.many(("HGETALL", f"{slot}i:{id}") for id, slot in page)
            for (id, _), row in zip(page, rows, strict=True):
                entry = row_of(id, fields_of(row)) if row else None
                if type(entry) is Entry and wanted <= entry.draft["tags"].items():
                    yield entry

    def _ended(self, slot: str) -> Iterator[str]:
        """The ids in a slot's stream of records."""
        after = "-"
        while True:
            page = self.server.ask("XRANGE", f"{slot}records", after, "+", "COUNT", str(PAGE))
            for _, fields in page:
                yield fields[b"id"].decode()
            if len(page) < PAGE:
                return
            after = f"({page[-1][0].decode()}"

    def _rows(
        self, slot: str, kind: str, ids: Sequence[bytes], made: Callable[[str, Mapping[str, str]], _T]
    ) -> list[_T]:
        names = [id.decode() for id in ids]
        rows = self.server.many(("HGETALL", f"{slot}{kind}{name}") for name in names)
        return [made(name, fields_of(row)) for name, row in zip(names, rows, strict=True) if row]

    def prune(self, before_us: int, facts: Mapping[str, Any]) -> Pruned:
        """Retire accounts, and forget alerts: records are drained, and pruned where they went."""
        now_us = self.now_us()
        rests_us = min(before_us, now_us - 2 * LATE_US)  # until LATE_US after the drain an expiry may be corrected
        more = granted(self.definitions()[1], now_us)
        for slot in self.slots.all():
            forget_alerts(self.server, slot, rests_us)
        return Pruned(accounts=sum(retire(self.server, slot, more, rests_us, now_us) for slot in self.slots.all()))


def _field(kind: str, name: str) -> str:
    return dumps((kind, name))
