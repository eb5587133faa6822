"""The drain: moves usage records out of Redis into a SQL store, where they stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bursar.commands import Draw, Drawn, Entry
from bursar.errors import StoreError
from bursar.stores.base import Store
from bursar.stores.pruning import LATE_US
from bursar.stores.redis.retiring import note
from bursar.stores.redis.scripts import DRAINED
from bursar.stores.redis.store import RedisStore
from bursar.stores.redis.wire import fields_of, row_of

BATCH = 500
KEPT_S = 86_400  # so long a command that comes twice is known for it
EXPIRY_KEPT_S = (
    LATE_US // 1_000_000
)  # so long what has expired may be settled late, or released by an operator who has the bill
_GROUP = "drain"


def drain(source: RedisStore, target: Store) -> int:
    """Move every record that has ended so far; the number that were new to the target.

    A record leaves Redis after it is on the target's disk. So a drain that is cut off moves some again, which the target knows by
    their ids; several may run at once. Raises StoreError; `damaged` where the target holds another record of the same id.
    """
    return sum(_drain(source, target, slot) for slot in source.slots.all())


def _drain(source: RedisStore, target: Store, slot: str) -> int:
    moved = 0
    for page in _pages(source, slot):
        ids = [id for _, id in page]
        rows = source.server.many(("HGETALL", f"{slot}i:{id}") for id in ids)
        found = [row_of(id, fields_of(row)) for id, row in zip(ids, rows, strict=True) if row]
        entries = tuple([row for row in found if type(row) is Entry])
        answer = target.execute(Draw(_GROUP, (), entries))
        if type(answer) is not Drawn:
            raise StoreError(
                f"The records cannot be drained: {answer}. The target holds another record of that id: name a target of its own "
                "for each Redis.",
                fault="damaged",
            )
        moved += answer.new
        note(source.server, slot, entries, source.now_us())
        source.server.run(DRAINED, slot, str(KEPT_S), str(EXPIRY_KEPT_S), *(text for one in page for text in one))
    return moved


def _pages(source: RedisStore, slot: str) -> Iterator[Sequence[tuple[str, str]]]:
    """Ids in the stream and of rows: first what an earlier drain was given and did not finish, then what nobody was given."""
    records = f"{slot}records"
    groups = source.server.ask("XINFO", "GROUPS", records) if source.server.ask("EXISTS", records) else None
    if groups is None:
        return
    if not groups:
        source.server.ask("XGROUP", "CREATE", records, _GROUP, "0")
    for since in ("0", ">"):
        while found := _given(source, records, since):
            yield found


def _given(source: RedisStore, records: str, since: str) -> list[tuple[str, str]]:
    told = source.server.ask("XREADGROUP", "GROUP", _GROUP, _GROUP, "COUNT", str(BATCH), "STREAMS", records, since)
    return [
        (number.decode(), fields[b"id"].decode() if fields else "") for _, page in told or () for number, fields in page
    ]
