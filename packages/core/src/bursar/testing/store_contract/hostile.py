"""The contract of stores, on texts that mean something to a database, a protocol or a pattern, and on what was decided."""

from __future__ import annotations

import json

import pytest

from bursar.commands import Ended, Granted
from bursar.stores.base import Store
from bursar.testing.store_contract.made import Base, Run, reserve, rule, settle

# Tags and budgets are printable, ids and reasons may be anything that a caller or a provider makes of them.
HOSTILE = (
    "'; DROP TABLE accounts; --",
    "\") OR \"\"=\"",
    "%s %(x)s {0} ${HOME} $1 ?1 :name",
    "a*b[c]?d\\e_%",
    "{a}:{b}~",
    "$.tags.\"x\"",
    "*3\\r\\n$3\\r\\nDEL",
    "../../etc/passwd",
    "=cmd|' /C calc'!A0",
    "<img src=x onerror=alert(1)>",
    "\u00e9 \u4e2d \U0001f600 \uff07",
    "null",
    "0",
)  # fmt: skip


class Hostile(Base):
    """Every text stays the text that it is."""

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_text_that_means_something_elsewhere_stays_a_text(self, store: Store, run: Run, text: str) -> None:
        other, hostile = rule("b", 100, of="other"), rule(text, 100, of=text)
        tags = {"run": text, "team": text, "free.tag": text, "model": text}
        draft = {"path": [text], "tags": tags, "cost_nanos": 7, "usage": {text: 1}}
        assert type(run(reserve("other", (other, 5)))) is Granted
        assert type(run(reserve(text, (hostile, 7), draft=draft))) is Granted
        told = settle(text, 6)._replace(reason=text, facts={"headers": {text: text}, "model_answered": text})
        ended = run(told)
        assert type(ended) is Ended
        found = self.account(store, hostile)
        assert (found.rule.budget, json.loads(found.rule.scope), found.spent) == (text, {"run": text}, 6)
        entry = self.entry(store, text)
        assert (entry.draft["tags"], entry.reason, entry.facts) == (tags, text, dict(told.facts))
        for name in tags:
            assert [one.id for one in store.entries({name: text})] == [text]
        assert self.account(store, other).reserved == 5
        assert store.open_reservations() == 1

    def test_i4_every_version_of_every_decision_is_kept_in_order(self, store: Store) -> None:
        for limit in ("1 USD", "2 USD", "2 USD", "3 USD"):
            store.publish({"b": {"limit": limit}, "c": {"limit": "9 USD"}})
        store.publish({"agent=x": {"frozen": True, "tags": {"agent": "x"}}}, "freeze")
        history = list(store.history())
        assert [one[0] for one in history] == [1, 2, 3, 4, 5]
        assert [one[3]["limit"] for one in history if one[2] == "b"] == ["1 USD", "2 USD", "3 USD"]
        assert history[-1][1:3] == ("freeze", "agent=x")
        version, held = store.definitions()
        assert version == 5
        assert held["budget"]["b"] == (4, {"limit": "3 USD"})
