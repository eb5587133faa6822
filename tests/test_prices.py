"""Prices: exact arithmetic, dates, tiers, regions, bounds, and the refusal of what is unknown."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.errors import InvalidInput, UnknownPrice
from bursar.prices import ModelPrice, Override, PriceBook
from bursar.prices.rates import Rates
from bursar.usage import Usage

BOOK = PriceBook.packaged()


def at(moment: str) -> int:
    return (datetime.fromisoformat(moment).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )


NOW = at("2026-11-22T12:00")


def cost(provider: str, model: str, when: int = NOW, **counts: object) -> int:
    return BOOK.cost(provider, model, Usage(**counts), at_us=when).cost_nanos  # type: ignore[arg-type]


def own(**rates: str) -> ModelPrice:
    """The price of a model of our own, with no rates but these."""
    return BOOK.with_overrides([Override(provider="acme", model="m", **rates)]).find("acme", "m", NOW)  # type: ignore[arg-type]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_text_is_priced_to_the_nano_dollar() -> None:
    assert cost("openai", "gpt-4o", input_tokens=1000, output_tokens=500) == 7_500_000


def test_parts_are_inside_their_totals() -> None:
    """3 USD input, 0.30 read, 3.75 written, 6 written for an hour, 15 output, all per million."""
    nanos = cost(
        "anthropic",
        "claude-sonnet-4-6",
        input_tokens=10_000,
        cache_read_tokens=4_000,
        cache_write_5m_tokens=3_000,
        cache_write_1h_tokens=2_000,
        output_tokens=100,
    )
    assert nanos == 1_000 * 3_000 + 4_000 * 300 + 3_000 * 3_750 + 2_000 * 6_000 + 100 * 15_000


def test_cached_audio_is_counted_once_though_it_is_cached_and_audio() -> None:
    model = own(
        input_mtok="4",
        output_mtok="8",
        cache_read_mtok="1",
        input_audio_mtok="32",
        cache_read_audio_mtok="0.4",
        output_audio_mtok="64",
    )
    usage = Usage(
        input_tokens=1_000,
        cache_read_tokens=600,
        input_audio_tokens=500,
        cache_read_audio_tokens=200,
        output_tokens=90,
        output_audio_tokens=40,
    )
    text_read, audio_new = 400, 300
    text_new = 1_000 - text_read - audio_new - 200
    expected = text_new * 4_000 + text_read * 1_000 + audio_new * 32_000 + 200 * 400 + 50 * 8_000 + 40 * 64_000
    assert model.cost_nanos(usage) == expected


def test_a_part_without_a_rate_is_billed_as_the_whole_that_holds_it() -> None:
    model = own(input_mtok="2", output_mtok="4")
    usage = Usage(input_tokens=10, cache_read_tokens=5, input_image_tokens=5, output_tokens=10, reasoning_tokens=9)
    assert model.cost_nanos(usage) == 10 * 2_000 + 10 * 4_000


def test_rounding_is_half_up_and_happens_once() -> None:
    """0.0005 USD per million is half a nano-dollar a token: 1 token rounds up, 2 are 1, and 3 are 1.5, so 2."""
    model = own(input_mtok="0.0005", output_mtok="0.0005")
    assert [model.cost_nanos(Usage(input_tokens=n)) for n in (1, 2, 3)] == [1, 1, 2]
    assert model.cost_nanos(Usage(input_tokens=1, output_tokens=1)) == 1  # 0.5 + 0.5, not 1 + 1


@given(
    st.integers(0, 10**7),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 10**5), min_size=5, max_size=5),
    st.sampled_from(["0.0833333333333333", "1.25", "3", "0.15"]),
)
def test_the_cost_is_the_sum_of_counts_times_rates_rounded_once(
    text: int, output: int, parts: list[int], rate: str
) -> None:
    """Against the plain sum over disjoint kinds of tokens, in fractions."""
    read, write, audio, reasoning, hour = parts
    rates = {
        "input_mtok": rate, "output_mtok": "7.77", "cache_read_mtok": "0.033", "cache_write_mtok": "1.7",
        "cache_write_1h_mtok": "2.9", "input_audio_mtok": "11.1", "reasoning_mtok": "9.9",
    }  # fmt: skip
    usage = Usage(
        input_tokens=text + read + write + hour + audio,
        output_tokens=output + reasoning,
        cache_read_tokens=read,
        cache_write_5m_tokens=write,
        cache_write_1h_tokens=hour,
        input_audio_tokens=audio,
        reasoning_tokens=reasoning,
    )
    counted = dict(zip(rates, (text, output, read, write, hour, audio, reasoning), strict=True))
    exact = sum((Fraction(rates[unit]) * 1000 * count for unit, count in counted.items()), Fraction(0))
    total, scale = Rates(rates, {}).fraction(usage)
    assert Fraction(total, scale) == exact
    if exact:
        assert own(**rates).cost_nanos(usage) == (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)


def test_what_the_provider_states_is_believed() -> None:
    assert cost("openrouter", "openai/gpt-5-mini", input_tokens=5, output_tokens=5, stated_cost_nanos=123) == 123


def test_a_call_in_which_other_models_took_part_is_priced_by_each() -> None:
    advisor = Usage(input_tokens=2_000, output_tokens=10, model="claude-opus-4-8")
    usage = Usage(input_tokens=3_000, output_tokens=30, model="claude-sonnet-4-6", other_models=(advisor,))
    expected = 1_000 * 3_000 + 20 * 15_000 + 2_000 * 5_000 + 10 * 25_000
    assert BOOK.cost("anthropic", "claude-sonnet-4-6", usage, at_us=NOW).cost_nanos == expected


# --- beside tokens ------------------------------------------------------------------------------------------------


def test_audio_by_the_hour_pages_searches_and_tools() -> None:
    assert cost("openai", "whisper-1", input_audio_ms=60_000) == 6_000_000
    assert cost("cohere", "rerank-v3.5", search_units=2) == 4_000_000
    plain = cost("anthropic", "claude-sonnet-4-6", input_tokens=100, output_tokens=10)
    searched = cost(
        "anthropic", "claude-sonnet-4-6", input_tokens=100, output_tokens=10, server_tools={"web_search": 3}
    )
    assert searched - plain == 3 * 10_000_000


def test_google_bills_grounding_by_the_prompt_and_then_by_the_query() -> None:
    tools = {"grounding": 1, "grounding_queries": 2}
    for model, fee in (("gemini-2.5-pro", 35_000_000), ("gemini-3-flash-preview", 2 * 14_000_000)):
        plain = cost("google", model, input_tokens=100, output_tokens=10)
        assert cost("google", model, input_tokens=100, output_tokens=10, server_tools=tools) - plain == fee


def test_a_tool_without_a_price_is_refused_not_free() -> None:
    with pytest.raises(UnknownPrice, match=r"telepathy.*Override"):
        cost("openai", "gpt-4o", input_tokens=1, output_tokens=1, server_tools={"telepathy": 1})


# --- dates, tiers, regions ----------------------------------------------------------------------------------------


def test_the_price_of_the_day_holds() -> None:
    """OpenAI's gpt-5.6-sol cost 5 and 30 dollars until 2026-08-21, then 4 and 20."""
    counts = {"input_tokens": 1000, "output_tokens": 1000}
    assert cost("openai", "gpt-5.6-sol", at("2026-08-20T23:59"), **counts) == 35_000_000
    assert cost("openai", "gpt-5.6-sol", at("2026-08-21T00:00"), **counts) == 24_000_000
    found = BOOK.find("openai", "gpt-5.6-sol", at("2026-08-21T00:00"))
    assert found.effective_from == "2026-08-21"


