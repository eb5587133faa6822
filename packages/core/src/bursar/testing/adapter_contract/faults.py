"""Faults: what the provider, the network and the caller may do, and what of it is billed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from bursar import Bursar
from bursar.testing.adapter_contract.made import (
    COST_NANOS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    PROMPT,
    STYLES,
    Base,
    covered,
    records,
)
from bursar.testing.provider import Answer, Fault, Provider


class Faults(Base):
    """What may have been billed is booked."""

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize(
        "fault",
        [
            Fault("refuse", status=429),
            Fault("refuse", status=500),
            Fault("drop", after_events=2),
            Fault("malformed"),
            Fault("no_usage"),
        ],
        ids=["429", "500", "cut", "malformed", "no_usage"],
    )
    def test_what_goes_wrong_is_covered(self, fault: Fault, style: str, provider: Provider, bursar: Bursar) -> None:
        """The ledger covers the bill: equal, or above it by entries marked estimated; a 429 itself costs nothing."""
        self.need(style)
        provider.script([fault])
        with self.install(bursar), contextlib.suppress(Exception):
            self.consume(style, provider.url)
        covered(bursar, provider)
        assert records(bursar)
        if fault.status == 429 and fault.kind == "refuse":
            assert sum(record.cost_nanos for record in records(bursar)) == provider.billed_nanos

    def test_a_client_that_gives_up_is_billed(self, provider: Provider, bursar: Bursar) -> None:
        provider.script([Fault("hang")])
        with self.install(bursar), contextlib.suppress(Exception):
            self.call(provider.url, PROMPT, timeout_s=0.2)
        covered(bursar, provider)
        assert [record.estimated for record in records(bursar)] == [True]

    def test_a_cancelled_call_is_billed(self, provider: Provider, bursar: Bursar) -> None:
        self.need("acall")
        provider.script([Fault("hang")])

        async def cancelled() -> None:
            task = asyncio.ensure_future(self.acall(provider.url, PROMPT))
            await asyncio.to_thread(provider.wait_requests, 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

        with self.install(bursar):
            asyncio.run(cancelled())
        covered(bursar, provider)
        assert [record.estimated for record in records(bursar)] == [True]

    @pytest.mark.parametrize("style", ["stream", "astream"])
    def test_an_abandoned_stream_is_billed(self, style: str, provider: Provider, bursar: Bursar) -> None:
        self.need(style)
        slow = Answer(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, chunks=30, event_delay_s=0.01)
        provider.script([slow])
        with self.install(bursar):
            if style == "stream":
                _leave_early(self.stream(provider.url, PROMPT))
            else:
                asyncio.run(_aleave_early(self.astream(provider.url, PROMPT)))
            gc.collect()
        covered(bursar, provider)
        assert records(bursar)

    def test_the_clients_own_retries_are_one_call(self, provider: Provider, bursar: Bursar) -> None:
        self.need("retries")
        provider.script(
            [Fault("refuse", status=429, retry_after_s=0.001), Fault("refuse", status=429, retry_after_s=0.001)]
        )
        with self.install(bursar):
            self.call(provider.url, PROMPT, retries=2)
        assert provider.requests == 3
        assert sum(record.cost_nanos for record in records(bursar)) == provider.billed_nanos == COST_NANOS


def _leave_early(stream: Iterator[Any]) -> None:
    next(stream)
    next(stream)
    close = getattr(stream, "close", None)
    if close is not None:
        close()


async def _aleave_early(stream: AsyncIterator[Any]) -> None:
    await anext(stream)
    await anext(stream)
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
