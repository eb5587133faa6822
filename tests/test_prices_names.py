"""Names of models and providers: every family of spellings resolves, and overrides of every kind hold where they should."""

from __future__ import annotations

from datetime import date

import pytest

from bursar.errors import InvalidInput, UnknownPrice
from bursar.prices import Override, PriceBook, provider_of_url
from bursar.prices.hosts import region_of_url
from bursar.prices.names import provider_name
from bursar.usage import Usage

BOOK = PriceBook.packaged()
DAY_US = 86_400_000_000
NOW = 20_779 * DAY_US + DAY_US // 2  # 2026-11-22 12:00 UTC
ONE = Usage(input_tokens=1_000_000, output_tokens=0)


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        ("openai OpenAI text-completion-openai ChatOpenAI", "openai"),
        ("azure azure_openai azure_ai az.ai.openai AzureChatOpenAI", "azure"),
        ("anthropic ChatAnthropic", "anthropic"),
        ("google google_genai google-gla gemini gcp.gemini google_ai_studio", "google"),
        ("vertex google-vertex vertex_ai google_vertexai gcp.vertex_ai vertex_ai-anthropic_models", "vertex"),
        ("bedrock aws amazon_bedrock aws.bedrock bedrock_converse ChatBedrockConverse", "bedrock"),
        ("mistral mistralai mistral_ai", "mistral"),
        ("xai x-ai x.ai grok", "xai"),
        ("together together_ai togetherai", "together"),
        ("fireworks fireworks_ai", "fireworks"),
        ("cohere cohere_chat", "cohere"),
        ("deepseek deepseek-ai", "deepseek"),
        ("openrouter open-router", "openrouter"),
        ("groq ChatGroq", "groq"),
        ("voyageai voyage", "voyageai"),
        ("huggingface hugging_face", "huggingface"),
        ("acme Acme", "acme"),
    ],
)
def test_the_spellings_of_a_provider_are_one(spellings: str, name: str) -> None:
    assert {provider_name(spelling) for spelling in spellings.split()} == {name}


@pytest.mark.parametrize(
    ("provider", "model", "found"),
    [
        # as it is, and its snapshots
        ("openai", "gpt-4o", "openai/gpt-4o"),
        ("openai", "GPT-4o", "openai/gpt-4o"),
        ("openai", "gpt-4o-2024-08-06", "openai/gpt-4o"),
        ("openai", "gpt-4o-2024-05-13", "openai/gpt-4o-2024-05-13"),  # a snapshot with a price of its own
        ("openai", "gpt-5-mini-2029-01-31", "openai/gpt-5-mini"),  # a snapshot that no table has seen
        ("openai", "gpt-3.5-turbo-0613", "openai/gpt-3.5-turbo-0613"),
        ("anthropic", "claude-sonnet-4-20250514", "anthropic/claude-sonnet-4-0"),
        ("anthropic", "claude-3-5-haiku-latest", "anthropic/claude-3-5-haiku-latest"),
        ("google", "gemini-2.5-pro-preview-05-06", "google/gemini-2.5-pro"),
        ("google", "gemini-2.0-flash-001", "google/gemini-2.0-flash"),
        ("google", "gemini-2.5-flash-preview-09-2025", "google/gemini-2.5-flash"),
        # paths
        ("google_genai", "models/gemini-2.5-pro", "google/gemini-2.5-pro"),
        ("vertex_ai", "publishers/google/models/gemini-2.5-pro", "vertex/gemini-2.5-pro"),
        ("vertex_ai", "projects/p/locations/global/publishers/google/models/gemini-2.5-pro", "vertex/gemini-2.5-pro"),
        ("vertex_ai", "claude-sonnet-4-5@20250929", "vertex/claude-sonnet-4-5@20250929"),
        ("google-vertex", "anthropic/claude-opus-4-8@default", "vertex/claude-opus-4-8@default"),
        # LiteLLM's provider/model
        ("openai", "openai/gpt-4o", "openai/gpt-4o"),
        ("anthropic", "anthropic/claude-sonnet-4-6", "anthropic/claude-sonnet-4-6"),
        (
            "bedrock",
            "bedrock/us.anthropic.claude-haiku-4-5-20251001-v1:0",
            "bedrock/regional.anthropic.claude-haiku-4-5-20251001-v1:0",
        ),
        ("bedrock", "qwen.qwen3-235b-a22b-2507-v1:0", "bedrock/qwen.qwen3-235b-a22b-2507"),
        # Azure: deployments are named freely, types of deployment cost the same
        ("azure_openai", "gpt-4o", "azure/gpt-4o"),
        ("azure", "gpt-realtime-global-standard", "azure/gpt-realtime"),
        ("azure", "o3-2025-04-16", "azure/o3-2025-04-16"),
        # fine-tuned
        ("openai", "ft:gpt-4o-mini-2024-07-18:acme::abc123", "openai/ft:gpt-4o-mini"),
        # OpenRouter: routes, dates, vendors
        ("openrouter", "openai/gpt-5-mini", "openrouter/openai/gpt-5-mini"),
        ("openrouter", "openai/gpt-5-mini:online", "openrouter/openai/gpt-5-mini"),
        ("openrouter", "openai/gpt-5-mini:nitro", "openrouter/openai/gpt-5-mini"),
        ("openrouter", "openrouter/openai/gpt-5-mini", "openrouter/openai/gpt-5-mini"),
        ("openrouter", "openai/gpt-5.6-sol-20260709", "openrouter/openai/gpt-5.6-sol"),
        # a gateway bills what the vendor bills
        ("portkey", "gpt-4o-mini", "openai/gpt-4o-mini"),
        ("portkey", "anthropic/claude-sonnet-4-6", "anthropic/claude-sonnet-4-6"),
        # Hugging Face names its partner in the model or the path
        ("huggingface", "deepseek-ai/DeepSeek-R1:together", "huggingface-together/deepseek-ai/DeepSeek-R1"),
    ],
)
def test_a_model_is_found_under_its_decorated_names(provider: str, model: str, found: str) -> None:
    price = BOOK.find(provider, model, NOW)
    assert f"{price.provider}/{price.model}" == found


