"""LLMs that tell LlamaIndex nothing, and streams that have to stop: a guarded copy, which reserves and settles by itself."""

from __future__ import annotations

import types
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.llms.llm import LLM
from llama_index.core.utils import get_tokenizer

from bursar.ending import released
from bursar.errors import BudgetExceeded
from bursar_llamaindex.calls import Call
from bursar_llamaindex.gate import Gate
from bursar_llamaindex.handler import announce_llm, found_tags, installed_bursar
from bursar_llamaindex.serving import is_served, serving
from bursar_llamaindex.spans import clean, current

if TYPE_CHECKING:
    from bursar import Bursar, Reservation

SLICE_TOKENS = 256  # how much further output is reserved at a time when a stream outgrows its estimate

T = TypeVar("T", bound=LLM)
_END = object()


def guard_llm(
    llm: T, bursar: Bursar | None = None, *, provider: str | None = None, stop_streams: bool = False, **tags: str
) -> T:
    """A copy of the LLM that holds each of its calls against the budgets of `bursar`, or of the installed guard.

    For LLMs of your own whose methods have none of LlamaIndex's callbacks, and for streams that are to stop: with
    `stop_streams`, a stream that outgrows what was reserved for it reserves more, 256 tokens at a time, and where a budget
    refuses that, BudgetExceeded ends it. `provider`: who bills the calls, where the class does not tell. `tags` are added to
    every call. The copy is of the same class, and what LlamaIndex itself announces of its calls is not counted again.
    Raises InvalidInput without a guard.
    """
    guarded = llm.model_copy()
    limiter = getattr(llm, "rate_limiter", None)
    inner = limiter.limiter if isinstance(limiter, Gate) else limiter
    guarded.rate_limiter = _OwnGate(inner, installed_bursar(bursar), provider, clean(tags), stop_streams)
    object.__setattr__(guarded, "__class__", _guarded(type(llm)))
    return guarded


class _OwnGate(Gate):
    """The gate of a guarded copy, which knows its guard: pydantic's models take no attributes of strangers."""

    def __init__(
        self, limiter: Any, bursar: Bursar, provider: str | None, tags: Mapping[str, str], stop_streams: bool
    ) -> None:
        super().__init__(limiter)
        self.bursar = bursar
        self.provider = provider
        self.tags = tags
        self.stop_streams = stop_streams


def _plain(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **settings: Any) -> Any:
        inner = getattr(super(_Guarded, self), name)
        if is_served(self):
            return inner(*args, **settings)
        call = _announce(self, name, args, settings)
        call.reserve()
        with _failing(call), serving(self):
            answer = inner(*args, **settings)
        call.end(call.answered(answer))
        return answer

    return method


def _async(name: str) -> Callable[..., Any]:
    async def method(self: Any, *args: Any, **settings: Any) -> Any:
        inner = getattr(super(_Guarded, self), name)
        if is_served(self):
            return await inner(*args, **settings)
        call = _announce(self, name, args, settings)
        await call.areserve()
        with _failing(call), serving(self):
            answer = await inner(*args, **settings)
        await call.aend(call.answered(answer))
        return answer

    return method


def _stream(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **settings: Any) -> Any:
        inner = getattr(super(_Guarded, self), name)
        if is_served(self):
            return inner(*args, **settings)

        def parts() -> Iterator[Any]:
            call = _announce(self, name, args, settings)
            meter = _Meter(self, call, call.reserve())
            last, source = None, iter(())
            with _failing(call), meter:
                try:
                    with serving(self):
                        source = inner(*args, **settings)
                    while True:
                        with serving(self):
                            part = next(source, _END)
                        if part is _END:
                            break
                        last = part
                        call.check()
                        for more in meter.outgrown(part):
                            with _beside_rates():
                                more.reserve()
                        yield part
                finally:
                    _close(source)
                call.end(call.answered(last))

        return parts()

    return method


