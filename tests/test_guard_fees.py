"""A strict reservation holds the fees of the provider's own tools, or is refused where nothing bounds them."""

from __future__ import annotations

from typing import Any

import pytest

from bursar import Budget, Bursar, UnboundedEstimate


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
