"""Exact reading of single figures out of untrusted JSON, and the arithmetic that families share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from bursar.errors import InvalidInput, UnreadableAnswer
from bursar.money import MAX_NANOS, NANOS_PER_USD, round_half_up
from bursar.texts import printable
from bursar.usage import MAX_COUNT, Usage

Json = Mapping[str, Any]
Keywords = dict[str, Any]  # keyword arguments of Usage
_EMPTY: Json = {}
OBJECT = (dict, Mapping)  # told from a dict at once, from the abstract class ten times slower
MAX_NUMBER = 2**62
_READ_MEDIA = tuple((f"cache_read_{medium}_tokens", f"input_{medium}_tokens") for medium in ("audio", "image", "video"))
# What may be billed: an answer where all of these are zero has told nothing.
BILLED = (
    *("input_tokens", "output_tokens", "input_audio_ms", "output_audio_ms", "input_characters"),
    *("images", "pages", "search_units", "server_tools", "stated_cost_nanos"),
)


def unreadable(what: str) -> UnreadableAnswer:
    """The error for an answer that contradicts its own format."""
    return UnreadableAnswer(
        f"The answer's usage cannot be read: {what}. "
        "Settle the call with a Usage of your own, or leave it to its worst case.",
        reason="unreadable",
    )


def number(value: Any) -> Fraction:
    """A non-negative finite number, exactly as written: a JSON number, or digits as gRPC and headers send them."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise unreadable(f"a {type(value).__name__} stands where a number is due")
    try:
        # Through its text, so that a float stands for the decimal that was sent.
        exact = value if isinstance(value, int | Decimal) else Decimal(text if len(text := str(value)) <= 64 else "")
    except InvalidOperation:
        raise unreadable(f"{str(value)[:40]!r} is not a number") from None
    if isinstance(exact, Decimal) and (not exact.is_finite() or (exact and abs(exact.adjusted()) > 30)):
        raise unreadable(f"{str(value)[:40]!r} is not a finite number")
    if not 0 <= exact <= MAX_NUMBER:
        raise unreadable("a number is negative or far too large")
    return Fraction(exact)


def count(value: Any) -> int:
    """A whole number from 0 to 2^48; None counts as 0. Some providers send counts as 6.0."""
    if value is None:
        return 0
    if type(value) is int and 0 <= value <= MAX_COUNT:
        return value
    exact = number(value)
    if exact.denominator != 1 or exact > MAX_COUNT:
        raise unreadable(f"{str(value)[:40]} is not a count")
    return int(exact)


def milliseconds(seconds: Any) -> int:
    """Seconds as whole milliseconds, rounded half up."""
    return 0 if seconds is None else round_half_up(number(seconds) * 1000)


def cost_nanos(dollars: Any) -> int:
    """A stated bill in dollars as nano-dollars, rounded half up once."""
    return _bill(number(dollars) * NANOS_PER_USD)


def ticks_nanos(ticks: Any) -> int:
    """xAI's cost ticks, 10^-10 dollars each, as nano-dollars."""
    return _bill(number(ticks) / 10)


def _bill(amount: Fraction) -> int:
    rounded = round_half_up(amount)
    if rounded > MAX_NANOS:
        raise unreadable("the stated bill is beyond any account")
    return rounded


def part(data: Json, *names: str) -> Json:
    """The object under the first of these names that is there; empty when none is."""
    for name in names:
        value = data.get(name)
        if value is None or value == "":
            continue
        if not isinstance(value, OBJECT):
            raise unreadable(f"`{name}` is not an object")
        return value
    return _EMPTY


def items(data: Json, name: str) -> list[Json]:
    """The objects of a list; empty when it is not there. Other things in the list are passed over."""
    value = data.get(name)
    return [item for item in value if isinstance(item, OBJECT)] if isinstance(value, (list, tuple)) else []


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dict, or of an object of pydantic with those that its class does not know; None of anything else."""
    if type(value) is dict:
        return value
    if value is None or not hasattr(type(value), "__pydantic_extra__"):
        return None
    more = getattr(value, "__pydantic_extra__", None)
    return {**value.__dict__, **more} if more else value.__dict__


def total(data: Json, *names: str) -> int:
    """The largest of several names for the same count."""
    most = 0
    for name in names:
        value = data.get(name)
        if value is not None and (found := count(value)) > most:
            most = found
    return most


def word(value: Any) -> str | None:
    """A fact such as a model or a tier: a short text, else None (SDKs send enums, numbers and empty strings)."""
    value = getattr(value, "value", value)
    return printable(value, 200) if isinstance(value, str) and value else None


def tier(value: Any) -> dict[str, str]:
    """The service tier as a keyword, in small letters; `auto` is a wish, not what was used."""
    name = (word(value) or "").lower()
    return {} if name in ("", "auto", "unspecified", "service_tier_unspecified") else {"service_tier": name}


def reported(usage: Json) -> bool:
    """Whether a usage object holds any count above zero: providers send zeros where they counted nothing."""
    stack: list[Any] = list(usage.values())
    for _ in range(10_000):  # bound: a usage object is small
        if not stack:
            return False
        value = stack.pop()
        if isinstance(value, OBJECT):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, str):
            if value.replace(".", "", 1).isdigit() and value.strip("0."):
                return True
        elif isinstance(value, int | float | Decimal) and not isinstance(value, bool) and value != 0:
            return True
    return True


def tidy(words: Keywords) -> Keywords:
    """Make totals hold their parts, where a provider's figures do not.

    A single part above its total shows that the total left it out (xAI counts cached tokens over all rounds of its
    tools), so the total grows; so it does where reads and writes together exceed it: the same tokens were stored and
    read, and are billed for both (OpenRouter, for Gemini). Reasoning beside other media is cut.
    """
    into, out = words.get("input_tokens", 0), words.get("output_tokens", 0)
    seen = words.get("input_audio_tokens", 0) + words.get("input_image_tokens", 0) + words.get("input_video_tokens", 0)
    into = max(into, words.get("cache_read_tokens", 0), words.get("tool_prompt_tokens", 0), seen)
    written = words.get("cache_write_5m_tokens", 0) + words.get("cache_write_1h_tokens", 0)
    if words.get("cache_read_tokens", 0) + written > into:
        into += written
    media = words.get("output_audio_tokens", 0) + words.get("output_image_tokens", 0)
    out = max(out, media)
    if "reasoning_tokens" in words:
        words["reasoning_tokens"] = min(words["reasoning_tokens"], out - media)
    for name, medium in _READ_MEDIA:
        if name in words:
            words[name] = min(words[name], words.get("cache_read_tokens", 0), words.get(medium, 0))
    return words | {"input_tokens": into, "output_tokens": out}


def tools(words: Keywords, counts: Counter[str]) -> Keywords:
    """Add the server-side tools that were used, at most 50 names."""
    used = {name: times for name, times in counts.most_common(50) if times > 0} if counts else None
    return words | {"server_tools": used} if used else words


def usage_of(words: Keywords) -> Usage:
    """The Usage of these keywords; sums that no account holds are unreadable."""
    try:
        return Usage(**words)
    except InvalidInput as error:
        raise unreadable(str(error).split(". ")[0]) from None