def test_the_hour_of_the_day_decides_where_the_provider_says_so() -> None:
    """DeepSeek's peak hours are 01:00 to 04:00 and 06:00 to 10:00 UTC, at twice the price."""
    nanos = [
        cost("deepseek", "deepseek-flash", at(f"2026-11-22T{hour}"), input_tokens=10**6, output_tokens=0)
        for hour in ("00:59", "01:00", "03:59", "04:00", "06:30", "10:00")
    ]
    assert nanos == [150_000_000, 300_000_000, 300_000_000, 150_000_000, 300_000_000, 150_000_000]


def test_a_context_tier_bills_the_whole_request() -> None:
    """gemini-2.5-pro: above 200,000 input tokens every token costs 2.50 and 15 instead of 1.25 and 10."""
    assert cost("google", "gemini-2.5-pro", input_tokens=200_000, output_tokens=10) == 200_000 * 1_250 + 10 * 10_000
    assert cost("google", "gemini-2.5-pro", input_tokens=200_001, output_tokens=10) == 200_001 * 2_500 + 10 * 15_000


@pytest.mark.parametrize(
    ("facts", "factor"),
    [
        ({"service_tier": "default"}, 1),
        ({"service_tier": "auto"}, 1),
        ({"service_tier": "priority"}, 2),
        ({"service_tier": "flex"}, Fraction(1, 2)),
        ({"batch": True}, Fraction(1, 2)),
        ({"service_tier": "no such tier"}, 1),
    ],
)
def test_the_service_tier_decides(facts: dict[str, object], factor: Fraction) -> None:
    counts = {"input_tokens": 1000, "output_tokens": 1000}
    assert cost("openai", "gpt-5.4", **counts, **facts) == cost("openai", "gpt-5.4", **counts) * factor


