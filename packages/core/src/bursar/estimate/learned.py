"""The learned estimate: what a call will probably use, from the packaged priors and from the calls settled before."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from bursar.errors import UnboundedEstimate
from bursar.estimate.priors import Priors, packaged
from bursar.estimate.request import FEATURES, Request
from bursar.estimate.strict import Estimate, output_bound, text_bound
from bursar.usage import Usage

WINDOW = 64  # observations kept per model and size class
MAX_MODELS = 256  # the least recently used are forgotten
MAX_RUNS = 1024  # whose conversations are known
MAX_BRANCHES = 8  # conversations kept per run
# A continued conversation: what was added is taken at the cold estimate's factor, the rest as it was billed.
_RUN_FACTOR = 1.02
_RUN_MARGIN = 12
_TOOLS_MARGIN = 64
_LEAST_RATIO, _MOST_RATIO = 1.8, 2.5
_TOOLS = FEATURES.index("schema")


class _Seen(NamedTuple):
    """The dearest of so many observations; with none, `dearest` means nothing."""

    dearest: float
    number: int

    @property
    def widened(self) -> float:
        """What the next one may be: few observations say little."""
        return self.dearest * (1 + 1 / self.number)


_NOTHING_SEEN = _Seen(0.0, 0)


class _Window:
    """The last observations, and which of them is the dearest: looked for only when that one leaves."""

    __slots__ = ("_values", "seen")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.seen = _NOTHING_SEEN

    def add(self, value: float) -> None:
        values, (dearest, count) = self._values, self.seen
        leaves_dearest = count == WINDOW and values[0] >= dearest
        values.append(value)
        if not count or value >= dearest:
            dearest = value
        elif leaves_dearest:
            dearest = max(values)
        self.seen = _Seen(dearest, len(values))


@dataclass(slots=True)
class _Model:
    """What was observed of one model: per size class the ratios of actual to expected input, and the outputs."""

    key: tuple[str, str, str]
    ratios: dict[int, _Window] = field(default_factory=dict)
    outputs: _Window = field(default_factory=_Window)
    unmeasured: _Window = field(default_factory=_Window)


class _Call(NamedTuple):
    """A settled call of a run: how much it had said, what that was expected to be, and what it was."""

    key: tuple[str, str, str]
    messages: int
    mark: int
    tools: int
    expected: float
    input_tokens: int
    output_tokens: int


class Learner:
    """Estimates calls, and learns from each settled one. Safe for threads; memory is bounded whatever comes.

    Input, in this order: the caller's count; in a run, the last call's actual input plus what was added since; the
    dearest ratio of actual to expected among the last 64 calls of this model and size class, times (1 + 1/n); the
    packaged prior. Output: the dearest of the last 64, times (1 + 1/n), at most the request's or the model's maximum;
    before the first, that maximum. Never above the strict bound where the input is wholly in the request.
    """

    def __init__(self, priors: Priors | None = None) -> None:
        self._priors = priors
        self._lock = threading.Lock()
        self._models: OrderedDict[tuple[str, str, str], _Model] = OrderedDict()
        self._runs: OrderedDict[str, tuple[_Call, ...]] = OrderedDict()

    def renew_lock(self) -> None:
        """After a fork, in the child, where a thread of the parent's may have held it. What was learned stays."""
        self._lock = threading.Lock()

    def estimate(
        self,
        request: Request,
        *,
        run: str | None = None,
        context_window: int | None = None,
        max_output_tokens: int | None = None,
    ) -> Estimate:
        """What `request` will probably use. Raises UnboundedEstimate where nothing is known of its input or output."""
        key = _key(request)
        cold, expected = self._cold(request)
        ratios = outputs = unmeasured = _NOTHING_SEEN
        with self._lock:
            calls = self._runs.get(run, ()) if run is not None else ()
            model = self._models.get(key)
            if model is not None:
                outputs, unmeasured = model.outputs.seen, model.unmeasured.seen
                of_size = model.ratios.get(_size_class(expected))
                ratios = of_size.seen if of_size is not None else ratios
        output = self._output(request, outputs, max_output_tokens, context_window)
        if request.input_tokens is not None:
            tokens, basis = float(request.input_tokens), "the caller's count"
        elif not request.measured:
            tokens, basis = _unmeasured(request, unmeasured, context_window)
        else:
            tokens, basis = _continued(request, key, calls, expected, cold) or _learned(expected, cold, ratios)
            if request.kind == "text":
                tokens = min(tokens, text_bound(request))
            if (
                context_window is not None
                and not request.embeds
                and request.kind not in ("text", "session", "server_tools")
            ):
                tokens = min(tokens, context_window)
        return Estimate(math.ceil(tokens), output * request.n, output, request.n, False, basis)

    def observe(self, request: Request, usage: Usage, *, run: str | None = None) -> None:
        """Learn from a settled call. Calls whose input nobody reported (0 tokens) teach nothing."""
        actual = usage.input_tokens
        if actual <= 0:
            return
        key = _key(request)
        expected = self._cold(request)[1]
        output = math.ceil(usage.output_tokens / request.n)
        limit = request.max_output_tokens
        # An answer cut off at its limit says only that it would have been longer.
        learned_output = math.inf if limit is not None and output >= limit else float(output)
        with self._lock:
            model = self._models.get(key)
            if model is None:
                model = self._models[key] = _Model(key)
                if len(self._models) > MAX_MODELS:
                    self._models.popitem(last=False)
            self._models.move_to_end(key)
            model.outputs.add(learned_output)
            if request.measured:
                size = _size_class(expected)
                of_size = model.ratios.get(size)
                if of_size is None:
                    of_size = model.ratios[size] = _Window()
                of_size.add(actual / expected)
            else:
                model.unmeasured.add(actual)
            if run is not None and _may_continue(request):
                messages, mark = len(request.marks), request.marks[-1] if request.marks else 0
                tools = request.features[_TOOLS]
                call = _Call(model.key, messages, mark, tools, expected, actual, usage.output_tokens)
                self._runs[run] = (*self._runs.get(run, ())[1 - MAX_BRANCHES :], call)
                self._runs.move_to_end(run)
                if len(self._runs) > MAX_RUNS:
                    self._runs.popitem(last=False)

    def _cold(self, request: Request) -> tuple[float, float]:
        """The estimate from the priors alone, and the tokens that are usual for such a request."""
        priors = self._priors
        if priors is None:
            priors = self._priors = packaged()
        if request.usual is not None and request.usual[0] is priors:
            return request.usual[1:]
        line = priors.line(request)
        expected = line.expected(request)
        added = priors.additions.get(request.kind, 0)
        request.usual = priors, line.factor * expected + line.margin + added, expected
        return request.usual[1:]

    @staticmethod
    def _output(request: Request, outputs: _Seen, max_output_tokens: int | None, context_window: int | None) -> int:
        """Per answer. The request's own maximum is believed here, for xAI's reasoning too: what was observed corrects it."""
        if request.embeds:
            return 0
        learned = outputs.widened if outputs.number else math.inf
        limit = request.max_output_tokens if request.max_output_tokens is not None else max_output_tokens
        if math.isinf(learned):
            return output_bound(request, max_output_tokens, context_window) if limit is None else limit
        return math.ceil(learned) if limit is None else min(limit, math.ceil(learned))