def _astream(name: str) -> Callable[..., Any]:
    async def method(self: Any, *args: Any, **settings: Any) -> Any:
        inner = getattr(super(_Guarded, self), name)
        if is_served(self):
            return await inner(*args, **settings)

        async def parts() -> AsyncIterator[Any]:
            call = _announce(self, name, args, settings)
            meter = _Meter(self, call, await call.areserve())
            last, source = None, None
            with _failing(call), meter:
                try:
                    with serving(self):
                        source = await inner(*args, **settings)
                    while True:
                        with serving(self):
                            part = await anext(source, _END)
                        if part is _END:
                            break
                        last = part
                        call.check()
                        for more in meter.outgrown(part):
                            with _beside_rates():
                                await more.areserve()
                        yield part
                finally:
                    await _aclose(source)
                await call.aend(call.answered(last))

        return parts()

    return method


class _Guarded:
    """The eight methods by which an LLM is called; whichever of them another one calls is a part of its call."""

    __slots__ = ()  # a mixin with room of its own could not become the class of an object

    chat, complete = _plain("chat"), _plain("complete")
    achat, acomplete = _async("achat"), _async("acomplete")
    stream_chat, stream_complete = _stream("stream_chat"), _stream("stream_complete")
    astream_chat, astream_complete = _astream("astream_chat"), _astream("astream_complete")


_classes: dict[type, type] = {}


def _guarded(cls: type) -> type:
    if issubclass(cls, _Guarded):
        return cls
    if cls not in _classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[cls] = types.new_class(cls.__name__, (_Guarded, cls), exec_body=lambda space: space.update(names))
    return _classes[cls]


class _Meter:
    """Counts a stream's output, and says when it has outgrown what is reserved; leaving it gives back what was added."""

    def __init__(self, llm: Any, call: Call, reservation: Reservation) -> None:
        self._call = call
        self._model = reservation.model
        self._covered_tokens = reservation.covered_output_tokens or 0
        self._tokens = 0
        self._added: list[Call] = []
        self._count = get_tokenizer() if llm.rate_limiter.stop_streams else None

    def outgrown(self, part: Any) -> list[Call]:
        """The further calls to reserve for, until the part is covered."""
        if self._count is None:
            return []
        self._tokens += len(self._count(getattr(part, "delta", None) or ""))
        missing_tokens = max(0, self._tokens - self._covered_tokens)
        slices = -(-missing_tokens // SLICE_TOKENS)
        self._covered_tokens += slices * SLICE_TOKENS
        whole = self._call.request
        request = {name: whole[name] for name in ("provider", "default_tags")}
        request |= {"model": self._model, "input_tokens": 0, "max_output_tokens": SLICE_TOKENS, "changeable": ()}
        more = [Call(self._call.bursar, request, self._call.event) for _ in range(slices)]
        self._added += more
        return more

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *error: object) -> None:
        for more in self._added:
            more.drop(released("a part of a stream that is booked as one"))


@contextmanager
def _failing(call: Call) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        call.drop(call.failed(error))
        raise


@contextmanager
def _beside_rates() -> Iterator[None]:
    """A stream that goes on is no further request, and takes no further slot: only money and tokens stop it."""
    try:
        yield
    except BudgetExceeded as refused:
        if refused.unit not in ("requests", "slots"):
            raise


def _close(source: Any) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()


async def _aclose(source: Any) -> None:
    aclose = getattr(source, "aclose", None)
    if aclose is not None:
        await aclose()


def _announce(llm: Any, method: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Call:
    gate: _OwnGate = llm.rate_limiter
    span = current()
    if span is not None:
        span.raise_refusal()
    sent = args[0] if args else settings.get("messages") or settings.get("prompt") or ""
    call = announce_llm(gate.bursar, llm, method, sent, settings, "")
    call.request["default_tags"] = {**gate.tags, **found_tags()}
    if gate.provider is not None:
        call.request["provider"] = gate.provider
    if gate.stop_streams and "stream" in method:
        call.request["resize"] = (
            call.request["max_output_tokens"] is None
        )  # the stream is stopped where it is granted less
    return call
