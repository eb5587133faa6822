"""The targets: everything that reads text from outside. Each takes bytes, and lets nothing out but a BursarError."""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from bursar import Budget, BursarError, Threshold, Usage, answers
from bursar.alerts import Alert, Message, config, sinks
from bursar.answers import StreamReader
from bursar.answers import plain as answer_texts
from bursar.cli import books, operate, options, price, replay
from bursar.detect import settings as detector_settings
from bursar.money import MAX_NANOS, nanos
from bursar.policy_file import entries, file, read_policy
from bursar.prices import Override, PriceBook
from bursar.prices.hosts import provider_of_url
from bursar.reservation import tool_cost
from bursar.scope import Scope, check_tags, from_carried, to_baggage
from bursar.signing import OperatorKey, verifies
from bursar.stores import public_url
from bursar.stores.postgres.server import split

Target = Callable[[bytes], None]
PROVIDERS = ("openai", "anthropic", "google", "bedrock", "cohere", "ollama", "xai", "openrouter", "mistral", "unknown")
ENDS = (BursarError, click.ClickException)  # what a reader may raise: the caller is told, and nothing else happens


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**48, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "12", "-3", "9" * 70, "1e5", "nan", "5 USD", "80%", "day", "\x1b[2J", "\u2028", "\ud800", [], {}),
)


def _made(data: bytes, words: tuple[str, ...]) -> Any:
    """Data whose shape the bytes decide, with the words that its reader knows: nearly all of it gets past a parser."""
    left = iter(data)

    def one(depth: int) -> Any:
        kind = next(left, 0)
        if kind >= 128 and depth < 8:
            inner = range(next(left, 0) % 8)
            if kind % 3 == 0:
                return [one(depth + 1) for _ in inner]
            return {word(): one(depth + 1) for _ in inner}
        return word() if kind % 2 else _ODD[kind // 2 % len(_ODD)]

    def word() -> str:
        return words[(next(left, 0) * 256 + next(left, 0)) % len(words)] if words else "id"

    return one(0)


def answer(data: bytes) -> None:
    """A provider's answer: as text, as data, as the list of a stream's events, and read as it streams."""
    provider = PROVIDERS[data[0] % len(PROVIDERS)] if data else ""
    body, status = data[1:], 200 if len(data) % 3 else 500
    found = _json(body) or _made(body, vocabulary(answer))
    streamed = found if isinstance(found, list) else body.split(b"\n")
    for given in (body, _text(body), found, [found], streamed):
        with contextlib.suppress(BursarError):
            usage = Usage.from_response(provider, given, status=status)
            assert Usage(**usage.as_dict()) == usage
            assert PriceBook.packaged().cost(provider, "gpt-4o", usage, at_us=1_780_000_000_000_000).cost_nanos >= 0
    reader = StreamReader(provider)
    for event in streamed:
        reader.feed(event)
    for read in (reader.usage, reader.partial):
        with contextlib.suppress(BursarError):
            read()


def headers(data: bytes) -> None:
    """The headers beside an answer, of a receiver of alerts, and those that carry a scope."""
    text = _text(data)
    with contextlib.suppress(BursarError):
        names = ("x-amzn-bedrock-input-token-count", "x-amzn-bedrock-output-token-count")
        Usage.from_response("bedrock", {}, headers=dict.fromkeys(names, text))
    wish = sinks._retry_after_s(text, datetime(2026, 1, 1, tzinfo=UTC))
    assert wish is None or 0 <= wish <= sinks.MAX_RETRY_AFTER_S


def scope(data: bytes) -> None:
    """A scope of another process, in a header or in the environment."""
    for read in (from_carried, Scope.from_text):
        with contextlib.suppress(BursarError):
            found = read(_text(data))
            assert Scope.from_text(found.as_text()).key == found.key
            with contextlib.suppress(BursarError):
                assert from_carried(to_baggage(found)).key == found.key


@cache
def _folder() -> Path:
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="bursar-fuzz-", dir=memory if memory.is_dir() else None))


def _policy(data: bytes, suffix: str) -> None:
    path = _folder() / f"policy{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(BursarError):
        policy = read_policy(path)
        with contextlib.suppress(BursarError):
            policy.make_alerts()


def policy_toml(data: bytes) -> None:
    """A policy in TOML: prices, alerts, limits and detectors with it."""
    _policy(data, ".toml")


def policy_yaml(data: bytes) -> None:
    """A policy in YAML."""
    _policy(data, ".yaml")


