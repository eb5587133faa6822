"""The incremental reader of a live stream: counts and facts, constant memory."""

from __future__ import annotations

from typing import Any

from bursar.answers.anthropic import Anthropic
from bursar.answers.bedrock import METRICS, Agent, Bedrock
from bursar.answers.chat import Chat, usual_usage
from bursar.answers.cohere import Cohere
from bursar.answers.counts import BILLED, Json, Keywords, usage_of
from bursar.answers.google import Google
from bursar.answers.ollama import Ollama
from bursar.answers.plain import event_of
from bursar.answers.responses import Responses
from bursar.answers.tally import Tally
from bursar.errors import UnreadableAnswer
from bursar.usage import Usage

# Asked in this order; the shapes decide, because gateways and clouds pass on the shapes of others.
FAMILIES: tuple[type[Tally], ...] = (Agent, Cohere, Google, Bedrock, Anthropic, Ollama, Chat, Responses)
# What several families counted in one stream is the bill in this order: Bedrock's closing metrics stand above the
# model's own.
_RANK: tuple[type[Tally], ...] = (Agent, Bedrock, Anthropic, Google, Cohere, Responses, Chat, Ollama)


class StreamReader:
    """Reads a stream's usage as its events pass by; it keeps counts and facts, never the text.

    Feeding never raises, so that accounting cannot break a stream: what cannot be read is told by `usage` and
    `partial`.
    """

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.error: Json | None = None  # the provider's error, where an event told one
        self.events = 0
        self._tallies: dict[type[Tally], Tally] = {}
        self._usual: tuple[Usage, dict[str, Any]] | None = None  # all that was told so far, and by which event
        self._fault: UnreadableAnswer | None = None

    def feed(self, event: Any) -> None:
        """Take one event: an SDK's event object, a dict, `{"event": ..., "data": ...}`, or the text of a data line."""
        try:
            _, data = event_of(event)
            for entry in data if isinstance(data, list) else [data]:
                if isinstance(entry, dict):
                    self._take(entry)
        except UnreadableAnswer as error:
            self._fault = self._fault or error

    def usage(self) -> Usage | None:
        """The usage once the provider has told it; None before. Raises UnreadableAnswer for counts that are none."""
        return self._read(final=True)

    def partial(self) -> Usage | None:
        """What is known so far: a lower bound (Anthropic tells the input at the start); None when nothing is."""
        return self._read(final=False)

    def _take(self, data: dict[str, Any]) -> None:
        self.events += 1
        if isinstance(data.get("error"), dict):
            self.error = {name: data["error"].get(name) for name in ("type", "code", "status", "message")}
        if self.events == 1:
            usage = usual_usage(data)
            if usage is not None:
                self._usual = usage, {name: value for name, value in data.items() if name != "choices"}
                return
        elif self._usual is not None:  # there is more to it
            (_, first), self._usual = self._usual, None
            self._tally(first)
        self._tally(data)

    def _tally(self, data: dict[str, Any]) -> None:
        for family in FAMILIES:
            if family.claims(data):
                if family not in self._tallies:
                    self._tallies[family] = family()
                self._tallies[family].feed(data)
                break
        if METRICS in data and not isinstance(self._tallies.get(Bedrock), Bedrock):
            self._tallies.setdefault(Bedrock, Bedrock()).feed(data)

    def _read(self, *, final: bool) -> Usage | None:
        if self._fault is not None:
            raise self._fault
        if self._usual is not None:
            return self._usual[0]
        for family in _RANK:
            tally = self._tallies.get(family)
            if tally is None or (final and not tally.final):
                continue
            words = tally.counts()
            if words and any(words.get(name) for name in BILLED):
                return usage_of(words if family is Anthropic else self._merged(words))
        return None

    def _merged(self, words: Keywords) -> Keywords:
        """The counts of the family that ranks first, with what only Anthropic's events inside them told."""
        told = self._tallies.get(Anthropic)
        inner = (told.counts() or {}) if told else {}
        if inner and "input_tokens" in words:  # what Bedrock's metrics leave out of a Claude stream
            hour = min(inner.get("cache_write_1h_tokens", 0), words.get("cache_write_5m_tokens", 0))
            if hour and not words.get("cache_write_1h_tokens"):
                words = words | {
                    "cache_write_1h_tokens": hour,
                    "cache_write_5m_tokens": words["cache_write_5m_tokens"] - hour,
                }
            words = {
                **{name: inner[name] for name in ("model", "reasoning_tokens", "server_tools") if name in inner},
                **words,
            }
            words["reasoning_tokens"] = min(words.get("reasoning_tokens", 0), words["output_tokens"])
        return words
