"""A guarded twin of a client: the same class and settings, and each request reserves before it goes out."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping
from contextvars import ContextVar
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, TypeVar

from bursar.answers.counts import OBJECT
from bursar.ending import Ending, settled
from bursar.errors import InvalidInput, UnboundedEstimate
from bursar.outcome import refuses, surely_not_billed
from bursar.prices.hosts import region_of_url
from bursar.reservation import Block, Reservation
from bursar.sending import is_sending, passing
from bursar.wrap.answer import SILENT, answer_of
from bursar.wrap.doors import Visit, answer_id, is_free, path_of, visit
from bursar.wrap.providers import provider_of
from bursar.wrap.watch import watch

if TYPE_CHECKING:
    from bursar.facade import Bursar

T = TypeVar("T")
MAX_BACKGROUND = 10_000  # responses under way at the provider; what is beyond expires, and is booked as estimated
_OVERLOADED = (503, 529)  # turned away before anything was generated; the client comes again, time after time
_UNFINISHED = ("queued", "in_progress")


class Gate:
    """What the twins of one client share: the guard, the provider's name where it was given, and the answers under way."""

    def __init__(self, bursar: Bursar, provider: str | None) -> None:
        self.bursar = bursar
        self.provider = provider
        self._background: OrderedDict[str, Reservation] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, id: str, reservation: Reservation) -> None:
        """A response goes on at the provider: its reservation waits until the response is retrieved."""
        with self._lock:
            self._background[id] = reservation
            if len(self._background) > MAX_BACKGROUND:
                self._background.popitem(last=False)

    def kept(self, id: str) -> Reservation | None:
        """The open reservation of a response that was begun in the background."""
        with self._lock:
            reservation = self._background.get(id)
            if reservation is not None and not reservation.is_open:
                reservation = self._background.pop(id, None) and None
            return reservation


class Trip:
    """One guarded request: its reservation, and what becomes of it when the response is there."""

    __slots__ = ("_gate", "_visit", "met", "reservation")

    def __init__(self, gate: Gate, visit: Visit, reservation: Reservation) -> None:
        self._gate = gate
        self._visit = visit
        self.reservation = reservation
        self.met = False  # a response has been seen, which ends the reservation, or will

    def lose(self) -> None:
        """An attempt was never answered, and may have been billed, unless it only retrieved what was made before."""
        self.reservation._call.lost += bool(self._visit.model)

    def meet(self, response: Any) -> Ending | None:
        """How a whole response ends the reservation; None where it is still to come: streamed, or made in the background."""
        self.met = True
        visit, keep = self._visit, None
        if visit.is_background:
            keep = partial(self._gate.keep, reservation=self.reservation)
        if not response.is_closed:
            watch(response, answer_of(self.reservation, visit, response, keep))
            return None
        if keep is not None and (id := _unfinished(response)) is not None:
            keep(id)
            return None
        if visit.is_silent:
            return SILENT
        return settled(visit.known or response, headers=response.headers)


_current: ContextVar[Trip | None] = ContextVar("bursar_wrap_trip", default=None)


def wrap_client(bursar: Bursar, client: T, provider: str | None = None) -> T:
    """The guarded twin of `client`; see `Bursar.wrap`."""
    kind: Any = type(client)
    if issubclass(kind, _Twin):
        raise InvalidInput(
            "The client is wrapped already: its calls would be charged twice. Wrap the plain one.", argument="client"
        )
    if not is_client(kind) or not hasattr(client, "base_url"):
        raise InvalidInput(
            f"{kind.__module__}.{kind.__qualname__} is no client that can be wrapped. Give one of the packages openai or "
            "anthropic, or use `with bursar.call(...)` around each call.",
            argument="client",
        )
    plain: Any = client
    return _as(twin_of(bursar, kind, provider), plain.copy())  # type: ignore[no-any-return]


def is_client(kind: type) -> bool:
    """Whether the class is made as those are whose calls all pass one door."""
    return all(callable(getattr(kind, name, None)) for name in ("request", "_process_response", "copy"))


