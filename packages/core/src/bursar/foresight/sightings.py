"""Sightings: who was seen spending in the records, or is named in the policy, and what its loop would look like."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from bursar.budget import Budget
from bursar.commands import Entry
from bursar.foresight.loop import Step
from bursar.foresight.past import OWN_TAGS
from bursar.policy import NONE
from bursar.scope import process_run
from bursar.usage import Usage

TAGS = ("agent", "workflow")
ANY_OTHER = "(any other)"
RUN = "(a loop)"
MOST_CALLS = 10_000  # of one subject: the newest are looked at
MOST_TOOLS = 8  # of one turn
MOST_SUBJECTS = 1_000
HIGH_PERCENT = 95
SPAN = 10  # the speed is that of so many calls in a row, so that calls side by side count as such
LEAST_INTERVAL_US = 1_000
# What is not known is taken to be: a call a second, of this model and size, by a client with the SDKs' own retries.
INTERVAL_US = 1_000_000
CALL = Step("openai", "gpt-4o", Usage(input_tokens=4_000, output_tokens=1_000))
ATTEMPTS = 3
_PROCESS = "process-"


@dataclass(frozen=True, slots=True)
class Subject:
    """An agent or workflow. `turn`: a dear model call of it, and the tools that go with one; `interval_us`: between two turns.

    `seen`: its model calls in the records. `overrun_nanos`: the most by which one of them cost more than was held for it.
    """

    tag: str
    value: str
    tags: dict[str, str]
    turn: tuple[Step, ...] = (CALL,)
    interval_us: int = INTERVAL_US
    attempts: int = ATTEMPTS
    seen: int = 0
    overrun_nanos: int = 0

    @property
    def has_run(self) -> bool:
        """Whether its calls belong to runs; else detectors cannot tell one task of it from another."""
        return self.tags["run"] != process_run()


class _Call(NamedTuple):
    cost_nanos: int
    reserved_us: int
    entry: Entry


class _Seen:
    """The calls of one subject."""

    def __init__(self) -> None:
        self.models: deque[_Call] = deque(maxlen=MOST_CALLS)
        self.tools: deque[_Call] = deque(maxlen=MOST_CALLS)
        self.count = self.tool_count = 0

    def add(self, entry: Entry) -> None:
        call = _Call(entry.cost_nanos, entry.reserved_us, entry)
        if "model" in entry.draft["tags"]:
            self.models.append(call)
            self.count += 1
        elif "tool" in entry.draft["tags"]:
            self.tools.append(call)
            self.tool_count += 1

    def subject(self, tag: str, value: str) -> Subject:
        entry = _high(self.models).entry
        tags = {name: text for name, text in entry.draft["tags"].items() if name not in OWN_TAGS}
        tags["run"] = process_run() if tags["run"].startswith(_PROCESS) else RUN
        overruns = (one.cost_nanos - one.entry.draft["cost_nanos"] for one in self.models if not one.entry.estimated)
        return Subject(
            tag,
            value,
            tags,
            (_step(entry), *self._tools()),
            self._interval_us(),
            max(one.entry.draft.get("attempts", 1) for one in self.models),
            self.count,
            max(0, *overruns, 0),
        )

    def _tools(self) -> tuple[Step, ...]:
        """As many of its dear tools as it calls for each model call."""
        count = min(MOST_TOOLS, (self.tool_count + self.count // 2) // self.count)
        return (_step(_high(self.tools).entry),) * count if count else ()

    def _interval_us(self) -> int:
        """The pause between two calls when it is fast: of ten in a row in one run, at the shortest 5 %."""
        begun: dict[str, list[int]] = {}
        for one in self.models:
            begun.setdefault(one.entry.draft["tags"]["run"], []).append(one.reserved_us)
        means = []
        for times in begun.values():
            times.sort()
            gaps = min(SPAN, len(times) - 1)
            means += [(later - earlier) // gaps for earlier, later in zip(times, times[gaps:], strict=False) if gaps]
        means.sort()
        return max(LEAST_INTERVAL_US, means[len(means) * (100 - HIGH_PERCENT) // 100]) if means else INTERVAL_US


def _high(calls: Iterable[_Call]) -> _Call:
    """The call at the high quantile of cost, by nearest rank."""
    ranked = sorted(calls, key=lambda one: (one.cost_nanos, one.reserved_us))
    return ranked[-(-len(ranked) * HIGH_PERCENT // 100) - 1]


def _step(entry: Entry) -> Step:
    tags = entry.draft["tags"]
    connection = tags.get("connection")
    if "tool" in tags:
        return Step(tool=tags["tool"], cost_nanos=entry.cost_nanos, connection=connection)
    usage = Usage(**entry.usage).replace(model=None, stated_cost_nanos=None, other_models=())
    return Step(tags["provider"], tags["model"], usage, connection=connection)


def subjects(entries: Iterable[Entry], budgets: Sequence[Budget], wanted: Mapping[str, str]) -> list[Subject]:
    """Everybody who was seen, dearest first, then those whom the budgets name. `wanted`: only calls with these tags."""
    seen: dict[tuple[str, str], _Seen] = {}
    spent: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        tags = entry.draft["tags"]
        if entry.kind not in ("settlement", "expiry") or not wanted.items() <= tags.items():
            continue
        for who in (
            ("agent", tags.get("agent", NONE)),
            *([("workflow", tags["workflow"])] if "workflow" in tags else ()),
        ):
            if who in seen or len(seen) < MOST_SUBJECTS:
                seen.setdefault(who, _Seen()).add(entry)
                spent[who] += entry.cost_nanos
    found = [seen[who].subject(*who) for who, _ in spent.most_common() if seen[who].count]
    for tag in TAGS:
        known = [one.value for one in found if one.tag == tag]
        found += [one for one in _named(tag, known, budgets) if wanted.items() <= {**one.tags, "run": ""}.items()]
    if not found and not wanted:
        found = [Subject("agent", ANY_OTHER, {"agent": ANY_OTHER, "run": RUN})]
    return found


def _named(tag: str, known: Sequence[str], budgets: Iterable[Budget]) -> list[Subject]:
    """Those whom the budgets name by this tag and nobody has seen yet; a pattern stands for itself."""
    found: dict[str, dict[str, str]] = {}
    for budget in budgets:
        match = {
            name: [value] if isinstance(value, str) else list(value) for name, value in (budget.match or {}).items()
        }
        beside = {name: values[0] for name, values in match.items() if name not in (*OWN_TAGS, "run")}
        for value in match.get(tag, ()):
            if "[" not in value and not any(fnmatchcase(one, value) for one in known):
                found.setdefault(value, {**beside, tag: value, "run": RUN})
    if any(tag in budget.per for budget in budgets):
        found[ANY_OTHER] = {tag: ANY_OTHER, "run": RUN}
    return [Subject(tag, value, tags) for value, tags in found.items()]
