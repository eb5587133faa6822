"""Loops: what a runaway agent does turn after turn, and driving one through the real guard until something stops it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from bursar.call import Call
from bursar.errors import BudgetExceeded, UnknownPrice
from bursar.foresight.simulation import Simulation
from bursar.usage import Usage

Kind = Literal["varying", "repeating", "failing"]
ARGUMENTS, RESULT = '{"query": "the answer"}', "No results. Try again with other words."


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a turn: of a model, with what it uses; or of a tool, with what it costs."""

    provider: str = ""
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    tool: str = ""
    cost_nanos: int = 0
    connection: str | None = None


@dataclass(frozen=True, slots=True)
class Loop:
    """The same turn again and again: a model call first, then the tools that it asks for, and a pause of `interval_us`.

    `kind`: "varying" asks for something else each time, "repeating" for the very same; "failing" is one model call that may
    have been billed each time and is tried again. `attempts`: 1 and the client's own retries of a call that fails.
    """

    kind: Kind
    tags: Mapping[str, str]
    turn: tuple[Step, ...]
    interval_us: int
    attempts: int = 1


class End(NamedTuple):
    """How far a loop came: model calls and tool calls that were sent, what they may be billed, and when it was stopped.

    `by`: what stopped it; None when nothing did so far.
    """

    calls: int
    tool_calls: int
    nanos: int
    elapsed_us: int
    by: str | None


def drive(loop: Loop, given: Mapping[str, Any], start_us: int, most_calls: int) -> End:
    """The loop through the real guard, law and memory store, in simulated time, for `most_calls` at most.

    `given`: arguments of `Bursar`.
    """
    return _Driven(loop, given, start_us).run(most_calls)


class _Driven:
    def __init__(self, loop: Loop, given: Mapping[str, Any], start_us: int) -> None:
        self.simulation = Simulation(given, start_us)
        self.guard = self.simulation.guard
        self.loop = loop
        self.start_us = start_us
        self.calls = self.tool_calls = self.nanos = 0
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "Find the answer."}]

    def run(self, most_calls: int) -> End:
        while self.calls + self.tool_calls < most_calls:
            try:
                for step in self.loop.turn:
                    self.take(step)
            except BudgetExceeded as refused:
                return self.end(refused.budget or refused.fields.get("cause") or "a question")
            except UnknownPrice:
                return self.end("no price")
            self.simulation.clock.advance(us=self.loop.interval_us)
        return self.end(None)

    def end(self, by: str | None) -> End:
        return End(self.calls, self.tool_calls, self.nanos, self.simulation.now_us() - self.start_us, by)

    def take(self, step: Step) -> None:
        """Reserve, and settle at once. Raises BudgetExceeded, UnknownPrice."""
        said = self.messages if self.loop.kind != "varying" else None
        call = call_of(self.simulation, self.loop, step, step.model, step.usage.output_tokens, said)
        self.simulation.carry_out(self.guard.reserve(call, self.simulation.now_us()))
        now_us = self.simulation.now_us()
        if step.tool:
            self.tool_calls += 1
            self.nanos += step.cost_nanos
            self.simulation.carry_out(self.guard.settle_tool(call, None, "completed", now_us))
            return
        self.calls += 1
        usage = used(call, step)
        if self.loop.kind == "failing":
            cost = self.guard.book.cost(call.provider, call.model, usage, at_us=now_us, tags=call.tags())
            self.nanos += cost.cost_nanos * self.loop.attempts
            self.simulation.carry_out(self.guard.settle_unknown(call, "a time-out", now_us))
            return
        answer = self._answer() if said else None
        self.nanos += self.simulation.carry_out(self.guard.settle(call, usage, now_us, answer=answer)).cost_nanos

    def _answer(self) -> dict[str, Any]:
        """The same answer as ever, which is also what the next request goes on from."""
        tools = [step.tool for step in self.loop.turn if step.tool]
        wishes = [
            {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
            for at, name in enumerate(tools)
        ]
        message = {"role": "assistant", "content": None if wishes else "I try again.", "tool_calls": wishes}
        results = [{"role": "tool", "tool_call_id": one["id"], "content": RESULT} for one in wishes]
        self.messages = [*self.messages, message, *(results or [{"role": "user", "content": "Go on."}])]
        return {"choices": [{"message": message}]}


def call_of(simulation: Simulation, loop: Loop, step: Step, model: str, output_tokens: int, said: Any = None) -> Call:
    """A step's call, of this model and with this maximum output. `said`: its messages, for the detectors."""
    if step.tool:
        arguments = ARGUMENTS if said else None
        return simulation.tool_call(
            step.tool, step.cost_nanos, tags=loop.tags, connection=step.connection, arguments=arguments
        )
    tokens = {"input_tokens": step.usage.input_tokens, "max_output_tokens": output_tokens}
    options: dict[str, Any] = tokens if _is_tokens(step.usage) else {"usage": step.usage}
    return simulation.model_call(
        step.provider,
        model,
        messages=said,
        tags=loop.tags,
        connection=step.connection,
        retries=loop.attempts - 1,
        **options,
    )


def used(call: Call, step: Step) -> Usage:
    """What the call uses: the step's usage, with an answer that is no longer than it may be."""
    most = call.request.max_output_tokens if call.request is not None else None
    if most is None or step.usage.output_tokens <= most:
        return step.usage
    reasoning = min(step.usage.reasoning_tokens, most)
    return step.usage.replace(output_tokens=most, reasoning_tokens=reasoning)


def _is_tokens(usage: Usage) -> bool:
    """Whether tokens of text are all that it counts; pictures, seconds and fees are reserved as they were."""
    counted = {name for name, value in usage.as_dict().items() if type(value) is int}
    known = {"input_tokens", "output_tokens", "reasoning_tokens", "requests"}
    return counted <= known | {"cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens"}
