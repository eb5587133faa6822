"""A strict reservation holds what tier and region add, and the fees of the provider's own tools, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from bursar import Budget, Bursar, UnboundedEstimate, Usage


def body(**tool: Any) -> dict[str, Any]:
    return {
        "model": "claude-sonnet-4-5",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "What is new?"}],
        "tools": [{"type": "web_search_20250305", "name": "web_search", **tool}],
    }


@pytest.fixture
def bursar() -> Bursar:
    return Bursar("memory:", [Budget("strict", "1000 USD", estimate="strict")])


def reserved(bursar: Bursar, request: dict[str, Any]) -> int:
    reservation = bursar.reserve("anthropic", request["model"], body=request)
    (status,) = bursar.status()
    reservation.release()
    return int(status.reserved * 10**9)


def test_each_search_that_is_allowed_is_reserved(bursar: Bursar) -> None:
    """$10 per 1,000 searches, by Anthropic's price page; the tokens of three rounds are there in both."""
    fee = 10_000_000
    two, three = reserved(bursar, body(max_uses=2)), reserved(bursar, body(max_uses=3))
    tokens = {uses: held - uses * fee for uses, held in ((2, two), (3, three))}
    assert tokens[2] * 4 == tokens[3] * 3


def test_searches_without_a_limit_are_refused(bursar: Bursar) -> None:
    with pytest.raises(UnboundedEstimate, match="max_uses"):
        bursar.reserve("anthropic", "claude-sonnet-4-5", body=body())


def test_the_smaller_answer_that_is_granted_leaves_room_for_the_fees() -> None:
    with Bursar("memory:", [Budget("strict", "3.70 USD", estimate="strict")]) as bursar:
        request = body(max_uses=2)
        del request[
            "max_tokens"
        ]  # at its full length the answer would cost 2.88 USD, beside 3.60 of input and 0.02 of fees
        granted = bursar.reserve("anthropic", request["model"], body=request)
        (status,) = bursar.status()
        assert granted.capped
        assert 3.69 < status.reserved <= status.limit


TIERS: list[tuple[str, str, dict[str, Any], Usage]] = [
    ("openai", "gpt-5.1", {"service_tier": "priority"}, Usage(service_tier="priority")),
    ("anthropic", "claude-opus-4-8", {"speed": "fast"}, Usage(service_tier="fast")),
    ("anthropic", "claude-opus-4-8", {"inference_geo": "us"}, Usage(region="us")),
    ("anthropic", "claude-opus-4-8", {"speed": "fast", "inference_geo": "us"}, Usage(service_tier="fast", region="us")),
    ("google", "gemini-2.5-pro", {"serviceTier": "priority"}, Usage(service_tier="priority")),
    ("bedrock", "amazon.nova-pro-v1:0", {"serviceTier": {"type": "priority"}}, Usage(service_tier="priority")),
]


@pytest.mark.parametrize("estimate", ["strict", "learned"])
@pytest.mark.parametrize(("provider", "model", "asked", "served"), TIERS)
def test_what_a_tier_or_region_adds_is_reserved(
    provider: str, model: str, asked: dict[str, Any], served: Usage, estimate: str
) -> None:
    """In the words of each provider; a call that is lost is booked at as much."""
    with Bursar("memory:", [Budget("all", "1000 USD", estimate=estimate)]) as bursar:
        request = {
            "model": model,
            "max_tokens": 100,
            "messages": [{"role": "user", "content": "What is new?"}],
            **asked,
        }
        dear = bursar.reserve(provider, model, body=request, input_tokens=10_000)
        held = bursar.status()[0].reserved
        record = dear.settle(served.replace(input_tokens=10_000, output_tokens=100))
        assert record is not None
        assert record.cost_usd <= held
        lost = bursar.reserve(provider, model, body=request, input_tokens=10_000).settle_unknown("lost")
        assert lost is not None
        assert lost.cost_usd >= record.cost_usd


@pytest.mark.parametrize("said", ["auto", "default", "standard_only"])
def test_a_tier_that_leaves_the_choice_is_the_standard_one(bursar: Bursar, said: str) -> None:
    plain = {"model": "gpt-5.1", "max_tokens": 100, "messages": [{"role": "user", "content": "What is new?"}]}
    held = []
    for request in (plain, {**plain, "service_tier": said}):
        reservation = bursar.reserve("openai", "gpt-5.1", body=request)
        held.append(bursar.status()[0].reserved)
        reservation.release()
    assert held[0] == held[1]


def test_a_region_that_only_the_caller_knows_is_reserved_and_settled() -> None:
    """OpenAI's and Vertex's answers do not say where they were made."""
    with Bursar("memory:", [Budget("strict", "1000 USD", estimate="strict")]) as bursar:
        spent = []
        for region in (None, "global", "us-east5"):
            call = bursar.reserve(
                "vertex", "claude-sonnet-4-5", input_tokens=1_000_000, max_output_tokens=10, region=region
            )
            record = call.settle(Usage(input_tokens=1_000_000))
            assert record is not None
            spent.append(record.cost_nanos)
        assert spent[0] == spent[1]
        assert spent[2] * 10 == spent[0] * 11
