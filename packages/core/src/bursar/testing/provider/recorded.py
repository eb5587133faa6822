"""Recorded exchanges with real providers: how they are kept, read, matched to requests and billed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from bursar.errors import InvalidInput
from bursar.testing.provider.script import Answer, Counts, Fault
from bursar.testing.provider.wire import Call, Event, characters, quarter

Match = Literal["order", "conversation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One exchange as it was: `endpoint` is the request's path; the answer is a `body`, or the `events` of its stream.

    An event is `{"event": name or absent, "data": JSON or text}`.
    """

    endpoint: str
    request: Mapping[str, Any]
    status: int = 200
    body: Any = None
    events: tuple[Mapping[str, Any], ...] | None = None

    @classmethod
    def from_dict(cls, step: Mapping[str, Any]) -> Recorded:
        """Read `{"endpoint", "request", "response": {"status", "body" | "events"}}`, or raise InvalidInput."""
        try:
            response = step["response"]
            events = response.get("events")
            return cls(
                endpoint=step["endpoint"],
                request=step["request"],
                status=response.get("status", 200),
                body=response.get("body"),
                events=None if events is None else tuple(events),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"A recorded step is unreadable ({error!r}). Give endpoint, request, and response with body or events."
            ) from error

    def data(self) -> Any:
        """The body, or the list of the events' data."""
        return self.body if self.events is None else [event.get("data") for event in self.events]

    def wire_events(self) -> list[Event]:
        """The events as the wire formats give them."""
        return [(event.get("event"), event.get("data")) for event in self.events or ()]


def recorded(name: str) -> list[Recorded]:
    """The packaged recording of that name, such as `langchain-agent`; InvalidInput tells the names there are."""
    folder = files("bursar.testing.provider") / "recorded"
    names = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    if name not in names:
        raise InvalidInput(
            f"There is no recording {name!r}. There are {', '.join(names)}.", argument="name", value=name
        )
    steps = json.loads((folder / f"{name}.json").read_text("utf-8"))["steps"]
    return [Recorded.from_dict(step) for step in steps]


Step = Answer | Fault | Recorded


class Run:
    """The steps of a run and which of them answers a call; not safe for threads, so the provider holds its lock."""

    def __init__(self, steps: Iterable[tuple[Step, Call | None]], match: Match) -> None:
        # a step that is no recording fits every endpoint and stands at its own place in the run
        self._places = [(step, asked, asked.turns if asked else place) for place, (step, asked) in enumerate(steps)]
        self._match = match

    def choose(self, call: Call) -> Step | None:
        """The step for a call: by order each serves once, by conversation each serves every call at its place."""
        fitting = [place for place in self._places if place[1] is None or place[1].endpoint == call.endpoint]
        if self._match == "conversation":
            fitting = [place for place in fitting if place[2] == call.turns]
            return max(fitting, key=lambda place: _common(place[1], call))[0] if fitting else None
        if not fitting:
            return None
        self._places.remove(fitting[0])
        return fitting[0][0]


def _common(asked: Call | None, call: Call) -> int:
    """How many of the conversation's messages are word for word the recorded ones."""
    if asked is None:
        return 0
    known = {json.dumps(message, sort_keys=True) for message in _messages(asked)}
    return sum(json.dumps(message, sort_keys=True) in known for message in _messages(call))


def _messages(call: Call) -> list[Any]:
    found = call.body.get("messages") or call.body.get("contents") or call.body.get("input") or []
    return found if isinstance(found, list) else [found]


def counted(call: Call, step: Recorded) -> Counts:
    """The bill of a recording without usage: four characters a token, of the request now and the recorded answer."""
    return Counts(input_tokens=quarter(call.prompt_chars), output_tokens=quarter(_written(step.data())))


def _written(data: Any) -> int:
    # characters under the keys that hold generated text in the formats served here
    if isinstance(data, list):
        return sum(_written(part) for part in data)
    if not isinstance(data, Mapping):
        return 0
    own = sum(characters(value) for key, value in data.items() if key in _TEXT_KEYS and isinstance(value, str))
    return own + sum(_written(value) for value in data.values())


_TEXT_KEYS = ("content", "text", "arguments", "partial_json")