def test_a_region_adds_its_uplift() -> None:
    counts = {"input_tokens": 1000, "output_tokens": 1000}
    plain = cost("anthropic", "claude-opus-4-8", **counts)
    assert cost("anthropic", "claude-opus-4-8", region="us", **counts) == plain * Fraction(11, 10)
    assert cost("anthropic", "claude-opus-4-8", region="global", **counts) == plain
    assert cost("anthropic", "claude-opus-4-8", region="not_available", **counts) == plain
    vertex = cost("vertex", "gemini-3.6-flash", **counts)
    assert cost("vertex", "gemini-3.6-flash", region="europe-west4", **counts) == vertex * Fraction(11, 10)


# --- bounds -------------------------------------------------------------------------------------------------------

COUNTS = st.integers(0, 400_000)


@given(
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    COUNTS,
    st.sampled_from(["claude-sonnet-4-6", "gpt-5.4", "gemini-2.5-pro", "gpt-4o"]),
)
def test_no_split_of_the_totals_costs_more_than_the_bound(
    read: int, write: int, hour: int, text: int, output: int, model: str
) -> None:
    provider = {"c": "anthropic", "g": "openai"}[model[0]] if not model.startswith("gemini") else "google"
    price = BOOK.find(provider, model, NOW)
    usage = Usage(
        input_tokens=read + write + hour + text,
        cache_read_tokens=read,
        cache_write_5m_tokens=write,
        cache_write_1h_tokens=hour,
        output_tokens=output,
        reasoning_tokens=output // 2,
    )
    bound = price.bound_nanos(usage.input_tokens, usage.output_tokens)
    assert price.cost_nanos(usage) <= bound
    # also of fewer tokens, which may fall into a lower tier
    half = Usage(input_tokens=usage.input_tokens // 2, output_tokens=output // 2)
    assert price.cost_nanos(half) <= bound


def test_the_bound_without_cache_writes_is_the_plain_cost() -> None:
    price = BOOK.find("anthropic", "claude-sonnet-4-6", NOW)
    assert price.bound_nanos(1000, 500, cache_writes=False) == price.cost_nanos(
        Usage(input_tokens=1000, output_tokens=500)
    )
    assert price.bound_nanos(1000, 500) == 1000 * 6_000 + 500 * 15_000


def test_media_counts_where_the_request_holds_it() -> None:
    price = own(input_mtok="1", output_mtok="1", input_audio_mtok="10")
    assert price.bound_nanos(100, 0, cache_writes=False) == 100 * 1_000
    assert price.bound_nanos(100, 0, cache_writes=False, media=True) == 100 * 10_000


@given(st.integers(0, 10**9), st.integers(0, 10**5))
def test_the_output_that_fits_fits_and_one_token_more_does_not(headroom: int, tokens: int) -> None:
    price = own(input_mtok="0.333", output_mtok="1.7771")
    spent = price.bound_nanos(tokens, 0)
    fits = price.fit_output_tokens(headroom, spent)
    if fits:
        assert price.cost_nanos(Usage(input_tokens=tokens, output_tokens=fits)) <= headroom
    if spent <= headroom:
        assert price.cost_nanos(Usage(input_tokens=tokens, output_tokens=fits + 2)) > headroom - 1


def test_the_output_that_fits_is_at_most_what_the_model_can_say() -> None:
    price = BOOK.find("openai", "gpt-4o", NOW)
    assert price.max_output_tokens == 16_384
    assert price.fit_output_tokens(10**12, 0) == 16_384
    assert price.fit_output_tokens(5_000_000, 2_500_000) == 250
    assert price.fit_output_tokens(1, 2) == 0


# --- the unknown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["gpt-4o-ultra-max", "gpt-4o-v2", "gpt-4o-2", "gpt-4o-500", "gpt-5.9", "o9-mini", "gpt"]
)
def test_an_invented_model_is_unknown_and_the_error_names_the_nearest(model: str) -> None:
    with pytest.raises(UnknownPrice) as caught:
        BOOK.find("openai", model, NOW)
    assert caught.value.provider == "openai"
    assert caught.value.nearest
    assert all(BOOK.table.row("openai", near.lower()) for near in caught.value.nearest)
    assert "Override(provider='openai'" in str(caught.value)