@pytest.mark.parametrize("prefix", ["us.", "eu.", "au.", "jp.", ""])
def test_a_bedrock_profile_carries_the_price_of_its_region(prefix: str) -> None:
    """Regional endpoints of Claude cost a tenth more than the global one."""
    name = "anthropic.claude-sonnet-4-6"
    world = BOOK.find("bedrock", f"global.{name}", NOW).cost_nanos(ONE)
    assert BOOK.find("bedrock", f"{prefix}{name}", NOW).cost_nanos(ONE) * 10 == world * 11


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-haiku-4-5-20251001-v1:0",
        "arn:aws:bedrock:us-east-1::foundation-model/anthropic.claude-haiku-4-5-20251001-v1:0",
    ],
)
def test_an_arn_is_its_last_part(arn: str) -> None:
    plain = BOOK.find("bedrock", "us.anthropic.claude-haiku-4-5-20251001-v1:0", NOW)
    assert BOOK.find("aws", arn, NOW).cost_nanos(ONE) == plain.cost_nanos(ONE)


def test_the_model_that_answered_decides() -> None:
    """An Azure deployment, a router, and a retired name that another model answers."""
    answered = Usage(input_tokens=1000, output_tokens=10, model="gpt-4o-2024-08-06")
    assert BOOK.cost("azure", "our-deployment", answered, at_us=NOW).cost_nanos == 1000 * 2_500 + 10 * 10_000
    routed = Usage(input_tokens=1000, output_tokens=10, model="x-ai/grok-4")
    assert BOOK.cost("openrouter", "openrouter/auto", routed, at_us=NOW).cost_nanos == 1000 * 3_000 + 10 * 15_000


def test_on_bedrock_the_profile_asked_for_decides() -> None:
    """The answer says claude-sonnet-4-6; the profile says in which region it was billed."""
    usage = Usage(input_tokens=1_000_000, model="claude-sonnet-4-6")
    world = BOOK.cost("bedrock", "global.anthropic.claude-sonnet-4-6", usage, at_us=NOW).cost_nanos
    region = BOOK.cost("bedrock", "eu.anthropic.claude-sonnet-4-6", usage, at_us=NOW).cost_nanos
    assert region * 10 == world * 11


# --- overrides ----------------------------------------------------------------------------------------------------


def with_overrides(*overrides: Override) -> PriceBook:
    return BOOK.with_overrides(overrides)