def twin_of(bursar: Bursar, kind: Any, provider: str | None) -> type:
    """The guarded class that stands for a client's class."""
    base = _AsyncTwin if iscoroutinefunction(kind._process_response) else _SyncTwin
    own = {"_bursar_gate": Gate(bursar, provider), "_bursar_plain": kind, "__module__": kind.__module__}
    return type(kind.__name__, (base, kind), own)


def _as(kind: type, client: Any) -> Any:
    """The client as an instance of another class; its resources are made anew, so that their calls pass that class."""
    made: Any = object.__new__(kind)
    made.__dict__.update(client.__dict__)
    return made


class _Twin:
    """What sync and async twins have in common. It stands before the client's own class, whose `request` all calls pass."""

    _bursar_gate: Gate
    _bursar_plain: type

    @property
    def websocket_base_url(self) -> Any:
        """Whoever opens a session over a websocket reads this first; no request of such a session passes here."""
        raise UnboundedEstimate(
            "A session over a websocket is not guarded: each of its answers bills the whole conversation again. "
            "Open it on the client that is not wrapped, and book what it cost with bursar.charge(...).",
            reason="a live session",
            provider=self._bursar_provider(),
            model="",
        )

    @websocket_base_url.setter
    def websocket_base_url(self, value: Any) -> None:
        self.__dict__["websocket_base_url"] = value

    def copy(self, *arguments: Any, **options: Any) -> Any:
        """A guarded twin with other settings, copied by the plain class: some of them look at what class they are of."""
        return _as(type(self), _as(self._bursar_plain, self).copy(*arguments, **options))

    with_options = copy

    def _bursar_provider(self) -> str:
        client: Any = self
        return self._bursar_gate.provider or provider_of(self._bursar_plain, str(client.base_url))

    def _bursar_path(self, options: Any) -> str:
        client: Any = self
        return path_of(options.url, str(client.base_url) if "://" in options.url else "")

    def _bursar_free(self, options: Any, path: str) -> tuple[Trip | None, bool]:
        """The trip of a response that is retrieved, and whether the request is free."""
        method = options.method.lower()
        if not is_free(method, path):
            return None, False
        id = answer_id(path)
        reservation = self._bursar_gate.kept(id) if id is not None and method in ("get", "post") else None
        if reservation is None:
            return None, True
        return Trip(self._bursar_gate, Visit.of_background(self._bursar_provider()), reservation), True

    def _bursar_block(self, options: Any, path: str) -> tuple[Visit, Block]:
        """What to send, and the block that reserves for it. `options` are already a copy, and hold the body as it is sent."""
        client: Any = self
        if getattr(client, "_middleware", None):
            raise UnboundedEstimate(
                "A client with middleware is not guarded: it may send several requests for one. "
                "Give the wrapped client no middleware, or use `with bursar.call(...)` inside it.",
                reason="middleware",
                provider=self._bursar_provider(),
                model="",
            )
        retries = options.get_max_retries(client.max_retries)
        made = visit(path, self._bursar_provider(), _body(options), options.files, retries)
        made.said["region"] = region_of_url(str(client.base_url))
        return made, self._bursar_gate.bursar.call(made.provider, made.model, **made.said)


class _SyncTwin(_Twin):
    def request(self, cast_to: Any, options: Any, **rest: Any) -> Any:
        plain: Any = super()
        path = self._bursar_path(options)
        trip, free = self._bursar_free(options, path)
        if free:
            with _on(trip):
                return plain.request(cast_to, options, **rest)
        if is_sending():
            with passing(self._bursar_gate.bursar, *_asked(options)) as is_held, _on(None):
                if is_held:
                    return plain.request(cast_to, options, **rest)
        options = getattr(self, "_copy_and_prepare", copy.copy)(options)
        visit, block = self._bursar_block(options, path)
        trip = Trip(self._bursar_gate, visit, block.__enter__())
        token = _current.set(trip)
        try:
            visit.write(options, trip.reservation)
            answer = plain.request(cast_to, options, **rest)
        except BaseException as error:
            if not trip.met:
                block.__exit__(type(error), error, None)
            raise
        finally:
            _current.reset(token)
        if not trip.met:  # an SDK that takes its responses elsewhere: what it returns is settled
            settled(answer).end(trip.reservation)
        return answer

    def _sleep_for_retry(self, *, response: Any, **rest: Any) -> None:
        _note_lost(response)
        plain: Any = super()
        plain._sleep_for_retry(response=response, **rest)

    def _process_response(self, *, response: Any, **rest: Any) -> Any:
        trip = _current.get()
        if trip is not None and (ending := trip.meet(response)) is not None:
            ending.end(trip.reservation)
        plain: Any = super()
        return plain._process_response(response=response, **rest)


