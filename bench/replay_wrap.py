"""Recorded runs of Anthropic's clients, replayed through wrapped clients: does the ledger equal the provider's account?

python bench/replay_wrap.py FOLDER   (runs.jsonl.gz: runs and the ids of their exchanges; responses.jsonl.gz: the exchanges, whole)
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anthropic
from measure import table

from bursar import Budget, Bursar
from bursar.testing.provider import Provider, Rates

# Anthropic's list prices in nano-dollars a token, stated here so that they do not come from the price book under test.
_SONNET, _SONNET_5, _HAIKU_4, _HAIKU_3, _OPUS = (
    Rates(
        input_nanos=10 * base,
        output_nanos=50 * base,
        cache_read_nanos=base,
        cache_write_5m_nanos=base * 25 // 2,
        cache_write_1h_nanos=20 * base,
    )
    for base in (300, 200, 100, 80, 500)
)
_FAMILIES = {"sonnet": _SONNET, "sonnet-5": _SONNET_5, "haiku-4": _HAIKU_4, "3-5-haiku": _HAIKU_3, "opus": _OPUS}
ARGUMENTS = ("model", "max_tokens", "messages", "system", "tools", "tool_choice", "thinking")


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def rates_of(models: set[str]) -> Mapping[str, Rates]:
    return {model: rates for model in models for part, rates in _FAMILIES.items() if part in model}


def steps_of(run: Mapping[str, Any], responses: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The exchanges of a run; None where one is shortened, or bills what is not tokens."""
    steps = []
    for step in run["steps"]:
        found = responses[step["id"]]
        request, answer = found["request"], found["response"]
        usage = found.get("usage") or {}
        if "body_trimmed" in request or "response_trimmed" in found or usage.get("iterations"):
            return None
        if any((usage.get("server_tool_use") or {}).values()) or usage.get("speed") == "fast":
            return None
        body = {"events": answer["events"]} if found.get("stream") else {"body": answer}
        if found.get("stream") and not answer.get("complete"):
            return None
        steps.append(
            {
                "endpoint": found["endpoint"],
                "request": request["body"],
                "response": {"status": found["status"], **body},
            }
        )
    return steps


def arguments(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as the client takes it; newer fields go through `extra_body`."""
    named = {name: request[name] for name in ARGUMENTS if name in request}
    more = {name: value for name, value in request.items() if name not in (*ARGUMENTS, "stream")}
    return {**named, "extra_body": more} if more else named


def replay(client: anthropic.Anthropic, request: Mapping[str, Any]) -> None:
    if request.get("stream"):
        with client.messages.stream(**arguments(request)) as stream:
            stream.until_done()
    else:
        client.messages.create(**arguments(request))


async def areplay(client: anthropic.AsyncAnthropic, request: Mapping[str, Any]) -> None:
    if request.get("stream"):
        async for _ in await client.messages.create(**arguments(request), stream=True):
            continue
    else:
        await client.messages.with_raw_response.create(**arguments(request))


async def areplay_all(bursar: Bursar, url: str, steps: list[dict[str, Any]]) -> None:
    async with bursar.wrap(anthropic.AsyncAnthropic(base_url=url, api_key="replayed", max_retries=0)) as client:
        for step in steps:
            with contextlib.suppress(anthropic.APIStatusError):
                await areplay(client, step["request"])


def main(folder: Path) -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # of models that the recordings are older than
    responses = {found["id"]: found for found in lines(folder / "responses.jsonl.gz")}
    tally: Counter[str] = Counter()
    for number, run in enumerate(lines(folder / "runs.jsonl.gz")):
        steps = None
        if run["providers"] == ["anthropic"] and run["replayable"]:
            steps = steps_of(run, responses)
        rates = rates_of({step["request"]["model"] for step in steps or []})
        if not steps or not rates:
            continue
        with (
            Provider.from_run(steps, rates=rates) as provider,
            Bursar("memory:", [Budget("ample", "100 USD")]) as bursar,
            bursar.scope(run=run["run_id"]),
        ):
            if number % 2:
                asyncio.run(areplay_all(bursar, provider.url, steps))
            else:
                client = bursar.wrap(anthropic.Anthropic(base_url=provider.url, api_key="replayed", max_retries=0))
                for step in steps:
                    with contextlib.suppress(anthropic.APIStatusError):
                        replay(client, step["request"])
            provider.wait_idle()
            records = list(bursar.records())
            ledger = sum(record.cost_nanos for record in records)
            tally["runs"] += 1
            tally["requests"] += provider.requests
            tally["billed calls"] += provider.billed_calls
            tally["streams"] += sum(entry.stream for entry in provider.account)
            tally["ledger, nano-dollars"] += ledger
            tally["account, nano-dollars"] += provider.billed_nanos
            tally["estimated records"] += sum(record.estimated for record in records)
            tally["open reservations"] += bursar.store.open_reservations()
            if ledger != provider.billed_nanos or provider.requests != len(steps):
                tally["runs that differ"] += 1
                print(run["run_id"], run["source"], ledger, provider.billed_nanos, provider.requests, len(steps))
    tally.setdefault("runs that differ", 0)
    table("Recorded runs through wrapped Anthropic clients", ["what", "count"], [*tally.items()])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