def nanos(book: PriceBook, model: str = "gpt-4o", at_us: int = NOW, tags: dict[str, str] | None = None) -> int:
    return book.find("openai", model, at_us, tags or {}).cost_nanos(
        Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    )


def test_an_absolute_rate_replaces_the_books() -> None:
    assert nanos(with_overrides(Override(model="gpt-4o", input_mtok="1.25"))) == 1_250_000_000 + 10_000_000_000


def test_a_discount_takes_its_part_off_everything() -> None:
    assert nanos(with_overrides(Override(model="gpt-4o", discount="15%"))) == 12_500_000_000 * 85 // 100
    tiered = BOOK.find("google", "gemini-2.5-pro", NOW)
    less = with_overrides(Override(model="*", provider="gemini", discount="50%")).find("google", "gemini-2.5-pro", NOW)
    usage = Usage(input_tokens=300_000, output_tokens=1000)
    assert less.cost_nanos(usage) * 2 == tiered.cost_nanos(usage)
    fee = Usage(input_tokens=300_000, output_tokens=1000, server_tools={"grounding": 1})
    assert less.cost_nanos(fee) * 2 == tiered.cost_nanos(fee)


def test_a_rate_beside_a_discount_is_taken_as_it_is_written() -> None:
    book = with_overrides(Override(model="gpt-4o", discount="10%", output_mtok="9"))
    assert nanos(book) == 2_250_000_000 + 9_000_000_000


def test_a_model_of_ones_own_by_any_unit() -> None:
    book = with_overrides(
        Override(provider="acme", model="seer", per_call="0.01", input_mtok="1", output_mtok="2", context_window=8_000),
        Override(provider="acme", model="scribe", input_audio_hour="0.36"),
    )
    seer = book.find("acme", "seer", NOW)
    assert seer.cost_nanos(Usage(input_tokens=1000, output_tokens=10)) == 10_000_000 + 1_000_000 + 20_000
    assert (seer.context_window, seer.source) == (8_000, "override")
    assert book.find("acme", "scribe", NOW).cost_nanos(Usage(input_audio_ms=10_000)) == 1_000_000


def test_an_override_holds_from_its_first_day_until_its_last_is_over() -> None:
    book = with_overrides(
        Override(model="gpt-4o", input_mtok="1", effective_from="2026-11-22", effective_to=date(2026, 11, 24))
    )
    day = NOW - NOW % DAY_US
    inputs = [
        book.find("openai", "gpt-4o", at).cost_nanos(ONE)
        for at in (day - 1, day, day + 2 * DAY_US - 1, day + 2 * DAY_US)
    ]
    assert inputs == [2_500_000_000, 1_000_000_000, 1_000_000_000, 2_500_000_000]


def test_an_override_may_begin_at_any_instant() -> None:
    book = with_overrides(Override(model="gpt-4o", input_mtok="1", effective_from="2026-11-22T12:00:01+00:00"))
    assert book.find("openai", "gpt-4o", NOW).cost_nanos(ONE) == 2_500_000_000
    assert book.find("openai", "gpt-4o", NOW + 1_000_000).cost_nanos(ONE) == 1_000_000_000


def test_an_override_holds_for_the_tags_that_it_names() -> None:
    book = with_overrides(Override(model="gpt-4o", input_mtok="1", match={"customer": "acme"}))
    assert nanos(book, tags={"customer": "acme", "team": "x"}) == 11_000_000_000
    assert nanos(book, tags={"customer": "other"}) == nanos(book) == 12_500_000_000


def test_of_two_overrides_the_later_holds() -> None:
    book = with_overrides(Override(model="gpt-4o", input_mtok="1"), Override(model="gpt-4o", input_mtok="2"))
    assert nanos(book) == 12_000_000_000
    assert nanos(book.with_overrides([Override(model="gpt-4o", input_mtok="3")])) == 13_000_000_000


def test_an_override_speaks_of_snapshots_and_of_a_deployments_name() -> None:
    book = with_overrides(
        Override(provider="azure_openai", model="our-deployment", input_mtok="1", output_mtok="1"),
        Override(provider="openai", model="gpt-4o", input_mtok="1"),
    )
    answered = Usage(input_tokens=1_000_000, model="gpt-4o-2024-08-06")
    assert book.cost("azure", "our-deployment", answered, at_us=NOW).cost_nanos == 1_000_000_000
    assert book.find("openai", "gpt-4o-2024-08-06", NOW).cost_nanos(ONE) == 1_000_000_000
    assert book.find("openai", "gpt-4o-2024-05-13", NOW).cost_nanos(ONE) == 5_000_000_000  # another model