class _AsyncTwin(_Twin):
    async def request(self, cast_to: Any, options: Any, **rest: Any) -> Any:
        plain: Any = super()
        path = self._bursar_path(options)
        trip, free = self._bursar_free(options, path)
        if free:
            with _on(trip):
                return await plain.request(cast_to, options, **rest)
        if is_sending():
            with passing(self._bursar_gate.bursar, *_asked(options)) as is_held, _on(None):
                if is_held:
                    return await plain.request(cast_to, options, **rest)
        prepare = getattr(self, "_copy_and_prepare", None)
        options = copy.copy(options) if prepare is None else await prepare(options)
        visit, block = self._bursar_block(options, path)
        trip = Trip(self._bursar_gate, visit, await block.__aenter__())
        token = _current.set(trip)
        try:
            visit.write(options, trip.reservation)
            answer = await plain.request(cast_to, options, **rest)
        except BaseException as error:
            if not trip.met:
                await block.__aexit__(type(error), error, None)
            raise
        finally:
            _current.reset(token)
        if not trip.met:
            await settled(answer).aend(trip.reservation)
        return answer

    async def _sleep_for_retry(self, *, response: Any, **rest: Any) -> None:
        _note_lost(response)
        plain: Any = super()
        await plain._sleep_for_retry(response=response, **rest)

    async def _process_response(self, *, response: Any, **rest: Any) -> Any:
        trip = _current.get()
        if trip is not None and (ending := trip.meet(response)) is not None:
            await ending.aend(trip.reservation)
        plain: Any = super()
        return await plain._process_response(response=response, **rest)


def _note_lost(response: Any) -> None:
    """The SDK tries again: whether the attempt before may have been billed, by its response or by the error that is handled."""
    trip = _current.get()
    if response is not None:
        was_refused = refuses(response.status_code) or response.status_code in _OVERLOADED
    else:
        error = sys.exc_info()[1]
        was_refused = error is not None and surely_not_billed(error)
    if trip is not None and not was_refused:
        trip.lose()


@contextlib.contextmanager
def _on(trip: Trip | None) -> Generator[None]:
    """Responses met inside belong to this trip."""
    token = _current.set(trip)
    try:
        yield
    finally:
        _current.reset(token)


def _body(options: Any) -> Any:
    """The body as it will be sent: the resource's own, with the caller's `extra_body` over it."""
    body, more = options.json_data, getattr(options, "extra_json", None)
    if body is None:
        body = more
    elif more is not None and isinstance(body, OBJECT) and isinstance(more, OBJECT):
        body = {**body, **more}
    if not isinstance(body, OBJECT):
        return body
    return {name: value for name, value in body.items() if type(value).__name__ not in ("Omit", "NotGiven")}


def _asked(options: Any) -> tuple[str, Any]:
    """The model and the conversation of a request, as far as it has any."""
    body = _body(options)
    return (str(body.get("model")), body) if isinstance(body, Mapping) else ("", None)


def _unfinished(response: Any) -> str | None:
    """The id of a response that the provider still works on."""
    try:
        data = json.loads(response.content)
    except ValueError:
        return None  # the client says so itself
    if isinstance(data, dict) and data.get("status") in _UNFINISHED and isinstance(data.get("id"), str):
        return str(data["id"])
    return None
