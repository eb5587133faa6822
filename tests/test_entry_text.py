"""An entry's text: the journal reads back what it wrote, and a PostgreSQL table holds what was copied."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from postgres_server import fresh_url

from bursar.commands import Draw, Drawn, Entry
from bursar.stores.entry_text import entry_of, entry_text
from bursar.stores.postgres import PostgresStore
from bursar.stores.sqlite_rows import TAGS

# all that a field of a row may hold: PostgreSQL has no NUL, and no half of a pair
WORDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=6) | st.sampled_from(
    ["\\N", "\\.", "\\", "a\tb", "a\nb", "\r", "\\t", "\x1f", "\x7f", "[", "None", '"']
)
COUNTS = st.integers(-(2**63), 2**63 - 1)
PLAIN: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | COUNTS | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(WORDS, PLAIN, max_size=3)


def entries(amounts: st.SearchStrategy[dict[str, int]]) -> st.SearchStrategy[Entry]:
    drafts = st.builds(
        lambda tags, more: {**more, "tags": tags},
        st.dictionaries(st.sampled_from(TAGS) | WORDS, WORDS, max_size=4),
        OBJECTS,
    )
    facts = OBJECTS | st.builds(lambda model: {"model_answered": model}, WORDS)
    return st.builds(
        Entry, WORDS, st.sampled_from(["settlement", "correction", "carried"]), st.none() | WORDS,
        st.sampled_from(["completed", "failed"]), st.booleans(), WORDS,
        COUNTS, OBJECTS, amounts, COUNTS, COUNTS, WORDS, drafts, facts,
    )  # fmt: skip


@given(entries(st.dictionaries(WORDS, COUNTS, max_size=3)))
def test_what_was_written_is_read_back(entry: Entry) -> None:
    text = entry_text(entry)
    assert entry_of(text) == entry
    assert "\n" not in text
    assert not text.startswith("[")


def test_postgresql_reads_the_same() -> None:
    store = PostgresStore(fresh_url())
    drawn = 0

    @given(st.lists(entries(st.just({})), max_size=20))
    def check(some: list[Entry]) -> None:
        nonlocal drawn
        drawn += 1
        named = [
            entry._replace(id=f"{drawn:06}.{number:02}{entry.id}", settled_us=abs(entry.settled_us) % 2**60)
            for number, entry in enumerate(some)
        ]
        texts = {entry.id: entry_text(entry) for entry in named[::2]}  # the others are made by the store
        assert type(store.execute(Draw("no lease", (), tuple(named), texts=texts))) is Drawn
        assert [entry for entry in store.entries() if entry.id.startswith(f"{drawn:06}.")] == named
        columns = store._query(
            f"SELECT {', '.join(map(json.dumps, TAGS))}, model_answered FROM records WHERE id LIKE %s ORDER BY id",
            (f"{drawn:06}.%",),
        )
        assert columns == [
            (*map(entry.draft["tags"].get, TAGS), _text(entry.facts.get("model_answered"))) for entry in named
        ]

    try:
        check()
    finally:
        store.close()


def _text(value: object) -> str | None:
    return None if value is None else str(value)