def test_a_ceiling_prices_the_unknown_and_only_that() -> None:
    book = BOOK.with_overrides(ceiling=Override(model="*", input_mtok="75", output_mtok="150"))
    unknown = book.find("openai", "gpt-9", NOW)
    assert (unknown.cost_nanos(ONE), unknown.source) == (75_000_000_000, "ceiling")
    assert book.find("openai", "gpt-4o", NOW).cost_nanos(ONE) == 2_500_000_000


def test_fees_of_tools_the_providers_and_ones_own() -> None:
    book = BOOK.with_overrides(
        [Override(model="gpt-4o", tools={"web_search": "0.007", "telepathy": "1"})], tools={"crawl": "0.002 USD"}
    )
    usage = Usage(input_tokens=0, output_tokens=0, server_tools={"web_search": 2, "telepathy": 1})
    assert book.find("openai", "gpt-4o", NOW).cost_nanos(usage) == 1_014_000_000
    assert (book.tool_price("crawl"), book.tool_price("dig"), BOOK.tool_price("crawl")) == (2_000_000, None, None)


def test_a_free_model_may_be_declared() -> None:
    book = with_overrides(Override(provider="ollama", model="*", input_mtok="0", output_mtok="0"))
    assert book.find("ollama", "my-own:7b", NOW).cost_nanos(ONE) == 0


def test_the_version_names_the_table_and_the_overrides() -> None:
    one, same = (with_overrides(Override(model="gpt-4o", input_mtok="1")) for _ in range(2))
    other = with_overrides(Override(model="gpt-4o", input_mtok="2"))
    assert one.version == same.version != other.version
    assert one.version.startswith(BOOK.version + "+")


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_mtok": "-1"},
        {"input_mtok": "a"},
        {"input_mtok": "1/0"},
        {"input_mtok": 1.25},
        {"input_mtok": "inf"},
        {"discount": "15"},
        {"discount": "100%"},
        {"discount": "-5%"},
        {"tools": {"x": "-1"}},
        {"effective_from": "soon"},
        {"effective_from": "2026-02-01", "effective_to": "2026-01-01"},
    ],
)
def test_what_is_no_price_is_refused_with_a_remedy(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=r"\.$"):
        Override(model="m", **wrong)  # type: ignore[arg-type]


def test_an_override_of_another_provider_does_not_hold() -> None:
    with pytest.raises(UnknownPrice):
        with_overrides(Override(provider="acme", model="m", input_mtok="1")).find("openai", "m", NOW)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "openai"),
        ("https://eu.api.openai.com/v1/", "openai"),
        ("https://API.GROQ.com/openai/v1", "groq"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://res.openai.azure.com/openai/v1/", "azure"),
        ("https://res.services.ai.azure.com/models", "azure"),
        ("https://mine.westus.cloudapp.azure.com/v1", None),
        ("https://bedrock-runtime.us-west-2.amazonaws.com/openai/v1", "bedrock"),
        ("https://us-east5-aiplatform.googleapis.com/v1", "vertex"),
        ("https://generativelanguage.googleapis.com/v1beta/openai/", "google"),
        ("https://notgroq.com/v1", None),
        ("https://api.deepseek.com.example.org", None),
        ("http://127.0.0.1:8000/v1", None),
        ("http://[broken", None),
        ("", None),
    ],
)
def test_the_host_of_a_base_url_tells_who_bills(url: str, name: str | None) -> None:
    assert provider_of_url(url) == name


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://api.openai.com/v1", None),
        ("https://eu.api.openai.com/v1/", "eu"),
        ("https://eu.api.openai.com.example.org/v1/", None),
        ("https://aiplatform.googleapis.com/v1", None),
        ("https://us-east5-aiplatform.googleapis.com/v1", "us-east5"),
        ("https://aiplatform.us.rep.googleapis.com/v1", "us"),
        ("https://bedrock-runtime.us-west-2.amazonaws.com", None),
        ("http://[broken", None),
    ],
)
def test_the_host_of_a_base_url_tells_the_region_that_has_a_price(url: str, region: str | None) -> None:
    assert region_of_url(url) == region