def policy_data(data: bytes) -> None:
    """A policy whose form is right: what stands in it may be anything."""
    _policy(json.dumps(_made(data, vocabulary(policy_data))).encode(), ".yaml")


def limit(data: bytes) -> None:
    """Limits, windows, zones, thresholds and amounts of money."""
    text = _text(data)
    makers: tuple[Callable[[], object], ...] = (
        lambda: Budget("b", text),
        lambda: Budget(text, "1 USD"),
        lambda: Budget("b", "1 USD", window=text),
        lambda: Budget("b", "1 USD", window="day", tz=text),
        lambda: Budget("b", "1 USD", on_exceed=text),
        lambda: Budget("b", "1 USD", match={text: text}, per=[text], owner=text),
        lambda: Threshold(text, "notify"),
        lambda: Threshold("1%", "throttle", rate=text),
        lambda: tool_cost(text),
        lambda: check_tags({text: text, "run": text}),
    )
    for make in makers:
        with contextlib.suppress(BursarError):
            make()
    with contextlib.suppress(BursarError):
        assert abs(nanos(text)) <= MAX_NANOS


def price_of(data: bytes) -> None:
    """An own price, and the names of models and hosts."""
    text = _text(data)
    for given in ({"input_mtok": text}, {"discount": text}, {"effective_from": text}, {"tools": {text: text}}):
        with contextlib.suppress(BursarError):
            book = PriceBook.packaged().with_overrides([Override(model="m", output_mtok="1", **given)])  # type: ignore[arg-type]
            usage = Usage(input_tokens=5, output_tokens=7)
            assert book.cost("house", "m", usage, at_us=1_780_000_000_000_000).cost_nanos >= 0
    provider, _, model = text.partition("\n")
    with contextlib.suppress(BursarError):
        PriceBook.packaged().find(provider, model, 1_780_000_000_000_000)
    provider_of_url(text)
    price.priced(data, 1, PriceBook.packaged(), price._clock("recorded"), ignore_stated=bool(len(data) % 2))


def words(data: bytes) -> None:
    """The words of the command line: TAG=VALUE, durations, times, addresses of stores, keys."""
    text = _text(data)
    context = click.Context(click.Command("x"))
    readers: tuple[Callable[[], object], ...] = (
        lambda: check_tags(options._tags(context, click.Argument(["tags"]), (text,))),
        lambda: operate.Duration().convert(text, None, None),
        lambda: replay._Instant().convert(text, None, None),
        lambda: price._clock(text),
        lambda: split(text),
        lambda: OperatorKey(text),
    )
    for read in readers:
        with contextlib.suppress(*ENDS):
            read()
    assert books.plain(text).plain.isprintable()
    assert "hunter2" not in public_url(f"postgresql://{text}:hunter2@host/")
    assert verifies(text, "raise", text, {"signature": text}) is False


_FACTS = (
    "at",
    "limit",
    "spent",
    "unit",
    "account",
    "scope",
    "owner",
    "was",
    "budget",
    "until_us",
    "tags",
    "why",
    "<!here>",
)


def alert(data: bytes) -> None:
    """An alert with whatever somebody put into the store, as it is told."""
    found = _made(data, _FACTS)
    for facts in (found if isinstance(found, dict) else {}, {"why": _text(data), "owner": _text(data)}):
        message = Message((Alert(_text(data), "threshold", int.from_bytes(data[:9]), facts),))
        assert message.id.isascii()
        assert message.group.isascii()
        assert _is_plain(message.title)
        assert all(_is_plain(line) for line in message.text.split("\n"))
        json.loads(message.body())


def _is_plain(line: str) -> bool:
    return line.replace("\u200b", "").isprintable()  # the sign that breaks mentions


TARGETS: dict[str, Target] = {
    one.__name__: one
    for one in (answer, headers, scope, policy_toml, policy_yaml, policy_data, limit, price_of, words, alert)
}
_SPOKEN: dict[Target, tuple[ModuleType, ...]] = {
    answer: (answers.anthropic, answers.bedrock, answers.chat, answers.cohere, answers.google, answers.ollama,
             answers.plain, answers.read, answers.responses),
    **dict.fromkeys((policy_toml, policy_yaml, policy_data), (entries, config, file, detector_settings)),
    price_of: (price, answer_texts),
}  # fmt: skip


@cache
def vocabulary(target: Target) -> tuple[str, ...]:
    """The words that a reader knows, out of its source: without them a fuzzer would have to guess every key."""
    return tuple(sorted({word for module in _SPOKEN.get(target, ()) for word in _words(inspect.getsource(module))}))


def _words(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 40:
            yield node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