def _key(request: Request) -> tuple[str, str, str]:
    return request.provider, request.model, request.kind


def _size_class(expected: float) -> int:
    return int(expected).bit_length()


def _may_continue(request: Request) -> bool:
    """Whether another call of the run may continue this one's conversation: see `_continued`."""
    if request.input_tokens is not None or not request.measured:
        return False
    return bool(request.marks) or request.kind == "stored"


def _continued(
    request: Request, key: tuple[str, str, str], calls: tuple[_Call, ...], expected: float, cold: float
) -> tuple[float, str] | None:
    """The last call of the run whose conversation this one continues, as it was billed, plus what was added since."""
    for call in reversed(calls):
        if call.key != key:
            continue
        stored = request.stored and request.kind == "stored"
        if stored:  # the provider adds the conversation so far, the last answer included
            return call.input_tokens + call.output_tokens + cold, "the run's last call plus this request"
        if 0 < call.messages <= len(request.marks) and request.marks[call.messages - 1] == call.mark:
            added = max(0.0, expected - call.expected)
            ratio = min(_MOST_RATIO, max(_LEAST_RATIO, cold / expected, call.input_tokens / call.expected))
            margin = _RUN_MARGIN if added else 0
            if request.features[_TOOLS] != call.tools:
                margin += _TOOLS_MARGIN
            return call.input_tokens * _RUN_FACTOR + added * ratio + margin, "the run's last call plus what was added"
    return None


def _learned(expected: float, cold: float, ratios: _Seen) -> tuple[float, str]:
    if not ratios.number:
        return cold, "the packaged prior"
    seen = expected * ratios.dearest
    spread = seen * (1 + 1 / ratios.number)
    # Few observations widen what was seen, but not beyond the prior, which many answers stand behind.
    return max(seen * (1 + 1 / WINDOW), min(spread, cold)), f"the dearest of the last {ratios.number} calls"


def _unmeasured(request: Request, seen: _Seen, context_window: int | None) -> tuple[float, str]:
    if seen.number:
        learned = seen.widened
        return (learned if context_window is None else min(learned, context_window)), "the dearest of the last calls"
    if context_window is not None:
        return float(context_window), "the model's context window"
    raise UnboundedEstimate(
        f"Nothing is known of the input of this call of {request.provider} {request.model!r}. "
        "Give its messages or input_tokens.",
        reason="neither the messages nor their count are known",
        provider=request.provider,
        model=request.model,
    )
