"""An entry as one line of text: what the journal of a process keeps, and what PostgreSQL copies into its table as it is."""

from __future__ import annotations

import re
from functools import lru_cache

from pydantic_core import from_json, to_json

from bursar.commands import Entry
from bursar.stores.sqlite_rows import TAGS

# The kind first: it tells such a line from JSON, which begins with a bracket.
COLUMNS = (
    "kind, id, corrects, outcome, estimated, reason, cost_nanos, reserved_us, settled_us, digest, usage, amounts, draft, facts, "
    + ", ".join(f'"{tag}"' for tag in TAGS)
    + ", model_answered"
)
_NULL = "\\N"
_SIGNS = {"t": "\t", "n": "\n", "r": "\r"}
_ESCAPED = re.compile(r"\\(.)")


def entry_text(entry: Entry) -> str:
    """The entry's row of `records`, in the order of COLUMNS, without the end of the line.

    Source: PostgreSQL's manual, COPY, "Text Format".
    """
    id, kind, corrects, outcome, estimated, reason, cost, usage, amounts, reserved, settled, digest, draft, facts = (
        entry
    )
    # Of what has to be escaped, JSON has backslashes alone.
    told = b"\t".join((to_json(usage), to_json(amounts), to_json(draft), to_json(facts))).decode().replace("\\", "\\\\")
    return (
        f"{kind}\t{_field(id)}\t{_NULL if corrects is None else _field(corrects)}\t{outcome}\t{estimated:d}\t"
        f"{reason and _field(reason)}\t{cost}\t{reserved}\t{settled}\t{digest and _field(digest)}\t{told}\t"
        f"{_tags(*map(draft['tags'].get, TAGS))}\t{_known(facts.get('model_answered'))}"
    )


def entry_of(text: str) -> Entry:
    """The entry whose text this is. Raises ValueError where it is none."""
    kind, id, corrects, *told = text.split("\t")[:14]
    outcome, estimated, reason, cost, reserved, settled, digest, *values = [
        _ESCAPED.sub(_sign, field) for field in told
    ]
    usage, amounts, draft, facts = map(from_json, values)
    return Entry(
        _ESCAPED.sub(_sign, id),
        kind,
        None if corrects == _NULL else _ESCAPED.sub(_sign, corrects),
        outcome,
        estimated == "1",
        reason,
        int(cost),
        usage,
        amounts,
        int(reserved),
        int(settled),
        digest,
        draft,
        facts,
    )


def _sign(escaped: re.Match[str]) -> str:
    return _SIGNS.get(escaped[1], escaped[1])


@lru_cache(maxsize=1_024, typed=True)
def _tags(*tags: str | None) -> str:
    """The columns of these tags: those of a run's calls are few."""
    return "\t".join(map(_known, tags))


@lru_cache(maxsize=1_024, typed=True)
def _known(value: str | None) -> str:
    return _NULL if value is None else _field(value)


def _field(value: object) -> str:
    value = str(value)
    if "\\" in value:
        value = value.replace("\\", "\\\\")
    if not value.isprintable():
        value = value.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
    return value