def test_an_unknown_provider_is_unknown() -> None:
    with pytest.raises(UnknownPrice, match=r"opnai.*openai"):
        BOOK.find("opnai", "gpt-4o", NOW)


def test_a_usage_that_no_rate_covers_is_refused_not_free() -> None:
    with pytest.raises(UnknownPrice, match="per_image"):
        cost("openai", "dall-e-2", input_audio_ms=1000)
    with pytest.raises(UnknownPrice, match="no rate for output_tokens"):
        own(input_mtok="1").cost_nanos(Usage(input_tokens=1, output_tokens=1))


def test_only_models_that_are_known_to_be_free_cost_nothing() -> None:
    assert cost("openrouter", "openai/gpt-oss-20b:free", input_tokens=10**6, output_tokens=10**6) == 0
    assert cost("ollama", "llama3", input_tokens=10**6, output_tokens=10**6) == 0
    with pytest.raises(UnknownPrice):
        BOOK.find("openrouter", "openai/gpt-99:free", NOW)
    with pytest.raises(UnknownPrice):
        BOOK.find("ollama", "somebodys-own-model", NOW)


def test_a_row_of_zeros_is_free_by_name() -> None:
    """Every row of the table without a price above 0 belongs to a family that is known to be free."""
    zero = [
        (provider, model)
        for provider in BOOK.table.providers
        for model in BOOK.table.models(provider)
        if BOOK.find(provider, model, NOW).rates().free
    ]
    families = ("ollama", "github-copilot")
    named = (":free", "moderation", "gemma-3")
    assert zero
    assert [row for row in zero if row[0] not in families and not any(word in row[1] for word in named)] == []


@pytest.mark.parametrize("tokens", [(0, 0), (0, 7), (1_000, 420), (300_000, 5)])
@pytest.mark.parametrize("tier", [None, "flex"])
def test_the_price_of_tokens_alone_is_that_of_their_usage(tokens: tuple[int, int], tier: str | None) -> None:
    """For every model of the book: where it has no price for them, both say so."""
    book = PriceBook.packaged()

    def told(price: Callable[[], int]) -> object:
        try:
            return price()
        except UnknownPrice as error:
            return str(error)

    for provider in book.table.providers:
        for model in book.table.models(provider):
            price = book.find(provider, model, 1_790_000_000_000_000)
            usage = Usage(input_tokens=tokens[0], output_tokens=tokens[1], service_tier=tier)
            found = told(partial(price.tokens_nanos, *tokens, tier))
            assert found == told(partial(price.cost_nanos, usage)), (provider, model)


def test_a_usage_is_what_was_given_in_whatever_order_and_nothing_else() -> None:
    usage = Usage(model="m", output_tokens=2, input_tokens=1, server_tools={"web_search": 1})
    assert usage == Usage(server_tools={"web_search": 1}, input_tokens=1, output_tokens=2, model="m", requests=1)
    assert list(usage.as_dict()) == ["input_tokens", "output_tokens", "server_tools", "model"]
    assert (usage.images, usage.requests, usage.region, Usage().server_tools) == (0, 1, None, {})
    assert pickle.loads(pickle.dumps(usage)) == usage == usage.replace() == Usage(**usage.as_dict())
    with pytest.raises(TypeError, match="tokens_in"):
        Usage(tokens_in=1)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        usage.input_tokens = 2  # type: ignore[misc]


@pytest.mark.parametrize("price", [0.002, None, "0.002 EUR", "-1 USD", "USD"])
def test_a_price_of_a_tool_that_is_none_is_an_error_of_bursars(price: Any) -> None:
    with pytest.raises(InvalidInput):
        PriceBook.packaged().with_overrides(tools={"crawler": price})
