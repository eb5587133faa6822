"""The provider itself: what it answers next, at which rates, and what it has served."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from bursar.errors import InvalidInput
from bursar.testing.provider.account import Account, Served, served
from bursar.testing.provider.anthropic import Anthropic
from bursar.testing.provider.gemini import Gemini
from bursar.testing.provider.openai import OpenAI, usage_event, wants_usage
from bursar.testing.provider.recorded import Match, Recorded, Run, Step, counted
from bursar.testing.provider.script import GPT_4O, Answer, Counts, Fault, Rates
from bursar.testing.provider.server import Reply, Server
from bursar.testing.provider.wire import Call, Event, RefusedRequest, Wire, endpoint_of, generate

_WIRES: Mapping[str, Wire] = {"openai": OpenAI(), "anthropic": Anthropic(), "gemini": Gemini()}
_ID_STEMS = {
    "openai.chat": "chatcmpl-",
    "openai.responses": "resp_",
    "openai.embeddings": "emb-",
    "anthropic.messages": "msg_",
    "gemini.generate": "gemini-",
    "gemini.embed": "gemini-",
}


class Provider:
    """A provider on loopback: real HTTP in the wire formats of OpenAI, Anthropic and Gemini.

    `answer` (or a Fault) is what every request gets; `script` puts others before it. `rates`: one Rates for every
    model, or a mapping of model to Rates, in which case any other model is answered 404; the default bills every model
    as gpt-4o ($2.50, $1.25 cached, $10.00 per million tokens). `latency_s` passes before each answer. The base URL of
    OpenAI's clients is `provider.url + "/v1"`, of Anthropic's and Gemini's `provider.url`; any API key will do. Use it
    as a context manager.
    """

    def __init__(
        self,
        answer: Answer | Fault | None = None,
        *,
        rates: Rates | Mapping[str, Rates] = GPT_4O,
        latency_s: float = 0.0,
        port: int = 0,
    ) -> None:
        if not isinstance(rates, Rates) and not rates:
            raise InvalidInput(
                "The provider has no rates. Give it Rates, or a mapping of model to Rates.", argument="rates"
            )
        self._answer = Answer() if answer is None else answer
        self._rates = rates
        self._latency_s = latency_s
        self._script: deque[Step] = deque()
        self._run: Run | None = None
        self._lock = threading.Lock()
        self._count = 0
        self._account = Account()
        self._server = Server(port, self._plan, self._account)
        self._server.start()

    @classmethod
    def from_run(
        cls,
        steps: Iterable[Step | Mapping[str, Any]],
        *,
        match: Match = "order",
        rates: Rates | Mapping[str, Rates] = GPT_4O,
        latency_s: float = 0.0,
    ) -> Self:
        """A provider that replays a run: recordings (or dicts like them), or Answers and Faults.

        `match="order"`: each step serves once, in order, for a request to its endpoint. `match="conversation"`: the
        step that was recorded after as many answers of the model as the request's conversation holds, and of several
        the one with the most messages in common; each serves any number of times, so that parallel runs do not mix. A
        request without a step gets 400.
        """
        placed: list[tuple[Step, Call | None]] = []
        for given in steps:
            step = _step(given)
            placed.append((step, _read(step.endpoint, "", step.request)[1] if isinstance(step, Recorded) else None))
        provider = cls(rates=rates, latency_s=latency_s)
        provider._run = Run(placed, match)
        return provider

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def account(self) -> list[Served]:
        """Every request so far, in order of acceptance: copies that do not change."""
        return self._account.entries()

    @property
    def billed_nanos(self) -> int:
        """The sum of the bills in nano-dollars."""
        return sum(entry.cost_nanos for entry in self._account.entries())

    @property
    def billed_calls(self) -> int:
        """How many calls were billed."""
        return sum(entry.billed for entry in self._account.entries())

    @property
    def requests(self) -> int:
        """How many HTTP requests arrived, refused ones included."""
        return self._account.requests

    @property
    def max_in_flight(self) -> int:
        """The most requests that were in flight at once."""
        return self._account.max_in_flight

    def script(self, steps: Iterable[Step | Mapping[str, Any]]) -> None:
        """What to serve first, in order, each to one request; then come the provider's own answers again."""
        checked = [_step(given) for given in steps]
        with self._lock:
            self._script.extend(checked)

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Wait until no request is in flight; raises TimeoutError."""
        if not self._account.wait_idle(timeout_s):
            raise TimeoutError(f"{self._account.in_flight} requests are still in flight after {timeout_s} s.")

    def wait_requests(self, count: int, timeout_s: float = 10.0) -> None:
        """Wait until `count` requests are on the account since the start, answered or not; raises TimeoutError."""
        if not self._account.wait_requests(count, timeout_s):
            raise TimeoutError(f"{self.requests} of {count} requests have arrived after {timeout_s} s.")

    def stop(self) -> None:
        """Cut what is in flight and close. Raises what went wrong inside the provider, if anything did."""
        self._server.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _plan(self, path: str, query: str, body: Mapping[str, Any] | None) -> Reply:
        with self._lock:
            self._count += 1
            number = self._count
        try:
            wire, call = _read(path, query, body)
            rates = self._rates if isinstance(self._rates, Rates) else self._rates.get(call.model)
            if rates is None:
                raise RefusedRequest(404, f"The model `{call.model}` does not exist or you do not have access to it.")
            with self._lock:
                step = self._next(call)
        except RefusedRequest as refused:
            return self._refused(path, body or {}, number, refused)
        reply = self._answered(wire, call, step, number)
        if reply.entry.billed:
            counts = Counts(**{name: getattr(reply.entry, name) for name in Counts.__dataclass_fields__})
            reply.entry.cost_nanos = rates.cost_nanos(counts)
        self._account.enter(reply.entry)
        return reply

    def _next(self, call: Call) -> Step:
        if self._script:
            return self._script.popleft()
        if self._run is None:
            return self._answer
        step = self._run.choose(call)
        if step is None:
            raise RefusedRequest(
                400, f"No recorded step answers this request to {call.endpoint} after {call.turns} answers."
            )
        if isinstance(step, Recorded) and step.status < 300 and (step.events is not None) != call.stream:
            form = "a plain body" if step.events is None else "a stream"
            raise RefusedRequest(400, f"The recorded step is {form}: ask for it so.")
        return step

    def _refused(self, path: str, body: Mapping[str, Any], number: int, refused: RefusedRequest) -> Reply:
        endpoint = endpoint_of(path) or path
        wire = _WIRES.get(endpoint.partition(".")[0], _WIRES["openai"])
        entry = Served(
            id=f"req_{number}",
            endpoint=endpoint,
            model=str(body.get("model", "")),
            stream=body.get("stream") is True,
            status=refused.status,
            billed=False,
            cost_nanos=0,
            request=body,
        )
        self._account.enter(entry)
        return Reply(entry=entry, body=wire.error(refused.status, str(refused)))

    def _answered(self, wire: Wire, call: Call, step: Step, number: int) -> Reply:
        """What a step sends for a call, and its entry, of which the cost is still to be set."""
        id = f"{_ID_STEMS[call.endpoint]}bursar{number:08d}"
        common: dict[str, Any] = {
            "endpoint": call.endpoint,
            "model": call.model,
            "stream": call.stream,
            "request": call.body,
            "cost_nanos": 0,
        }
        if isinstance(step, Recorded):
            return self._replayed(wire, call, step, id, common)
        fault = step if isinstance(step, Fault) else None
        if fault is not None and fault.kind == "refuse":
            entry = Served(id=id, status=fault.status, billed=False, fault="refuse", **common)
            headers = {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
            body = wire.error(fault.status, fault.message or f"Refused on demand with {fault.status}.")
            return Reply(entry=entry, headers=headers, body=body, latency_s=self._latency(fault.latency_s))
        answer = step if isinstance(step, Answer) else (fault and fault.answer) or self._answer
        if isinstance(answer, Fault):
            answer = answer.answer or Answer()
        made = generate(call, answer, id, int(time.time()), report_usage=fault is None or fault.kind != "no_usage")
        billed = fault is None or fault.billed
        entry = served(
            made.counts if billed else Counts(), id=id, status=200, billed=billed, fault=fault and fault.kind, **common
        )
        return Reply(
            entry=entry,
            headers=answer.headers,
            fault=fault,
            sse=call.sse,
            event_delay_s=answer.event_delay_s,
            events=list(wire.events(made)) if call.stream else None,
            body=None if call.stream else wire.body(made),
            latency_s=self._latency(answer.latency_s if fault is None or fault.latency_s is None else fault.latency_s),
        )

    def _replayed(self, wire: Wire, call: Call, step: Recorded, id: str, common: Mapping[str, Any]) -> Reply:
        billed = step.status < 300
        counts = (wire.counts(step.data()) or counted(call, step)) if billed else Counts()
        entry = served(counts, id=id, status=step.status, billed=billed, **common)
        events: list[Event] | None = None
        if step.events is not None:
            events = step.wire_events()
            states_usage = wire.counts(step.data()) is not None
            if call.endpoint == "openai.chat" and wants_usage(call) and not states_usage and events[-1][1] == "[DONE]":
                events.insert(-1, (None, usage_event(events[0][1], counts)))
        return Reply(entry=entry, body=step.body, events=events, sse=call.sse, latency_s=self._latency(None))

    def _latency(self, own_s: float | None) -> float:
        return self._latency_s if own_s is None else own_s


def _step(given: Step | Mapping[str, Any]) -> Step:
    if isinstance(given, Mapping):
        return Recorded.from_dict(given)
    if not isinstance(given, Answer | Fault | Recorded):
        raise InvalidInput(f"{given!r} is no step. Give an Answer, a Fault or a recording.", argument="steps")
    return given


def _read(path: str, query: str, body: Mapping[str, Any] | None) -> tuple[Wire, Call]:
    endpoint = endpoint_of(path)
    if endpoint is None:
        raise RefusedRequest(404, f"Nothing is served at {path}.")
    if body is None:
        raise RefusedRequest(400, "We could not parse the JSON body of your request.")
    wire = _WIRES[endpoint.partition(".")[0]]
    return wire, wire.read(endpoint, path, query, body)
